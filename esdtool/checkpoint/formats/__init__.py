"""Readers of checkpoint containers: one file each, with its helpers."""

"""Checkpoints, steps of a run and whole runs side by side."""

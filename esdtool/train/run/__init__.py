"""A run directory: its files, log, checkpoints and live view."""

"""The rows that reports show, independent of where they are shown."""

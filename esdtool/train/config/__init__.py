"""The training configuration: its sections, the whole, the files that it is read from, and the presets."""

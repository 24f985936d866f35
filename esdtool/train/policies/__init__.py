"""Weight-decay policies of a training run."""

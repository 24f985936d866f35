"""From weight matrices to alpha: spectra, tail fits and null models. Nothing here knows what a checkpoint is."""

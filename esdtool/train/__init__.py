"""Pretraining with module-wise weight decay: `esdtool train`."""

"""Folders that torch.distributed.checkpoint wrote: a container of many files, under its own marker, `.metadata`."""

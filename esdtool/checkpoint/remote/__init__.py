"""Checkpoints that stay where they are: on the Hub, in an object store or on a web server, read by ranges of bytes.

`path` makes a place in a store look like a path, so that what reads folders, indices and containers on disk reads them
here, too. `store` is the interface of a store, with one module for each kind: `hub`, `web`, `s3`, and `objects` for any
other filesystem of fsspec. `transfer` fetches ranges, and goes on from where a connection was cut.
"""

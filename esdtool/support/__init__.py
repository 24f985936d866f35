"""Provide what every package needs: files, sizes, threads, devices and wording."""

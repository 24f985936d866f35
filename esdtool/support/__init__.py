"""What every room needs and no room owns: files, sizes, threads, devices and words."""

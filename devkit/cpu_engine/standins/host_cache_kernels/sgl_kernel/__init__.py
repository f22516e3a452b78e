"""Stand-in for the package; only `kvcacheio` below it exists; see mmlane_devkit_standins."""

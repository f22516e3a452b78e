"""Stand-in for the package; only `_custom_ops` below it exists; see mmlane_devkit_standins."""

"""0.5.11 and 0.5.12: the host cache kernels, which are imported whatever the device."""

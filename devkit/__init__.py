"""The test bed: the real engine on a machine without a GPU. See README.md."""

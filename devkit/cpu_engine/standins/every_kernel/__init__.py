"""Before 0.5.11: every compiled kernel the engine names."""

"""mmlane: fast, safe and leak-free multimodal features for the SGLang serving engine."""

__version__ = "0.1.0"

PREFIX = "mmlane: "  # of every line that a person is to read

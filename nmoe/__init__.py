"""nmoe: a Mixture-of-Experts trainer whose results can be trusted."""

__version__ = "0.1.0"

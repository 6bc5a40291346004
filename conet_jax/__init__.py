"""CoNet: collaborative cross networks for cross-domain recommendation, in JAX."""

__version__ = "0.2.0"

"""The version of the package, also stored in stages on disk."""

__version__ = "0.1.0"

"""The version, which the package and the stages on disk carry."""

__version__ = "0.1.0"

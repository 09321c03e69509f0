"""Packages that only some ways of loading data need, imported when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from pae_jax.errors import DataError


def require(module: str, purpose: str) -> ModuleType:
    """Import a module, or say what to install.

    Args:
      module: full name of the module.
      purpose: what needs it, as the beginning of a sentence.

    Returns:
      The module.

    Raises:
      DataError: the module, or one that it imports, is not installed.

    Example:
      >>> require("json", "Reading JSON").__name__
      'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{purpose} needs the package {error.name}, which is not installed. "
            'Install what loading data needs with pip install "pae-jax[data]".'
        ) from error

"""Optional packages, imported on use."""

from __future__ import annotations

import importlib
from types import ModuleType

from pae_jax.errors import DataError


def require(module: str, purpose: str, extra: str = "data") -> ModuleType:
    """Import a module, or raise an error that says what to install.

    Args:
      module: full name of the module.
      purpose: what needs it, as the beginning of a sentence.
      extra: the optional dependencies of pae_jax that bring it.

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
            f'Install what it takes with pip install "pae-jax[{extra}]".'
        ) from error

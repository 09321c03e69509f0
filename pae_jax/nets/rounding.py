"""Outputs of two programs compared up to rounding: at which precision they run, and how far apart they may be."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def full_precision() -> contextlib.AbstractContextManager[Any]:
    """Return a context of exact products: reduced ones, as of accelerators, differ by more than rounding."""
    exact = jax.default_backend() == "cpu"
    return contextlib.nullcontext() if exact else jax.default_matmul_precision("highest")


def relative_limit(dtype: Any, least: float) -> float:
    """Return the largest relative difference that counts as rounding in a dtype."""
    return max(least, 8 * float(jnp.finfo(dtype).eps))


def as_complex(leaf: Any) -> np.ndarray:
    """Return numbers of any dtype as complex128, in which differences are exact enough."""
    return np.asarray(leaf, np.complex128)


def largest(leaf: Any) -> float:
    """Return the largest absolute value, 0 of none; NaN if there is one."""
    return float(np.max(np.abs(as_complex(leaf)), initial=0.0))

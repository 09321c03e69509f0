"""Compare two traces of one function: whatever is drawn anew when a model is traced differs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from pae_jax.checks import is_traced


def same_trace(a: Any, b: Any) -> bool:
    """Return whether two programs, or parts of them, have the same operations, settings and constants."""
    if a is b:
        return True
    if isinstance(a, ClosedJaxpr):
        return isinstance(b, ClosedJaxpr) and same_trace(a.consts, b.consts) and same_trace(a.jaxpr, b.jaxpr)
    if isinstance(a, Jaxpr):
        return isinstance(b, Jaxpr) and len(a.eqns) == len(b.eqns) and all(map(_same_equation, a.eqns, b.eqns))
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(same_trace, a, b))
    if isinstance(a, (bool, int, float, complex)) or (hasattr(a, "__array__") and not is_traced(a)):
        return _bits(a) == _bits(b)
    return True  # functions, types and names, which are other objects in every trace


def _same_equation(a: Any, b: Any) -> bool:
    constants = ([var.val if isinstance(var, Literal) else None for var in one.invars] for one in (a, b))
    settings = (list(one.params.values()) for one in (a, b))
    return a.primitive is b.primitive and same_trace(*constants) and same_trace(*settings)


def _bits(value: Any) -> tuple[Any, ...]:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return array.shape, array.dtype, array.tobytes()

"""Caches of traced and compiled programs: how many are kept, and when two calls share one.

A program is reused only for the functions it was made from. Functions are equal only if they are the same object;
frozen dataclasses, Flax modules and graphs of NNX modules are compared by value. A user's function may capture values
that have changed since, so its program is lowered again and compared as text (`program_text`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

T = TypeVar("T")
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
_PLAIN = (bool, int, complex, str, bytes, type(None), np.dtype, jax.sharding.Mesh, nnx.GraphDef)


class Cache:
    """The most recent results by key; a new entry evicts the least recently used one when the cache is full."""

    every: list[Cache] = []  # noqa: RUF012

    def __init__(self, size: int):
        self.size, self._entries, self._lock = size, [], threading.Lock()
        Cache.every.append(self)

    def get(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return the result for a key, or compute it."""
        with self._lock:
            for position, (known, value) in enumerate(self._entries):
                if same(known, key):
                    self._entries.insert(0, self._entries.pop(position))
                    return value
        value = make()
        with self._lock:
            self._entries.insert(0, (key, value))
            del self._entries[self.size :]
        return value

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            self._entries.clear()


def clear_caches() -> None:
    """Clear the caches of traced and compiled programs; the next calls compile again.

    At most 8 train steps, 72 programs that evaluate or predict and 8 that score weights are kept. They hold the network
    description, the optimizer and the loss they were made from.

    Example:
      >>> import pae_jax as pae
      >>> pae.clear_caches()
    """
    for cache in Cache.every:
        cache.clear()


def same(a: Any, b: Any) -> bool:
    """Return whether two parts of a key are equal."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, float):
        return a.hex() == b.hex()  # 0.0 == -0.0, but they differ as keys
    if isinstance(a, (*_PLAIN, MethodType)):
        return a == b
    if isinstance(a, nn.Module) or _by_value(type(a)):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.name != "parent")
    return False


def _by_value(kind: type) -> bool:
    settings = getattr(kind, "__dataclass_params__", None)
    return settings is not None and settings.frozen and settings.eq


def jax_settings() -> dict[str, bool | str]:
    """Return the settings of JAX that change what a program computes."""
    found = {name: getattr(jax.config, name, None) for name in _SETTINGS}
    return {name: value if isinstance(value, bool) else str(value) for name, value in found.items()}


def program_text(function: Callable[..., Any], *operands: Any) -> str:
    """Return a digest of a function's present program, including the values it captures."""
    lowered = jax.jit(lambda *arguments: function(*arguments)).lower(*operands)  # JAX keeps traces per function object
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()

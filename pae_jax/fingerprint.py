"""Equality of functions by what they do, so that a new but equal optimizer reuses a compiled train step."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np


class Same:
    """A key that equals another only if both stand for the very same object."""

    def __init__(self, value: Any):
        self.value = value  # keeps the object alive, so its id is not reused

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def fingerprint(value: Any) -> Hashable:
    """Return a key that is equal for values built alike.

    `optax.adam(1e-3)` called twice gives two tuples of closures that compare unequal, and a compiled function keyed
    by them would be compiled twice. Here a function is its code, what it closes over, its defaults and the very
    objects its global names stand for; a container, an object or a NumPy array is what it holds now; a number is
    itself. Anything else, a JAX array for one, equals only itself, which costs a compilation but is never wrong.
    """
    return _fingerprint(value, ())


def _fingerprint(value: Any, above: tuple[int, ...]) -> Hashable:
    if id(value) in above:  # a closure that contains itself
        return ("above", above.index(id(value)))
    above = (*above, id(value))
    if isinstance(value, float):
        return (type(value), value.hex())  # 0.0 == -0.0, and yet they differ
    if value is None or isinstance(value, (bool, int, complex, str, bytes)):
        return (type(value), value)
    if isinstance(value, np.ndarray):
        return (np.ndarray, str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, FunctionType):
        cells = tuple(_cell(cell, above) for cell in value.__closure__ or ())
        defaults = _fingerprint((value.__defaults__, value.__kwdefaults__), above)
        names = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
        return (value.__code__, cells, defaults, tuple((name, Same(names[name])) for name in sorted(names)))
    if isinstance(value, MethodType):
        return (_fingerprint(value.__func__, above), _fingerprint(value.__self__, above))
    if isinstance(value, partial):
        return (partial, _fingerprint((value.func, value.args, value.keywords), above))
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_fingerprint(item, above) for item in value))
    if isinstance(value, dict):
        return (dict, tuple((_fingerprint(k, above), _fingerprint(v, above)) for k, v in value.items()))
    if isinstance(value, (type, ModuleType, jax.Array)) or not hasattr(value, "__dict__"):
        return Same(value)
    return (type(value), _fingerprint(_attributes(value), above))


def _attributes(value: Any) -> dict[str, Any]:
    """Return what an object was made of: the fields of a dataclass (Linen modules are), else all attributes."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return vars(value)


def _cell(cell: Any, above: tuple[int, ...]) -> Hashable:
    try:
        return _fingerprint(cell.cell_contents, above)
    except ValueError:  # a variable that no branch has set
        return ("empty",)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the global names that a function, or a function defined inside it, may look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)

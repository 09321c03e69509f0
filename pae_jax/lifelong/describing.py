"""Functions and objects of the user in words that another process repeats, so that a run knows them again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.core import integrity


def name_of(function: Any) -> str:
    """Return the name of a function or type, or that of the type of another value."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def code_of(function: Any) -> str | None:
    """Return the name of a function and a digest of its code and of the plain values it has captured."""
    if function is None:
        return None
    return f"{name_of(function)} {short(*_known(function, 0, set()))}"


def described(value: Any) -> str:
    """Return the name of a setting, and a digest of what it holds where the name alone does not say what it is."""
    name = name_of(value)
    if isinstance(value, type) or (hasattr(value, "__qualname__") and "<" not in name):
        return name
    words = list(_known(value, 0, set()))
    return name if words == [name] else f"{name} {short(*words)}"


def short(*words: str) -> str:
    """Return a digest of words."""
    return hashlib.sha256("\n".join(words).encode(errors="backslashreplace")).hexdigest()[:16]


def _known(value: Any, depth: int, seen: set[int] | None) -> Iterator[str]:
    """Yield what can be known of a function, or of a value that it holds, in words that another process repeats.

    Args:
      value: the function or value.
      depth: how deep it lies in what is described.
      seen: objects whose attributes were described already. None where attributes are no settings: those of an object
        that a function has captured may be anything, such as results so far.
    """
    inner = getattr(value, "__wrapped__", None) or getattr(value, "__func__", None) or getattr(value, "func", None)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        held = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items())
        yield from (value.__qualname__, *_code_words(value.__code__))
        seen = None
    elif inner is not None:
        held = (inner, *getattr(value, "args", ()), *sorted(getattr(value, "keywords", {}).items()))
        own = seen is not None and "func" in getattr(value, "__dict__", {})
        held = (*held, *(part for part in _attributes(value) if part[0] != "func")) if own else held
    elif isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        yield repr(value)
        return
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        held = value.tolist()
    elif isinstance(value, (np.ndarray, np.generic, jax.Array)):
        yield _digest(value)
        return
    elif isinstance(value, tuple):
        held = value
    elif isinstance(value, (list, dict, set, frozenset)):
        yield from (type(value).__qualname__, *([str(len(value))] if value else []))
        parts = ["\n".join(_known(part, depth + 1, seen)) for part in _parts(value)] if depth < 5 else []
        # Sets have no order that another process repeats, and that of a dict is no setting.
        yield from parts if isinstance(value, list) else sorted(parts)
        return
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__qualname__
        held = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    else:
        yield type(value).__qualname__
        held = (type(value).__call__,) if callable(value) and not isinstance(value, type) else ()
        if seen is not None and id(value) not in seen:
            seen.add(id(value))
            held = (*held, *_attributes(value))
    if depth < 5:
        for part in held:
            yield from _known(part, depth + 1, seen)


def _parts(value: Any) -> Iterable[Any]:
    return value.items() if isinstance(value, dict) else value


def _digest(array: Any) -> str:
    is_key = isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return integrity.array_digest(jax.random.key_data(array) if is_key else array)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Return the attributes of an object by name, but what it only keeps for later, and those of types and modules."""
    if isinstance(value, (type, types.ModuleType)):
        return []
    kept = lambda name: isinstance(getattr(type(value), name, None), functools.cached_property)  # noqa: E731
    return sorted((name, part) for name, part in getattr(value, "__dict__", {}).items() if not kept(name))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _code_words(code: types.CodeType) -> Iterator[str]:
    yield from (code.co_code.hex(), *code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_words(constant)
        else:
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)

"""Argument checks: a value outside its documented range raises `ArgumentError` with the argument's name."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pae_jax.errors import ArgumentError, CheckpointError, kind_of
from pae_jax.trees import describe

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless a value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise unless a value is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False, found {value!r}")


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise unless a value is of a class; `wanted` says what, and how one is made."""
    if not isinstance(value, kind):
        raise ArgumentError(f"{name} must be {wanted}, found {kind_of(value)}")


def check_mapping(name: str, value: Any, wanted: str) -> dict[str, Any]:
    """Return a mapping as a dict, an empty one for None; `wanted` says what it holds, such as "{task: value}"."""
    check_kind(name, {} if value is None else value, Mapping, f"a dict {wanted}")
    return dict(value or {})


def check_names(name: str, value: Any) -> list[Any]:
    """Return a collection of names as a list; a single name is none."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ArgumentError(f"{name} must be a collection of names, found {value!r}; one name goes into a list")
    return list(value)


def takes(function: Any, count: int) -> bool:
    """Return whether a function can be called with so many values; True if it does not say."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # written in C
        return callable(function)
    return True


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_end: bool = False
) -> float:
    """Return a finite Python or NumPy number in [low, high] as a float; `open_end` leaves `high` out."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if number and math.isfinite(value) and low <= value <= high and not (open_end and value == high):
        return float(value)
    if math.isfinite(low) and math.isfinite(high):
        wanted = f"a number in [{low:g}, {high:g}{')' if open_end else ']'}"
    else:
        wanted = "a finite number" + (f" of at least {low:g}" if math.isfinite(low) else "")
    raise ArgumentError(f"{name} must be {wanted}, found {value!r}")


def check_count(name: str, value: Any, low: int = 0) -> int:
    """Return a Python or NumPy integer of at least a lower bound as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ArgumentError(f"{name} must be an integer of at least {low}, found {value!r}")
    return int(value)


def check_fraction(value: Any, name: str = "fraction") -> float:
    """Return a fraction as a float."""
    fraction = real_number(value)
    if fraction is None:
        raise ArgumentError(f"{name} must be a number in [0, 1], found {value!r}")
    if not 0.0 <= fraction <= 1.0:  # false for NaN too
        raise ArgumentError(f"{name} must lie in [0, 1], found {value}; 0.5 frees half of the available weights")
    return fraction


def check_width(width: Any) -> float:
    """Return a width as a float."""
    value = real_number(width)
    if value is None:
        raise ArgumentError(f"width is a positive channel factor, found {width!r}")
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"width is a positive channel factor, found {width!r}; from a size ratio: pae.width_for")
    return value


def real_number(value: Any) -> float | None:
    """Return a real number, also that of a scalar array, as a float; None for a bool, a text and anything else."""
    dtype = getattr(value, "dtype", None)
    if isinstance(value, (bool, str, bytes)) or (dtype is not None and not jnp.issubdtype(dtype, jnp.number)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def check_name(name: Any) -> str:
    """Return the name of a task."""
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"a task's name is a non-empty string, found {name!r}")
    return name


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path of this machine, `~` expanded; raise `CheckpointError` for any other."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if not isinstance(text, str) or not text or "\0" in text:
        raise CheckpointError(f"{text!r} is no path: it is empty, not text, or holds a NUL. Use another one.")
    if _REMOTE.match(text):
        raise CheckpointError(f"{text} is remote; stages and runs are local folders. Write to one, then copy it.")
    try:
        os.fsencode(text)
        return Path(text).expanduser().absolute()
    except (UnicodeError, RuntimeError, OSError) as error:  # no such user; no such working directory
        raise CheckpointError(f"{text!r} is no path here: {error}. Use another one.") from error


def check_key(key: Any, name: str = "key") -> jax.Array:
    """Return a typed random key; raw uint32 keys are accepted."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return key
    if hasattr(key, "dtype") and key.dtype == jnp.uint32 and np.ndim(key) == 1:
        return jax.random.wrap_key_data(jnp.asarray(key))
    raise ArgumentError(f"{name} must be one random key such as jax.random.key(0), found {describe(key)}")


def is_traced(tree: Any) -> bool:
    """Return whether some array of a tree is a tracer, without a concrete value."""
    return any(isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)) for leaf in jax.tree.leaves(tree))

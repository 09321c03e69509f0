"""A task's own output layer: a linear layer by default, any Flax module of the user, or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from pae_jax.caching import Cache
from pae_jax.errors import ArgumentError, StructureError
from pae_jax.nets.linen import program as linen_program
from pae_jax.nets.network import Net, Program, batch_size, require_batch_axis, zeros
from pae_jax.nets.nnx import program as nnx_program
from pae_jax.trees import Tree, sketch

_LAYOUTS, _INITS = Cache(64), Cache(8)


def check_head(head: Any) -> Any:
    """Return a head in its stored form: classes as an int, an NNX module as a private copy."""
    if head is None:
        return head
    if isinstance(head, nn.Module):
        for path in _arrays(head, ""):
            raise ArgumentError(
                f"head {type(head).__name__} holds an array in its field '{path}', so heads cannot be compared. Pass a "
                "tuple of numbers, or make the array in the call or as a variable of the module"
            )
        return head
    if isinstance(head, nnx.Module):
        return nnx.clone(head)
    if isinstance(head, bool) or not isinstance(head, (int, np.integer)):
        raise ArgumentError(f"head must be a number of classes, a Flax module, or None for none, found {head!r}")
    if head < 1:
        raise ArgumentError(f"head must have at least 1 class, found {head}")
    return int(head)


def _arrays(value: Any, path: str) -> Iterator[str]:
    """Yield the paths of arrays in the fields of a Linen module, and of what it is made of."""
    if isinstance(value, (np.ndarray, jax.Array)):
        yield path
    elif isinstance(value, Mapping):
        for name, child in value.items():
            yield from _arrays(child, f"{path}[{name!r}]")
    elif isinstance(value, (tuple, list)):
        for number, child in enumerate(value):
            yield from _arrays(child, f"{path}[{number}]")
    elif isinstance(value, nn.Module):
        for field in dataclasses.fields(value):
            if field.name != "parent":
                yield from _arrays(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))


def key_of(head: Any) -> Any:
    """Return the part of a program's cache key for a head; of the values of an NNX module only shapes and dtypes."""
    if not isinstance(head, nnx.Module):
        return head
    graph, values = nnx.split(head)
    return graph, [(np.shape(leaf), str(jnp.result_type(leaf))) for leaf in jax.tree.leaves(values)]


def program(head: Any) -> Program:
    """Return a head as pure functions of its variables.

    Args:
      head: number of classes (a linear layer with bias), a Linen module called on the features, an NNX module, whose
        present values are the initial ones, or None, where the features are the output.
    """
    if head is None:
        return Program(lambda key, x: {}, lambda variables, x, train, rngs: (x, {}), None)
    if isinstance(head, int):
        return linen_program(nn.Dense(head))
    if isinstance(head, nn.Module):
        return linen_program(head)
    return nnx_program(lambda key: nnx.clone(head))


def layout(net: Net, head: Any, width: float) -> tuple[Any, Any]:
    """Return `(variables, output)` of a head at a width as shapes and dtypes."""

    def make() -> tuple[Any, Any]:
        features = net.layout(width).features
        _require_linear(head, features)
        parts = program(head)
        try:
            variables = jax.eval_shape(lambda: parts.init(jax.random.key(0), zeros(features)))
            output, _ = jax.eval_shape(lambda v, f: parts.apply(v, f, False, None), variables, features)
        except StructureError:
            raise
        except Exception as error:
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            found = f"{describe(head)} failing with: {cause}"
            raise StructureError("head", "", found, f"a module that takes features {sketch(features)}") from error
        require_batch_axis(output, batch_size(net.sample), "head", "output")
        return variables, output

    return _LAYOUTS.get((net, width, key_of(head)), make)


def _require_linear(head: Any, features: Any) -> None:
    """Raise `StructureError` if a head is a number of classes and a linear layer does not take the features."""
    if not isinstance(head, int):
        return
    if not hasattr(features, "shape") or features.ndim < 2 or not jnp.issubdtype(features.dtype, jnp.floating):
        wanted = "real floating features (batch, ..., n), which a head of classes needs"
        hint = "Return such features, for instance the absolute value of complex ones, or pass a Flax module as head."
        raise StructureError("head", "", f"{head} classes on features {sketch(features)}", wanted, hint)


def initial(net: Net, head: Any, key: jax.Array, width: float) -> Tree:
    """Draw the variables of a head."""
    features = net.layout(width).features

    def make() -> Any:
        return jax.jit(lambda key: program(head).init(key, zeros(features)))

    # An NNX module has its own values, which are not part of the key.
    return make()(key) if isinstance(head, nnx.Module) else _INITS.get((net, width, head), make)(key)


def describe(head: Any) -> int | str | None:
    """Return the description of a head in checkpoint metadata: its classes, or the name of its module."""
    return head if head is None or isinstance(head, int) else type(head).__name__

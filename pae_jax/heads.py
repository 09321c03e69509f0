"""A task's own output layer: a linear layer by default, any Flax module if the user brings one."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from pae_jax.adapters import linen as linen_adapter
from pae_jax.adapters import nnx as nnx_adapter
from pae_jax.errors import ArgumentError, StructureError
from pae_jax.fingerprint import fingerprint
from pae_jax.network import Net, Program, zeros
from pae_jax.trees import describe as describe_array


def check_head(head: Any) -> None:
    """Raise `ArgumentError` unless a head is a number of classes or a Flax module."""
    if isinstance(head, bool) or not isinstance(head, (int, nn.Module, nnx.Module)):
        raise ArgumentError(f"head must be a number of classes or a Flax module, found {head!r}")
    if isinstance(head, int) and head < 1:
        raise ArgumentError(f"head must have at least 1 class, found {head}")


def program(head: Any) -> Program:
    """Return a head as pure functions of its variables.

    Args:
      head: number of classes (a linear layer with bias), a Linen module called on the features, or an NNX module,
        whose present values are the initial ones.
    """
    if isinstance(head, int):
        return linen_adapter.program(nn.Dense(head))
    if isinstance(head, nn.Module):
        return linen_adapter.program(head)
    return nnx_adapter.program(lambda key: nnx.clone(head))


def layout(net: Net, head: Any, width: float) -> tuple[Any, Any]:
    """Return `(variables, logits)` of a head at a width as shapes and dtypes."""

    def make() -> tuple[Any, Any]:
        features = net.layout(width).features
        parts = program(head)
        try:
            variables = jax.eval_shape(lambda: parts.init(jax.random.key(0), zeros(features)))
            logits, _ = jax.eval_shape(lambda v, f: parts.apply(v, f, False, None), variables, features)
        except (TypeError, ValueError) as error:
            found = f"{head!r} failing with: {error}"
            raise StructureError(
                "head", "", found, f"a module that takes features {describe_array(features)}"
            ) from error
        if not hasattr(logits, "shape") or logits.shape[:1] != features.shape[:1] or len(logits.shape) < 2:
            raise StructureError("head", "", logits, "one array of outputs (batch, ..., classes)")
        return variables, logits

    return net.memo(("head", fingerprint(head), width), make)


def describe(head: Any) -> int | str:
    """Return what the metadata of a checkpoint says of a head: its classes, or the name of its module."""
    return head if isinstance(head, int) else type(head).__name__

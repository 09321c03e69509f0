"""Check that a model's outputs use no random numbers and depend on no other example of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.caching import Cache
from pae_jax.errors import StructureError
from pae_jax.nets import heads
from pae_jax.nets.network import Net, Program
from pae_jax.trees import PARAMS, Tree, path_name

_ASKED = Cache(64)
_ROWS = 3
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def require_single_answers(net: Net, head: Any, width: float) -> None:
    """Raise `StructureError` if evaluation draws random numbers or mixes the examples of a batch.

    Backbone and head run with random weights: the first example twice, with different other examples and keys.
    """
    if net.couples_examples:
        return
    _ASKED.get((net, width), lambda: _ask(net.source, net.program(width), trial_inputs(net, _ROWS), net.sample))
    if head is not None and not isinstance(head, int):
        features = jax.tree.map(
            lambda f: jax.ShapeDtypeStruct((_ROWS, *f.shape[1:]), f.dtype), net.layout(width).features
        )
        inputs = tuple(_drawn(features, None, seed) for seed in (0, 1))
        name = f"head {type(head).__name__}"
        _ASKED.get((net, width, heads.key_of(head)), lambda: _ask(name, heads.program(head), inputs, features))


def trial_inputs(net: Net, rows: int) -> tuple[Tree, Tree]:
    """Return two batches that have the first example in common: normal floats; integers as in the sample."""
    sample = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), net.sample)
    return _drawn(sample, net.example, 0), _drawn(sample, net.example, 1)


def _drawn(shapes: Tree, example: Tree | None, seed: int) -> Tree:
    first, others = np.random.default_rng(0), np.random.default_rng(seed + 1)

    def draw(wanted: Any, known: Any) -> np.ndarray:
        shape, rows = wanted.shape, wanted.shape[0]
        if jnp.issubdtype(wanted.dtype, jnp.floating):
            values = np.concatenate([first.normal(size=(1, *shape[1:])), others.normal(size=(rows - 1, *shape[1:]))])
            return values.astype(wanted.dtype)
        if known is None:
            return np.zeros(shape, wanted.dtype)
        tiled = np.resize(np.asarray(known), shape)
        tiled[1:] = others.permuted(tiled[1:], axis=-1) if tiled.ndim > 1 else tiled[1:]
        return tiled.astype(wanted.dtype)

    if example is None:
        return jax.tree.map(lambda wanted: draw(wanted, None), shapes)
    return jax.tree.map(draw, shapes, example)


def _ask(name: str, program: Program, inputs: tuple[Tree, Tree], sample: Tree) -> bool:
    answer = _answers(program, sample, inputs[0])
    alone, same_key, other_key = (answer(x, seed) for x, seed in ((inputs[0], 0), (inputs[1], 0), (inputs[0], 1)))
    if _differs(alone, other_key):
        hint = "Draw in training alone; or, with Linen, name the stream: pae.linen(..., rngs=) draws from a fixed key."
        raise StructureError(
            name, "", "an answer that depends on random numbers in evaluation", "one that does not", hint
        )
    if _differs(alone, same_key):
        hint = (
            "A norm that takes the statistics of the batch in evaluation is the usual cause. To accept it, describe "
            "the net with couples_examples=True: its answers then hold for one composition of the batch."
        )
        found = "an answer that depends on the other examples of the batch"
        raise StructureError(name, "", found, "one that does not, in evaluation", hint)
    return True


def _answers(program: Program, sample: Tree, inputs: Tree) -> Callable[[Tree, int], list[np.ndarray]]:
    """Return `(x, seed) -> outputs of the first example`, at random weights without zeros that hide an influence."""

    def run(variables: Tree, x: Tree, seed: np.ndarray) -> Tree:
        out, _ = program.apply(variables, x, False, jax.random.key(seed))
        return jax.tree.map(lambda leaf: leaf[0], out)

    shapes = jax.eval_shape(lambda x: program.init(jax.random.key(0), x), sample)
    variables = jax.tree_util.tree_map_with_path(_weights, shapes)
    # Compiled and called explicitly, on host arrays, so that `pack` itself may be traced.
    compiled = jax.jit(run).lower(variables, inputs, np.uint32(0)).compile(compiler_options=_QUICK)
    return lambda x, seed: [np.asarray(leaf) for leaf in jax.tree.leaves(compiled(variables, x, np.uint32(seed)))]


def _weights(path: Any, leaf: Any) -> np.ndarray:
    """Return values of a variable: kernels of unit gain, everything else near 1, so that a variance is positive."""
    rng = np.random.default_rng(leaf.size)
    if jnp.issubdtype(leaf.dtype, jnp.floating) and path_name(path).startswith(PARAMS):
        values = rng.random(leaf.shape, np.float32)
        fan_in = max(leaf.size // leaf.shape[-1], 1) if leaf.ndim else 1
        return ((values - 0.5) * (12 / fan_in) ** 0.5 if leaf.ndim >= 2 else 0.5 + values).astype(leaf.dtype)
    return (
        np.ones(leaf.shape, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else np.zeros(leaf.shape, leaf.dtype)
    )


def _differs(found: list[np.ndarray], other: list[np.ndarray]) -> bool:
    def apart(a: np.ndarray, b: np.ndarray) -> bool:
        a, b = np.asarray(a, np.complex128), np.asarray(b, np.complex128)
        known = np.isfinite(a) & np.isfinite(b)
        scale = np.max(np.abs(a[known]), initial=0.0)
        return bool(np.max(np.abs(a - b)[known], initial=0.0) > 1e-4 * scale)

    return any(map(apart, found, other))

"""Front end for Flax NNX modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx as fnnx
from flax import traverse_util

from pae_jax import network
from pae_jax.network import Net, Program, abstract_sample, kernels_and_embeddings
from pae_jax.trees import PARAMS, Tree

_COLLECTIONS = ((fnnx.Param, PARAMS), (fnnx.BatchStat, "batch_stats"))


def program(make: Callable[[jax.Array], fnnx.Module]) -> Program:
    """Return an NNX module as pure functions of plain variables.

    The variables are sorted into collections named as in Linen. Random state of the module (dropout) is not a
    variable: it is set from the explicit key at every call.

    Args:
      make: `key -> module`; called abstractly once to learn the graph.
    """
    graph, state = fnnx.split(fnnx.eval_shape(lambda: make(jax.random.key(0))))
    flat = list(fnnx.to_flat_state(state))
    train_argument = network.takes_train(fnnx.merge(graph, state))

    def variables_of(module: fnnx.Module) -> dict[str, Tree]:
        values = fnnx.to_flat_state(fnnx.split(module)[1])
        kept = {_path(path, leaf): leaf.get_value() for path, leaf in values if not isinstance(leaf, fnnx.RngState)}
        return traverse_util.unflatten_dict(kept)

    def init(key: jax.Array, x: Tree) -> dict[str, Tree]:
        del x
        return variables_of(make(key))

    def apply(variables: dict[str, Tree], x: Tree, train: bool, key: jax.Array | None) -> tuple[Tree, dict[str, Tree]]:
        values: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(variables))
        key = jax.random.key(0) if key is None else key

        def value(index: int, path: tuple[Any, ...], leaf: fnnx.Variable) -> jax.Array:
            return _random(leaf, key, index) if isinstance(leaf, fnnx.RngState) else values[_path(path, leaf)]

        leaves = [(path, leaf.replace(value(i, path, leaf))) for i, (path, leaf) in enumerate(flat)]
        module: Any = fnnx.merge(graph, fnnx.from_flat_state(leaves))
        out = module(x, train=train) if train_argument else module(x)
        updates = variables_of(module) if train else {}
        return out, {name: tree for name, tree in updates.items() if name != PARAMS}

    return Program(init, apply)


def nnx(
    build: Callable[..., fnnx.Module],
    sample: Tree,
    *,
    packable: Callable[[str, Any], bool] = kernels_and_embeddings,
) -> Net:
    """Describe a Flax NNX backbone.

    Nothing in the model knows about packing; it is any module called as `module(x, train=bool)` that returns
    features. `nnx.Param` variables become `params`, `nnx.BatchStat` variables `batch_stats`.

    Args:
      build: `(width, rngs) -> flax.nnx.Module`; width is a channel factor, 1.0 the nominal network.
      sample: an input batch, concrete or abstract; only shapes and dtypes are used.
      packable: as in `pae.linen`; paths like "layers/0/kernel".

    Returns:
      The network description that every other function takes.

    Raises:
      StructureError: the sample has no batch axis. What `build` returns is checked at `init`.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> from flax import nnx
      >>> class Backbone(nnx.Module):
      ...     def __init__(self, width, rngs):
      ...         self.dense = nnx.Linear(4, int(16 * width), rngs=rngs)
      ...     def __call__(self, x, train):
      ...         return nnx.relu(self.dense(x))
      >>> net = pae.nnx(Backbone, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> state.shared["dense"]["kernel"].shape
      (4, 16)
    """
    source = getattr(build, "__name__", type(build).__name__)

    def program_of(width: float) -> Program:
        def make(key: jax.Array) -> fnnx.Module:
            model = build(width, rngs=fnnx.Rngs(key))
            return network.require_module(model, fnnx.Module, source, "For Linen modules use pae.linen.")

        return program(make)

    return Net(program_of, abstract_sample(sample), packable, source)


def _path(path: tuple[Any, ...], leaf: fnnx.Variable) -> tuple[str, ...]:
    """Return collection and path as strings; NNX uses integers for the items of lists."""
    collection = next((name for kind, name in _COLLECTIONS if isinstance(leaf, kind)), type(leaf).__name__)
    return (collection, *map(str, path))


def _random(leaf: fnnx.RngState, key: jax.Array, index: int) -> jax.Array:
    """Return the value of a random stream for this call: its own key, and a counter at 0."""
    if isinstance(leaf, fnnx.RngKey):
        return jax.random.fold_in(key, index)
    return jnp.zeros((), jnp.uint32)

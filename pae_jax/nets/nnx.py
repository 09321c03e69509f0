"""Front end for Flax NNX modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx as fnnx
from flax import traverse_util

from pae_jax.errors import ArgumentError
from pae_jax.nets import network
from pae_jax.nets.modes import bound, mode_arguments
from pae_jax.nets.network import Net, Program, Rngs, kernels_and_embeddings
from pae_jax.trees import PARAMS, Tree

_COLLECTIONS = ((fnnx.Param, PARAMS), (fnnx.BatchStat, "batch_stats"))


def program(make: Callable[[jax.Array], fnnx.Module], call: Callable[[Any, Tree, bool], Tree] | None = None) -> Program:
    """Return an NNX module as pure functions of plain variables.

    The variables are sorted into collections named as in Linen. Random state of the module (dropout) is not a
    variable: it is set from the explicit key at every call. Its mode is set by `.train()` and `.eval()`.

    Args:
      make: `key -> module`; called abstractly once to learn the graph.
      call: `(module, x, train) -> output`, for a module that is called otherwise.
    """
    abstract = fnnx.eval_shape(lambda: make(jax.random.key(0)))
    graph, state = fnnx.split(abstract)
    flat = list(fnnx.to_flat_state(state))
    axes: list[str] = []

    def init(key: jax.Array, x: Tree) -> dict[str, Tree]:
        del x
        return variables_of(make(key))

    def apply(variables: dict[str, Tree], x: Tree, train: bool, rngs: Rngs) -> tuple[Tree, dict[str, Tree]]:
        key = next(iter(rngs.values()), None) if isinstance(rngs, Mapping) else rngs
        if key is None and train and any(isinstance(leaf, fnnx.RngState) for _, leaf in flat):
            raise ArgumentError(
                f"{type(abstract).__name__} draws random numbers in training and got none: pass rngs=, or a key to "
                "TrainState.create"
            )

        def run() -> tuple[Tree, dict[str, Tree]]:
            module = merged(graph, flat, variables, jax.random.key(0) if key is None else key)
            module.train() if train else module.eval()
            if call is not None:
                out = call(module, x, train)
            else:
                after, named = mode_arguments(module, train)
                out = module(x, *after, **named)
            updates = variables_of(module) if train else {}
            return out, {name: tree for name, tree in updates.items() if name != PARAMS}

        return bound(run, axes)

    return Program(init, apply, abstract, call)


def merged(graph: Any, flat: Sequence[tuple[Any, Any]], variables: dict[str, Tree], key: jax.Array) -> Any:
    """Return an NNX module that holds plain variables, its random streams set from a key."""
    values: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(variables))

    def value(index: int, path: tuple[Any, ...], leaf: fnnx.Variable) -> jax.Array:
        return _random(leaf, key, index) if isinstance(leaf, fnnx.RngState) else values[variable_path(path, leaf)]

    leaves = [(path, leaf.replace(value(i, path, leaf))) for i, (path, leaf) in enumerate(flat)]
    return fnnx.merge(graph, fnnx.from_flat_state(leaves))


def variables_of(module: fnnx.Module | fnnx.State) -> dict[str, Tree]:
    """Return the variables of an NNX module, or of its state, as plain nested dicts; random streams are left out."""
    state = module if isinstance(module, fnnx.State) else fnnx.split(module)[1]
    flat = fnnx.to_flat_state(state)
    kept = {variable_path(path, leaf): leaf.get_value() for path, leaf in flat if not isinstance(leaf, fnnx.RngState)}
    return traverse_util.unflatten_dict(kept)


def variable_path(path: tuple[Any, ...], leaf: fnnx.Variable) -> tuple[str, ...]:
    """Return collection and path as strings; NNX uses integers for the items of lists."""
    collection = next((name for kind, name in _COLLECTIONS if isinstance(leaf, kind)), type(leaf).__name__)
    return (collection, *map(str, path))


def _random(leaf: fnnx.RngState, key: jax.Array, index: int) -> jax.Array:
    """Return the value of a random stream for this call: its own key, and a counter at 0; stacked layers have many."""
    shape = leaf.get_value().shape
    if isinstance(leaf, fnnx.RngKey):
        own = jax.random.fold_in(key, index)
        return jax.random.split(own, shape) if shape else own
    return jnp.zeros(shape, jnp.uint32)


def nnx(
    build: Callable[..., fnnx.Module],
    sample: Tree,
    *,
    packable: Callable[[str, Any], bool] = kernels_and_embeddings,
    call: Callable[[Any, Tree, bool], Tree] | None = None,
    free_axes: Sequence[int] | Mapping[str, Sequence[int]] = (),
    couples_examples: bool = False,
) -> Net:
    """Describe a Flax NNX backbone.

    Nothing in the model knows about packing; it is any module called as `module(x)` that returns features. Its mode is
    set by `.train()` and `.eval()`, and by an argument `train` or the like if it has one. `nnx.Param` variables become
    `params`, `nnx.BatchStat` variables `batch_stats`.

    Args:
      build: `(width, rngs) -> flax.nnx.Module`, or `rngs=` alone by name; width is a channel factor, 1.0 the nominal
        network. It is called once for each width, so a build that should read another setting is another net.
      sample: as for `pae.linen`.
      packable: as for `pae.linen`; paths like "layers/0/kernel".
      call: as for `pae.linen`.
      free_axes: as for `pae.linen`.
      couples_examples: as for `pae.linen`.

    Returns:
      The network description that every other function takes.

    Raises:
      StructureError: the sample has no batch axis. What `build` returns is checked at `init`.
      ArgumentError: `free_axes` names an input or axis that the sample does not have.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> from flax import nnx
      >>> class Backbone(nnx.Module):
      ...     def __init__(self, width, rngs):
      ...         self.dense = nnx.Linear(4, int(16 * width), rngs=rngs)
      ...     def __call__(self, x):
      ...         return nnx.relu(self.dense(x))
      >>> net = pae.nnx(Backbone, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> state.shared["dense"]["kernel"].shape
      (4, 16)
    """
    source = getattr(build, "__name__", type(build).__name__)
    abstract, example = network.read_sample(sample)

    def program_of(width: float) -> Program:
        def make(key: jax.Array) -> fnnx.Module:
            model = build(width, rngs=fnnx.Rngs(key))
            return network.require_module(model, fnnx.Module, source, "For Linen modules use pae.linen.")

        return program(make, call)

    axes = network.read_free_axes(abstract, free_axes)
    return Net(program_of, abstract, example, packable, axes, source, "nnx", (), couples_examples)

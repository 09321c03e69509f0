"""Front end for Flax NNX modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx as fnnx
from flax import traverse_util

from pae_jax.checks import is_traced
from pae_jax.errors import ArgumentError
from pae_jax.nets import network
from pae_jax.nets.modes import bound, called, require_moved, require_one_input
from pae_jax.nets.network import Net, Program, Rngs, kernels_and_embeddings
from pae_jax.trees import PARAMS, Tree

CONSTANTS = "constants"
_COLLECTIONS = ((fnnx.Param, PARAMS), (fnnx.BatchStat, "batch_stats"))

_HINT = "For Linen modules use pae.linen."


def program(make: Callable[[jax.Array], fnnx.Module], call: Callable[[Any, Tree, bool], Tree] | None = None) -> Program:
    """Return an NNX module as pure functions of plain variables.

    The variables are sorted into collections named as in Linen. Random state of the module (dropout) is not a variable;
    every call sets it from the explicit key. `.train()` and `.eval()` set the mode.

    Args:
      make: `key -> module`; called abstractly once to learn the graph.
      call: `(module, x, train) -> output`, for a module that is called otherwise.
    """
    abstract = fnnx.eval_shape(lambda: _with_constants(make(jax.random.key(0))))
    graph, state = fnnx.split(abstract)
    flat = list(fnnx.to_flat_state(state))
    axes: list[str] = []

    def init(key: jax.Array, x: Tree) -> dict[str, Tree]:
        del x
        return variables_of(_with_constants(make(key)))

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
            out = called(module, call, x, train)
            updates = variables_of(module) if train else {}
            if train and call is None:
                require_moved(module, variables, updates)
            return out, {name: tree for name, tree in updates.items() if name != PARAMS}

        return bound(run, axes)

    return Program(init, apply, abstract, call)


def _with_constants(module: fnnx.Module) -> fnnx.Module:
    """Return a module whose attributes that are tracers are data, as other arrays are in Flax."""
    for _, part in fnnx.iter_modules(module):
        for name, value in list(vars(part).items()):
            if is_traced(value) and isinstance(value, jax.Array):
                setattr(part, name, fnnx.data(value))
    return module


def merged(graph: Any, flat: Sequence[tuple[Any, Any]], variables: dict[str, Tree], key: jax.Array) -> Any:
    """Return an NNX module with the given plain variables, and random streams set from a key."""
    values: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(variables))

    def filled(index: int, path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, fnnx.RngState):
            return leaf.replace(_random(leaf, key, index))
        value = values.get(variable_path(path, leaf))  # None if the module has None
        return leaf.replace(value) if isinstance(leaf, fnnx.Variable) else value

    leaves = [(path, filled(i, path, leaf)) for i, (path, leaf) in enumerate(flat)]
    return fnnx.merge(graph, fnnx.from_flat_state(leaves))


def variables_of(module: fnnx.Module | fnnx.State) -> dict[str, Tree]:
    """Return the variables of an NNX module, or of its state, as plain nested dicts.

    Arrays that are plain attributes, not variables, are in the collection "constants". Random streams and None are left
    out.
    """
    state = module if isinstance(module, fnnx.State) else fnnx.split(module)[1]
    flat = [(path, leaf) for path, leaf in fnnx.to_flat_state(state) if not isinstance(leaf, fnnx.RngState)]
    found = {variable_path(path, leaf): _value(leaf) for path, leaf in flat}
    return traverse_util.unflatten_dict({path: value for path, value in found.items() if value is not None})


def variable_path(path: tuple[Any, ...], leaf: Any) -> tuple[str, ...]:
    """Return collection and path as strings; NNX uses integers for list items."""
    other = type(leaf).__name__ if isinstance(leaf, fnnx.Variable) else CONSTANTS
    return (next((name for kind, name in _COLLECTIONS if isinstance(leaf, kind)), other), *map(str, path))


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, fnnx.Variable) else leaf


def _random(leaf: fnnx.RngState, key: jax.Array, index: int) -> jax.Array:
    """Return the value of a random stream for this call: its own key, a counter at 0; stacked layers have several."""
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

    The model needs no changes for packing: it is any module called as `module(x)` that returns features. Its mode is
    set by `.train()` and `.eval()`, and by its arguments named as for `pae.linen`. `nnx.Param` variables become
    `params`, `nnx.BatchStat` variables `batch_stats`.

    Args:
      build: `(width, rngs) -> flax.nnx.Module`, or with `rngs` passed by name; width is a channel factor, 1.0 the
        nominal network. It makes the same model at every call with one width; if it depends on another setting,
        describe another net for each value.
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
    wanted = "an NNX module from a width, such as lambda width, rngs: Model(..., rngs=rngs)"
    source = network.require_build(build, fnnx.Module, nn.Module, wanted, _HINT)
    abstract, example = network.read_sample(sample)

    def program_of(width: float) -> Program:
        def make(key: jax.Array) -> fnnx.Module:
            model = build(width, rngs=fnnx.Rngs(key))
            return network.require_module(model, fnnx.Module, source, _HINT)

        made = program(make, call)
        if call is None:
            require_one_input(made.module, abstract)
        return made

    axes = network.read_free_axes(abstract, free_axes)
    return Net(program_of, abstract, example, packable, axes, source, "nnx", (), couples_examples)

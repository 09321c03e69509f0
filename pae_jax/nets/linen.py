"""Front end for Flax Linen modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import errors as flax_errors
from flax import linen as nn
from flax import nnx
from flax.core import DenyList, meta, unfreeze

from pae_jax.errors import ArgumentError, StructureError
from pae_jax.nets import network
from pae_jax.nets.modes import bound, mode_arguments, require_moved, require_one_input
from pae_jax.nets.network import Net, Program, Rngs, kernels_and_embeddings
from pae_jax.trees import PARAMS, Tree

DROPOUT = "dropout"
Call = Callable[[Any, Tree, bool], Tree]

_HINT = "For NNX modules use pae.nnx."


def program(module: nn.Module, call: Call | None = None, streams: Sequence[str] = ()) -> Program:
    """Return a Linen module as pure functions of plain variables.

    Args:
      module: called as `module(x)`, with its arguments for training mode if it has any, such as `train` or
        `deterministic`.
      call: `(module, x, train) -> output`, for a module that is called otherwise.
      streams: random streams besides "dropout" that the module draws from, also in evaluation.
    """
    evaluation_rngs = _rngs(jax.random.key(0), streams) if streams else None
    axes: list[str] = []

    def arguments(x: Tree, train: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if call is not None:
            return (x, train), {"method": call}
        after, named = mode_arguments(module, train)
        return (x, *after), named

    def init(key: jax.Array, x: Tree) -> dict[str, Tree]:
        params_key, other = jax.random.split(key)
        positional, named = arguments(x, False)
        rngs = {PARAMS: params_key, **_rngs(other, streams)}

        def make(left_out: Sequence[str]) -> Any:
            return bound(lambda: module.init(rngs, *positional, **named, mutable=DenyList(left_out)), axes)

        try:
            variables = make(("intermediates",))
            sown = [name for name in variables if name != PARAMS and _is_sown(lambda name=name: make((name,)))]
            kept = make(("intermediates", *sown)) if sown else variables
        except flax_errors.InvalidRngError as error:
            raise _unnamed_stream(module, error) from error
        return meta.unbox(unfreeze(kept))

    def apply(variables: dict[str, Tree], x: Tree, train: bool, rngs: Rngs) -> tuple[Tree, dict[str, Tree]]:
        positional, named = arguments(x, train)
        mutable = DenyList(PARAMS)
        if train:
            every = dict(rngs) if isinstance(rngs, Mapping) else None if rngs is None else _rngs(rngs, streams)
            if every and not isinstance(rngs, Mapping):
                every[PARAMS] = every[DROPOUT]
            run = lambda: module.apply(variables, *positional, **named, rngs=every, mutable=mutable)  # noqa: E731
            try:
                out, updates = bound(run, axes)
            except flax_errors.InvalidRngError as error:
                raise _no_key(module, rngs, error) from error
            updates = meta.unbox(unfreeze(updates))
            if call is None:
                require_moved(module, variables, updates)
            return out, updates
        try:
            run = lambda: module.apply(variables, *positional, **named, rngs=evaluation_rngs)  # noqa: E731
            return bound(run, axes), {}
        except flax_errors.ModifyScopeVariableError:  # such as a cache; evaluation keeps no changed variables
            return module.apply(variables, *positional, **named, rngs=evaluation_rngs, mutable=mutable)[0], {}
        except flax_errors.InvalidRngError as error:
            raise _unnamed_stream(module, error) from error

    return Program(init, apply, module, call)


def _rngs(key: jax.Array, streams: Sequence[str]) -> dict[str, jax.Array]:
    others = {name: jax.random.fold_in(key, index) for index, name in enumerate(streams)}
    return {DROPOUT: key, **others}


def _is_sown(make_without: Callable[[], Any]) -> bool:
    """Return whether a module only sows into a collection; sown values are outputs and may be left out."""
    try:
        jax.eval_shape(make_without)
    except flax_errors.FlaxError:
        return False
    return True


def _unnamed_stream(module: nn.Module, error: Exception) -> StructureError:
    found = f"a random number drawn in evaluation ({str(error).splitlines()[0]})"
    hint = (
        'Name its stream, pae.linen(..., rngs=("noise",)): evaluation then draws from a fixed key. Or draw in training '
        "alone."
    )
    return StructureError(type(module).__name__, "", found, "the same answer at every call", hint)


def _no_key(module: nn.Module, rngs: Rngs, error: Exception) -> ArgumentError:
    name = type(module).__name__
    if not isinstance(rngs, Mapping):
        return ArgumentError(
            f"{name} draws random numbers in training and got none: pass rngs=, or a key to TrainState.create"
        )
    return ArgumentError(
        f"{name} draws random numbers in training from a stream that rngs= does not have, which has "
        f"{', '.join(map(repr, rngs)) or 'none'} ({str(error).splitlines()[0]}). Name it, or pass one key for all."
    )


def linen(
    build: Callable[[float], nn.Module],
    sample: Tree,
    *,
    packable: Callable[[str, Any], bool] = kernels_and_embeddings,
    call: Call | None = None,
    rngs: Sequence[str] = (),
    free_axes: Sequence[int] | Mapping[str, Sequence[int]] = (),
    couples_examples: bool = False,
) -> Net:
    """Describe a Flax Linen backbone.

    The model needs no changes for packing: it is any module called as `module(x)` that returns features. Its arguments
    for the mode are set automatically. True in training: `train`, `training`, `is_training`, `is_train`, `train_mode`,
    `training_mode`, `enable_dropout`, `use_dropout`, `update_stats`, `update_batch_stats`. True in evaluation:
    `deterministic`, `use_running_average`, `use_running_stats`, `inference`, `is_inference`, `inference_mode`, `eval`,
    `is_eval`, `eval_mode`, `evaluation`, `test`, `is_test`, `test_mode`, `testing`. `call` sets any other.

    Args:
      build: `width -> flax.linen.Module`; width is a channel factor, 1.0 the nominal network. It makes the same model
        at every call with one width; if it depends on another setting, describe another net for each value.
      sample: an input batch, any tree of arrays (batch, ...), concrete or abstract. Its shapes and dtypes describe the
        inputs. Its values, if it has any, are those on which the model is initialised, 0 if it has none; its integer
        values are also used in trial runs of the model.
      packable: `(path, leaf) -> bool` over the float leaves of `params`, path like "Conv_0/kernel": True makes the
        leaf a shared weight, False a local variable kept once per task. Default: leaves of two or more axes.
      call: `(module, x, train) -> features`, for a module with another call, for instance with several inputs.
      rngs: names of random streams, besides "dropout", that the module draws from; evaluation draws from a fixed key.
      free_axes: axes of the inputs whose sizes may change from batch to batch, such as `(1,)` for the length of token
        sequences; a mapping `{path: axes}` if they differ between inputs.
      couples_examples: accept a model whose output for an example depends on the other examples in the batch, which
        `pack` otherwise refuses. Its outputs are then bit-identical only for the same batch.

    Returns:
      The network description that every other function takes.

    Raises:
      StructureError: the sample has no batch axis. What `build` returns is checked at `init`; training raises it if
        running statistics stay as they are and a flag of the call that is not set may be the mode.
      ArgumentError: `free_axes` names an input or axis that the sample does not have.

    Example:
      >>> import jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> net.layout(1.0).features.shape
      (1, 16)
    """
    wanted = "a Linen module from a width, such as lambda width: Model(...)"
    source = network.require_build(build, nn.Module, nnx.Module, wanted, _HINT)
    abstract, example = network.read_sample(sample)
    streams = tuple(rngs)

    def program_of(width: float) -> Program:
        module = network.require_module(build(width), nn.Module, source, _HINT)
        if call is None:
            require_one_input(module, abstract)
        return program(module, call, streams)

    axes = network.read_free_axes(abstract, free_axes)
    return Net(program_of, abstract, example, packable, axes, source, "linen", streams, couples_examples)

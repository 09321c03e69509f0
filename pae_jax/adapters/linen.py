"""Front end for Flax Linen modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta, unfreeze

from pae_jax import network
from pae_jax.network import Net, Program, abstract_sample, kernels_and_embeddings
from pae_jax.trees import PARAMS, Tree


def program(module: nn.Module) -> Program:
    """Return a Linen module as pure functions of plain variables.

    A module whose `__call__` has no `train` argument is called without it, so that plain layers serve as heads.
    """
    train_argument = network.takes_train(module)

    def arguments(train: bool) -> dict[str, Any]:
        return {"train": train} if train_argument else {}

    def init(key: jax.Array, x: Tree) -> dict[str, Tree]:
        params_key, other = jax.random.split(key)
        variables = module.init({PARAMS: params_key, "dropout": other}, x, **arguments(False))
        return meta.unbox(unfreeze(variables))

    def apply(variables: dict[str, Tree], x: Tree, train: bool, key: jax.Array | None) -> tuple[Tree, dict[str, Tree]]:
        if not train:
            return module.apply(variables, x, **arguments(False)), {}
        rngs = None if key is None else {PARAMS: key, "dropout": key}
        mutable = [name for name in variables if name != PARAMS]
        out, updates = module.apply(variables, x, **arguments(True), rngs=rngs, mutable=mutable)
        return out, unfreeze(updates)

    return Program(init, apply)


def linen(
    build: Callable[[float], nn.Module],
    sample: Tree,
    *,
    packable: Callable[[str, Any], bool] = kernels_and_embeddings,
) -> Net:
    """Describe a Flax Linen backbone.

    Nothing in the model knows about packing; it is any module called as `module(x, train=bool)` that returns
    features.

    Args:
      build: `width -> flax.linen.Module`; width is a channel factor, 1.0 the nominal network.
      sample: an input batch, concrete or abstract; only shapes and dtypes are used.
      packable: `(path, leaf) -> bool` over the float leaves of `params`, path like "Conv_0/kernel": True makes the
        leaf a shared weight, False a local variable kept once per task. Default: leaves of two or more axes.

    Returns:
      The network description that every other function takes.

    Raises:
      StructureError: the sample has no batch axis. What `build` returns is checked at `init`.

    Example:
      >>> import jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> net.layout(1.0).features.shape
      (1, 16)
    """
    source = getattr(build, "__name__", type(build).__name__)

    def program_of(width: float) -> Program:
        return program(network.require_module(build(width), nn.Module, source, "For NNX modules use pae.nnx."))

    return Net(program_of, abstract_sample(sample), packable, source)

"""The train steps that the benchmarks compare: packed, as `pae.fit` runs it, and plain, as one writes it without us."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pae_jax as pae
from pae_jax import heads, ownership, training, trees

CLASSES = 5
Batch = tuple[jax.Array, jax.Array]


def random_batch(shape: tuple[int, ...]) -> Batch:
    """Return float32 inputs and labels below `CLASSES`."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    return x, jnp.arange(shape[0]) % CLASSES


def random_examples(count: int, shape: tuple[int, ...] | list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 inputs and random labels below `CLASSES`, as a user's arrays on the host."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *shape)).astype(np.float32), rng.integers(0, CLASSES, count).astype(np.int32)


def packed_state(net: pae.Net, frozen: int = 2, width: float = 1.0) -> pae.State:
    """Return a network with frozen tasks, each pruned to half its room, and the newest, "newest", in training."""
    state = pae.init(net, jax.random.key(0), width=width)
    for index in range(frozen):
        name = f"task {index}"
        state = pae.pack(net, state, name, head=CLASSES, key=jax.random.key(index))
        state = pae.freeze(pae.prune(state, name, 0.5), name)
    return pae.pack(net, state, "newest", head=CLASSES, key=jax.random.key(frozen))


class Stepper:
    """A compiled step and the arrays that it changes in place; each call takes one step.

    Attributes:
      lowered: the program before XLA's optimizations, for its operations.
      compiled: the program, for its memory.
      moving: the arrays, replaced at every call.
    """

    def __init__(self, step: Any, moving: Any, *fixed: Any):
        self.lowered = step.lower(moving, *fixed)
        self.compiled = self.lowered.compile()
        self.moving, self.fixed = moving, fixed

    def __call__(self) -> Any:
        """Take a step; return the arrays."""
        self.moving = self.compiled(self.moving, *self.fixed)
        return self.moving


def packed_step(net: pae.Net, state: pae.State, tx: optax.GradientTransformation, batch: Batch) -> Stepper:
    """Return the step of the newest task as `pae.fit` compiles it. The only place here that knows its operands."""
    entry = state.tasks["newest"]
    rule = training.Rule(tx, training.softmax_cross_entropy)
    task_id = ownership.id_array(entry.id)
    shared, local, head, pick = jax.tree.map(jnp.copy, (state.shared, entry.local, entry.head, entry.pick))
    opt_state = training.optimizer_init(net, rule)(shared, local, head, pick, state.owner, task_id)
    zero = jnp.zeros((), jnp.int32)
    carry = training.Carry(shared, local, head, pick, opt_state, zero, zero - 1, jnp.zeros((), jnp.float32))
    rates = jnp.ones(2, jnp.float32)
    step = training.train_step(net, entry, rule)
    return Stepper(step, carry, state.owner, task_id, jax.random.key(0), rates, *batch)


def plain_step(net: pae.Net, state: pae.State, tx: optax.GradientTransformation, batch: Batch) -> Stepper:
    """Return the step of the same model and head without packing: gradient, optax update, donated buffers."""
    backbone, output = net.program(state.width), heads.program(CLASSES)
    entry = state.tasks["newest"]

    def step(moving: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        params, collections, opt_state, _ = moving

        def objective(params: Any) -> tuple[jax.Array, Any]:
            variables = {**collections, "params": params["backbone"]}
            features, updates = backbone.apply(variables, x, True, key)
            logits, _ = output.apply({"params": params["head"]}, features, True, key)
            return training.softmax_cross_entropy(logits, y).mean(), updates

        (loss, updates), grads = jax.value_and_grad(objective, has_aux=True)(params)
        changes, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), {**collections, **updates}, opt_state, loss

    collections = jax.tree.map(jnp.copy, trees.merge(state.shared, entry.local))
    params = {"backbone": collections.pop("params"), "head": jax.tree.map(jnp.copy, entry.head["params"])}
    moving = (params, collections, tx.init(params), jnp.zeros((), jnp.float32))
    return Stepper(jax.jit(step, donate_argnums=0), moving, jax.random.key(0), *batch)

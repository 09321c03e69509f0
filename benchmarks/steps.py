"""The train steps that the benchmarks compare: of `pae.fit`, of a user's own loop, and plain Flax and optax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pae_jax as pae
from pae_jax import trees
from pae_jax.nets import heads
from pae_jax.training import batches, losses
from pae_jax.training import steps as programs

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
    """Return a network with frozen tasks, each pruned to half of its weights, and a task "newest" in training."""
    state = pae.init(net, jax.random.key(0), width=width)
    for index in range(frozen):
        name = f"task {index}"
        state = pae.pack(net, state, name, head=CLASSES, key=jax.random.key(index))
        state = pae.freeze(pae.prune(state, name, 0.5), name)
    return pae.pack(net, state, "newest", head=CLASSES, key=jax.random.key(frozen))


class Stepper:
    """A compiled step and the arrays that it changes in place; each call takes one step.

    Attributes:
      moving: the arrays, replaced at every call.
    """

    def __init__(self, step: Any, moving: Any, *fixed: Any):
        self.step, self.moving, self.fixed = step, moving, fixed
        self.lowered = step.lower(moving, *fixed)

    @functools.cached_property
    def operations(self) -> float:
        """The operations of the program before XLA's optimizations; lowered for the CPU, as only it counts them."""
        with jax.default_device(jax.devices("cpu")[0]):
            return self.step.lower(*trees.abstract((self.moving, *self.fixed))).cost_analysis()["flops"]

    @functools.cached_property
    def compiled(self) -> Any:
        """The compiled program, to read its memory use."""
        return self.lowered.compile()

    def __call__(self) -> Any:
        """Take a step; return the arrays."""
        self.moving = self.compiled(self.moving, *self.fixed)
        return self.moving


def packed_step(net: pae.Net, state: pae.State, tx: optax.GradientTransformation, batch: Batch) -> Stepper:
    """Return the step of the newest task as `pae.fit` compiles it. Only this function knows its operands."""
    ts = pae.TrainState.create(net, state, "newest", tx=tx, key=jax.random.key(0))
    objective = losses.objective(None, "example", None)
    shapes, seen = _abstract(net, state.width, batch)
    key = programs.key_of(trees.abstract(ts), objective, None, shapes, seen)
    step = programs.train_step(key, objective, None)
    return Stepper(step, programs.start(ts, objective), np.ones(2, np.float32), *batch)


def user_step(net: pae.Net, state: pae.State, tx: optax.GradientTransformation, batch: Batch) -> Stepper:
    """Return the step of the newest task in a user's own loop: `pae.TrainState`, public names, donated buffers."""

    def step(moving: Any, x: jax.Array, y: jax.Array) -> Any:
        ts, _ = moving

        def loss(params: Any) -> tuple[jax.Array, Any]:
            out, updates = ts.apply_fn(params, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(ts.params)
        return ts.apply_gradients(grads=grads, updates=updates), value

    ts = pae.TrainState.create(net, state, "newest", tx=tx, key=jax.random.key(0))
    return Stepper(jax.jit(step, donate_argnums=0), (ts, jnp.zeros((), jnp.float32)), *batch)


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
            return losses.softmax_cross_entropy(logits, y).mean(), updates

        (loss, updates), grads = jax.value_and_grad(objective, has_aux=True)(params)
        changes, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), {**collections, **updates}, opt_state, loss

    collections = jax.tree.map(jnp.copy, trees.merge(state.shared, entry.local))
    params = {"backbone": collections.pop("params"), "head": jax.tree.map(jnp.copy, entry.head["params"])}
    moving = (params, collections, tx.init(params), jnp.zeros((), jnp.float32))
    return Stepper(jax.jit(step, donate_argnums=0), moving, jax.random.key(0), *batch)


def eval_step(net: pae.Net, width: float, batch: tuple[Any, Any]) -> Callable[..., Any]:
    """Return the compiled `(backbone variables, head variables, x, y, weight) -> sums` that `pae.evaluate` runs."""
    objective = losses.objective(None, "example", None)
    texts = objective.text(*_abstract(net, width, batch)[1])
    return programs.eval_step(net, width, CLASSES, objective, texts)


def _abstract(net: pae.Net, width: float, batch: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return `(inputs, labels)` and `(outputs, labels)` as shapes and dtypes."""
    x, y = trees.abstract(batch)
    return (x, y), (batches.form(net, width, CLASSES, True).output(x), y)

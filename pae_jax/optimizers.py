"""Optimizers of the published recipes as typed data; the learning rate is a factor of their updates, see `pae.fit`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from pae_jax.errors import ArgumentError


class Optimizer(Protocol):
    """Anything that makes an optax chain of learning rate 1."""

    def transformation(self) -> optax.GradientTransformation:
        """Return the chain."""
        ...


def _check(name: str, value: Any, end: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value < end:
        raise ArgumentError(f"{name} must lie in [0, {end:g}), found {value!r}")


def _check_decay(weight_decay: float, decayed: tuple[str, ...]) -> None:
    _check("weight_decay", weight_decay)
    if isinstance(decayed, str) or not {*decayed} <= {"shared", "head"}:
        raise ArgumentError(f"decayed must hold 'shared', 'head', both or nothing, found {decayed!r}")


def _decay(weight_decay: float, decayed: tuple[str, ...]) -> optax.GradientTransformation:
    """Add `weight_decay * w` to the gradient of the kernels of some parts: shared weights, heads."""

    def mask(params: Any) -> Any:
        return {
            part: jax.tree.map(lambda leaf, decays=part in decayed: decays and leaf.ndim >= 2, tree)
            for part, tree in params.items()
        }

    return optax.add_decayed_weights(weight_decay, mask)


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum and coupled L2 decay.

    `g <- g + weight_decay w; v <- momentum v + g; w <- w - rate (g + momentum v)`, the last without Nesterov
    `w - rate v`.

    Attributes:
      momentum: in [0, 1).
      nesterov: whether to look ahead.
      weight_decay: of kernels, at least 0.
      decayed: parts that decay, of "shared" and "head".

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> from pae_jax.recipes import Sgd
      >>> Sgd(momentum=0.9).nesterov
      True

    Source: CPG and its PackNet, CIFAR-100: Nesterov 0.9, decay 4e-5 of the shared kernels alone.
    """

    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 4e-5
    decayed: tuple[str, ...] = ("shared",)

    def __post_init__(self) -> None:
        _check("momentum", self.momentum, 1.0)
        _check_decay(self.weight_decay, self.decayed)

    def transformation(self) -> optax.GradientTransformation:
        """Return the optax chain of learning rate 1."""
        return optax.chain(
            _decay(self.weight_decay, self.decayed), optax.trace(self.momentum, self.nesterov), optax.scale(-1.0)
        )


@dataclass(frozen=True)
class Adam:
    """Adam with coupled L2 decay, in the usual form or with the epsilon outside the bias correction.

    With `m, v` the running means of g and g^2, `w <- w - rate m' / (sqrt(v') + epsilon)`, where `m', v'` are corrected
    for their start at 0. With `epsilon_hat`, `w <- w - rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon)`. The
    two differ when epsilon is large: at 0.1 the second is momentum descent at ten times the rate with a slow start.

    Attributes:
      b1, b2: decay of the running means, in [0, 1).
      epsilon: added to the denominator, at least 0.
      epsilon_hat: which of the two forms.
      start: steps that t starts from; large, the slow start of the second form is left out.
      weight_decay: of kernels, at least 0.
      decayed: parts that decay, of "shared" and "head".

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> from pae_jax.recipes import Adam
      >>> Adam(epsilon=0.1, epsilon_hat=True).b2
      0.999

    Source: Kingma and Ba, ICLR 2015, section 2, for both forms; PAE uses the second with epsilon 0.1.
    """

    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    epsilon_hat: bool = False
    start: int = 0
    weight_decay: float = 0.0
    decayed: tuple[str, ...] = ("shared",)

    def __post_init__(self) -> None:
        _check("b1", self.b1, 1.0)
        _check("b2", self.b2, 1.0)
        _check("epsilon", self.epsilon)
        if isinstance(self.start, bool) or not isinstance(self.start, int) or not 0 <= self.start < 2**30:
            raise ArgumentError(f"start must be an integer of at least 0, found {self.start!r}")
        _check_decay(self.weight_decay, self.decayed)

    def transformation(self) -> optax.GradientTransformation:
        """Return the optax chain of learning rate 1."""
        if self.epsilon_hat or self.start:
            scale = _scale_by_adam_hat(self.b1, self.b2, self.epsilon, self.epsilon_hat, self.start)
        else:
            scale = optax.scale_by_adam(self.b1, self.b2, self.epsilon)
        decay = [_decay(self.weight_decay, self.decayed)] if self.weight_decay else []
        return optax.chain(*decay, scale, optax.scale(-1.0))


class _AdamState(NamedTuple):
    steps: jax.Array
    mean: Any
    square: Any


def _scale_by_adam_hat(
    b1: float, b2: float, epsilon: float, epsilon_hat: bool, start: int
) -> optax.GradientTransformation:
    def init(params: Any) -> _AdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return _AdamState(jnp.full((), start, jnp.int32), zeros, zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, _AdamState]:
        del params
        steps = state.steps + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, updates)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, updates)
        # The moments start at 0 with this transformation, whatever count the bias correction starts from.
        first, second = _one_minus_power(b1, steps), jnp.sqrt(_one_minus_power(b2, steps))
        scale = epsilon if epsilon_hat else epsilon * second
        scaled = jax.tree.map(
            lambda m, v: (second / first).astype(m.dtype) * m / (jnp.sqrt(v) + jnp.asarray(scale, m.dtype)),
            mean,
            square,
        )
        return scaled, _AdamState(steps, mean, square)

    return optax.GradientTransformation(init, update)


def _one_minus_power(base: float, steps: jax.Array) -> jax.Array:
    """Return `1 - base^steps` without the cancellation that costs 4 digits of `1 - 0.999` in float32."""
    return -jnp.expm1(steps * math.log(base)) if base else jnp.ones((), jnp.float32)

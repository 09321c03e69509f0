"""Optimizers of the published recipes as typed settings, compared by value.

In a recipe the phase sets the learning rate; in `pae.fit` and `pae.TrainState` the optimizer does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import optax

from pae_jax.checks import check_flag, check_number
from pae_jax.errors import ArgumentError


class Optimizer(Protocol):
    """An object that makes an optax chain; where a phase sets the rate, the chain has learning rate 1."""

    def transformation(self) -> optax.GradientTransformation:
        """Return the chain."""
        ...


def _check_rate(learning_rate: float | None) -> None:
    if learning_rate is not None:
        check_number("learning_rate", learning_rate, 0.0)


def _descent(learning_rate: float | None) -> optax.GradientTransformation:
    return optax.scale(-1.0 if learning_rate is None else -learning_rate)


def at_phase_rate(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer of learning rate 1, whose updates the rate of a phase multiplies."""
    if getattr(optimizer, "learning_rate", 1.0) is None:
        return cast("Optimizer", replace(cast("Any", optimizer), learning_rate=1.0))
    return optimizer


def _check_decay(weight_decay: float, decayed: tuple[str, ...]) -> None:
    check_number("weight_decay", weight_decay, 0.0)
    if not isinstance(decayed, (tuple, list)) or not {*decayed} <= {"shared", "head", "pick"}:
        raise ArgumentError(f"decayed must hold some of 'shared', 'head' and 'pick', found {decayed!r}")


def _decay(weight_decay: float, decayed: tuple[str, ...]) -> optax.GradientTransformation:
    """Add `weight_decay * w` to the gradient of shared weights, of kernels of heads, and of scores of picks."""

    def mask(params: Any) -> Any:
        return {
            part: jax.tree.map(lambda leaf, part=part: part in decayed and (part == "shared" or leaf.ndim >= 2), tree)
            for part, tree in params.items()
        }

    return optax.add_decayed_weights(weight_decay, mask)


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum and coupled L2 decay.

    `g <- g + weight_decay w; v <- momentum v + g; w <- w - rate (g + momentum v)`, the last without Nesterov
    `w - rate v`.

    Attributes:
      learning_rate: at least 0; None in a recipe, whose phases set it.
      momentum: in [0, 1).
      nesterov: whether to use Nesterov momentum.
      weight_decay: of shared weights and of kernels of heads, at least 0.
      decayed: parts that decay, of "shared", "head" and "pick".

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> from pae_jax.lifelong.recipes import Sgd
      >>> Sgd(momentum=0.9).nesterov
      True

    Source: CPG and its PackNet, CIFAR-100: Nesterov 0.9, decay 4e-5 of the shared kernels alone.
    """

    learning_rate: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 4e-5
    decayed: tuple[str, ...] = ("shared",)

    def __post_init__(self) -> None:
        _check_rate(self.learning_rate)
        check_number("momentum", self.momentum, 0.0, 1.0, open_end=True)
        check_flag("nesterov", self.nesterov)
        _check_decay(self.weight_decay, self.decayed)

    def transformation(self) -> optax.GradientTransformation:
        """Return the optax chain; if `learning_rate` is None, with rate 1."""
        trace = optax.trace(self.momentum, self.nesterov)
        return optax.chain(_decay(self.weight_decay, self.decayed), trace, _descent(self.learning_rate))


@dataclass(frozen=True)
class Adam:
    """Adam with coupled L2 decay or decoupled (AdamW), in the usual form or with epsilon outside the bias correction.

    With `m, v` the running means of g and g^2, `w <- w - rate m' / (sqrt(v') + epsilon)`, where `m', v'` are corrected
    for their start at 0. With `epsilon_hat`, `w <- w - rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon)`. The
    two differ when epsilon is large: at 0.1 the second is momentum descent at ten times the rate with a warm-up. Decay
    adds `weight_decay w` to g, or, decoupled, subtracts `rate weight_decay w` from w.

    Attributes:
      learning_rate: at least 0; None in a recipe, whose phases set it.
      b1, b2: decay of the running means, in [0, 1).
      epsilon: added to the denominator, at least 0.
      epsilon_hat: which of the two forms.
      start: initial value of t; with a large value, the second form has no warm-up.
      weight_decay: of shared weights and of kernels of heads, at least 0.
      decayed: parts that decay, of "shared", "head" and "pick".
      decoupled: whether the decay does not go through the running means (AdamW).

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> from pae_jax.lifelong.recipes import Adam
      >>> Adam(epsilon=0.1, epsilon_hat=True).b2
      0.999

    Source: Kingma and Ba, ICLR 2015, section 2, for both forms; PAE uses the second with epsilon 0.1. Loshchilov and
    Hutter, ICLR 2019, for decoupled decay.
    """

    learning_rate: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    epsilon_hat: bool = False
    start: int = 0
    weight_decay: float = 0.0
    decayed: tuple[str, ...] = ("shared",)
    decoupled: bool = False

    def __post_init__(self) -> None:
        _check_rate(self.learning_rate)
        check_number("b1", self.b1, 0.0, 1.0, open_end=True)
        check_number("b2", self.b2, 0.0, 1.0, open_end=True)
        check_number("epsilon", self.epsilon, 0.0)
        check_flag("epsilon_hat", self.epsilon_hat)
        check_flag("decoupled", self.decoupled)
        if isinstance(self.start, bool) or not isinstance(self.start, int) or not 0 <= self.start < 2**30:
            raise ArgumentError(f"start must be an integer of at least 0, found {self.start!r}")
        _check_decay(self.weight_decay, self.decayed)

    def transformation(self) -> optax.GradientTransformation:
        """Return the optax chain; if `learning_rate` is None, with rate 1."""
        if self.epsilon_hat or self.start:
            scale = _scale_by_adam_hat(self.b1, self.b2, self.epsilon, self.epsilon_hat, self.start)
        else:
            scale = optax.scale_by_adam(self.b1, self.b2, self.epsilon)
        decay = [_decay(self.weight_decay, self.decayed)] if self.weight_decay else []
        parts = (scale, *decay) if self.decoupled else (*decay, scale)
        return optax.chain(*parts, _descent(self.learning_rate))


@dataclass(frozen=True)
class WithPicks:
    """One optimizer for the scores of picks, another for everything else.

    Attributes:
      others: of weights, local variables and head.
      picks: of the scores.
    """

    others: Optimizer
    picks: Optimizer

    def transformation(self) -> optax.GradientTransformation:
        """Return the optax partition of both."""
        chains: Any = {"others": self.others.transformation(), "picks": self.picks.transformation()}
        return optax.partition(chains, lambda params: {p: "picks" if p == "pick" else "others" for p in params})


class _AdamState(NamedTuple):
    steps: jax.Array
    mean: Any
    square: Any


def _scale_by_adam_hat(
    b1: float, b2: float, epsilon: float, epsilon_hat: bool, start: int
) -> optax.GradientTransformation:
    def init(params: Any) -> _AdamState:
        # Two separate trees of zeros, because the same array cannot be donated twice.
        mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return _AdamState(jnp.full((), start, jnp.int32), mean, square)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, _AdamState]:
        del params
        steps = state.steps + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, updates)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, updates)
        # This transformation starts the moments at 0, regardless of the initial count of the bias correction.
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
    """Return `1 - base^steps` without the cancellation that loses 4 digits of `1 - 0.999` in float32."""
    return -jnp.expm1(steps * math.log(base)) if base else jnp.ones((), jnp.float32)

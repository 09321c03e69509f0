"""Exact magnitude pruning: `prune`, gradual updates on a host-side budget, and the cubic schedule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax import ownership, verification
from pae_jax.errors import ArgumentError
from pae_jax.selection import Scope, smallest
from pae_jax.state import State, find_trainable
from pae_jax.trees import Tree

Of = Literal["available", "own"]


@partial(jax.jit, static_argnames="scope")
def release_smallest(
    shared: Tree, owner: Tree, task_id: jax.Array, wanted: jax.Array, scope: Scope
) -> tuple[Tree, Tree]:
    """Release a task's smallest weights, as many as wanted; `wanted` as in `smallest`."""
    mine = ownership.owned(owner, task_id)
    marks = smallest(jax.tree.leaves(shared), jax.tree.leaves(mine), wanted, scope)
    return ownership.release(shared, owner, jax.tree.unflatten(jax.tree.structure(owner), marks))


class Room:
    """How many weights a task has and how many are free, kept on the host while the task is pruned.

    Counting once is enough: only pruning moves a weight between the two. Targets are rounded here, in double
    precision, and enter the compiled selection as operands, so no fraction and no task compiles anything anew.
    """

    def __init__(self, owner: Tree, task_id: int, scope: Scope):
        own, free = ownership.host_counts(owner, task_id)
        if scope == "global":
            own, free = (np.full_like(n, n.sum()) for n in (own, free))
            if own[0] + free[0] > np.iinfo(np.int32).max:
                raise ArgumentError(f"scope='global' counts up to 2**31 - 1 weights; there are {own[0] + free[0]}")
        self.own, self.free, self.scope, self.task_id = own, free, scope, task_id

    def prune(
        self, shared: Tree, owner: Tree, fraction: float, of: Of = "available", good: jax.Array | bool = True
    ) -> tuple[Tree, Tree]:
        """Release weights until the fraction is free; return shared weights and owners.

        Where `good`, a scalar that may still be on its way, turns out false, nothing is released.
        """
        base = self.own if of == "own" else self.own + self.free
        already = 0 if of == "own" else self.free
        targets = np.asarray([round(fraction * n) for n in base.tolist()])
        wanted = np.maximum(targets - already, 0)
        if not wanted.any():
            return shared, owner
        self.own, self.free = self.own - wanted, self.free + wanted
        quota = jnp.where(good, jnp.asarray(wanted, jnp.int32), 0)
        return release_smallest(shared, owner, ownership.id_array(self.task_id), quota, self.scope)


def check_fraction(fraction: float, name: str = "fraction") -> float:
    """Return a fraction as a float, or raise `ArgumentError` unless it lies in [0, 1]."""
    try:
        value = float(fraction)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} must be a number in [0, 1], found {fraction!r}") from None
    if not 0.0 <= value <= 1.0:  # false for NaN too
        raise ArgumentError(f"{name} must lie in [0, 1], found {value}; 0.5 frees half of the available weights")
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ArgumentError` unless a value is one of the choices."""
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}")


def prune(state: State, task: str, fraction: float, *, scope: Scope = "leaf", of: Of = "available") -> State:
    """Release the smallest weights of the newest task until a fraction of its room is free.

    Per leaf, with n weights available to the task (its own plus the free ones), exactly `round(fraction * n)` weights
    are free afterwards; Python's `round`. Smaller |w| goes first, ties by index. Released weights are exactly 0.
    Where more than that is free already, nothing changes.

    Args:
      state: the network.
      task: the newest task, not frozen.
      fraction: share in [0, 1] of the weights that `of` names.
      scope: "leaf" ranks and counts per leaf, as the paper does; "global" over all leaves together.
      of: "available" counts own and free weights (PAE, CPG); "own" releases `round(fraction * own)` of the task's
        present weights (PackNet).

    Returns:
      A new state.

    Raises:
      UnknownTaskError: no task of this name.
      PhaseError: the task is frozen.
      ArgumentError: fraction outside [0, 1] or NaN, or another scope or denominator.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> pae.free_fraction(pae.prune(state, "a", 0.75))
      0.75

    Source: Hung et al., "Packing and Expanding", ICMR 2019; Mallya and Lazebnik, "PackNet", CVPR 2018 (of="own").
    """
    entry = find_trainable(state, task, "prune")
    share = check_fraction(fraction)
    verification.require_owner(state)
    check_choice("scope", scope, ("leaf", "global"))
    check_choice("of", of, ("available", "own"))
    shared, owner = Room(state.owner, entry.id, scope).prune(state.shared, state.owner, share, of)
    return state.replace(shared=shared, owner=owner)


@dataclass(frozen=True)
class CubicSchedule:
    """Gradual pruning: from one fraction to another over a range of training steps.

    `s(t) = final + (initial - final) * (1 - p)^3`, `p = clip((t - begin) / (end - begin), 0, 1)`; many weights go
    early, while the network can still recover, and few at the end.

    Attributes:
      final: fraction of the available weights that is free at `end`, in [0, 1].
      end: step of the last update, counted from the start of `fit`, at least `begin`.
      initial: fraction at `begin`, in [0, final].
      begin: step of the first update.
      every: steps between updates; the update at `end` always happens.
      scope: as in `prune`.

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> import pae_jax as pae
      >>> schedule = pae.CubicSchedule(final=0.5, end=100)
      >>> schedule(0), schedule(50), schedule(100)
      (0.0, 0.4375, 0.5)
      >>> [step for step in range(101) if schedule.updates_at(step)][-2:]
      [90, 100]

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1; used by PAE with steps of 0.1.
    """

    final: float
    end: int
    initial: float = 0.0
    begin: int = 0
    every: int = 10
    scope: Scope = "leaf"

    def __post_init__(self) -> None:
        check_fraction(self.final, "final")
        check_fraction(self.initial, "initial")
        check_choice("scope", self.scope, ("leaf", "global"))
        if self.initial > self.final:
            raise ArgumentError(f"initial must not exceed final, found {self.initial} > {self.final}")
        if not 0 <= self.begin <= self.end:
            raise ArgumentError(f"0 <= begin <= end must hold, found begin={self.begin}, end={self.end}")
        if self.every < 1:
            raise ArgumentError(f"every must be at least 1 step, found {self.every}")

    def __call__(self, step: int) -> float:
        """Return the fraction that is to be free after this many steps."""
        span = self.end - self.begin
        progress = min(max((step - self.begin) / span, 0.0), 1.0) if span else float(step >= self.end)
        return self.final + (self.initial - self.final) * (1.0 - progress) ** 3

    def updates_at(self, step: int) -> bool:
        """Return whether weights are released after this many steps."""
        if not self.begin <= step <= self.end:
            return False
        return step == self.end or (step - self.begin) % self.every == 0

"""Exact magnitude pruning: `prune`, gradual updates with a target computed on the host, and the cubic schedule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.arrays import Counts, Owners, TaskId, Weights
from pae_jax.checks import check_choice, check_count, check_fraction, is_traced
from pae_jax.core import integrity, ownership
from pae_jax.core.selection import Scope, smallest
from pae_jax.core.state import State, find_trainable
from pae_jax.errors import ArgumentError

Of = Literal["available", "own"]


@partial(jax.jit, static_argnames="scope")
def release_smallest(
    shared: Weights, owner: Owners, task_id: TaskId, wanted: Counts, scope: Scope
) -> tuple[Weights, Owners]:
    """Release a task's smallest weights, as many as wanted; `wanted` as in `smallest`."""
    mine = ownership.owned(owner, task_id)
    marks = smallest(jax.tree.leaves(shared), jax.tree.leaves(mine), wanted, scope)
    return ownership.release(shared, owner, jax.tree.unflatten(jax.tree.structure(owner), marks))


@partial(jax.jit, static_argnames="scope")
def release_until(
    shared: Weights, owner: Owners, task_id: TaskId, targets: Counts, scope: Scope
) -> tuple[Weights, Owners]:
    """Release a task's smallest weights until `targets` of them, int32 (leaves,), are free."""
    _, free = ownership.counts(owner, task_id)
    free = jnp.full_like(free, free.sum()) if scope == "global" else free
    return release_smallest(shared, owner, task_id, jnp.maximum(targets - free, 0), scope)


def available(owner: Owners, task_id: int, scope: Scope) -> np.ndarray:
    """Return how many weights a task owns or could claim, int64 (leaves,); the total with scope "global"."""
    own, free = ownership.host_counts(owner, task_id)
    return _together(own + free, scope)


def rounded(fraction: Any, counts: Any) -> Any:
    """Return `round(fraction * counts)` in double precision, int32; halves round to even.

    A traced fraction is a float32. If it is the float32 nearest to a decimal number of six digits, it means that
    number: the float32 of 0.6 means 0.6.
    """
    if not is_traced((fraction, counts)):
        share = float(fraction)
        if getattr(fraction, "dtype", None) == np.float32 and np.float32(round(share, 6)) == np.float32(share):
            share = round(share, 6)
        return np.asarray([round(share * n) for n in np.asarray(counts).tolist()], np.int32)
    with jax.enable_x64(True):
        exact = jnp.asarray(counts).astype(jnp.float64)
        if is_traced(fraction):
            share = jnp.nan_to_num(jnp.clip(fraction.astype(jnp.float64), 0.0, 1.0))
            # XLA turns a division by a constant into a product with its reciprocal, which is not the nearest double.
            million = jnp.where(jnp.isnan(share), jnp.nan, 1e6)
            decimal = jnp.rint(share * 1e6) / million
            share = jnp.where(decimal.astype(jnp.float32) == share.astype(jnp.float32), decimal, share)
        else:
            share = jnp.float64(float(fraction))
        return jnp.rint(share * exact).astype(jnp.int32)


def pruned(
    shared: Weights, owner: Owners, task_id: TaskId, fraction: Any, scope: Scope, of: Of
) -> tuple[Weights, Owners]:
    """Release the smallest weights of a task until a fraction is free; return shared weights and owners.

    Owners, task id and fraction may be traced.
    """
    own, free = ownership.counts(owner, task_id)
    if not is_traced((own, fraction)):
        own, free = np.asarray(own, np.int64), np.asarray(free, np.int64)
    own, free = _together(own, scope), _together(free, scope)
    wanted = rounded(fraction, own) if of == "own" else jnp.maximum(rounded(fraction, own + free) - free, 0)
    if not is_traced(wanted) and not np.any(wanted):
        return shared, owner
    return release_smallest(shared, owner, task_id, jnp.asarray(wanted, jnp.int32), scope)


def _together(counts: Any, scope: Scope) -> Any:
    if scope == "leaf":
        return counts
    if not is_traced(counts) and int(np.sum(counts)) > np.iinfo(np.int32).max:
        raise ArgumentError(f"scope='global' counts up to 2**31 - 1 weights; there are {np.sum(counts)}")
    return counts * 0 + counts.sum()


def prune(
    state: State, task: str, fraction: float | jax.Array, *, scope: Scope = "leaf", of: Of = "available"
) -> State:
    """Release the smallest weights of the newest task until a fraction of its available weights is free.

    Per leaf, with n weights available to the task (its own plus the free ones), exactly `round(fraction * n)` weights
    are free afterwards, with Python's `round`. Weights with smaller |w| are released first, ties by index. Released
    weights are exactly 0. If more than that is already free, nothing changes.

    Args:
      state: the network.
      task: the newest task, not frozen.
      fraction: share in [0, 1] of the weights that `of` names. It may be traced; a traced value outside the range is
        clipped.
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
    if not is_traced(fraction):
        check_fraction(fraction)
    integrity.require_owner(state)
    check_choice("scope", scope, ("leaf", "global"))
    check_choice("of", of, ("available", "own"))
    shared, owner = pruned(state.shared, state.owner, ownership.id_array(entry.id), fraction, scope, of)
    return state.replace(shared=shared, owner=owner)


@dataclass(frozen=True)
class CubicSchedule:
    """Gradual pruning: from one fraction to another over a range of training steps.

    `s(t) = final + (initial - final) * (1 - p)^3`, `p = clip((t - begin) / (end - begin), 0, 1)`; many weights are
    released early, while the network can still recover, and few at the end.

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
        for name in ("begin", "end"):
            check_count(name, getattr(self, name))
        if self.begin > self.end:
            raise ArgumentError(f"0 <= begin <= end must hold, found begin={self.begin}, end={self.end}")
        check_count("every", self.every, 1)

    def __call__(self, step: int | jax.Array) -> Any:
        """Return the target fraction of free weights after this many steps: a float, of a traced step a float32."""
        if is_traced(step):
            with jax.enable_x64(True):
                since = jnp.asarray(step).astype(jnp.float64) - self.begin
                left = 1.0 - jnp.clip(since / max(self.end - self.begin, 1), 0.0, 1.0)
                left = jnp.where(since < self.end - self.begin, left, 0.0)
                return (self.final + (self.initial - self.final) * left**3).astype(jnp.float32)
        step, span = getattr(step, "item", lambda: step)(), self.end - self.begin
        progress = min(max((step - self.begin) / span, 0.0), 1.0) if span else float(step >= self.end)
        return self.final + (self.initial - self.final) * (1.0 - progress) ** 3

    def updates_at(self, step: int | jax.Array) -> Any:
        """Return whether weights are released after this many steps; of a traced step, a bool scalar."""
        if is_traced(step):
            due = (step == self.end) | ((step - self.begin) % self.every == 0)
            return due & (self.begin <= step) & (step <= self.end)
        if not self.begin <= step <= self.end:
            return False
        return bool(step == self.end or (step - self.begin) % self.every == 0)

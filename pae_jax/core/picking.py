"""Picking: which older weights a task uses, learned as real scores and kept as signs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.arrays import Masks, Owners, Scores, Signs, TaskId, Weights
from pae_jax.checks import check_flag, check_number
from pae_jax.core.selection import smallest
from pae_jax.core.spread_arrays import whole
from pae_jax.errors import ArgumentError, CheckpointError


@dataclass(frozen=True)
class Picking:
    """How a task picks among the weights of older tasks.

    Each older weight has a real score p and takes part as `b * w`, `b = 1 if p > threshold else 0`; with `ternary`
    also `b = -1 if p < 0`. The gradient treats b as p (straight-through): `dL/dp = dL/d(b * w) * w`.

    Attributes:
      threshold: score above which a weight is picked, at least 0.
      initial: score that every older weight starts from; above the threshold, so that initially all are picked.
      ternary: whether a weight may also be used with its sign flipped.
      top: share in (0, 1] of each leaf's weights, at least one, to mark by the highest scores, instead of a threshold;
        of the marked ones those are picked that the task may pick. Scores are then initialised uniformly in
        `+-1 / sqrt(fan in)`. None picks by the threshold.
      own: whether the task also picks among the weights it owns, so that scores and weights may be trained together;
        `freeze` then releases its own weights that are not picked. Goes without ternary.

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp, pae_jax as pae
      >>> pae.Picking().signs({"w": jnp.asarray([-0.1, 0.004, 0.2])})["w"].tolist()
      [False, False, True]
      >>> pae.Picking(ternary=True).signs({"w": jnp.asarray([-0.1, 0.004, 0.2])})["w"].tolist()
      [-1, 0, 1]

    Source: Mallya et al., "Piggyback", ECCV 2018; Hung et al., "Compacting, Picking and Growing", NeurIPS 2019; `own`
    as in Kang et al., "Forget-free Continual Learning with Winning Subnetworks", ICML 2022.
    """

    threshold: float = 0.005
    initial: float = 0.01
    ternary: bool = False
    top: float | None = None
    own: bool = False

    def __post_init__(self) -> None:
        check_flag("ternary", self.ternary)
        if self.top is not None and (not check_number("top", self.top, 0.0, 1.0) or self.ternary):
            raise ArgumentError(f"top must lie in (0, 1] and goes without ternary, found top={self.top!r}")
        if not isinstance(self.own, bool) or (self.own and self.ternary):
            raise ArgumentError(f"own must be a bool and goes without ternary, found own={self.own!r}")
        check_number("threshold", self.threshold, 0.0)
        check_number("initial", self.initial)
        if not self.initial > self.threshold:
            raise ArgumentError(
                f"initial must lie above the threshold {self.threshold}, so that all older weights are picked at "
                f"first; found {self.initial}"
            )

    def scores(self, shared: Weights, key: jax.Array) -> Scores:
        """Return the initial scores, float32 parallel to the shared weights; `key` draws them with `top`."""
        if self.top is None:
            return jax.tree.map(lambda w: jnp.full(w.shape, self.initial, jnp.float32), shared)
        leaves, structure = jax.tree.flatten(shared)
        bounds = [max(w.size // w.shape[-1], 1) ** -0.5 for w in leaves]
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jax.random.uniform(k, w.shape, jnp.float32, -b, b) for k, w, b in zip(keys, leaves, bounds, strict=True)
        ]
        return structure.unflatten(drawn)

    def starting_at(self, scores: Scores, mask: Masks) -> Scores:
        """Return initial scores by which the weights of a mask come first."""
        low = (lambda p: -jnp.abs(p)) if self.top is not None else jnp.zeros_like
        return jax.tree.map(lambda p, m: jnp.where(m, jnp.abs(p), low(p)), scores, mask)

    def signs(self, pick: Scores | Signs) -> Signs:
        """Return the signs of scores: bool, or int8 in {-1, 0, 1} if ternary. Signs are returned unchanged."""
        return jax.tree.map(self._sign, pick)

    def _sign(self, pick: jax.Array) -> jax.Array:
        if not jnp.issubdtype(pick.dtype, jnp.floating):
            return pick
        if self.top is not None:
            return _highest(pick, max(1, round(self.top * pick.size)))
        positive = pick > self.threshold
        return positive.astype(jnp.int8) - (pick < 0).astype(jnp.int8) if self.ternary else positive

    def straight_through(self, scores: Scores) -> Scores:
        """Return the signs as float32 factors whose gradient passes to the scores unchanged."""
        return jax.tree.map(lambda p: self._sign(p).astype(p.dtype) + (p - jax.lax.stop_gradient(p)), scores)

    def among(self, owner: Owners, task_id: TaskId) -> Masks:
        """Return the bool tree of the weights that a task may pick: older ones, and with `own` its own."""
        return jax.tree.map(lambda o: (o > 0) & (o <= task_id), owner) if self.own else older(owner, task_id)


@partial(jax.jit, static_argnames="count")
def _highest(pick: jax.Array, count: int) -> jax.Array:
    """Mark the highest scores of a leaf, ties by index."""
    scores = jax.lax.stop_gradient(pick)
    rest = jnp.asarray([pick.size - count], jnp.int32)
    [lowest] = smallest([scores - jnp.min(scores)], [jnp.ones(pick.shape, bool)], rest, "leaf")
    return ~lowest


def older(owner: Owners, task_id: TaskId) -> Masks:
    """Return the bool tree of the weights that tasks before k own, `0 < owner < k`: those that k may pick."""
    return jax.tree.map(lambda o: (o > 0) & (o < task_id), owner)


@jax.jit
def settle(signs: Signs, owner: Owners, task_id: TaskId) -> Signs:
    """Return signs with 0 where no weight can be picked, so that equal picks are equal arrays."""
    return jax.tree.map(lambda s, m: jnp.where(m, s, jnp.zeros((), s.dtype)), signs, older(owner, task_id))


def to_bits(signs: Signs, owner: Owners, task_id: int) -> np.ndarray:
    """Return signs as bits, one per older weight (two if ternary), leaf after leaf; uint8, at least one byte."""
    leaves = [whole(s)[_older(o, task_id)] for s, o in zip(*map(jax.tree.leaves, (signs, owner)), strict=True)]
    flat = np.concatenate(leaves)
    planes = [flat > 0] if flat.dtype == np.bool_ else [flat > 0, flat < 0]
    packed = np.concatenate([np.packbits(plane) for plane in planes])
    return packed if packed.size else np.zeros(1, np.uint8)


def from_bits(bits: np.ndarray, owner: Owners, task_id: int, ternary: bool) -> Signs:
    """Undo `to_bits`; raise `CheckpointError` unless there are as many bits as weights to pick from."""
    owners = jax.tree.leaves(owner)
    where = [_older(o, task_id) for o in owners]
    count = sum(int(w.sum()) for w in where)
    size = -(-count // 8)
    if bits.dtype != np.uint8 or bits.shape != (max(1, size * (2 if ternary else 1)),):
        found = f"{bits.dtype} of shape {bits.shape}"
        raise CheckpointError(f"the picks of task {task_id} are {found}, which cannot be {count} older weights")
    flat = np.unpackbits(bits[:size], count=count).astype(np.bool_)
    if ternary:
        flat = flat.astype(np.int8) - np.unpackbits(bits[size:], count=count).astype(np.int8)
    leaves, start = [], 0
    for mask in where:
        leaf = np.zeros(mask.shape, flat.dtype)
        end = start + int(mask.sum())
        leaf[mask] = flat[start:end]
        leaves.append(jnp.asarray(leaf))
        start = end
    return jax.tree.unflatten(jax.tree.structure(owner), leaves)


def _older(owner: jax.Array, task_id: int) -> np.ndarray:
    host = whole(owner)
    return (host > 0) & (host < task_id)

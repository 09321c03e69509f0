"""Picking: which older weights a task uses, learned as real scores and kept as signs."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.checks import check_number
from pae_jax.errors import ArgumentError, CheckpointError
from pae_jax.trees import Tree


@dataclass(frozen=True)
class Picking:
    """How a task picks among the weights of older tasks.

    Each older weight has a real score p and takes part as `b * w`, `b = 1 if p > threshold else 0`; with `ternary`
    also `b = -1 if p < 0`. The score learns as if b were p (straight-through): `dL/dp = dL/d(b * w) * w`.

    Attributes:
      threshold: score above which a weight is picked, at least 0.
      initial: score that every older weight starts from; above the threshold, so that all are picked at first.
      ternary: whether a weight may also be used with its sign turned.

    Raises:
      ArgumentError: a value outside its range.

    Example:
      >>> import jax.numpy as jnp, pae_jax as pae
      >>> pae.Picking().signs({"w": jnp.asarray([-0.1, 0.004, 0.2])})["w"].tolist()
      [False, False, True]
      >>> pae.Picking(ternary=True).signs({"w": jnp.asarray([-0.1, 0.004, 0.2])})["w"].tolist()
      [-1, 0, 1]

    Source: Mallya et al., "Piggyback", ECCV 2018; Hung et al., "Compacting, Picking and Growing", NeurIPS 2019.
    """

    threshold: float = 0.005
    initial: float = 0.01
    ternary: bool = False

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0.0)
        check_number("initial", self.initial)
        if not self.initial > self.threshold:
            raise ArgumentError(
                f"initial must lie above the threshold {self.threshold}, so that all older weights are picked at "
                f"first; found {self.initial}"
            )

    def scores(self, shared: Tree) -> Tree:
        """Return the initial scores, float32 parallel to the shared weights."""
        return jax.tree.map(lambda w: jnp.full(w.shape, self.initial, jnp.float32), shared)

    def signs(self, pick: Tree) -> Tree:
        """Return what takes part: bool, or int8 in {-1, 0, 1} if ternary. Signs are returned as they are."""
        return jax.tree.map(self._sign, pick)

    def _sign(self, pick: jax.Array) -> jax.Array:
        if not jnp.issubdtype(pick.dtype, jnp.floating):
            return pick
        positive = pick > self.threshold
        return positive.astype(jnp.int8) - (pick < 0).astype(jnp.int8) if self.ternary else positive

    def straight_through(self, scores: Tree) -> Tree:
        """Return the signs as float32 factors whose gradient passes to the scores unchanged."""
        return jax.tree.map(lambda p: self._sign(p).astype(p.dtype) + (p - jax.lax.stop_gradient(p)), scores)


def older(owner: Tree, task_id: jax.Array) -> Tree:
    """Return the bool tree of the weights that tasks before k own, `0 < owner < k`: those that k may pick."""
    return jax.tree.map(lambda o: (o > 0) & (o < task_id), owner)


@jax.jit
def settle(signs: Tree, owner: Tree, task_id: jax.Array) -> Tree:
    """Return signs with 0 where there is nothing to pick, so that equal picks are equal arrays."""
    return jax.tree.map(lambda s, m: jnp.where(m, s, jnp.zeros((), s.dtype)), signs, older(owner, task_id))


def to_bits(signs: Tree, owner: Tree, task_id: int) -> np.ndarray:
    """Return signs as bits, one per older weight (two if ternary), leaf after leaf; uint8, at least one byte."""
    leaves = [np.asarray(s)[_older(o, task_id)] for s, o in zip(*map(jax.tree.leaves, (signs, owner)), strict=True)]
    flat = np.concatenate(leaves)
    planes = [flat > 0] if flat.dtype == np.bool_ else [flat > 0, flat < 0]
    packed = np.concatenate([np.packbits(plane) for plane in planes])
    return packed if packed.size else np.zeros(1, np.uint8)


def from_bits(bits: np.ndarray, owner: Tree, task_id: int, ternary: bool) -> Tree:
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
    host = np.asarray(owner)
    return (host > 0) & (host < task_id)

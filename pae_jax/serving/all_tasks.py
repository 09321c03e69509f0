"""One compiled program for all tasks on one batch, and the confidence of each task.

There are two variants. If every task's own weights are operands, the program contains one copy of the backbone per
task: it does no work but the forward passes, but its compile time grows with the number of tasks. If the shared weights
are operands, the program contains one backbone per width, mapped over traced task ids, and masks the weights at run
time.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.caching import Cache
from pae_jax.core import State, TaskState, ownership
from pae_jax.nets import Net, apply_backbone, apply_task, heads
from pae_jax.trees import Tree

By = Literal["confidence", "entropy", "gradient"]
_TOGETHER = Cache(8)

Program = Callable[[Any, Tree], tuple[list[jax.Array], dict[str, jax.Array]]]
"""`(operands, x) -> (logits of each task, {"confidence" and "entropy": float32 (examples, tasks)})`."""


class Inference(NamedTuple):
    """The inferred task of each input.

    Attributes:
      tasks: names of the chosen tasks, one per example; a single one with `per="batch"`.
      scores: float32 (examples, tasks), columns in the order of `Server.tasks`: the task with the largest score is
        chosen. In [0, 1], except for `by="gradient"`. One row, the mean over the examples, with `per="batch"`.
      logits: `{task: logits (examples, ..., classes)}` of every task, chosen or not; empty with `by="gradient"`, which
        does not compute them.
    """

    tasks: list[str]
    scores: np.ndarray
    logits: dict[str, jax.Array]


class _Kind(NamedTuple):
    """Properties that tasks must share to be mapped over by one loop; their heads may differ."""

    width: float
    sharing: str
    picks: str | None


def by_gradient(net: Net, entries: Sequence[TaskState], together: bool) -> Callable[[Any, Tree], jax.Array]:
    """Return the program of `-dH/da` at `a = 1 / tasks`, float32 (examples, tasks), or (1, tasks) for all together.

    H is the entropy of the softmax of a network whose weights, local variables and head are the sums over all tasks,
    weighted by a. Its operands are `[(weights, local, head)]`, parallel to the tasks.
    """
    first = entries[0]
    apply = apply_task(net, first.width, first.head_spec)

    def entropy(shares: jax.Array, operands: Any, x: Tree) -> jax.Array:
        def mixed(*leaves: jax.Array) -> jax.Array:
            if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
                return leaves[0]
            return sum((a.astype(w.dtype) * w for a, w in zip(shares, leaves, strict=True)), jnp.zeros_like(leaves[0]))

        weights, local, head = jax.tree.map(mixed, *operands)
        log_p = jax.nn.log_softmax(apply(weights, local, head, x).astype(jnp.float32), axis=-1)
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1).mean()

    def run(operands: Any, x: Tree) -> jax.Array:
        equal = jnp.full((len(entries),), 1 / len(entries), jnp.float32)
        slope = jax.grad(entropy)
        if together:
            return -slope(equal, operands, x)[None]
        return -jax.lax.map(lambda one: slope(equal, operands, jax.tree.map(lambda leaf: leaf[None], one)), x)

    key = (first.width, heads.key_of(first.head_spec), len(entries), together)
    return _TOGETHER.get(("by gradient", net, key), lambda: jax.jit(run))


def at_widths(state: State, entries: Iterable[TaskState]) -> dict[float, State]:
    """Return `{width: state}` for the widths of tasks: with only shared weights and owners, gathered at that width."""

    def gathered(width: float) -> State:
        shared, owner = (ownership.at_width(state, tree, width) for tree in (state.shared, state.owner))
        return State(shared=shared, owner=owner, tasks={}, width=width)

    return {width: gathered(width) for width in sorted({entry.width for entry in entries})}


def by_weights(net: Net, entries: Sequence[TaskState]) -> Program:
    """Return the program whose operands are `[(weights, local, head)]`, parallel to the tasks."""
    applies = [apply_task(net, entry.width, entry.head_spec) for entry in entries]

    def run(operands: Any, x: Tree) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        pairs = zip(applies, operands, strict=True)
        return _with_scores([apply(weights, local, head, x) for apply, (weights, local, head) in pairs])

    key = tuple((entry.width, heads.key_of(entry.head_spec)) for entry in entries)
    return _TOGETHER.get(("by weights", net, key), lambda: jax.jit(run))


def by_id(net: Net, entries: Sequence[TaskState], at: Mapping[float, State]) -> tuple[Program, Any]:
    """Return the program that masks the weights by task id, and its operands.

    Args:
      net: the network.
      entries: the tasks.
      at: the result of `at_widths` for them.
    """
    positions: dict[_Kind, list[int]] = {}
    for position, entry in enumerate(entries):
        positions.setdefault(_kind(entry), []).append(position)
    operands = []
    for kind, members in positions.items():
        own = [(ownership.id_array(entries[i].id), entries[i].local, ownership.signs(entries[i])) for i in members]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
        operands.append((at[kind.width].shared, at[kind.width].owner, stacked, [entries[i].head for i in members]))
    specs = [entry.head_spec for entry in entries]
    key = tuple((_kind(entry), heads.key_of(entry.head_spec)) for entry in entries)
    return _TOGETHER.get(("by id", net, key), lambda: jax.jit(_mapped(net, positions, specs))), operands


def _mapped(net: Net, positions: dict[_Kind, list[int]], specs: list[Any]) -> Program:
    outputs = [heads.program(spec) for spec in specs]
    backbones = {kind: apply_backbone(net, kind.width) for kind in positions}

    def features_of(kind: _Kind, shared: Tree, owner: Tree, stacked: Any, x: Tree) -> jax.Array:
        def features(task: Any) -> jax.Array:
            task_id, local, signs = task
            return backbones[kind](ownership.effective(shared, owner, task_id, kind.sharing, signs), local, x)

        return jax.lax.map(features, stacked)

    def run(operands: Any, x: Tree) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        logits: dict[int, jax.Array] = {}
        for (kind, members), (shared, owner, stacked, own_heads) in zip(positions.items(), operands, strict=True):
            features = features_of(kind, shared, owner, stacked, x)
            for index, (position, head) in enumerate(zip(members, own_heads, strict=True)):
                one = jax.tree.map(operator.itemgetter(index), features)
                logits[position] = outputs[position].apply(head, one, False, None)[0]
        return _with_scores([logits[position] for position in range(len(specs))])

    return run


def _kind(entry: TaskState) -> _Kind:
    signs = jax.tree.leaves(ownership.signs(entry))
    return _Kind(entry.width, entry.seeing, str(signs[0].dtype) if signs else None)


def _with_scores(logits: list[jax.Array]) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    if not all(isinstance(one, jax.Array) and one.ndim > 1 for one in logits):
        return logits, {}  # `infer_task` refuses outputs without a softmax
    scores = [_scores(one) for one in logits]
    return logits, {by: jnp.stack([score[by] for score in scores], axis=1) for by in scores[0]}


def _scores(logits: jax.Array) -> dict[str, jax.Array]:
    """Return max p and 1 - H(p) / log C of the softmax p of each example, averaged over further axes."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(p == 0, 0.0, p * log_p), axis=-1)  # 0 * log 0 is 0, not NaN
    certainty = jnp.maximum(1.0 - entropy / math.log(max(logits.shape[-1], 2)), 0.0)  # rounding may give less than 0
    found = {"confidence": jnp.max(p, axis=-1), "entropy": certainty}
    return {by: score.mean(axis=tuple(range(1, score.ndim))) for by, score in found.items()}


def grouped(scores: np.ndarray, size: int) -> np.ndarray:
    """Return the mean of every `size` neighbouring rows; the last group may be smaller."""
    return np.stack([scores[start : start + size].mean(axis=0) for start in range(0, len(scores), size)])


def surest(scores: np.ndarray) -> np.ndarray:
    """Return for each row the column of the largest score, the first on ties; NaN is never the largest."""
    return np.where(np.isnan(scores), -np.inf, scores).argmax(axis=1)

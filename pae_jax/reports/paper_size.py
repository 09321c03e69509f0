"""Size of a packed network by PAE's published formula, from owner counts alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jax

from pae_jax.core import State, check_state
from pae_jax.errors import ArgumentError, UnknownTaskError
from pae_jax.reports.ownership_table import report
from pae_jax.reports.size_table import MB, Sizes, values
from pae_jax.trees import PARAMS, flatten

CSV_COLUMNS = {
    "inference": "Model size through inference (MB) (Shared part + task-specific part)",
    "shared": "Shared part (MB)",
    "bytes": "Task specific part (MB)",
    "whole_masks": "Whole masks (MB)",
    "masks": "Task specific masks (MB)",
    "norms": "Task specific batch norm vars (MB)",
    "biases": "Task specific biases (MB)",
}
"""Size columns of the reference's result files, by the keys of the rows of `paper`."""

_VALUE = 4
_OWNED = _VALUE + 1


@dataclass(frozen=True)
class Counts:
    """Inputs of the paper's formula for one task; all are counts of values at the task's width.

    Attributes:
      task: name.
      own: shared weights that the task owns.
      older: weights of older tasks that it uses; None means all that the tasks before it in the list own.
      norms: norm offsets, scales and statistics (PAE: 3 per channel), and all other local variables except biases.
      biases: biases of layers with shared weights.
      kernels: arrays of shared weights.
      head: weights and biases of the head; 0 if it is not counted.
      whole: all shared weights, free ones included.

    Raises:
      ArgumentError: a negative number.
    """

    task: str
    own: int
    older: int | None = None
    norms: int = 0
    biases: int = 0
    kernels: int = 0
    head: int = 0
    whole: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "task" and value is not None and value < 0:
                raise ArgumentError(f"{field.name} of task {self.task!r} must be at least 0, found {value}")


def paper(source: State | Sequence[Counts], *, without_head: str | Collection[str] = ()) -> Sizes:
    """Return the size by the formula of PAE's authors, from owner counts alone.

    Of task k: `5 own_k + 4 (norms_k + biases_k + kernels) + 4 head_k` bytes. An owned weight takes 4 bytes plus 1 mask
    byte, and each kernel one scalar threshold per task. Free weights and their mask bytes are not counted.

    Args:
      source: a state, whose owners, local variables and heads are counted; or the counts of its tasks, in order.
      without_head: task, or tasks, whose head is left out, as the authors leave out the 8631 identities of FaceNet.

    Returns:
      One row per task: `weights`, `masks`, `norms`, `biases`, `thresholds`, `head`, their sum `bytes` (the task's own
      part), `shared` (5 bytes for each older weight that it uses), `inference = shared + bytes`, and `whole_masks` (1
      byte per weight of the task's width). The total is the sum of `bytes`.

    Raises:
      UnknownTaskError: `without_head` names a task that does not exist.
      ArgumentError: a repeated task name.

    Example:
      >>> from pae_jax.reports import sizes
      >>> facenet = {"norms": 3 * 14_800, "biases": 20_992, "kernels": 133}
      >>> face = sizes.Counts("face", own=14_403_449, **facenet)
      >>> age = sizes.Counts("age", own=1_854_931, head=513 * 8, **facenet)
      >>> found = sizes.paper([face, age])
      >>> [round(row["bytes"] / sizes.MB, 2) for row in found.rows]
      [68.93, 9.11]

    Source: Hung et al., ICMR 2019: the poster's sizes, by the authors' model analyzer.
    """
    counted = count(source) if isinstance(source, State) else list(source)
    known = [counts.task for counts in counted]
    if len(set(known)) != len(known):
        raise ArgumentError(f"tasks must have distinct names, found {known}")
    without_head = {without_head} if isinstance(without_head, str) else set(without_head)
    for name in sorted(without_head):
        if name not in known:
            raise UnknownTaskError(name, known, "the source")
    rows, before = [], 0
    for counts in counted:
        older = before if counts.older is None else counts.older
        before += counts.own
        parts = {
            "weights": _VALUE * counts.own,
            "masks": counts.own,
            "norms": _VALUE * counts.norms,
            "biases": _VALUE * counts.biases,
            "thresholds": _VALUE * counts.kernels,
            "head": 0 if counts.task in without_head else _VALUE * counts.head,
        }
        row = {"part": counts.task, **parts, "bytes": sum(parts.values()), "shared": _OWNED * older}
        rows.append(row | {"inference": row["bytes"] + row["shared"], "whole_masks": counts.whole})
    notes = [
        "every value counts 4 bytes, every owned weight 1 mask byte, a free weight nothing",
        "shared: the older weights that a task uses; the authors' code takes those of task 1, for task 1 itself too",
        "thresholds: one scalar per kernel, which the authors store and this library does not have",
    ]
    if without_head:
        notes.append(f"heads left out: {', '.join(name for name in known if name in without_head)}")
    if isinstance(source, State) and any(entry.pick is not None for entry in source.tasks.values()):
        notes.append("picks of older weights are not part of the formula and count nothing; see stored_estimate")
    return Sizes("paper", "published formula, from owner counts", rows, tuple(notes))


def count(state: State) -> list[Counts]:
    """Return the inputs of `paper` for each task of a state, in order of learning.

    A bias is a local variable in a layer with a shared weight; all other local variables count as `norms`.

    Args:
      state: the network.

    Returns:
      One `Counts` per task.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> from pae_jax.reports import sizes
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "age", head=2, key=jax.random.key(1))
      >>> sizes.count(pae.prune(state, "age", 0.5))
      [Counts(task='age', own=160, older=0, norms=0, biases=32, kernels=2, head=34, whole=320)]
    """
    check_state(state)
    layers = {_layer(path) for path in flatten(state.shared)}
    found = []
    for row in report(state).rows[:-1]:  # without the free weights
        entry = state.tasks[row["task"]]
        beside = [leaf for path, leaf in flatten(entry.local.get(PARAMS, {})).items() if _layer(path) in layers]
        biases = sum(leaf.size for leaf in beside)
        found.append(
            Counts(
                task=row["task"],
                own=row["weights"],
                older=row["sees"] - row["weights"],
                norms=values(entry.local) - biases,
                biases=biases,
                kernels=len(jax.tree.leaves(state.owner)),
                head=values(entry.head),
                whole=weights_at(state, entry.width),
            )
        )
    return found


def csv_columns(sizes: Sizes, task: str) -> dict[str, float]:
    """Return the size columns of the reference's result files for one task.

    Args:
      sizes: the result of `paper`.
      task: name of a task.

    Returns:
      `{column: MB of 2^20 bytes}`, in the order of the reference; not rounded (there, to 3 decimals).

    Raises:
      ArgumentError: a table of another kind.
      UnknownTaskError: no task of this name.

    Example:
      >>> from pae_jax.reports import sizes
      >>> columns = sizes.csv_columns(sizes.paper([sizes.Counts("age", own=2**20)]), "age")
      >>> columns["Task specific part (MB)"], columns["Task specific masks (MB)"]
      (5.0, 1.0)
    """
    if sizes.kind != "paper":
        raise ArgumentError(f"the reference's columns are those of sizes.paper, found a {sizes.kind!r} table")
    row = sizes[task]
    return {column: row[key] / MB for key, column in CSV_COLUMNS.items()}


def weights_at(state: State, width: float) -> int:
    """Count the shared weights at one of the widths the state has had."""
    check_state(state)
    for growth in state.growth:
        if growth.narrow >= width:
            return sum(math.prod(growth.maps[f"{PARAMS}/{path}"].narrow) for path in flatten(state.owner))
    return values(state.owner)


def _layer(path: str) -> str:
    return path.rpartition("/")[0]

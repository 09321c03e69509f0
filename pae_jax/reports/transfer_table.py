"""Forward transfer of a network: what each task reuses of the older ones, and what it gains over its own network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pae_jax import html
from pae_jax.checks import check_mapping, check_number
from pae_jax.core import State, TaskState, names, ownership, spread_arrays
from pae_jax.errors import ArgumentError, UnknownTaskError
from pae_jax.reports.page import text_table
from pae_jax.trees import flatten


@dataclass(frozen=True)
class Transfer:
    """What each task reuses and gains; `str(report)` is a table.

    Attributes:
      rows: one dict per task in order of learning: `task`, `learned` and `alone` (metric in this network and in the
        task's own), `gain` (`learned - alone`), each None if not given; `sees` (weights that take part in its forward
        pass), `reused` (share of those that older tasks own), `by` (`{older task: share of those}`), `picked` (`{older
        task: share of its weights that this task uses}`).
      leaves: per leaf path the weights that each task uses of each owner, int64 (tasks, tasks): `[user, owner]`.
    """

    rows: list[dict[str, Any]]
    leaves: dict[str, np.ndarray]

    @property
    def gain(self) -> float:
        """Forward transfer: the mean gain of all tasks but the first; NaN without."""
        gains = [row["gain"] for row in self.rows[1:] if row["gain"] is not None]
        return float(np.mean(gains)) if gains else float("nan")

    def __str__(self) -> str:
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html.table(*self._table())

    def _table(self) -> tuple[list[str], list[list[str]]]:
        tasks = [row["task"] for row in self.rows]
        measured = [name for name in ("learned", "alone", "gain") if any(row[name] is not None for row in self.rows)]
        lines = []
        for row in self.rows:
            values = [
                "" if row[name] is None else f"{row[name]:{'+' if name == 'gain' else ''}.4f}" for name in measured
            ]
            shares = [f"{row['by'][older]:.1%}" if older in row["by"] else "" for older in tasks[:-1]]
            lines.append([row["task"], *values, f"{row['sees']:,}", f"{row['reused']:.1%}", *shares])
        return ["task", *measured, "sees", "reused", *(f"of {older}" for older in tasks[:-1])], lines

    def plot(self) -> Any:
        """Return a matplotlib figure: shares of the weights in use by owner, and gains; needs the `plot` extra."""
        from pae_jax.reports.plotting import Picture

        tasks = [row["task"] for row in self.rows]
        if not tasks:
            raise ArgumentError("the network has no tasks to plot; pack one first")
        known = any(row["gain"] is not None for row in self.rows)
        size = 1.6 + 0.45 * len(tasks)
        figure = Picture((2 if known else 1) * size + 1.2, size)
        axes = np.atleast_1d(figure.subplots(1, 2 if known else 1, sharey=True))
        used = np.sum(list(self.leaves.values()), axis=0)
        image = axes[0].imshow(used / np.maximum(used.sum(axis=1, keepdims=True), 1), vmin=0.0, vmax=1.0)
        axes[0].set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
        axes[0].set_yticks(range(len(tasks)), tasks)
        axes[0].set(xlabel="owner of the weights", ylabel="task", title="share of the weights in use")
        figure.colorbar(image, ax=axes[0], shrink=0.8)
        if known:
            axes[1].barh(range(len(tasks)), [row["gain"] or 0.0 for row in self.rows])
            axes[1].axvline(0.0, color="0.5", linewidth=1)
            axes[1].set(title="gain over its own network")
        return figure


def transfer(
    state: State, learned: Mapping[str, float] | None = None, alone: Mapping[str, float] | None = None
) -> Transfer:
    """Report what each task reuses of the older ones, and what it gains over its own network.

    `reused = #{weights in use that older tasks own} / #{weights in use}`; `gain = learned - alone`.

    Args:
      state: the network.
      learned: metric of tasks in this network, more is better, such as `{o.task: o.value for o in stream.outcomes}`;
        None leaves it out.
      alone: metric, on the same data, of each task's own network from scratch, such as that of `pae.baseline`.

    Returns:
      A `Transfer`: `str(report)`, `report.rows`, `report.leaves`, `report.gain`, `report.plot()`.

    Raises:
      UnknownTaskError: a metric of a task that the network does not have.
      ArgumentError: a metric that is not a finite number.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "age", head=2, key=jax.random.key(1))
      >>> state = pae.freeze(pae.prune(state, "age", 0.5), "age")
      >>> state = pae.pack(net, state, "gender", head=2, key=jax.random.key(2))
      >>> print(pae.transfer(state, learned={"gender": 0.93}, alone={"gender": 0.9}))
      task    learned   alone     gain  sees  reused  of age
      age                                160    0.0%
      gender   0.9300  0.9000  +0.0300   320   50.0%   50.0%

    Source: the gain is the intransigence of Chaudhry et al., ECCV 2018, with the sign turned, task by task.
    """
    tasks = names(state)
    given = {"learned": learned, "alone": alone}
    known = {name: check_mapping(name, values, "{task: value}") for name, values in given.items()}
    for label, values in known.items():
        for task, value in values.items():
            if task not in state.tasks:
                raise UnknownTaskError(task, tasks, "the network")
            check_number(f"{label} of task {task!r}", value)
    pairs = [_counts(state, state.tasks[task]) for task in tasks]
    rows = []
    for task, (used, owned) in zip(tasks, pairs, strict=True):
        total, there = (
            dict(zip(tasks, np.sum(list(of.values()), axis=0).tolist(), strict=True)) for of in (used, owned)
        )
        older, sees = tasks[: state.tasks[task].id - 1], sum(total.values())
        values = {label: None if task not in of else float(of[task]) for label, of in known.items()}
        both = None not in values.values()
        rows.append(
            {
                "task": task,
                **values,
                "gain": known["learned"][task] - known["alone"][task] if both else None,
                "sees": sees,
                "reused": sum(total[one] for one in older) / max(sees, 1),
                "by": {one: total[one] / max(sees, 1) for one in older},
                "picked": {one: total[one] / max(there[one], 1) for one in older},
            }
        )
    leaves = {path: np.stack([used[path] for used, _ in pairs]) for path in (pairs[0][0] if pairs else ())}
    return Transfer(rows, leaves)


def _counts(state: State, entry: TaskState) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return per leaf the weights of each owner, at a task's width: those that it uses, and all."""
    owner = ownership.at_width(state, state.owner, entry.width)
    seen = ownership.visible(owner, ownership.id_array(entry.id), entry.seeing, ownership.signs(entry))
    size = len(state.tasks) + 1
    host = {path: spread_arrays.whole(leaf) for path, leaf in flatten(owner).items()}
    masks = dict(zip(host, map(spread_arrays.whole, jax.tree.leaves(seen)), strict=True))

    def count(ids: np.ndarray) -> np.ndarray:
        return np.bincount(ids.ravel(), minlength=size)[1:].astype(np.int64)

    return {path: count(ids[masks[path]]) for path, ids in host.items()}, {p: count(ids) for p, ids in host.items()}

"""Weight ownership of a network: a table, its rows and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pae_jax import html
from pae_jax.core import State, TaskState, check_state, names, owner_counts, ownership, spread_arrays


@dataclass(frozen=True)
class Report:
    """Ownership of a network; `str(report)` is a table.

    Attributes:
      rows: one dict per task in order of learning, and a last one for the free weights: `task`, `id`, `phase`,
        `width`, `sharing`, `weights`, `share` (of all shared weights, in [0, 1]), `sees` (weights that take part in
        the task's forward pass), `zero` (its weights that are exactly 0: they are owned but have no effect; in a
        trained task they never had a gradient).
      leaves: per leaf path the weights of each owner, int64 (tasks + 1,), free ones first.
      width: present channel factor.
    """

    rows: list[dict[str, Any]]
    leaves: dict[str, np.ndarray]
    width: float

    def __str__(self) -> str:
        size = max(8, *(len(row["task"]) for row in self.rows))
        lines = [f"{'task':<{size}}  id  phase   width  sharing     weights   share        sees"]
        for row in self.rows:
            width = "" if row["width"] is None else f"{row['width']:.3g}"
            sees = "" if row["sees"] is None else f"{row['sees']:,}"
            lines.append(
                f"{row['task']:<{size}} {row['id']:>3}  {row['phase']:<6} {width:>6}  {row['sharing']:<7} "
                f"{row['weights']:>11,} {row['share']:>7.1%} {sees:>11}"
            )
        total = sum(row["weights"] for row in self.rows)
        lines.append(f"{total:,} shared weights in {len(self.leaves)} arrays at width {self.width:.3g}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        columns = list(self.rows[0])
        bars = html.ownership([row["task"] for row in self.rows[:-1]], self.leaves)
        return html.table(columns, [[row[name] for name in columns] for row in self.rows]) + bars

    def plot(self) -> Any:
        """Return a matplotlib figure: per layer the share of each owner; needs the `plot` extra."""
        from matplotlib import colormaps

        from pae_jax.reports.plotting import Picture

        labels = [row["task"] for row in self.rows]
        counts = np.stack([np.roll(leaf, -1) for leaf in self.leaves.values()])  # free weights last, as in rows
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        figure = Picture(8, 1.6 + 0.28 * len(self.leaves))
        axes = figure.subplots()
        left = np.zeros(len(self.leaves))
        colours = [*colormaps["turbo"](np.linspace(0.08, 0.92, max(len(labels) - 1, 1)))[: len(labels) - 1], "0.9"]
        for index, (label, colour) in enumerate(zip(labels, colours, strict=True)):
            axes.barh(range(len(self.leaves)), shares[:, index], left=left, color=colour, label=label, height=0.8)
            left += shares[:, index]
        axes.set_yticks(range(len(self.leaves)), list(self.leaves), fontsize=7)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="share of the layer's weights")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
        return figure


def report(state: State) -> Report:
    """Report which task owns which weights.

    Args:
      state: the network.

    Returns:
      A `Report`: `str(report)`, `report.rows`, `report.leaves`, `report.plot()`.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "age", head=2, key=jax.random.key(1))
      >>> print(pae.report(pae.prune(state, "age", 0.5)))
      task      id  phase   width  sharing     weights   share        sees
      age        1  packed      1  all             160   50.0%         160
      (free)                                       160   50.0%
      320 shared weights in 2 arrays at width 1
    """
    check_state(state)
    leaves = owner_counts(state)
    totals = np.sum(list(leaves.values()), axis=0)
    rows = []
    for name in names(state):
        entry = state.tasks[name]
        rows.append(
            {
                "task": name,
                "id": entry.id,
                "phase": entry.phase,
                "width": entry.width,
                "sharing": entry.sharing,
                "weights": int(totals[entry.id]),
                "share": float(totals[entry.id] / totals.sum()),
                "sees": _seen(state, entry, totals),
                "zero": _zeros(state, entry),
            }
        )
    free = {"task": "(free)", "id": "", "phase": "", "width": None, "sharing": "", "sees": None, "zero": None}
    rows.append(free | {"weights": int(totals[0]), "share": float(totals[0] / totals.sum())})
    return Report(rows, leaves, state.width)


def _zeros(state: State, entry: TaskState) -> int:
    """Count the weights of a task that are exactly 0."""
    pairs = zip(jax.tree.leaves(state.shared), jax.tree.leaves(state.owner), strict=True)
    return sum(int(((w == 0) & (o == entry.id)).sum()) for w, o in pairs)


def _seen(state: State, entry: TaskState, totals: np.ndarray) -> int:
    """Count the weights that take part in a task's forward pass."""
    signs = ownership.signs(entry)
    if signs is None:
        older = [1] if entry.sharing == "first" else list(range(1, entry.id))
        return int(totals[list({*older, entry.id})].sum())
    owner = ownership.at_width(state, state.owner, entry.width)
    mask = ownership.visible(owner, ownership.id_array(entry.id), entry.seeing, signs)
    return sum(int(spread_arrays.whole(leaf).sum()) for leaf in jax.tree.leaves(mask))

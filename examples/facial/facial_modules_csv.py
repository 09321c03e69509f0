"""Result files of facial_modules.py in the columns of the authors, with test values; and the mean over folds."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pae_jax as pae
from pae_jax.reports import sizes, text_table

Measure = Callable[[pae.State], dict[str, float]]
"""`network -> test values by column`."""


def write_stages(path: Path, net: pae.Net, stages: Path, outcome: pae.Outcome, heads: Any, measure: Measure) -> None:
    """Write one row for each stage of a task that is on disk, unpruned first, as the authors' result files have it.

    Args:
      path: the file; if it is there, it is kept.
      net: the network description.
      stages: folder of the task's stages.
      outcome: what came of the task.
      heads: modules of heads, as for `pae.load`.
      measure: measures a network on test data.
    """
    if path.exists():
        return
    records = {r.stage: r for r in outcome.records if (stages / r.stage).exists()}
    if not records:  # only the chosen stage is kept
        records = {"frozen": next(r for r in reversed(outcome.records) if r.pruned == outcome.pruned)}
    rows = []
    for stage, record in records.items():
        state = pae.load(net, stages / stage, heads=heads)
        rows.append(authors_row(state, outcome.task, record.pruned, measure(state), str(record.kept_epoch)))
    _write(path, rows)


def authors_row(state: pae.State, task: str, pruned: float, values: Mapping[str, float], epoch: str) -> dict[str, str]:
    """Return the row of a task: what is pruned, the measured values, the epoch, and sizes in MB by the paper's formula.

    Args:
      state: the network.
      task: name of the task.
      pruned: free / (free + own).
      values: measured values by column.
      epoch: that was kept.
    """
    table = sizes.paper(state, without_head=[name for name in state.tasks if name == "face"])
    row = {name: f"{value:.5f}" for name, value in {"Pruned rate": pruned, **values}.items()} | {"Epoch No.": epoch}
    return row | {name: f"{value:.3f}" for name, value in sizes.csv_columns(table, task).items()}


def fold_rows(folds: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return one row for each task: mean and standard deviation over the folds, of test values and of sizes in MB.

    The deviation is that of the population, as for the folds of LFW.
    """
    rows = []
    for number, task in enumerate(folds[0]["tasks"]):
        name = task["task"]
        if name == "face":  # one network for all folds
            packed, alone = ([fold["verification"][part]["accuracy"] for fold in folds] for part in _FACE)
        else:
            packed, alone = ([fold["tasks"][number][part] for fold in folds] for part in ("test", "own_test"))
        size = [fold["sizes"]["paper_bytes"][name] / sizes.MB for fold in folds]
        values = {"packed": packed, "separate": alone, "MB": size}
        row = {"Task": name, "Folds": str(len(folds))}
        for title, found in values.items():
            row |= {f"{title} mean": f"{np.mean(found):.5f}", f"{title} std": f"{np.std(found):.5f}"}
        rows.append(row)
    return rows


def write_folds(path: Path, folds: Sequence[Mapping[str, Any]]) -> str:
    """Write `fold_rows` as CSV; return them as a table."""
    rows = fold_rows(folds)
    _write(path, rows)
    return text_table(list(rows[0]), [list(row.values()) for row in rows])


def _write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text.getvalue(), "utf-8")
    aside.replace(path)


_FACE = ("packed", "unpruned")

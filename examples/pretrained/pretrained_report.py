"""Table, picture and page of the experiments on pretrained encoders."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pretrained_packing

from pae_jax.reports import Picture, text_table, write_page

SPAN = 0.12
"""Range of accuracies in the picture; a way below it is drawn as a triangle, with its accuracy beside it."""


def collect(out: Path, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per way: means over its finished tasks and over the seeds that have them all.

    Bytes, trained numbers and seconds are per task.
    """
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for folder in sorted(out.glob("seed-*/*")):
        files = [folder / f"{task}.json" for task in tasks]
        if all(file.exists() for file in files):
            found.setdefault(folder.name, []).append([json.loads(file.read_text("utf-8")) for file in files])
    rows = [_row(way, seeds, tasks) for way, seeds in found.items()]
    return sorted(rows, key=lambda row: row["stored"])


def _row(way: str, seeds: list[list[dict[str, Any]]], tasks: Sequence[str]) -> dict[str, Any]:
    values = {key: np.asarray([[r[key] for r in runs] for runs in seeds]) for key in ("accuracy", "val", "seconds")}
    sizes = {key: float(np.mean([[r[key] for r in runs] for runs in seeds])) for key in ("stored", "trained")}
    forgetting = [run["notes"].get("forgetting") for runs in seeds for run in runs[:-1]]
    return {
        "way": way,
        "ours": way in pretrained_packing.WAYS,
        "seeds": len(seeds),
        "accuracy": float(values["accuracy"].mean()),
        "by task": dict(zip(tasks, values["accuracy"].mean(axis=0).tolist(), strict=True)),
        "val": float(values["val"].mean()),
        **sizes,
        "seconds": float(values["seconds"].mean()),
        # Ways that train nothing of an older task cannot forget.
        "forgetting": 0.0 if None in forgetting else float(np.mean(forgetting)),
        "notes": [run["notes"] for run in seeds[0] if run["notes"]],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results as text, from few to many bytes."""
    tasks = list(rows[0]["by task"]) if rows else []
    columns = ["way", "mean", *tasks, "kB per task", "numbers", "s per task", "forgetting"]
    cells = [
        [
            row["way"] + (" *" if row["ours"] else ""),
            f"{row['accuracy']:.4f}",
            *(f"{row['by task'][task]:.3f}" for task in tasks),
            f"{row['stored'] / 1000:,.1f}",
            f"{row['trained']:,.0f}",
            f"{row['seconds']:.0f}",
            f"{row['forgetting']:.3f}",
        ]
        for row in rows
    ]
    return f"{text_table(columns, cells)}\n\n* by packing. Test accuracy; bytes as delivered, in half precision."


def picture(rows: Sequence[dict[str, Any]]) -> Picture:
    """Return the picture of accuracy against bytes per task; ways far below the best stand at its lower edge."""
    figure = Picture(8, 4.6)
    axes = figure.subplots()
    axes.set(xscale="log", xlabel="kB per task, head included", ylabel="mean test accuracy")
    axes.grid(alpha=0.3)
    axes.margins(0.08, 0.12)
    floor = max(row["accuracy"] for row in rows) - SPAN
    points = [(row["stored"] / 1000, max(row["accuracy"], floor)) for row in rows]
    labels = [row["way"] + (f" ({row['accuracy']:.2f})" if row["accuracy"] < floor else "") for row in rows]
    colors = ["#1a7f37" if row["ours"] else "#57606a" for row in rows]
    for row, point, color in zip(rows, points, colors, strict=True):
        axes.plot(*point, "v" if row["accuracy"] < floor else "o" if row["ours"] else "s", color=color)
    figure.draw_without_rendering()  # only now are limits and margins known
    printed = axes.transData.transform(points) * 72 / figure.dpi
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in printed]
    bottom, top = (edge * 72 / figure.dpi for edge in axes.bbox.intervaly)
    taken += [(-math.inf, -math.inf, math.inf, bottom), (-math.inf, top, math.inf, math.inf)]
    for label, point, color, (x, y) in zip(labels, points, colors, printed, strict=True):
        left, low = _free_place(x, y, 5 * len(label), taken)
        axes.annotate(
            label,
            point,
            (left - x, low - y),
            textcoords="offset points",
            fontsize=8,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.4, "shrinkB": 4},
        )
    return figure


def _free_place(x: float, y: float, length: float, taken: list[tuple[float, ...]]) -> tuple[float, float]:
    """Return where the label of a point begins, in points of print, so that it covers no other; and take that place."""
    heights = sorted(range(-60, 61, 10), key=abs)
    for up, left in ((up, left) for up in heights for left in (x + 6, x - 6 - length)):
        box = (left, y + up - 3, left + length, y + up + 6)
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            taken.append(box)
            return left, y + up - 3
    return x + 6, y


def write(out: Path, title: str, rows: Sequence[dict[str, Any]], text: str) -> Path:
    """Write the picture, the numbers and a page that shows them; return the page."""
    heading = "Accuracy against bytes per task: packing (green) and the usual ways (grey)"
    pictures = {"accuracy_per_byte": (heading, picture(rows))}
    return write_page(out, title, text, pictures, {"ways": list(rows)})

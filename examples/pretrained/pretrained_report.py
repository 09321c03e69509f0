"""Table, picture and page of the experiments on pretrained encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pretrained_packing

from pae_jax.reports import Picture, text_table, write_page


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
    forgetting = [run["notes"].get("forgetting") for runs in seeds for run in runs]
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
        "forgetting": 0.0 if None in forgetting else float(np.mean([value for value in forgetting[:-1]])),
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
    """Return the picture of accuracy against bytes per task."""
    figure = Picture(8, 4.6)
    axes = figure.subplots()
    for row in rows:
        color = "#1a7f37" if row["ours"] else "#57606a"
        axes.plot(row["stored"] / 1000, row["accuracy"], "o" if row["ours"] else "s", color=color)
        axes.annotate(
            row["way"],
            (row["stored"] / 1000, row["accuracy"]),
            (5, 3),
            textcoords="offset points",
            fontsize=8,
            color=color,
        )
    axes.set(xscale="log", xlabel="kB per task, head included", ylabel="mean test accuracy")
    axes.grid(alpha=0.3)
    return figure


def write(out: Path, title: str, rows: Sequence[dict[str, Any]], text: str) -> Path:
    """Write the picture, the numbers and a page that shows them; return the page."""
    heading = "Accuracy against bytes per task: packing (green) and the usual ways (grey)"
    pictures = {"accuracy_per_byte": (heading, picture(rows))}
    return write_page(out, title, text, pictures, {"ways": list(rows)})

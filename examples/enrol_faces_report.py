"""Table, pictures and page of a face enrolment; see enrol_faces.py."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import pae_jax as pae
from pae_jax import data

RIGHT, WRONG = "#1a7f37", "#c62828"


def table(result: dict[str, Any]) -> str:
    """Return the closing table as text."""
    lines = ["group               learned    now  bits equal  separate   share  free after"]
    for row in result["groups"]:
        equal = "yes" if row["bits_equal"] else "NO"
        lines.append(
            f"{row['group']:<18} {row['learned']:>8.3f} {row['now']:>6.3f}  {equal:>10}  {row['separate']:>8.3f} "
            f"{row['share']:>7.1%} {row['free_after']:>11.1%}"
        )
    sizes = result["stored_bytes"]
    lines += [
        "",
        f"mean test accuracy   {result['mean_test_accuracy']:.4f} in one network, "
        f"{result['mean_test_accuracy_separate']:.4f} in 8 separate networks",
        f"stored on disk       {sizes['one_network']:,} bytes against {sizes['separate_networks']:,}: "
        f"{result['stored_share']:.1%}",
        f"forgetting           {result['forgetting']:.4f}",
        f"time                 {result['seconds']:.0f} s",
    ]
    return "\n".join(lines)


def write(
    folder: Path,
    result: dict[str, Any],
    report: Any,
    matrix: pae.metrics.AccuracyMatrix,
    stages: list[dict[str, Any]],
    groups: list[data.FaceGroup],
    predictions: list[Any],
) -> Path:
    """Write pictures, numbers and an HTML page that shows them; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "ownership": ("Who owns the weights of each layer", report.plot()),
        "pruning": ("Accuracy against the pruned fraction, per group", _pruning(stages)),
        "accuracy_matrix": ("Test accuracy on every group after learning each group", matrix.plot()),
        "faces": ("Test faces with predictions; a wrong one is red", _faces(groups, predictions)),
    }
    for name, (_, figure) in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    figures = "\n".join(
        f'<h2>{title}</h2>\n<img src="{name}.png" alt="{title}">' for name, (title, _) in pictures.items()
    )
    page = folder / "index.html"
    page.write_text(
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Face enrolment</title>\n'
        "<style>body{font-family:sans-serif;max-width:60em;margin:2em auto}img{max-width:100%}</style>\n"
        f"<h1>40 people, 8 groups, one network</h1>\n<pre>{html.escape(table(result))}</pre>\n"
        f"<pre>{html.escape(str(report))}</pre>\n{figures}\n"
        "<p>Faces: The Database of Faces, AT&amp;T Laboratories Cambridge.</p></html>\n"
    )
    return page


def _pruning(stages: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    grid = figure.subplots(2, 4, sharex=True, sharey=True)
    for axes, stage in zip(grid.ravel(), stages, strict=True):
        pruned = [point["pruned"] for point in stage["curve"]]
        for part, style in (("val", "o-"), ("test", "s--")):
            axes.plot(pruned, [point[part] for point in stage["curve"]], style, label=part, markersize=4)
        losses = axes.twinx()
        losses.plot(pruned, [point["val_loss"] for point in stage["curve"]], "0.6", linewidth=1)
        losses.set(yscale="log", ylim=(1e-4, 2))
        losses.tick_params(labelsize=7, colors="0.5")
        axes.set(ylim=(0.45, 1.03))
        axes.set_title(stage["group"], fontsize=9)
        axes.grid(alpha=0.3)
    grid[-1, -1].legend(fontsize=8)
    figure.supxlabel("pruned fraction of the weights available to the group")
    figure.supylabel("accuracy (grey, right: validation loss)")
    return figure


def _faces(groups: list[data.FaceGroup], predictions: list[Any]) -> Figure:
    """Show the first test image of every person, framed by whether the network knows them."""
    people = len(groups[0].people)
    figure = Figure(figsize=(1.6 * people, 2.0 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), people, squeeze=False)
    for row, group, predicted in zip(grid, groups, predictions, strict=True):
        images, labels = group.test
        for label, axes in enumerate(row):
            index = int(np.flatnonzero(labels == label)[0])
            guess = int(predicted[index])
            colour = RIGHT if guess == label else WRONG
            axes.imshow(images[index, :, :, 0], cmap="gray")
            axes.set_title(f"person {group.people[guess]}", color=colour, fontsize=8)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=colour, linewidth=2)
    return figure

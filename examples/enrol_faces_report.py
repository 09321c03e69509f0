"""Table, plots and HTML page of a face enrolment; see enrol_faces.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pae_jax as pae
from pae_jax import data
from pae_jax.reports import Picture, text_table, write_page

RIGHT, WRONG = "#1a7f37", "#c62828"


def table(facts: dict[str, Any]) -> str:
    """Return the final table as text."""
    columns = ["group", "learned", "now", "bits equal", "separate", "share", "free after"]
    rows = [
        [
            row["group"],
            f"{row['learned']:.3f}",
            f"{row['now']:.3f}",
            "yes" if row["bits_equal"] else "NO",
            f"{row['separate']:.3f}",
            f"{row['share']:.1%}",
            f"{row['free_after']:.1%}",
        ]
        for row in facts["groups"]
    ]
    one, separate = facts["stored_bytes"].values()
    return f"""{text_table(columns, rows)}

mean test accuracy   {facts["mean_test_accuracy"]:.4f} in one network, {facts["mean_test_accuracy_separate"]:.4f} in \
{len(rows)} separate networks
stored on disk       {one:,} bytes against {separate:,}: {facts["stored_share"]:.1%}
forgetting           {facts["forgetting"]:.4f}
time                 {facts["seconds"]:.0f} s"""


def write(
    folder: Path, facts: dict[str, Any], stream: Any, groups: Sequence[data.FaceGroup], predictions: list[np.ndarray]
) -> Path:
    """Write pictures, numbers and an HTML page that shows them; return the page."""
    owners = pae.report(stream.state)
    pictures = {
        "ownership": ("Who owns the weights of each layer", owners.plot()),
        "pruning": ("Validation accuracy against the pruned fraction, per group", _pruning(stream.outcomes)),
        "accuracy_matrix": ("Test accuracy on every group after learning each group", stream.matrix.plot()),
        "faces": ("Test faces with predictions; a wrong one is red", _faces(groups, predictions)),
    }
    text = f"{table(facts)}\n\n{owners}\n\nFaces: The Database of Faces, AT&T Laboratories Cambridge."
    people = sum(len(group.people) for group in groups)
    return write_page(folder, f"{people} people, {len(groups)} groups, one network", text, pictures, facts)


def _pruning(outcomes: tuple[pae.Outcome, ...]) -> Picture:
    figure = Picture(10, 4.6)
    grid = figure.subplots(2, (len(outcomes) + 1) // 2, sharex=True, sharey=True, squeeze=False)
    for axes, outcome in zip(grid.ravel(), outcomes, strict=False):
        axes.plot([r.pruned for r in outcome.records], [r.value for r in outcome.records], "o-", markersize=4)
        axes.axhline(outcome.goal, color="0.4", linestyle=":", label="own network")
        axes.plot([outcome.pruned], [outcome.value], "*", markersize=12, label="chosen")
        axes.set_title(outcome.task, fontsize=9)
        axes.grid(alpha=0.3)
    grid[-1, -1].legend(fontsize=8)
    figure.supxlabel("pruned fraction of the weights available to the group")
    figure.supylabel("validation accuracy")
    return figure


def _faces(groups: Sequence[data.FaceGroup], predictions: list[np.ndarray]) -> Picture:
    """Show the first test image of every person, framed by whether the network knows them."""
    people = len(groups[0].people)
    figure = Picture(1.6 * people, 2.0 * len(groups))
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

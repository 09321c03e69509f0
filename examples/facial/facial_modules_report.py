"""Numbers, table, plots and HTML page of facial_modules.py."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import pae_jax as pae
from pae_jax.faces.scores import Verification
from pae_jax.reports import Picture, sizes, text_table, write_page

# Published by Hung et al., ICMR 2019 (poster): for each task and experiment accuracy in % and size in MB of 2^20 bytes,
# of the separate network and of the packed one.
PUBLISHED = {
    1: {
        "face": ((99.55, 89.6), (99.67, 68.9)),
        "age": ((56.37, 89.6), (57.30, 15.3)),
        "gender": ((89.50, 89.6), (89.08, 13.6)),
    },
    2: {
        "face": ((99.55, 89.6), (99.67, 68.9)),
        "expression": ((64.74, 89.6), (65.29, 26.1)),
        "gender": ((94.45, 89.6), (92.93, 12.3)),
    },
}
PUBLISHED_SEPARATE, PUBLISHED_TOTAL = {1: 268.8, 2: 268.9}, {1: 97.8, 2: 107.3}
DATA = {1: "LFW and Adience", 2: "LFW, AffectNet and FotW"}


def verification_facts(faces: Any, embeddings: np.ndarray) -> dict[str, Any]:
    """Return verification by the protocol, and the area under the curve of all pairs."""
    found, curve = faces.verify(embeddings), faces.curve(embeddings)
    return {
        "accuracy": found.accuracy,
        "accuracy_std": found.accuracy_std,
        "val": found.val,
        "far_target": found.far_target,
        "pairs": len(found.same),
        "skipped": list(found.skipped),
        "auc": curve.auc,
        "eer": curve.eer,
        "curve_pairs": len(curve.same),
    }


def task_facts(outcome: pae.Outcome, own_val: float, own_test: float | None) -> dict[str, Any]:
    """Return the results of a task and of its separate network, whose validation metric may be the goal."""
    return {
        "task": outcome.task,
        "status": outcome.status.value,
        "metric": outcome.records[0].metric,
        "pruned": outcome.pruned,
        "goal": outcome.goal,
        "val": outcome.value,
        "test": outcome.test,
        "own_val": None if own_test is None else own_val,
        "own_test": own_test,
        "records": [
            {"stage": r.stage, "pruned": r.pruned, "value": r.value, "epochs": r.epochs}
            for r in outcome.records
            if not r.diverged
        ],
    }


def size_facts(
    net: pae.Net, state: pae.State, stage: Path, separate: Mapping[str, Path], heads: Mapping[str, Any]
) -> dict[str, Any]:
    """Return sizes by the paper's formula, and measured on disk.

    By the formula a separate network is dense and has no masks: 4 bytes per value. The identity head is not counted, as
    in the paper.
    """
    alone, bundles = {}, {}
    for name, path in separate.items():
        own = pae.load(net, path, heads=heads if name in heads else None)
        [counts] = sizes.count(own)
        values = counts.whole + counts.norms + counts.biases + counts.kernels
        alone[name] = 4 * (values + (0 if name in heads else counts.head))
        bundles[name] = bundle_bytes(net, own)
    return {
        **network_sizes(net, state, stage),
        "paper_separate": alone,
        "stored_separate": {name: sizes.stored(path).total for name, path in separate.items()},
        "bundle_separate": bundles,
    }


def network_sizes(net: pae.Net, state: pae.State, stage: Path) -> dict[str, Any]:
    """Return the sizes of a network by the paper's formula, as a stage on disk, and as one bundle of all tasks."""
    packed = sizes.paper(state, without_head="face")
    return {
        "table": str(packed),
        "paper_bytes": {row["part"]: row["bytes"] for row in packed.rows},
        "paper_total": packed.total,
        "stored_bytes": sizes.stored(stage).total,
        "bundle_bytes": bundle_bytes(net, state),
    }


def bundle_bytes(net: pae.Net, state: pae.State) -> int:
    """Return the bytes of one file of all tasks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tasks.safetensors"
        pae.write_bundle(file, net, state)
        return file.stat().st_size


def table(facts: Mapping[str, Any]) -> str:
    """Return the table of our numbers beside the paper's, with a legend."""
    tasks, size = {row["task"]: row for row in facts["tasks"]}, facts["sizes"]
    before, after = facts["verification"]["unpruned"], facts["verification"]["packed"]
    accuracies = {"face": (before["accuracy"], after["accuracy"])}
    accuracies |= {name: (row["own_test"], row["test"]) for name, row in tasks.items() if name != "face"}
    rows, number = [["", *("separate", "packed") * 4, "freed"]], facts["experiment"]
    for name, (separate, packed) in accuracies.items():
        ours = [size[part][name] / sizes.MB for part in ("paper_separate", "paper_bytes")]
        (test, megabytes), (packed_test, packed_megabytes) = PUBLISHED[number][name]
        cells = [f"{separate:.2%}", f"{packed:.2%}", *(f"{mb:.2f}" for mb in ours), f"{test:.2f}", f"{packed_test:.2f}"]
        rows.append([name, *cells, f"{megabytes:.1f}", f"{packed_megabytes:.1f}", f"{tasks[name]['pruned']:.1%}"])
    separate, total = sum(size["paper_separate"].values()), size["paper_total"]
    published_separate, published = PUBLISHED_SEPARATE[number], PUBLISHED_TOTAL[number]
    totals = [f"{separate / sizes.MB:.2f}", f"{total / sizes.MB:.2f}"]
    rows.append(["total", "", "", *totals, "", "", f"{published_separate:.1f}", f"{published:.1f}", ""])
    heads = ["", "ours,", "test", "ours,", "MB", "published,", "test", "published,", "MB", ""]
    curves = [
        [
            name,
            f"{row['accuracy']:.4f} ± {row['accuracy_std']:.4f}",
            *(f"{row[part]:.4f}" for part in ("auc", "eer", "val")),
        ]
        for name, row in (("before pruning", before), ("with all tasks", after))
    ]
    measured = []
    for kind, what in (("stored", "stored on disk"), ("bundle", "as one bundle")):
        one, alone = size[f"{kind}_bytes"], sum(size[f"{kind}_separate"].values())
        measured.append(
            f"size {what}, measured: {one / 1e6:.2f} MB of 10^6 bytes, {one / alone:.1%} of the three networks' "
            f"{alone / 1e6:.2f}"
        )
    kept = "bit-identical" if facts["identical"] else "CHANGED"
    lines = [
        text_table(heads, rows),
        "",
        f"size by the paper's formula: {total / separate:.1%} of three networks; published for this experiment "
        f"{published / published_separate:.1%}",
        *measured,
        f"The {100 * PUBLISHED_TOTAL[2] / PUBLISHED_SEPARATE[2]:.1f} % that the paper claims is experiment 2 (face, "
        f"expression, gender), by the formula; {'not ' if number == 1 else ''}this one.",
        "",
        text_table(["verification", "accuracy", "AUC", "EER", f"VAL at FAR {before['far_target']:g}"], curves),
        f"of {before['pairs']:,} pairs in the protocol and {before['curve_pairs']:,} of the curve; "
        f"{len(before['skipped'])} pairs skipped",
        f"verification features after the other tasks were learned: {kept}",
        "",
        "Ours is not measured on the paper's data unless the preset says so; published numbers: Hung et al., ICMR "
        f"2019, {DATA[number]}.",
        f"preset {facts['preset']}, images of {facts['size']} pixels; chosen by validation data alone",
        *(f"{name}: {text}" for name, text in facts["data"].items()),
    ]
    return "\n".join(lines)


def roc(curves: Mapping[str, Verification]) -> Picture:
    """Return the plot of the ROC curves before pruning and at the end, on people never trained on."""
    figure = Picture(5, 4)
    axes = figure.subplots()
    for (name, found), style in zip(curves.items(), ("--", "-"), strict=True):
        far, val, _ = found.roc
        axes.plot(far, val, style, label=f"{name}: AUC {found.auc:.4f}")
    axes.set(xlabel="false accept rate", ylabel="validation rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(loc="lower right")
    return figure


def pruning(facts: Mapping[str, Any]) -> Picture:
    """Return the plot of the ladders: validation metric against the fraction freed."""
    figure = Picture(11, 3.4)
    for axes, task in zip(figure.subplots(1, len(facts["tasks"]), squeeze=False)[0], facts["tasks"], strict=True):
        rows = sorted(task["records"], key=lambda row: row["pruned"])
        axes.plot([row["pruned"] for row in rows], [row["value"] for row in rows], marker="o")
        if task["goal"] is not None:
            axes.axhline(task["goal"], color="0.4", linestyle=":", label="goal")
        axes.plot([task["pruned"]], [task["val"]], marker="*", markersize=14, linestyle="none", label="chosen")
        axes.ticklabel_format(useOffset=False)  # an offset would be printed over the title
        axes.set(title=task["task"], xlabel="freed", ylabel=f"validation {task['metric']}", xlim=(-0.02, 1))
        axes.legend(fontsize=8)
    return figure


def write(out: Path, facts: Mapping[str, Any], curves: Mapping[str, Verification]) -> Path:
    """Write numbers, plots and an HTML page; return the page's path."""
    pictures = {
        "pruning": ("Pruning ladders", pruning(facts)),
        "roc": ("Verification of people never trained on", roc(curves)),
    }
    text = f"{table(facts)}\n\n{facts['sizes']['table']}"
    title = f"{', '.join(task['task'] for task in facts['tasks'])} in one network"
    return write_page(out / "report", title, text, pictures, facts)

"""Table, plots and HTML page of cifar100_20tasks.py, from the result files of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pae_jax.reports import Picture, text_table, write_page

COLOURS = {
    "separate": "0.35",
    "joint": "#9467bd",
    "sequential": "#8c564b",
    "frozen": "#e377c2",
    "lora": "#bcbd22",
    "piggyback": "#17becf",
    "packnet": "#d62728",
    "wsn": "#ff7f0e",
    "supsup": "#aec7e8",
    "exssnet": "#98df8a",
    "pae": "#1f77b4",
    "cpg": "#2ca02c",
}
METHODS = tuple(COLOURS)


def measured(matrix: np.ndarray) -> list[list[float]]:
    """Return the accuracies after each task on the tasks learned until then: the lower triangle of a matrix."""
    return [row[: i + 1].tolist() for i, row in enumerate(matrix)]


def collect(folder: Path) -> list[dict[str, Any]]:
    """Return all results of a folder, or of one file that holds them."""
    if folder.is_file():
        return json.loads(folder.read_text())["results"]
    return [_without_epochs(json.loads(file.read_text())) for file in sorted(folder.glob("seed-*/*.json"))]


def _without_epochs(result: dict[str, Any]) -> dict[str, Any]:
    """Leave out the rows per epoch; the run folders have them."""
    for records in result.get("records", []):
        for record in records:
            record.pop("history", None)
            record.pop("sizes", None)
    return result


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per method: mean and standard deviation of the accuracy over seeds, and stored size.

    The deviation of one seed, and a difference from networks that were not run, are None.
    """
    separate = {r["seed"]: float(np.mean(r["test"])) for r in results if r["method"] == "separate"}
    rows = []
    for method in METHODS:
        runs = [r for r in results if r["method"] == method]
        if not runs:
            continue
        means = [float(np.mean(r["test"])) for r in runs]
        gaps = [mean - separate[r["seed"]] for mean, r in zip(means, runs, strict=True) if r["seed"] in separate]
        rows.append(
            {
                "method": method,
                "seeds": len(runs),
                "tasks": len(runs[0]["tasks"]),
                "accuracy": float(np.mean(means)),
                "deviation": float(np.std(means, ddof=1)) if len(runs) > 1 else None,
                "to_separate": float(np.mean(gaps)) if gaps else None,
                "last": float(np.mean([np.mean(r["test"][-max(3, len(r["test"]) // 4) :]) for r in runs])),
                "forgetting": float(np.mean([r["forgetting"] for r in runs])),
                "size_ratio": float(np.mean([r["size_ratio"] for r in runs])),
                "stored_bytes": float(np.mean([r["stored_bytes"] for r in runs])),
                "bundle_bytes": float(np.mean([r["bundle_bytes"] for r in runs])),
                "seconds": float(np.mean([r["seconds"] for r in runs])),
            }
        )
    return rows


def table(results: list[dict[str, Any]]) -> str:
    """Return the table of all methods as text."""
    rows = [
        [
            row["method"],
            f"{row['tasks']}",
            f"{row['seeds']}",
            f"{row['accuracy']:.3f}" + ("" if row["deviation"] is None else f" ± {row['deviation']:.3f}"),
            "" if row["to_separate"] is None else f"{row['to_separate']:+.3f}",
            f"{row['last']:.3f}",
            f"{row['forgetting']:.4f}",
            f"{row['size_ratio']:.2f}",
            f"{row['stored_bytes'] / 1e6:.2f}",
            f"{row['bundle_bytes'] / 1e6:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for row in summary(results)
    ]
    measured = [
        "test accuracy",
        "to separate",
        "last tasks",
        "forgetting",
        "size ratio",
        "stored MB",
        "bundle MB",
        "s",
    ]
    return text_table(["method", "tasks", "seeds", *measured], rows)


def pruning_curve(results: list[dict[str, Any]], method: str = "pae", number: int | None = None) -> Picture:
    """Return the plot of a task's ladder: validation metric against the fraction freed, over the seeds."""
    figure = Picture(6, 3.6)
    axes = figure.subplots()
    runs = [r for r in results if r["method"] == method]
    for run in runs:
        position = (
            number if number is not None else max(range(len(run["records"])), key=lambda i: len(run["records"][i]))
        )
        outcome, tried = run["outcomes"][position], run["records"][position]
        width = tried[-1]["width"]
        ladder = [r for r in tried if r["width"] == width and "retrained" not in r["stage"] and not r["diverged"]]
        label = f"seed {run['seed']}: {outcome['task']}, size ratio {width**2:.2g}"
        (line,) = axes.plot([r["pruned"] for r in ladder], [r["value"] for r in ladder], marker="o", label=label)
        if outcome["goal"] is not None:
            axes.axhline(outcome["goal"], color=line.get_color(), linestyle=":", linewidth=1)
        axes.plot([outcome["pruned"]], [outcome["value"]], marker="*", markersize=15, color=line.get_color())
    axes.set(xlabel="fraction of the available weights freed", ylabel="validation accuracy")
    axes.legend(fontsize=8, title="dotted: goal; star: chosen", title_fontsize=8)
    return figure


def task_accuracies(results: list[dict[str, Any]]) -> Picture:
    """Return the plot of final test accuracies, task by task, relative to the separate networks."""
    figure = Picture(8, 4)
    axes = figure.subplots()
    separate = {r["seed"]: np.asarray(r["test"]) for r in results if r["method"] == "separate"}
    names: list[str] = []
    for method in ("packnet", "pae", "cpg"):
        runs = [r for r in results if r["method"] == method and r["seed"] in separate]
        runs = [r for r in runs if len(r["test"]) == len(separate[r["seed"]])]
        if not runs:
            continue
        names = runs[0]["tasks"]
        gap = np.mean([np.asarray(r["test"]) - separate[r["seed"]] for r in runs], axis=0)
        axes.plot(range(len(names)), 100 * gap, marker="o", label=method, color=COLOURS[method])
    axes.axhline(0, color=COLOURS["separate"], linewidth=1)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set(ylabel="points above the separate network")
    axes.legend()
    return figure


def accuracy_and_size(results: list[dict[str, Any]]) -> Picture:
    """Return the plot of mean accuracy against stored bytes."""
    figure = Picture(6, 4)
    axes = figure.subplots()
    for row in sorted(summary(results), key=lambda row: -row["accuracy"]):
        marker = "s" if row["method"] in ("pae", "cpg") else "o"
        place = (row["stored_bytes"] / 1e6, row["accuracy"])
        colour = COLOURS[row["method"]]
        axes.errorbar(*place, yerr=row["deviation"], fmt=marker, color=colour, label=row["method"])
    axes.set_xscale("log", base=2)
    axes.set(xlabel="stored, MB on disk", ylabel="mean test accuracy")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="lower right", ncols=2, title="by accuracy, best first")
    return figure


def shares(results: list[dict[str, Any]]) -> Picture:
    """Return the plot of weight ownership per method, first seed."""
    figure = Picture(8, 2.2)
    axes = figure.subplots()
    runs = {r["method"]: r for r in reversed(results) if "weights_share" in r}
    for y, (_, run) in enumerate(runs.items()):
        left = 0.0
        parts = list(run["weights_share"].values())
        for i, share in enumerate(parts):
            free = i == len(parts) - 1
            axes.barh(y, share, left=left, color="0.9" if free else f"C{i % 10}", edgecolor="white", linewidth=0.5)
            left += share
    axes.set_yticks(range(len(runs)), list(runs))
    axes.set(xlabel="share of all weights, task after task; grey is free", xlim=(0, 1))
    return figure


def write(folder: Path, preset: str, results: list[dict[str, Any]], text: str) -> Path:
    """Write numbers, plots and an HTML page; return the page's path."""
    pictures = {
        "accuracy_and_size": ("Accuracy and what it takes to store", accuracy_and_size(results)),
        "tasks": ("Task by task, beside its separate network", task_accuracies(results)),
        "pruning": ("The pruning ladder of one task", pruning_curve(results)),
        "shares": ("Who owns the weights", shares(results)),
    }
    found = [{str(result[key]): None for result in results} for key in ("method", "seed")]
    methods, seeds = (" ".join(sorted(names)) for names in found)
    command = f"python examples/cifar100/cifar100_20tasks.py --preset {preset} --recipe {methods} --seeds {seeds}"
    facts = {"command": command, "summary": summary(results), "results": results}
    return write_page(folder / "report", f"CIFAR-100, {preset}", text, pictures, facts)

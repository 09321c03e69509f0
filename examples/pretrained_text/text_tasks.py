"""Sentence classification tasks from files of lines `label TAB text`, tokenised for a BERT encoder."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pretrained_encoder import Task

ORDER = ("trec", "subj", "sst2", "mpqa", "banking77", "clinc150", "sst5")
Batch = dict[str, np.ndarray]
Tokenise = Callable[[Sequence[str], int], Batch]
"""`(sentences, length) -> {"ids": int32 (n, length), "mask": int32 (n, length)}`."""


class TextTask(Task):
    """A task whose inputs are sentences."""

    @property
    def length(self) -> int:
        """Tokens of a sentence; longer ones were cut."""
        return self.train[0]["ids"].shape[1]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much of the data is used.

    Attributes:
      train: most training sentences of a task, drawn by the seed.
      val: most validation sentences, which choose the epoch and the older task to start from.
      test: most test sentences; None takes all.
      tokens: longest sentence.
    """

    train: int = 2000
    val: int = 500
    test: int | None = None
    tokens: int = 32


def read_task(folder: Path, name: str, tokenise: Tokenise, limits: Limits, seed: int) -> TextTask:
    """Read `name.train`, `name.val` and `name.test` of a folder, each .tsv or .tsv.gz."""
    parts = {part: read_lines(folder, f"{name}.{part}") for part in ("train", "val", "test")}
    return make_task(name, parts, tokenise, limits, seed)


def make_task(
    name: str, parts: dict[str, list[tuple[str, str]]], tokenise: Tokenise, limits: Limits, seed: int
) -> TextTask:
    """Draw, number and tokenise the sentences of a task; its classes are the sorted labels."""
    found = {label for rows in parts.values() for label, _ in rows}
    labels = sorted(found, key=int if all(label.isdigit() for label in found) else str)
    number = {label: index for index, label in enumerate(labels)}
    drawn = {}
    for index, (part, most) in enumerate((("train", limits.train), ("val", limits.val), ("test", limits.test))):
        rows, rng = parts[part], np.random.default_rng((seed, index))
        drawn[part] = [rows[i] for i in np.sort(rng.permutation(len(rows))[:most])]
    length = limits.tokens
    tokens = {part: tokenise([text for _, text in rows], length) for part, rows in drawn.items()}
    # 99 of 100 training sentences fit; a multiple of 8 keeps the number of compiled steps small.
    needed = float(np.quantile(tokens["train"]["mask"].sum(axis=1), 0.99))
    length = min(length, int(-(-needed // 8) * 8))
    cut = {part: {key: array[:, :length] for key, array in batch.items()} for part, batch in tokens.items()}
    y = {part: np.asarray([number[label] for label, _ in rows], np.int32) for part, rows in drawn.items()}
    train, val, test = ((cut[part], y[part]) for part in ("train", "val", "test"))
    return TextTask(name, len(labels), train, val, test)


def read_lines(folder: Path, name: str) -> list[tuple[str, str]]:
    """Return the `(label, text)` of a file `name.tsv` or `name.tsv.gz`."""
    for path in (folder / f"{name}.tsv.gz", folder / f"{name}.tsv"):
        if path.exists():
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            rows = [line.split("\t", 1) for line in text.decode("utf-8").splitlines() if line.strip()]
            wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 2), None)
            if wrong is not None:
                raise SystemExit(f"{path}, line {wrong}: expected `label TAB text`")
            return [(label, sentence) for label, sentence in rows]
    raise SystemExit(f"no file {name}.tsv or {name}.tsv.gz in {folder}; see the README of this folder for the data")


def unlabelled(tasks: Sequence[TextTask]) -> Batch:
    """Return the training sentences of all tasks."""
    return joined([task.train[0] for task in tasks], max(task.length for task in tasks))


def joined(batches: Sequence[Batch], length: int) -> Batch:
    """Return the sentences of several batches as one batch of a length."""
    pad = lambda array: np.pad(array, ((0, 0), (0, length - array.shape[1])))  # noqa: E731
    return {key: np.concatenate([pad(batch[key]) for batch in batches]) for key in ("ids", "mask")}


def made_lines(name: str, classes: int, words: int, counts: Sequence[int]) -> dict[str, list[tuple[str, str]]]:
    """Return sentences of numbered words, in which a class prefers words of its own; for trials without data."""
    rng = np.random.default_rng(list(name.encode()))
    own = rng.permutation(words)[: 6 * classes].reshape(classes, 6)
    parts: dict[str, list[tuple[str, str]]] = {}
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        parts[part] = []
        for label in rng.integers(0, classes, count):
            length = rng.integers(5, 15)
            preferred = rng.random(length) < 0.4
            chosen = np.where(preferred, rng.choice(own[label], length), rng.integers(0, words, length))
            parts[part].append((str(label), " ".join(f"w{word}" for word in chosen)))
    return parts

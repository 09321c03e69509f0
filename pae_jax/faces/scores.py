"""Results of verification: rates, the ROC curve, a table and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pae_jax.data import require


class Roc(NamedTuple):
    """A receiver operating characteristic; both rates rise from 0 to 1.

    Attributes:
      far: false accept rate, the share of different-person pairs closer than the threshold.
      val: validation rate, the share of same-person pairs closer than it.
      thresholds: distances at which the rates change.
    """

    far: np.ndarray
    val: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True, eq=False)
class Verification:
    """Result of `verify_pairs`; `str` of it is a table.

    Attributes:
      accuracy: mean over the folds of the share of right answers.
      accuracy_std: population standard deviation over the folds.
      fold_accuracies: float64 (folds,).
      thresholds: float64 (folds,), chosen for accuracy on the other folds.
      val: validation rate at `far_target`, mean over the folds: thresholds chosen on the other folds.
      val_std: its population standard deviation over the folds.
      far: false accept rate at these thresholds, mean over the folds.
      far_target: highest false accept rate allowed when choosing them.
      distances: float64 (pairs,), with the mean of the other folds subtracted if `subtract_mean`.
      same: bool (pairs,).
      folds: (pairs,), as given.
      distance: "cosine" or "euclidean".
      subtract_mean: as given.
      skipped: pairs left out before, one text per pair.
    """

    accuracy: float
    accuracy_std: float
    fold_accuracies: np.ndarray
    thresholds: np.ndarray
    val: float
    val_std: float
    far: float
    far_target: float
    distances: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    distance: str
    subtract_mean: bool
    skipped: tuple[str, ...] = ()

    @property
    def roc(self) -> Roc:
        """The exact curve over all pairs, one point for each distinct distance; by scikit-learn."""
        curve = require("sklearn.metrics", "The ROC curve", "faces").roc_curve
        far, val, scores = curve(self.same, -self.distances, drop_intermediate=False)
        # scikit-learn accepts a pair at its own score, this code only below the threshold; the first point accepts
        # none.
        thresholds = np.concatenate([[self.distances.min()], np.nextafter(-scores[1:], np.inf)])
        return Roc(far, val, thresholds)

    @property
    def auc(self) -> float:
        """Area under the exact curve: P(d_same < d_different) + P(d_same = d_different) / 2 (Mann and Whitney)."""
        far, val, _ = self.roc
        return float(require("sklearn.metrics", "The area under the curve", "faces").auc(far, val))

    @property
    def eer(self) -> float:
        """Equal error rate: the false accept rate x with x = 1 - VAL(x), linear between the points of the curve."""
        far, val, _ = self.roc
        excess = 1.0 - far - val  # falls from 1 to -1
        after = int(np.argmax(excess <= 0.0))
        before = after - 1
        step = excess[before] / (excess[before] - excess[after])
        return float(far[before] + step * (far[after] - far[before]))

    def __str__(self) -> str:
        count, folds = len(self.same), len(self.fold_accuracies)
        mean = "mean subtracted" if self.subtract_mean else "mean not subtracted"
        rows = [
            ("pairs", f"{count:,} in {folds} folds, {self.same.sum():,} of them of one person"),
            ("distance", f"{self.distance}, {mean}"),
            ("accuracy", f"{self.accuracy:.5f} ± {self.accuracy_std:.5f}"),
            ("VAL", f"{self.val:.5f} ± {self.val_std:.5f} at FAR {self.far:.5f} (chosen for {self.far_target:g})"),
            ("AUC", f"{self.auc:.5f}"),
            ("EER", f"{self.eer:.5f}"),
            ("thresholds", f"{self.thresholds.min():.4g} to {self.thresholds.max():.4g}"),
        ]
        if self.skipped:
            rows.append(("skipped", f"{len(self.skipped):,} pairs; only their own folds became smaller"))
            rows += [("", text) for text in self.skipped[:10]]
            rows += [("", f"... and {len(self.skipped) - 10:,} more")] if len(self.skipped) > 10 else []
        return "\n".join(f"{name:<11}{text}" for name, text in rows)

    def plot(self) -> Any:
        """Return a matplotlib figure of the curve and of the distances; needs the `plot` extra."""
        from pae_jax.reports import Picture

        figure = Picture(9.0, 4.0)
        curve, spread = figure.subplots(1, 2)
        far, val, _ = self.roc
        curve.plot(far, val, label=f"AUC {self.auc:.4f}")
        curve.plot([0, 1], [1, 0], color="grey", linewidth=0.8, linestyle=":")
        curve.plot(self.eer, 1 - self.eer, "o", label=f"EER {self.eer:.4f}")
        curve.set(xlabel="false accept rate", ylabel="validation rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        curve.legend(loc="lower right")
        bins = np.histogram_bin_edges(self.distances, 50)
        for kind, label in ((self.same, "one person"), (~self.same, "two people")):
            spread.hist(self.distances[kind], bins, alpha=0.6, label=label)
        spread.axvline(self.thresholds.mean(), color="black", linewidth=0.8, label="mean threshold")
        spread.set(xlabel=f"{self.distance} distance", ylabel="pairs")
        spread.legend()
        return figure


def accepted(distances: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Count the distances below each threshold, by one sort instead of a pass per threshold."""
    return np.searchsorted(np.sort(distances), thresholds, side="left")

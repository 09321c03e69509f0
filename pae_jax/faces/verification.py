"""Face verification, whether two images show one person: distances of embeddings, and the ten-fold protocol of LFW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.scores import Verification, accepted

PUBLISHED_THRESHOLDS = np.arange(400) * 0.01  # 0, 0.01, ..., 3.99


def verify_pairs(
    embeddings_a: ArrayLike,
    embeddings_b: ArrayLike,
    same: ArrayLike,
    folds: ArrayLike,
    *,
    distance: Literal["cosine", "euclidean"] = "cosine",
    subtract_mean: bool = True,
    thresholds: ArrayLike | Literal["published", "exact"] = "published",
    far_target: float = 1e-3,
    skipped: Sequence[str] = (),
) -> Verification:
    """Measure verification by the protocol of LFW: on each fold, with a threshold chosen on all other folds.

    Two images show one person if their distance is below the threshold. The threshold of a fold is the one with the
    highest accuracy on the other folds, the smallest such on ties; for VAL it is the largest whose false accept rate
    there is at most `far_target`, exactly. So nothing measured on a fold was chosen on that fold.

    Args:
      embeddings_a: (pairs, features), first image of each pair; usually from `flip_concat`.
      embeddings_b: (pairs, features), second image.
      same: bool (pairs,), whether both show one person.
      folds: (pairs,), any labels; each fold must have pairs of one person and of two.
      distance: "cosine" is arccos(a·b / |a||b|) / pi, in [0, 1], 0.5 if a vector is zero; "euclidean" is the squared
        distance sum (a - b)^2.
      subtract_mean: first subtract the mean embedding of the other folds from all embeddings.
      thresholds: "published" tries 0, 0.01, ..., 3.99 as the published numbers do; "exact" tries every threshold that
        changes a decision, halfway between neighbouring distances; or increasing values.
      far_target: in [0, 1].
      skipped: pairs that were left out before, for the report; see `Pairs.skipped`.

    Returns:
      The result; `str` of it is a table. AUC, EER and the curve are computed over all pairs at their own distances.
      FaceNet averages the curves of the folds on a grid of thresholds instead; for equal folds the results are close.

    Raises:
      DataError: incompatible shapes, NaN or infinity, fewer than 2 folds, a fold without pairs of one of the kinds, or
        thresholds that end below the best one.
      ArgumentError: another distance, thresholds or target.

    Example:
      >>> a, b = np.eye(4)[[0, 1, 2, 3]], np.eye(4)[[0, 2, 2, 1]]
      >>> result = verify_pairs(a, b, [1, 0, 1, 0], [0, 0, 1, 1], subtract_mean=False)
      >>> result.accuracy, result.thresholds.tolist(), result.auc
      (1.0, [0.01, 0.01], 1.0)

    Source: Schroff et al. 2015 (FaceNet); G. B. Huang et al. 2007 (LFW); Hung et al., ICMR 2019 (PAE).
    """
    a, b = (np.asarray(part, np.float64) for part in (embeddings_a, embeddings_b))
    same, folds = np.asarray(same), np.asarray(folds)
    _check(a, b, same, folds)
    same = same.astype(bool)
    if distance not in ("cosine", "euclidean"):
        raise ArgumentError(f"distance must be 'cosine' or 'euclidean', found {distance!r}")
    if not 0.0 <= far_target <= 1.0:
        raise ArgumentError(f"far_target lies in [0, 1], found {far_target!r}")
    grid = _grid(thresholds)
    measure = _angles if distance == "cosine" else _squares
    own = np.empty(len(same))
    accuracies, chosen, vals, fars = [], [], [], []
    for fold in np.unique(folds):
        test = folds == fold
        train = ~test
        mean = (a[train].mean(axis=0) + b[train].mean(axis=0)) / 2 if subtract_mean else np.zeros(a.shape[1])
        distances = measure(a - mean[None], b - mean[None])
        threshold = _best(distances[train & same], distances[train & ~same], grid)
        strict = _largest(distances[train & ~same], far_target)
        own[test] = distances[test]
        chosen.append(threshold)
        accuracies.append(float(((distances[test] < threshold) == same[test]).mean()))
        vals.append(float((distances[test & same] < strict).mean()))
        fars.append(float((distances[test & ~same] < strict).mean()))
    return Verification(
        accuracy=float(np.mean(accuracies)),
        accuracy_std=float(np.std(accuracies)),
        fold_accuracies=np.asarray(accuracies),
        thresholds=np.asarray(chosen),
        val=float(np.mean(vals)),
        val_std=float(np.std(vals)),
        far=float(np.mean(fars)),
        far_target=float(far_target),
        distances=own,
        same=same,
        folds=folds,
        distance=distance,
        subtract_mean=subtract_mean,
        skipped=tuple(skipped),
    )


def flip_concat(embed: Callable[[Any], ArrayLike], images: Any) -> np.ndarray:
    """Embed images and their mirror images; scale each embedding to length 1 and concatenate both.

    Args:
      embed: `images -> (n, features)`, of any norm; for instance `lambda x: pae.features(net, state, "face", x)`.
      images: (n, height, width, channels) as `embed` takes them; the mirror exchanges left and right.

    Returns:
      float32 (n, 2 · features), of length sqrt(2).

    Raises:
      DataError: images are not four-dimensional, or `embed` does not return one row of features for each.

    Example:
      >>> flip_concat(lambda x: x.reshape(1, -1), np.ones((1, 1, 4, 1))).tolist()
      [[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]
    """
    if np.ndim(images) != 4:
        raise DataError(f"images: found shape {np.shape(images)}, expected (n, height, width, channels).")
    halves = [np.asarray(embed(view), np.float32) for view in (images, images[:, :, ::-1])]
    for half in halves:
        if half.ndim != 2 or len(half) != len(images):
            raise DataError(f"embed gave shape {half.shape} for {len(images)} images, expected (n, features).")
    return np.concatenate([half / _lengths(half, 1e-10) for half in halves], axis=1)


def _lengths(vectors: np.ndarray, floor: float) -> np.ndarray:
    return np.sqrt(np.maximum((vectors**2).sum(axis=1, keepdims=True), floor))


def _angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products = np.einsum("ij,ij->i", a, b)
    lengths = np.sqrt(np.einsum("ij,ij->i", a, a)) * np.sqrt(np.einsum("ij,ij->i", b, b))
    cosines = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    # Rounding can make the cosine of a vector with itself exceed 1, where arccos is NaN.
    return np.arccos(np.clip(cosines, -1.0, 1.0)) / np.pi


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ((a - b) ** 2).sum(axis=1)


def _best(same: np.ndarray, different: np.ndarray, grid: np.ndarray | None) -> float:
    """Return the first threshold of highest accuracy; a grid of None means all thresholds that change a decision."""
    distinct = np.unique(np.concatenate([same, different]))

    def right(thresholds: np.ndarray) -> np.ndarray:
        return accepted(same, thresholds) + len(different) - accepted(different, thresholds)

    if grid is None:
        halfway = (distinct[:-1] + distinct[1:]) / 2
        halfway = np.where(halfway > distinct[:-1], halfway, distinct[1:])
        grid = np.concatenate([distinct[:1], halfway, np.nextafter(distinct[-1:], np.inf)])
    best = right(grid)
    beyond = np.nextafter(distinct[distinct >= grid[-1]], np.inf)
    if beyond.size and right(beyond).max() > best.max():
        raise DataError(
            f"the thresholds end at {grid[-1]:g}, distances go up to {distinct[-1]:g}, and a higher threshold would be "
            'better. Normalise the embeddings (flip_concat does), or pass thresholds="exact".'
        )
    return float(grid[int(np.argmax(best))])


def _largest(different: np.ndarray, target: float) -> float:
    """Return the largest threshold that accepts at most a share `target` of these distances."""
    count = len(different)
    allowed = int((np.arange(count + 1) / count <= target).sum()) - 1
    # A threshold equal to the distance of this rank accepts only the distances below it.
    return float(np.sort(different)[allowed]) if allowed < count else np.inf


def _grid(thresholds: Any) -> np.ndarray | None:
    if isinstance(thresholds, str) and thresholds in ("published", "exact"):
        return PUBLISHED_THRESHOLDS if thresholds == "published" else None
    try:
        grid = np.asarray(thresholds, np.float64)
    except (TypeError, ValueError):
        grid = np.zeros(0)
    if grid.ndim != 1 or not grid.size or not np.isfinite(grid).all() or not (np.diff(grid) > 0).all():
        raise ArgumentError(f"thresholds must be 'published', 'exact' or rising finite values, found {thresholds!r}")
    return grid


def _check(a: np.ndarray, b: np.ndarray, same: np.ndarray, folds: np.ndarray) -> None:
    if a.ndim != 2 or a.shape != b.shape or same.shape != a.shape[:1] or folds.shape != a.shape[:1]:
        shapes = ", ".join(str(part.shape) for part in (a, b, same, folds))
        raise DataError(f"embeddings_a, embeddings_b, same, folds: found shapes {shapes}, expected (n, d) twice, (n,)")
    for name, part in (("embeddings_a", a), ("embeddings_b", b)):
        bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
        if bad.size:
            raise DataError(f"{name} holds NaN or infinity in {bad.size:,} rows, first in row {bad[0]}")
    if not np.isin(same, (0, 1)).all():
        raise DataError(f"same: found {same[~np.isin(same, (0, 1))][0]!r}, expected True or False for each pair")
    names = np.unique(folds)
    if len(names) < 2:
        raise DataError(f"folds: found {len(names)}, at least 2 are needed: a threshold is chosen on the other folds")
    for name in names:
        count, ones = int((folds == name).sum()), int(same[folds == name].sum())
        if ones in (0, count):
            raise DataError(f"fold {name} has {ones} pairs of one person among {count}; both kinds are needed")

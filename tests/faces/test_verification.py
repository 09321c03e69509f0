"""The ten-fold protocol against cases computed by hand and against definitions counted pair by pair."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.verification import PUBLISHED_THRESHOLDS, flip_concat, verify_pairs


def at_distances(distances):
    """Embeddings whose squared distances are exactly these."""
    a = np.zeros((len(distances), 2))
    return a, a + np.sqrt(np.asarray(distances, float))[:, None] * np.array([1.0, 0.0])


def verify(distances, same, folds, **options):
    options = {"distance": "euclidean", "subtract_mean": False, **options}
    return verify_pairs(*at_distances(distances), same, folds, **options)


def test_thresholds_come_from_the_other_folds_by_hand():
    """Fold 0 is separable up to 0.25, fold 1 up to 1: each gets the other's smallest best threshold."""
    distances = [0.0625, 0.25, 0.25, 1.0]
    result = verify(distances, [1, 0, 1, 0], [0, 0, 1, 1])
    # On fold 1 all thresholds in (0.25, 1] are right: the first of the grid is 0.26, which accepts both of fold 0.
    # On fold 0 all in (0.0625, 0.25]: 0.07, which accepts none of fold 1.
    assert result.thresholds.tolist() == pytest.approx([0.26, 0.07])
    assert result.fold_accuracies.tolist() == [0.5, 0.5]
    assert (result.accuracy, result.accuracy_std) == (0.5, 0.0)
    exact = verify(distances, [1, 0, 1, 0], [0, 0, 1, 1], thresholds="exact")
    assert exact.thresholds.tolist() == pytest.approx([0.625, 0.15625])


def test_mean_and_population_deviation_are_those_of_the_folds():
    """The last fold is the reverse of the others; where it helps to choose, no threshold is better than 0."""
    result = verify([0.01, 1.0, 0.01, 1.0, 1.0, 0.01], [1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 2])
    assert result.fold_accuracies.tolist() == [0.5, 0.5, 0.0]
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.accuracy_std == pytest.approx(math.sqrt(1 / 18))


def test_a_distance_at_the_threshold_is_refused():
    result = verify([0.25, 1.0, 0.25, 1.0], [1, 0, 1, 0], [0, 0, 1, 1], thresholds=[0.25, 0.5, 3.0])
    assert result.thresholds.tolist() == [0.5, 0.5]
    assert result.accuracy == 1.0


def test_cosine_is_the_angle_over_pi_and_euclidean_the_squared_distance():
    a = np.array([[1.0, 0], [1, 0], [1, 0], [2, 0], [0, 0], [1, 1]])
    b = np.array([[3.0, 0], [-2, 0], [0, 1], [2, 2], [1, 0], [1, 1]])
    same, folds = [1, 0, 0, 1, 0, 1], [0, 0, 1, 1, 0, 1]
    cosine = verify_pairs(a, b, same, folds, subtract_mean=False).distances
    np.testing.assert_allclose(cosine, [0, 1, 0.5, 0.25, 0.5, 0], atol=1e-7)
    euclidean = verify_pairs(a, b, same, folds, distance="euclidean", subtract_mean=False, thresholds="exact").distances
    np.testing.assert_allclose(euclidean, [4, 9, 2, 4, 1, 0])


@given(st.integers(0, 2**31 - 1), st.integers(1, 600))
@settings(max_examples=50, deadline=None)
def test_the_angle_of_parallel_vectors_is_never_nan(seed, size):
    a = np.random.default_rng(seed).normal(size=(4, size)).astype(np.float32)
    distances = verify_pairs(a, 3 * a, [1, 0, 1, 0], [0, 0, 1, 1], subtract_mean=False).distances
    assert (distances >= 0).all()
    assert distances.max() < 1e-7


def test_the_mean_is_that_of_the_other_folds_and_of_both_sides():
    rng = np.random.default_rng(0)
    a, b = rng.normal(2.0, 1.0, (2, 12, 5))
    same, folds = np.tile([1, 0], 6), np.repeat([0, 1, 2], 4)
    result = verify_pairs(a, b, same, folds)
    for fold in range(3):
        mean = np.concatenate([a[folds != fold], b[folds != fold]]).mean(axis=0)
        plain = verify_pairs(a - mean, b - mean, same, folds, subtract_mean=False)
        np.testing.assert_allclose(result.distances[folds == fold], plain.distances[folds == fold])


def test_the_published_thresholds_are_400_steps_of_a_hundredth():
    np.testing.assert_array_equal(PUBLISHED_THRESHOLDS, np.arange(0, 4, 0.01))


distances_and_kinds = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=60).filter(
    lambda pairs: 0 < sum(same for _, same in pairs) < len(pairs)
)


def two_folds(pairs):
    """The same pairs as two folds, so that each fold has both kinds."""
    distances, same = (np.array(part) for part in zip(*pairs, strict=True))
    return np.tile(distances / 8.0, 2), np.tile(same, 2), np.repeat([0, 1], len(pairs))


@given(distances_and_kinds)
@settings(max_examples=150, deadline=None)
def test_auc_is_the_mann_whitney_statistic_with_ties(pairs):
    result = verify(*two_folds(pairs))
    distances, same, _ = two_folds(pairs)
    difference = distances[~same][None, :] - distances[same][:, None]
    assert result.auc == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean())


@given(distances_and_kinds, st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_the_threshold_for_val_is_the_largest_with_an_allowed_false_accept_rate(pairs, target):
    """Both folds are equal here, so the training rate is the measured one."""
    distances, same, folds = two_folds(pairs)
    result = verify(distances, same, folds, far_target=target)
    assert result.far <= target
    above = [t for t in [*np.unique(distances), np.inf] if (distances[~same] < t).mean() <= target]
    assert result.val == pytest.approx((distances[same] < max(above)).mean())
    assert result.val_std == 0


@given(distances_and_kinds)
@settings(max_examples=100, deadline=None)
def test_the_curve_holds_the_rates_of_its_thresholds_and_rises_from_0_to_1(pairs):
    distances, same, folds = two_folds(pairs)
    roc = verify(distances, same, folds).roc
    for rates, kind in ((roc.far, ~same), (roc.val, same)):
        np.testing.assert_allclose(
            rates, [(verify(distances, same, folds).distances[kind] < t).mean() for t in roc.thresholds]
        )
        assert rates[0] == 0 and rates[-1] == 1 and (np.diff(rates) >= 0).all()


@given(distances_and_kinds, st.integers(1, 6), st.sampled_from(["published", "exact"]))
@settings(max_examples=100, deadline=None)
def test_the_chosen_threshold_is_the_first_best_of_all_candidates_counted_one_by_one(pairs, shift, thresholds):
    distances, same, folds = two_folds(pairs)
    distances = distances + shift / 100 * folds
    result = verify(distances, same, folds, thresholds=thresholds)
    measured = result.distances
    for fold in (0, 1):
        other, own = folds != fold, folds == fold
        if thresholds == "published":
            candidates = PUBLISHED_THRESHOLDS
        else:
            points = np.unique(measured[other])
            candidates = np.concatenate([points[:1], (points[1:] + points[:-1]) / 2, [points[-1] + 1e-9]])
        accuracies = [((measured[other] < t) == same[other]).mean() for t in candidates]
        best = candidates[int(np.argmax(accuracies))]
        assert result.thresholds[fold] == pytest.approx(best)
        assert result.fold_accuracies[fold] == pytest.approx(((measured[own] < best) == same[own]).mean())


@given(st.integers(0, 2**31 - 1), st.sampled_from(["cosine", "euclidean"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_neither_the_order_of_pairs_nor_the_names_of_folds_nor_the_sides_matter(seed, distance, subtract_mean):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(40, 6))
    b = a + rng.normal(size=(40, 6))
    same, folds = np.tile([True, False], 20), np.repeat(np.arange(4), 10)
    b[~same] = rng.normal(size=(20, 6))
    options = {"distance": distance, "subtract_mean": subtract_mean, "thresholds": "exact"}
    plain = verify_pairs(a, b, same, folds, **options)
    order = rng.permutation(40)
    names = np.array(["a", "b", "c", "d"])
    moved = verify_pairs(b[order], a[order], same[order], names[folds[order]], **options)
    np.testing.assert_allclose(moved.fold_accuracies, plain.fold_accuracies)
    np.testing.assert_allclose(moved.distances, plain.distances[order], atol=1e-12)
    for name in ("accuracy", "accuracy_std", "val", "val_std", "far", "auc", "eer"):
        assert getattr(moved, name) == pytest.approx(getattr(plain, name)), name


@given(distances_and_kinds)
@settings(max_examples=100, deadline=None)
def test_at_the_equal_error_rate_the_curve_meets_the_falling_diagonal(pairs):
    result = verify(*two_folds(pairs))
    far, val, _ = result.roc
    assert 0 <= result.eer <= 1
    low = val[far < result.eer].max(initial=0.0)
    high = val[far > result.eer].min(initial=1.0)
    assert low - 1e-9 <= 1 - result.eer <= high + 1e-9


def test_equal_error_rate_by_hand():
    """Rates (FAR, VAL) after each distance: (0, .5), (.5, .5), (.5, 1), (1, 1)."""
    result = verify([0.1, 0.2, 0.3, 0.4] * 2, [1, 0, 1, 0] * 2, np.repeat([0, 1], 4))
    assert result.eer == pytest.approx(0.5)
    assert verify([0.1, 0.2] * 2, [1, 0] * 2, [0, 0, 1, 1]).eer == 0.0
    assert verify([0.2, 0.1] * 2, [1, 0] * 2, [0, 0, 1, 1]).eer == 1.0


def test_a_rate_that_the_pairs_cannot_resolve_allows_no_false_accept():
    result = verify([0.1, 0.5, 0.2, 0.3, 0.1, 0.5, 0.2, 0.3], [1, 1, 0, 0] * 2, np.repeat([0, 1], 4), far_target=0.001)
    assert (result.val, result.far) == (0.5, 0.0)
    everything = verify([0.1, 0.2] * 2, [1, 0] * 2, [0, 0, 1, 1], far_target=1.0)
    assert (everything.val, everything.far) == (1.0, 1.0)


def test_nothing_measured_on_a_fold_depends_on_the_fold_itself():
    """Whatever the labels of a fold, its threshold and its distances stay."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 30, 4))
    same, folds = np.tile([1, 0], 15), np.repeat([0, 1, 2], 10)
    changed = same.copy()
    changed[folds == 1] = changed[folds == 1][::-1]
    first, second = (verify_pairs(a, b, kinds, folds) for kinds in (same, changed))
    assert first.thresholds[1] == second.thresholds[1]
    np.testing.assert_array_equal(first.distances, second.distances)
    assert first.fold_accuracies[1] == pytest.approx(1 - second.fold_accuracies[1])


def test_thresholds_that_end_too_early_are_refused_instead_of_giving_a_low_accuracy():
    far, same, folds = [9.0, 16.0, 9.0, 16.0], [1, 0, 1, 0], [0, 0, 1, 1]
    with pytest.raises(DataError, match="thresholds end at 5, distances go up to 16, and a higher"):
        verify(far, same, folds, thresholds=[1.0, 5.0])
    with pytest.raises(DataError, match=r"thresholds end at 3\.99"):
        verify(far, same, folds)
    assert verify(far, same, folds, thresholds="exact").accuracy == 1.0
    assert verify(far, same, folds, thresholds=[1.0, 10.0]).accuracy == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings_a": np.zeros((4, 3))}, "found shapes"),
        ({"embeddings_a": np.zeros(4), "embeddings_b": np.zeros(4)}, "found shapes"),
        ({"same": [1, 0, 1]}, "found shapes"),
        ({"folds": [0, 0, 1]}, "found shapes"),
        (
            {"embeddings_b": np.array([[0, 0], [0, np.nan], [0, 0], [np.inf, 0]])},
            "embeddings_b .* in 2 rows, first in row 1",
        ),
        ({"same": [1, 0, 1, 2]}, "same: found .*2.*, expected True or False"),
        ({"folds": [0, 0, 0, 0]}, "folds: found 1, at least 2 are needed"),
        ({"same": [1, 1, 1, 0]}, "fold 0 has 2 pairs of one person among 2; both kinds are needed"),
        ({"same": [1, 0, 0, 0]}, "fold 1 has 0 pairs of one person among 2"),
    ],
)
def test_data_that_cannot_be_verified_is_refused(change, message):
    arguments = {
        "embeddings_a": np.ones((4, 2)),
        "embeddings_b": np.ones((4, 2)),
        "same": [1, 0, 1, 0],
        "folds": [0, 0, 1, 1],
    }
    with pytest.raises(DataError, match=message):
        verify_pairs(**{**arguments, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "manhattan"}, "distance must be"),
        ({"far_target": -0.1}, "far_target lies in"),
        ({"far_target": math.nan}, "far_target lies in"),
        ({"thresholds": "fine"}, "thresholds must be"),
        ({"thresholds": []}, "thresholds must be"),
        ({"thresholds": [0.2, 0.1]}, "thresholds must be"),
        ({"thresholds": [0.1, math.inf]}, "thresholds must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        verify([0.1, 0.2] * 2, [1, 0] * 2, [0, 0, 1, 1], **options)


def test_embeddings_of_image_and_mirror_have_length_one_each():
    images = np.arange(2 * 2 * 3).reshape(2, 2, 3, 1).astype(np.float32)
    flat = images.reshape(2, -1)
    mirrored = images[:, :, ::-1].reshape(2, -1)
    result = flip_concat(lambda x: x.reshape(2, -1), images)
    expected = np.concatenate([v / np.linalg.norm(v, axis=1, keepdims=True) for v in (flat, mirrored)], axis=1)
    np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert result.dtype == np.float32
    np.testing.assert_allclose(flip_concat(lambda x: 0 * x.reshape(2, -1), images), 0)


def test_flip_concat_refuses_what_is_no_batch_of_images_or_embeddings():
    with pytest.raises(DataError, match=r"images: found shape \(2, 3\), expected"):
        flip_concat(lambda x: x, np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"embed gave shape \(1, 6\) for 2 images"):
        flip_concat(lambda x: x.reshape(2, -1)[:1], np.zeros((2, 2, 3, 1)))


def test_the_table_and_the_picture_say_what_was_measured_and_left_out():
    result = verify(
        [0.1, 0.2, 0.15, 0.4] * 2, [1, 0] * 4, np.repeat([0, 1], 4), skipped=[f"fold 1: pair {i}" for i in range(12)]
    )
    text = str(result)
    assert f"{result.accuracy:.5f} ± {result.accuracy_std:.5f}" in text
    assert "12 pairs; only their own folds became smaller" in text and "fold 1: pair 9" in text and "and 2 more" in text
    assert "skipped" not in str(verify([0.1, 0.2] * 2, [1, 0] * 2, [0, 0, 1, 1]))
    figure = result.plot()
    labels = [t.get_text() for axes in figure.axes for t in axes.get_legend().get_texts()]
    assert labels[:2] == [f"AUC {result.auc:.4f}", f"EER {result.eer:.4f}"]
    assert figure._repr_png_().startswith(b"\x89PNG")


@given(distances_and_kinds)
@settings(max_examples=150, deadline=None)
def test_the_curve_of_the_library_is_the_one_counted_pair_by_pair(pairs):
    distances, same, folds = two_folds(pairs)
    far, val, thresholds = verify(distances, same, folds).roc
    assert (len(far), far[0], val[0], far[-1], val[-1]) == (len(np.unique(distances)) + 1, 0, 0, 1, 1)
    closer = verify(distances, same, folds).distances[None, :] < thresholds[:, None]
    np.testing.assert_allclose(far, closer[:, ~same].mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(val, closer[:, same].mean(axis=1), atol=1e-12)
    assert verify(distances, same, folds).auc == pytest.approx(np.trapezoid(val, far), abs=1e-12)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(DataError, match=r'The ROC curve needs the package sklearn.*pip install "pae-jax\[faces\]"'):
        _ = verify([0.1, 0.2] * 2, [1, 0] * 2, [0, 0, 1, 1]).auc

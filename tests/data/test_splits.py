"""Streams of tasks: nothing is lost or counted twice, validation never trains, and only what trains is measured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_jax.data import channel_statistics, class_incremental, normalised
from pae_jax.errors import ArgumentError, DataError

RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(6), 20)[RNG.permutation(120)]
IMAGES = RNG.integers(0, 256, (120, 5, 4, 3), np.uint8)
TEST = (RNG.integers(0, 256, (30, 5, 4, 3), np.uint8), np.arange(30) % 6)


def stream(groups=3, x=IMAGES, y=LABELS, test=TEST, **options):
    return class_incremental(x, y, groups, test=test, **options)


def numbered(labels):
    """Inputs that say which example they are."""
    return np.arange(len(labels), dtype=np.float64)[:, None]


def numbers(split, part):
    """The examples of a part of a split of `numbered` inputs."""
    x, _ = part
    return (x.astype(np.float64) * split.std + split.mean)[:, 0].round().astype(int)


def same(first, second):
    arrays = [(s.mean, s.std, *s.train, *s.val, *s.test) for s in (first, second)]
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(*arrays, strict=True))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_train_and_val_part_each_class_and_test_stays(data):
    counts = data.draw(st.lists(st.integers(2, 25), min_size=2, max_size=8))
    labels = np.repeat(np.arange(len(counts)) * 3, counts)
    labels = data.draw(st.permutations(labels.tolist()).map(np.asarray))
    ids = data.draw(st.permutations(sorted(set(labels.tolist()))))
    cut = data.draw(st.integers(1, len(ids)))
    groups = [group for group in (ids[:cut], ids[cut:]) if group]
    fraction = data.draw(st.floats(0.01, 0.5))
    splits = class_incremental(
        numbered(labels), labels, groups, test=(numbered(labels), labels), val_fraction=fraction, seed=7
    )
    for split, group in zip(splits, groups, strict=True):
        train, val, test = (numbers(split, part) for part in (split.train, split.val, split.test))
        belongs = np.flatnonzero(np.isin(labels, group))
        assert sorted([*train, *val]) == belongs.tolist() and test.tolist() == belongs.tolist()
        assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
        for (_, y), chosen in zip((split.train, split.val, split.test), (train, val, test), strict=True):
            assert y.dtype == np.int32 and [group[label] for label in y] == labels[chosen].tolist()
        for label, c in enumerate(group):
            assert (split.val[1] == label).sum() == max(1, round(fraction * (labels == c).sum()))


def test_what_is_held_out_depends_on_the_seed_and_not_on_the_grouping():
    x = numbered(LABELS)
    test = (x, LABELS)

    def held(groups, seed):
        return {n for split in stream(groups, x, test=test, seed=seed) for n in numbers(split, split.val)}

    assert held(1, 0) == held(6, 0) == held([[5, 0], [1, 3, 2, 4]], 0)
    assert held(6, 0) != held(6, 1)


def test_a_task_is_normalised_by_what_trains_in_it():
    for split, group in zip(stream(), ([0, 1], [2, 3], [4, 5]), strict=True):
        x, _ = split.train
        assert x.dtype == np.float32 and split.mean.dtype == split.std.dtype == np.float32
        np.testing.assert_allclose(x.mean(axis=(0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(x.std(axis=(0, 1, 2)), 1, atol=1e-5)
        chosen = np.isin(TEST[1], group)
        np.testing.assert_allclose(split.test[0], (TEST[0][chosen] / 255 - split.mean) / split.std, atol=1e-5)


def test_validation_and_test_images_have_no_influence_on_training():
    before = stream(seed=3)[1]
    x = IMAGES.copy()
    belongs = np.isin(LABELS, (2, 3))
    raw = (before.val[0] * before.std + before.mean) * 255
    held = [i for i in np.flatnonzero(belongs) if any(np.allclose(IMAGES[i], image, atol=0.01) for image in raw)]
    assert len(held) == 4
    x[held] = 255 - x[held]
    after = stream(x=x, test=(255 - TEST[0], TEST[1]), seed=3)[1]
    assert np.array_equal(after.train[0], before.train[0]) and np.array_equal(after.mean, before.mean)
    assert not np.array_equal(after.val[0], before.val[0]) and not np.array_equal(after.test[0], before.test[0])


def test_a_split_taken_twice_has_the_same_bits_and_the_images_stay_as_they_came():
    images = IMAGES.copy()
    splits = stream(x=images)
    assert same(splits[2], splits[2]) and same(splits[2], splits[-1]) and same(list(splits)[2], splits[2])
    assert same(stream()[2], splits[2])
    assert splits._train[0] is images and np.array_equal(images, IMAGES)
    with pytest.raises(IndexError):
        splits[3]


def test_a_slice_of_a_stream_is_a_stream():
    splits = stream(names=["a", "b", "c"])
    part = splits[1:]
    assert part.names == ("b", "c") and len(part) == 2 and same(part[0], splits[1])


def test_a_number_of_groups_cuts_the_classes_in_ascending_order():
    assert stream(2).groups == ((0, 1, 2), (3, 4, 5))
    assert stream(6).groups == tuple((c,) for c in range(6))


def test_names_of_tasks_and_classes_are_those_given():
    splits = stream([[4, 0], [2, 1]], names=["x", "y"], class_names=["zero", "one", "two", "three", "four", "five"])
    assert [split.name for split in splits] == ["x", "y"]
    assert [split.classes for split in splits] == [("four", "zero"), ("two", "one")]
    assert stream()[0].classes == ("0", "1") and stream().names == ("task_1", "task_2", "task_3")


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_normalising_undoes_the_statistics(dtype):
    images = IMAGES.astype(dtype)
    scale = 255 if dtype == np.uint8 else 1
    mean, std = channel_statistics(images)
    wide = images.astype(np.float64) / scale
    np.testing.assert_allclose(mean, wide.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(std, wide.std(axis=(0, 1, 2)))
    x = normalised(images, mean, std)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, (wide - mean) / std, atol=1e-5)
    assert images.dtype == dtype and np.array_equal(images, IMAGES.astype(dtype))


def test_a_constant_channel_becomes_zero():
    for images in (np.full((4, 3, 3, 2), 26, np.uint8), np.full((4, 3, 3, 2), 0.1, np.float32)):
        mean, std = channel_statistics(images)
        assert std.tolist() == [1.0, 1.0]
        np.testing.assert_allclose(normalised(images, mean, std), 0, atol=1e-7)


def with_one(value):
    images = IMAGES / 255
    images[37, 1, 0, 2] = value
    return images


DATA = {
    "lengths": ({"y": LABELS[:-1]}, r"x and y: found inputs of shape \(120, 5, 4, 3\) and labels of shape \(119,\)"),
    "one-hot labels": ({"y": np.eye(6, dtype=int)[LABELS]}, "expected .* and .n,."),
    "no channels": ({"x": np.zeros(120)}, "expected .n, ..., channels."),
    "float labels": ({"y": LABELS.astype(float)}, "labels of dtype float64, expected class ids"),
    "no labels": (
        {"y": np.where(np.arange(120) % 7, LABELS, -1)},
        "18 labels below 0, first -1 for example 0, ",
    ),
    "one NaN": ({"x": with_one(np.nan)}, "x and y: found NaN or infinity in 1 of 120 examples, first in example 37"),
    "one infinity": ({"x": with_one(-np.inf)}, "first in example 37, .* Repair these examples or leave them out"),
    "int32 images": ({"x": IMAGES.astype(np.int32)}, "x and y: found int32, expected uint8 images or floats"),
    "test of another size": ({"test": (TEST[0][:, 1:], TEST[1])}, r"test: found uint8 inputs of shape \(4, 4, 3\)"),
    "test of another type": ({"test": (TEST[0] / 255, TEST[1])}, "test: found float64"),
    "class without test": ({"test": (TEST[0], TEST[1] % 5)}, r"class 5 \(5\) has 20 training and 0 test"),
    "class without train": ({"groups": [[0, 1], [9]]}, r"classes \[9\] have no training"),
    "class of one": ({"y": np.where(np.arange(120) == 0, 6, LABELS), "groups": [[6]]}, "at least 1 to train"),
}


@pytest.mark.parametrize("name", DATA)
def test_examples_that_do_not_fit_are_refused(name):
    options, message = DATA[name]
    with pytest.raises(DataError, match=message):
        stream(**options)


ARGUMENTS = [
    {"groups": 4},
    {"groups": 0},
    {"groups": []},
    {"groups": [[0], []]},
    {"groups": [[0, 1], [1, 2]]},
    {"names": ["a", "b"]},
    {"names": ["a", "b", "b"]},
    {"class_names": ["a", "b"]},
    {"val_fraction": 0.0},
    {"val_fraction": 1.0},
    {"val_fraction": float("nan")},
    {"seed": -1},
    {"seed": 0.5},
]


@pytest.mark.parametrize("options", ARGUMENTS, ids=str)
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        stream(**options)


def test_statistics_that_do_not_fit_the_images_are_refused():
    for mean, std in (([0.5], [0.2]), ([0.5] * 3, [0.2, 0.0, 0.2]), (0.5, 0.2)):
        with pytest.raises(ArgumentError, match="mean and std"):
            normalised(IMAGES, mean, std)
    with pytest.raises(DataError, match="found int64"):
        normalised(IMAGES.astype(int), [0.5] * 3, [0.2] * 3)
    with pytest.raises(DataError, match="at least one entry"):
        channel_statistics(IMAGES[:0])


def test_one_bad_pixel_never_reaches_the_mean_nor_the_test_images():
    bad = with_one(np.nan)
    for call in (channel_statistics, lambda x: normalised(x, [0, 0, 0], [1, 1, 1])):
        with pytest.raises(DataError, match="images: found NaN or infinity in 1 of 120 examples, first in example 37"):
            call(bad)
    with pytest.raises(DataError, match="test: found NaN or infinity in 1 of 120"):
        class_incremental(IMAGES / 255, LABELS, 2, test=(bad, LABELS))

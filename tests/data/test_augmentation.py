"""`augmented` adds shifts and mirror images, and nothing else."""

import numpy as np
import pytest

from pae_jax.data import augmented
from pae_jax.errors import ArgumentError, DataError

IMAGES = np.random.default_rng(0).normal(size=(3, 8, 6, 2)).astype(np.float32)
LABELS = np.arange(3, dtype=np.int32)


def test_the_unchanged_images_come_first():
    images, labels = augmented((IMAGES, LABELS), pixels=2)
    assert np.array_equal(images[:3], IMAGES) and np.array_equal(labels[:3], LABELS)
    assert images.shape == (54, 8, 6, 2) and images.dtype == np.float32
    assert labels.shape == (54,) and labels.dtype == np.int32


def test_every_variant_is_a_shift_with_repeated_border_or_its_mirror_image():
    rows, columns = np.arange(8), np.arange(6)
    expected = {
        IMAGES[0][np.clip(rows + y, 0, 7)][:, np.clip(columns + x, 0, 5)][:, ::mirror].tobytes()
        for y in (-2, 0, 2)
        for x in (-2, 0, 2)
        for mirror in (1, -1)
    }
    images, labels = augmented((IMAGES, LABELS), pixels=2)
    assert {image.tobytes() for image in images[labels == 0]} == expected and len(expected) == 18


def test_shifts_and_mirror_images_can_be_had_alone():
    assert len(augmented((IMAGES, LABELS), mirror=False)[0]) == 27
    assert np.array_equal(augmented((IMAGES, LABELS), pixels=0)[0][3:], IMAGES[:, :, ::-1])
    assert np.array_equal(augmented((IMAGES, LABELS), pixels=0, mirror=False)[0], IMAGES)


@pytest.mark.parametrize("pixels", [-1, 6])
def test_a_shift_out_of_range_is_refused(pixels):
    with pytest.raises(ArgumentError, match="pixels"):
        augmented((IMAGES, LABELS), pixels=pixels)


@pytest.mark.parametrize("examples", [(IMAGES[0], LABELS), (IMAGES, LABELS[:2])])
def test_examples_of_another_shape_are_refused(examples):
    with pytest.raises(DataError, match="expected"):
        augmented(examples)

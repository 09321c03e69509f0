"""Augmentation shifts, crops and mirrors images, and does nothing else to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax.data import (
    augmented,
    centre_crop,
    channel_statistics,
    crop_and_flip,
    normalised,
    random_crop_to,
)
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


def distinct(count=4, height=8, width=6, channels=2):
    """Images of which no two pixels are equal."""
    return np.arange(1, count * height * width * channels + 1, dtype=np.float32).reshape(count, height, width, channels)


def windows(image, size, flips=(1, -1)):
    """All crops of an image of a size, and their mirror images, as bytes."""
    height, width = size
    return [
        image[top : top + height, left : left + width][:, ::flip].tobytes()
        for top in range(image.shape[0] - height + 1)
        for left in range(image.shape[1] - width + 1)
        for flip in flips
    ]


def shares(crops, expected):
    """How often each expected crop was drawn, by order; every crop must be an expected one."""
    found = [expected.index(np.asarray(crop).tobytes()) for crop in crops]
    return np.bincount(found, minlength=len(expected)) / len(found)


KEY = jax.random.key(0)
apply = jax.jit(lambda augment, key, x: augment(key, x), static_argnums=0)


def test_a_crop_is_a_window_of_the_padded_image_or_its_mirror_image_all_equally_often():
    image = distinct(1)[0]
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=-7)
    crops = apply(crop_and_flip(1, fill=-7), KEY, np.stack([image] * 9000))
    np.testing.assert_allclose(shares(crops, windows(padded, (8, 6))), 1 / 18, atol=0.01)


def test_a_crop_to_a_smaller_size_is_any_window_equally_often():
    image = distinct(1)[0]
    crops = apply(random_crop_to((6, 5)), KEY, np.stack([image] * 6000))
    np.testing.assert_allclose(shares(crops, windows(image, (6, 5))), 1 / 12, atol=0.015)
    crops = apply(random_crop_to((6, 5), flip=False), KEY, np.stack([image] * 3000))
    np.testing.assert_allclose(shares(crops, windows(image, (6, 5), (1,))), 1 / 6, atol=0.03)


def test_the_whole_of_an_image_can_only_be_flipped():
    images = distinct()
    for augment in (crop_and_flip(0), random_crop_to((8, 6))):
        flipped = np.asarray(apply(augment, KEY, images))
        for before, after in zip(images, flipped, strict=True):
            assert after.tobytes() in windows(before, (8, 6))
    assert np.array_equal(apply(crop_and_flip(0, flip=False), KEY, images), images)
    assert np.array_equal(apply(random_crop_to((8, 6), flip=False), KEY, images), images)


@pytest.mark.parametrize("augment", [crop_and_flip(2, fill=(0.5, -1.5)), random_crop_to((5, 4))])
def test_an_augmentation_is_a_pure_function_of_its_key(augment):
    images = distinct(16)
    first = np.asarray(augment(KEY, images))
    assert first.dtype == np.float32
    assert np.array_equal(apply(augment, KEY, images), first)
    assert not np.array_equal(apply(augment, jax.random.key(1), images), first)
    assert np.array_equal(images, distinct(16))


def test_padding_is_filled_channel_by_channel_and_cast_to_the_images_dtype():
    images = np.full((64, 2, 2, 3), 200, np.uint8)
    filled = np.asarray(apply(crop_and_flip(2, fill=[1, 2, 3]), KEY, images))
    assert filled.dtype == np.uint8
    assert {tuple(pixel) for pixel in filled.reshape(-1, 3).tolist()} == {(200, 200, 200), (1, 2, 3)}
    assert jax.eval_shape(crop_and_flip(), KEY, jnp.ones((2, 8, 8, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_black_padding_of_normalised_images_is_minus_mean_over_std():
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8)
    mean, std = channel_statistics(images)
    after = apply(crop_and_flip(3, fill=-mean / std), KEY, normalised(images, mean, std))
    before = normalised(np.asarray(apply(crop_and_flip(3), KEY, images)), mean, std)
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_equal_augmentations_compile_once(compilations):
    images = jnp.asarray(distinct())
    with compilations() as first:
        apply(crop_and_flip(2, fill=np.array([0.25, 1.0])), KEY, images)
    with compilations() as again:
        apply(crop_and_flip(2, fill=(0.25, 1)), KEY, images)
    assert first.count == 1
    assert again.count == 0
    assert random_crop_to(5) == random_crop_to((5, 5)) and hash(random_crop_to(5)) == hash(random_crop_to((5, 5)))
    assert crop_and_flip(2) != crop_and_flip(2, flip=False) and crop_and_flip(2) != crop_and_flip(3)


def test_the_centre_is_the_same_for_numpy_and_jax():
    images = distinct()
    assert np.array_equal(centre_crop(images, (4, 2)), images[:, 2:6, 2:4])
    assert np.array_equal(centre_crop(images, (5, 3)), images[:, 1:6, 1:4])
    assert np.array_equal(centre_crop(jnp.asarray(images), (5, 3)), images[:, 1:6, 1:4])
    assert np.shares_memory(centre_crop(images, 6), images)


@pytest.mark.parametrize("pad", [-1, 1.5, True, None])
def test_a_padding_out_of_range_is_refused(pad):
    with pytest.raises(ArgumentError, match="pad"):
        crop_and_flip(pad)


@pytest.mark.parametrize("fill", ["black", [], [[1.0]], np.nan, None])
def test_a_fill_that_is_no_number_is_refused(fill):
    with pytest.raises(ArgumentError, match="fill"):
        crop_and_flip(fill=fill)


def test_images_that_do_not_fit_an_augmentation_are_refused():
    with pytest.raises(ArgumentError, match=r"fill: found 2 values, expected 1 or one per channel, 3"):
        crop_and_flip(fill=(1, 2))(KEY, np.zeros((1, 4, 4, 3)))
    for augment in (random_crop_to((9, 6)), lambda key, x: centre_crop(x, (8, 7))):
        with pytest.raises(ArgumentError, match=r"at most the images' own \(8, 6\)"):
            augment(KEY, distinct())
    for augment in (crop_and_flip(), random_crop_to(4), lambda key, x: centre_crop(x, 4)):
        with pytest.raises(ArgumentError, match=r"x: found shape \(8, 6, 2\)"):
            augment(KEY, distinct()[0])

"""Crops of random size and squares cut out: what they keep, what they draw, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae

KEY = jax.random.key(3)


def ramp(height=24, width=20):
    """Images whose channels are the row and the column of a pixel."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    return np.broadcast_to(np.stack([rows, columns], axis=-1), (16, height, width, 2))


def test_a_sized_crop_is_a_part_of_the_image_of_the_area_and_shape_that_are_allowed():
    crops = np.asarray(pae.data.random_sized_crop(10, area=(0.2, 0.5), ratio=(0.5, 2.0), flip=False)(KEY, ramp()))
    assert crops.shape == (16, 10, 10, 2)
    steps = [np.diff(crops[:, 2:8, 2:8], axis=axis + 1)[..., axis].mean(axis=(1, 2)) * 10 for axis in (0, 1)]
    share = steps[0] * steps[1] / (24 * 20)
    assert (share > 0.2 * 0.95).all()
    assert (share < 0.5 * 1.05).all()
    assert np.ptp(share) > 0.1
    assert (steps[1] / steps[0] > 0.45).all()
    assert (steps[1] / steps[0] < 2.2).all()
    assert (crops >= -0.01).all()


def test_a_sized_crop_of_the_whole_image_at_its_size_is_the_image_and_flips_half():
    whole = pae.data.random_sized_crop((24, 24), area=(1.0, 1.0), ratio=(1.0, 1.0))
    x = ramp(24, 24)
    found = np.asarray(whole(KEY, x))
    flipped = np.asarray([np.allclose(a, b[:, ::-1], atol=1e-4) for a, b in zip(found, x, strict=True)])
    kept = np.asarray([np.allclose(a, b, atol=1e-4) for a, b in zip(found, x, strict=True)])
    assert (flipped ^ kept).all()
    assert 2 < flipped.sum() < 14


def test_pixels_stay_pixels():
    x = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3)).astype(np.uint8)
    assert pae.data.random_sized_crop(8)(KEY, x).dtype == jnp.uint8
    assert pae.data.cutout(3, 255)(KEY, x).dtype == jnp.uint8


def test_cutout_hides_one_square_whose_centre_lies_in_the_image():
    hidden = np.asarray(pae.data.cutout(5, -1.0)(KEY, np.ones((64, 12, 10, 3), np.float32))) == -1
    rows, columns = hidden.any(axis=(2, 3)).sum(axis=1), hidden.any(axis=(1, 3)).sum(axis=1)
    np.testing.assert_array_equal(hidden.sum(axis=(1, 2, 3)), rows * columns * 3)
    assert rows.max() == columns.max() == 5
    assert rows.min() >= 3
    assert len(np.unique(hidden.reshape(64, -1), axis=0)) > 20


def test_equal_settings_make_equal_objects_so_that_they_are_compiled_once():
    assert pae.data.random_sized_crop(8) == pae.data.random_sized_crop((8, 8))
    assert pae.data.cutout(4) == pae.data.cutout(4, 0.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pae.data.random_sized_crop(8, area=(0.0, 1.0)),
        lambda: pae.data.random_sized_crop(8, area=(0.5, 1.5)),
        lambda: pae.data.random_sized_crop(8, ratio=(2.0, 1.0)),
        lambda: pae.data.random_sized_crop(0),
        lambda: pae.data.cutout(0),
        lambda: pae.data.cutout(3, float("nan")),
        lambda: pae.data.cutout(3)(KEY, np.ones((3, 4, 4))),
    ],
)
def test_settings_outside_their_range_are_refused(call):
    with pytest.raises(pae.ArgumentError):
        call()

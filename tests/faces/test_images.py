"""Reading images: the same RGB from every format, an error with the name for everything else, exact standardisation."""

import io
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.images import load_images, read_image, standardise_each, standardise_fixed

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"), [("png", {}), ("webp", {"lossless": True}), ("bmp", {}), ("ppm", {}), ("tiff", {})]
)
def test_lossless_formats_give_the_same_pixels_from_bytes_and_from_files(kind, options, tmp_path):
    data = encoded(COLOURS, kind, **options)
    path = tmp_path / "face"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        image = read_image(source)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, COLOURS)


def test_grey_is_repeated_and_alpha_left_off():
    grey = COLOURS[..., 0]
    np.testing.assert_array_equal(read_image(encoded(grey)), np.repeat(grey[..., None], 3, axis=-1))
    alpha = np.concatenate([COLOURS, COLOURS[..., :1]], axis=-1)
    np.testing.assert_array_equal(read_image(encoded(alpha)), COLOURS)
    grey_alpha = np.stack([grey, COLOURS[..., 1]], axis=-1)
    np.testing.assert_array_equal(read_image(encoded(grey_alpha)), np.repeat(grey[..., None], 3, axis=-1))


def test_palettes_bits_and_transparent_colours_are_read_without_a_warning():
    palette = Image.fromarray(COLOURS).quantize(4)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(read_image(encoded(palette)), expected)
    np.testing.assert_array_equal(read_image(encoded(palette, transparency=bytes([0, 255]))), expected)
    bits = COLOURS[..., 0] > 99
    np.testing.assert_array_equal(read_image(encoded(bits))[..., 0], bits * np.uint8(255))


def test_a_camera_held_upright_gives_an_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
    np.testing.assert_array_equal(read_image(encoded(COLOURS, exif=exif)), np.rot90(COLOURS, -1))


def tiff_of(dtype):
    return encoded(np.zeros((2, 2), dtype), "tiff")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"not an image at all", "cannot be decoded as an image; expected one of JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
        (encoded(COLOURS)[:60], "cannot be decoded"),
        (encoded(COLOURS, "jpeg")[:-300], "cannot be decoded"),
        (tiff_of(np.float32), "8 bits per channel"),
    ],
)
def test_what_is_no_image_is_refused_by_name(data, message, tmp_path):
    path = tmp_path / "Zoe_0001.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read_image(path)
    assert str(path) in str(error.value)
    with pytest.raises(DataError, match=r"^pack, image 3: "):
        read_image(data, name="pack, image 3")


def test_missing_files_and_folders_are_refused_by_name(tmp_path):
    for path in (tmp_path / "none.png", tmp_path, "a\0b.png"):
        with pytest.raises(DataError, match=r"cannot be read|found a folder, expected an image"):
            read_image(path)


def claim(width, height):
    """A PNG that says it is of this size, and holds next to nothing."""
    data = bytearray(encoded(COLOURS))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (10_000, 10_000), (100_000, 100_000)])
def test_a_huge_image_is_refused_before_it_is_decoded(width, height):
    with pytest.raises(DataError, match="80,000,000 pixels are decoded"):
        read_image(claim(width, height), name="huge.png")
    with pytest.raises(DataError, match=r"found 5 x 6 pixels. At most 29 pixels"):
        read_image(encoded(COLOURS), max_pixels=29)
    assert read_image(encoded(COLOURS), max_pixels=30).shape == (6, 5, 3)


@given(
    st.sampled_from(["png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm"]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    st.integers(0, 10_000),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, about the damage
def test_whatever_the_damage_there_is_an_image_or_a_data_error(kind, changes, length):
    data = bytearray(encoded(COLOURS, kind))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        image = read_image(bytes(data[: length % (2 * len(data))]), name="face", max_pixels=10_000)
    except DataError as error:
        assert str(error).startswith("face: ")
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_many_images_become_one_array_in_the_order_of_the_paths(tmp_path):
    paths = [tmp_path / f"{level}.png" for level in (9, 1, 5)]
    for path in paths:
        path.write_bytes(encoded(np.full((20, 20, 3), int(path.stem), np.uint8)))
    images = load_images(paths, 16)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert images[:, 0, 0, 0].tolist() == [9, 1, 5]
    assert load_images([], 16).shape == (0, 16, 16, 3)


def test_a_crop_is_the_middle_and_scaling_follows_it(tmp_path):
    image = np.zeros((182, 182, 3), np.uint8)
    image[11:-11, 11:-11] = COLOURS[0, 0]
    path = tmp_path / "face.png"
    path.write_bytes(encoded(image))
    assert (load_images([path], 160, crop=160) == COLOURS[0, 0]).all()
    assert (load_images([path], 80, crop=160) == COLOURS[0, 0]).all()
    assert not (load_images([path], 160) == COLOURS[0, 0]).all()


def test_all_images_that_fail_are_counted_and_the_first_named(tmp_path):
    good, empty, small = (tmp_path / name for name in ("good.png", "empty.png", "small.png"))
    good.write_bytes(encoded(np.zeros((30, 30, 3), np.uint8)))
    empty.write_bytes(b"")
    small.write_bytes(encoded(COLOURS))
    with pytest.raises(DataError, match=r"2 of 3 images cannot be used:\n.*empty.png: .*\n.*small.png: found 6 x 5"):
        load_images([good, empty, small], 10, crop=20)
    for options in ({"size": 0}, {"size": 10, "crop": 0}, {"size": 1.5}):
        with pytest.raises(ArgumentError, match="size: found"):
            load_images([good], **options)


pixels = arrays.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.just(3)))


@given(pixels)
@settings(max_examples=50, deadline=None)
def test_each_image_gets_mean_0_and_deviation_1_and_no_more_than_the_floor_allows(images):
    result = standardise_each(images)
    assert result.dtype == np.float32 and result.shape == images.shape
    n = images[0].size
    for image, standard in zip(images.astype(np.float64), result, strict=True):
        expected = (image - image.mean()) / max(image.std(), 1 / np.sqrt(n))
        np.testing.assert_allclose(standard, expected, atol=2e-5)
        np.testing.assert_allclose(standardise_each(image.astype(np.uint8)), standard, atol=1e-6)


@given(pixels)
@settings(max_examples=20, deadline=None)
def test_the_fixed_standardisation_is_exact_and_can_be_undone(images):
    result = standardise_fixed(images)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result * 128 + 127.5, images)


def test_standardisation_takes_jax_arrays_and_leaves_its_argument_alone():
    images = COLOURS[None].copy()
    for standardise in (standardise_fixed, standardise_each):
        on_device = standardise(jnp.asarray(images))
        assert on_device.dtype == jnp.float32
        np.testing.assert_allclose(on_device, standardise(images), atol=1e-6)
        np.testing.assert_array_equal(images, COLOURS[None])
    constant = np.full((2, 4, 4, 3), 7, np.uint8)
    assert not standardise_each(constant).any()

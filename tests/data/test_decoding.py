"""Any image becomes RGB, upright, of 8 bits; what cannot is refused by name."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pae_jax.data import decode_rgb, resized
from pae_jax.errors import ArgumentError, DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
IMAGE = Image.fromarray(PIXELS)


def encoded(image, form="png", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(("form", "options"), [("png", {}), ("webp", {"lossless": True}), ("bmp", {}), ("tiff", {})])
def test_a_lossless_file_gives_its_pixels(form, options):
    image = decode_rgb(encoded(IMAGE, form, **options), "file")
    assert image.dtype == np.uint8 and np.array_equal(image, PIXELS)


def test_grey_becomes_three_equal_channels():
    image = decode_rgb(encoded(IMAGE.convert("L")), "file")
    assert np.array_equal(image, np.repeat(np.asarray(IMAGE.convert("L"))[:, :, None], 3, axis=2))
    assert set(np.unique(decode_rgb(encoded(IMAGE.convert("1")), "file"))) <= {0, 255}


def test_transparency_is_dropped_and_the_colours_stay():
    clear = IMAGE.copy()
    clear.putalpha(Image.fromarray(PIXELS[:, :, 0]))
    assert np.array_equal(decode_rgb(encoded(clear), "file"), PIXELS)
    palette = IMAGE.quantize(16)
    opaque = decode_rgb(encoded(palette), "file")
    assert np.array_equal(opaque, np.asarray(palette.convert("RGB")))
    assert np.array_equal(decode_rgb(encoded(palette, transparency=bytes(range(16))), "file"), opaque)


def test_cmyk_becomes_rgb():
    assert decode_rgb(encoded(IMAGE.convert("CMYK"), "jpeg"), "file").shape == (6, 9, 3)


def test_an_orientation_is_applied():
    exif = Image.Exif()
    exif[274] = 6  # the first row is the right-hand side
    assert np.array_equal(decode_rgb(encoded(IMAGE, exif=exif), "file"), np.rot90(PIXELS, -1))


DAMAGED = {
    "empty": (b"", "0 bytes"),
    "text": (b"no image at all", "cannot be decoded"),
    "cut": (encoded(IMAGE)[:-60], "cannot be decoded"),
    "cut jpeg": (encoded(IMAGE.resize((90, 60)), "jpeg")[:-300], "cannot be decoded"),
    "16 bits": (encoded(Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 256)), "more than 8 bits"),
    "floats": (encoded(Image.fromarray(PIXELS[:, :, 0].astype(np.float32)), "tiff"), "more than 8 bits"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_image_of_8_bits_is_refused_by_name(name):
    content, found = DAMAGED[name]
    with pytest.raises(DataError, match=r"people/ann\.png: .*" + found):
        decode_rgb(content, "people/ann.png")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(encoded(IMAGE)) - 1), st.integers(1, 255))
def test_a_damaged_file_is_refused_or_still_an_image(position, change):
    content = bytearray(encoded(IMAGE))
    content[position] ^= change
    try:
        image = decode_rgb(bytes(content), "file")
    except DataError:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_resizing_gives_the_size_and_keeps_a_flat_image_flat(height, width, high, wide):
    flat = np.full((height, width, 3), (3, 90, 250), np.uint8)
    assert np.array_equal(resized(flat, (high, wide)), np.broadcast_to(flat[0, 0], (high, wide, 3)))


def test_resizing_takes_the_centre_and_leaves_what_fits():
    assert resized(PIXELS, (6, 9)) is PIXELS
    assert np.array_equal(resized(PIXELS, (6, 5)), PIXELS[:, 2:7])
    assert np.array_equal(resized(PIXELS, (6, 7)), PIXELS[:, 1:8])


@pytest.mark.parametrize("size", [0, (4,), (4, 0), 2.5, "4", None, (True, 2)])
def test_a_size_out_of_range_is_refused(size):
    with pytest.raises(ArgumentError, match="size"):
        resized(PIXELS, size)


@pytest.mark.parametrize("image", [PIXELS[..., 0], PIXELS / 255, PIXELS[..., :2]])
def test_only_rgb_images_are_resized(image):
    with pytest.raises(ArgumentError, match="expected uint8"):
        resized(image, 4)

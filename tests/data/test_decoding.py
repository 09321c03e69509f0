"""Any image becomes RGB, upright, of 8 bits; what cannot is refused by name."""

import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pae_jax.data import decode_rgb, decoding, resized
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


def deep_png(colours, channels):
    """A PNG of 3 x 3 pixels with 16 bits per channel, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(6 * channels)) for _ in range(3))
    header = struct.pack(">IIBBBBB", 3, 3, 16, colours, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_tiff():
    """A TIFF of 2 x 2 RGB pixels of 16 bits."""
    entries = [(256, 3, 2), (257, 3, 2), (259, 3, 1), (262, 3, 2), (273, 4, 8), (277, 3, 3), (278, 3, 2), (279, 4, 24)]
    rows = [struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries]
    rows.insert(2, struct.pack("<HHII", 258, 3, 3, 32))
    directory = struct.pack("<H", len(rows)) + b"".join(rows) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 38) + bytes(range(24)) + struct.pack("<3H", 16, 16, 16) + directory


DEEP = {
    "grey PNG": deep_png(0, 1),
    "colour PNG": deep_png(2, 3),
    "grey PNG with alpha": deep_png(4, 2),
    "colour PNG with alpha": deep_png(6, 4),
    "colour PPM": b"P6 2 2 65535 " + bytes(24),
    "colour PPM of 10 bits": b"P6 2 2 1023 " + bytes(24),
    "plain PPM": b"P3 1 1 1023 1 2 3 ",
    "grey PGM": b"P5 2 2 65535 " + bytes(8),
    "colour TIFF": deep_tiff(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_pixels_of_more_than_8_bits_are_refused_where_pillow_would_cut_them(kind):
    with Image.open(io.BytesIO(DEEP[kind])) as image:
        image.load()
    with pytest.raises(DataError, match="deep: found more than 8 bits per channel"):
        decode_rgb(DEEP[kind], "deep")


def test_pixels_of_fewer_bits_are_taken():
    assert decode_rgb(b"P6 1 1 100 " + bytes([50, 100, 0]), "ppm")[0, 0].tolist() == [128, 255, 0]
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 0, 4, 0, 0, 0, 0)  # 5 bits per channel, 16 per pixel
    bmp = b"BM" + struct.pack("<IHHI", 58, 0, 0, 54) + header + struct.pack("<HH", 0x7C00, 0x001F)
    assert decode_rgb(bmp, "bmp")[0].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_no_format_is_opened_that_starts_a_program(tmp_path, monkeypatch):
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DataError, match="cannot be decoded as an image; expected one of JPEG, PNG, WEBP"):
        decode_rgb(encoded(IMAGE, "eps"), "cat.jpg")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["ico", "tga", "pcx", "sgi", "pdf", "jpeg2000"])
def test_only_the_formats_of_photographs_are_opened(kind):
    with pytest.raises(DataError, match="expected one of JPEG, PNG, WEBP, BMP, PPM, GIF, TIFF"):
        decode_rgb(encoded(IMAGE, kind), "file")


def test_a_huge_image_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    for side in (9000, 13_000, 60_000):
        with pytest.raises(DataError, match="80,000,000 pixels are decoded; make it smaller"):
            decode_rgb(b"P5 %d %d 255 " % (side, side), "bomb")
    with pytest.raises(DataError, match=r"found 9 x 6 pixels\. At most 53 pixels"):
        decode_rgb(encoded(IMAGE), "file", max_pixels=53)


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    running, most = [], []

    def slowly(opened):
        running.append(opened)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(opened)
        return PIXELS

    monkeypatch.setattr(decoding, "_upright_rgb", slowly)
    monkeypatch.setattr(decoding, "LARGE", 50)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: decode_rgb(encoded(IMAGE), "file"), range(8)))
    assert set(most) == {1}

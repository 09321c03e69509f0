"""A pack reads as it was written, in its own splits, and a damaged one is refused by the name of what is wrong."""

import io

import numpy as np
import pytest
from PIL import Image

from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.packs import AGE_EDGES, AGE_GROUPS, age_group, load_face_pack


def png(level, size=20):
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), level, np.uint8)).save(file, "png")
    return file.getvalue()


def arrays(count=12, images=None):
    """Face i is of grey level i and age 5 i; splits go 0 1 2 0 1 2."""
    images = [png(i) for i in range(count)] if images is None else images
    number = np.arange(len(images))
    return {
        "bytes": np.frombuffer(b"".join(images), np.uint8),
        "offsets": np.cumsum([0, *map(len, images)]),
        "age": (5 * number).astype(np.uint8),
        "gender": (number % 2).astype(np.uint8),
        "split": (number % 3).astype(np.uint8),
    }


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "faces.npz"
        contents = {**arrays(), **changes}
        np.savez(path, **{name: value for name, value in contents.items() if value is not None})
        return path

    return write


def levels(part):
    return part.images[:, 0, 0, 0].tolist()


def test_faces_come_in_their_own_split_and_order_with_their_labels(write):
    pack = load_face_pack(write(), size=8)
    for split, start in ((pack.train, 0), (pack.val, 1), (pack.test, 2)):
        numbers = np.arange(start, 12, 3)
        assert levels(split) == numbers.tolist()
        assert split.age.tolist() == (5 * numbers).tolist()
        assert split.gender.tolist() == (numbers % 2).tolist()
        assert split.images.shape == (4, 8, 8, 3) and len(split) == 4
        assert (split.images.dtype, split.age.dtype, split.gender.dtype) == (np.uint8, np.int32, np.int32)
    assert load_face_pack(write(), crop=10).train.images.shape == (4, 182, 182, 3)


def test_a_limit_takes_faces_evenly_from_each_split(write):
    pack = load_face_pack(write(), size=8, limit=2)
    assert [levels(split) for split in (pack.train, pack.val, pack.test)] == [[0, 6], [1, 7], [2, 8]]
    pack = load_face_pack(write(), size=8, limit=(3, 1, 100))
    assert [len(split) for split in (pack.train, pack.val, pack.test)] == [3, 1, 4]
    assert levels(pack.train) == [0, 3, 6]


@pytest.mark.parametrize("limit", [0, -1, (1, 2), (1, 2, 0), 1.5, True, "all"])
def test_a_limit_out_of_range_is_refused(write, limit):
    with pytest.raises(ArgumentError, match="limit must be"):
        load_face_pack(write(), limit=limit)


def test_the_eight_age_groups_begin_at_their_edges():
    assert age_group(AGE_EDGES).tolist() == list(range(8))
    assert age_group(np.array(AGE_EDGES[1:]) - 1).tolist() == list(range(7))
    assert age_group(np.array(AGE_EDGES[1:]) - 1e-9).tolist() == list(range(7))
    assert age_group(np.uint8(110)) == 7
    assert age_group([[1], [30]]).shape == (2, 1)
    for name, first, after in zip(AGE_GROUPS, AGE_EDGES, (*AGE_EDGES[1:], None), strict=True):
        assert name == (f"{first}-{after - 1}" if after else f"{first}+")


@pytest.mark.parametrize("years", [[-1], [3.0, np.nan], ["3"]])
def test_ages_below_zero_or_no_numbers_are_refused(years):
    with pytest.raises(DataError, match="years: found"):
        age_group(years)


LABELS = np.zeros(12, np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"age": None, "split": None}, "lacks age, split; found bytes, offsets, gender"),
        ({"age": LABELS + 131}, r"age is 131 for image 0, expected 0\.\.130 \(years\); 12 such labels"),
        ({"age": LABELS.astype(np.int64) - 1}, "age is -1 for image 0"),
        ({"gender": np.where(np.arange(12) == 7, 2, 0)}, r"gender is 2 for image 7, expected 0\.\.1"),
        ({"split": LABELS + 3}, "split is 3 for image 0"),
        ({"split": LABELS}, r"no face has split 1 \(val\)"),
        ({"age": LABELS.astype(np.float32)}, r"age is float32\[12\], expected integers in one dimension"),
        ({"age": LABELS[:-1]}, r"age is uint8\[11\]"),
        ({"offsets": np.arange(13)[::-1]}, "expected integers .* that rise from 0 to the length of bytes"),
        ({"offsets": np.arange(13)}, "that rise from 0 to the length"),
        ({"offsets": np.arange(13.0)}, "offsets is float64"),
        ({"bytes": np.zeros(5)}, r"bytes is float64\[5\], expected uint8"),
        ({"age": np.array([None] * 12)}, "age holds Python objects, which are never unpickled"),
    ],
)
def test_arrays_that_make_no_pack_are_refused_by_name(write, changes, message):
    with pytest.raises(DataError, match=message) as error:
        load_face_pack(write(**changes))
    assert "faces.npz" in str(error.value)


def test_images_that_cannot_be_decoded_are_counted_and_named(write):
    images = [png(i) for i in range(12)]
    images[4], images[7] = b"", b"rubbish"
    with pytest.raises(DataError, match=r"2 of 4 images cannot be used:\n.*image 4: .*\n.*image 7: ") as error:
        load_face_pack(write(**arrays(images=images)), size=8)
    assert "faces.npz" in str(error.value)
    with pytest.raises(DataError, match="too small to cut out 21"):
        load_face_pack(write(), size=8, crop=21)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "faces.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"faces\.npz: cannot be read as an \.npz file"):
        load_face_pack(path)
    with pytest.raises(DataError, match=r"none\.npz: cannot be read"):
        load_face_pack(tmp_path / "none.npz")


def test_a_single_array_or_a_damaged_archive_is_refused(write, tmp_path):
    np.save(tmp_path / "one.npy", LABELS)
    with pytest.raises(DataError, match=r"one\.npy: cannot be read as an \.npz file"):
        load_face_pack(tmp_path / "one.npy")
    path = write()
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays())
        data = bytearray(path.read_bytes())
        data[200:260] = bytes(60)
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"faces\.npz"):
            load_face_pack(path)

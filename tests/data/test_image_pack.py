"""Packs: what is read is what was written, and no file takes more memory than it may."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_jax.data import read_pack
from pae_jax.errors import DataError

LABELS = {"age": (0, 130, "years"), "kind": "kinds"}
ARRAYS = {
    "bytes": np.frombuffer(b"onetwothree", np.uint8),
    "offsets": np.array([0, 3, 6, 11]),
    "age": np.array([4, 71, 30], np.uint8),
    "kind": np.array([1, 0, 1], np.int16),
    "kinds": np.array(["cat", "dög"]),
}


def read(path):
    return read_pack(path, LABELS, ["kinds"])


@pytest.fixture
def write(tmp_path):
    def write(save=np.savez, **changes):
        save(tmp_path / "pack.npz", **{**ARRAYS, **changes})
        return tmp_path / "pack.npz"

    return write


def facts(pack):
    images = [pack.encoded(number) for number in range(len(pack))]
    return images, {name: values.tolist() for name, values in pack.labels.items()}, pack.names


EXPECTED = [b"one", b"two", b"three"], {"age": [4, 71, 30], "kind": [1, 0, 1]}, {"kinds": ("cat", "dög")}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_pack_gives_its_images_labels_and_names(write, save):
    pack = read(write(save))
    assert facts(pack) == EXPECTED
    assert pack.place(2).endswith("pack.npz, image 2")


def test_a_foreign_byte_order_gives_the_same_numbers(write):
    foreign = {name: ARRAYS[name].astype(ARRAYS[name].dtype.newbyteorder(">")) for name in ("offsets", "kind", "kinds")}
    pack = read(write(**foreign))
    assert facts(pack) == EXPECTED
    assert all(values.dtype.isnative for values in pack.labels.values())


BROKEN = {
    "missing": ({"age": None}, "lacks age; found bytes, offsets, kind, kinds"),
    "objects": ({"age": np.array([1, 2, 3], object)}, "age holds Python objects, which are never unpickled"),
    "table": ({"age": ARRAYS["age"][None]}, r"age is uint8\[1, 3\], expected integers in one dimension"),
    "empty": ({"kinds": np.zeros(0, "U3")}, "kinds is .* expected text in one dimension, not empty"),
    "wide bytes": ({"bytes": ARRAYS["bytes"].astype(np.uint16)}, "bytes is uint16.* expected uint8"),
    "float labels": ({"age": ARRAYS["age"] / 1}, "age is float64.* expected integers"),
    "offsets too long": ({"offsets": [0, 3, 6, 12]}, "offsets .* that rise from 0 to the length of bytes, 11"),
    "offsets fall": ({"offsets": [0, 6, 3, 11]}, "offsets .* that rise"),
    "one label less": ({"age": ARRAYS["age"][:2]}, "age is .* one for each of 3 images"),
    "out of range": ({"age": [1, 131, 2]}, r"age is 131 for image 1, expected 0..130 \(years\); 1 such labels"),
    "no such name": ({"kind": [0, 2, 0]}, r"kind is 2 for image 1, expected 0..1 \(numbers of kinds\)"),
    "negative": ({"kind": [0, -1, 0]}, "kind is -1 for image 1"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_arrays_that_make_no_pack_are_refused_by_name(write, tmp_path, kind):
    changes, message = BROKEN[kind]
    contents = {name: value for name, value in {**ARRAYS, **changes}.items() if value is not None}
    np.savez(tmp_path / "broken.npz", **contents)
    with pytest.raises(DataError, match=f"broken.npz: {message}"):
        read(tmp_path / "broken.npz")


def member(shape, size=0, descr="|u1"):
    """The content of a .npy file that declares a shape and holds so many zero bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(size)


def write_members(path, compression=zipfile.ZIP_STORED, **contents):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in ARRAYS.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", contents.get(name, file.getvalue()))
    return path


def test_an_archive_that_unpacks_to_far_more_than_it_is_takes_no_memory(tmp_path):
    size = 300 << 20
    path = write_members(tmp_path / "bomb.npz", zipfile.ZIP_DEFLATED, bytes=member((size,), size))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb\.npz: [0-9,]+ bytes that unpack to 314,[0-9,]+, expected at most 6"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_an_entry_that_unpacks_to_more_than_it_declares_takes_no_memory(tmp_path):
    size = 100 << 20
    path = tmp_path / "liar.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in ARRAYS.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", file.getvalue() if name != "bytes" else member((11,), size))
        archive.getinfo("bytes.npy").file_size = len(member((11,), 11))  # what the directory at the end says
    tracemalloc.start()
    with pytest.raises(DataError, match=r"liar\.npz: cannot be read"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_that_numpy_never_writes_are_refused(tmp_path, compression):
    with pytest.raises(DataError, match=r"'bytes\.npy' is packed in a way that NumPy never uses"):
        read(write_members(tmp_path / "odd.npz", compression))


@pytest.mark.parametrize(("shape", "size"), [((1 << 50,), 11), ((10,), 11), ((12,), 11)])
def test_an_array_that_declares_another_size_than_it_has_is_refused(tmp_path, shape, size):
    path = write_members(tmp_path / "liar.npz", bytes=member(shape, size))
    with pytest.raises(DataError, match=r"liar\.npz: bytes has 11 bytes, expected"):
        read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused(write):
    path = write()
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("age.npy", member((3,), 3))
    with pytest.raises(DataError, match="holds arrays of one name twice"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken", member((3,), 3)])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "file.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"file\.npz: cannot be read as an \.npz file of arrays"):
        read(tmp_path / "file.npz")


def test_a_pack_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pack.npz")
    with pytest.raises(DataError, match=r"pack\.npz: found a FIFO, expected an \.npz file"):
        read(tmp_path / "pack.npz")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_pack_is_refused_or_holds_what_it_held(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("packs") / "damaged.npz"
    data.draw(st.sampled_from([np.savez, np.savez_compressed]))(path, **ARRAYS)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2]))])
    try:
        found = facts(read(path))
    except DataError:
        return
    assert found == EXPECTED

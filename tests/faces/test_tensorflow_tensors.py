"""Checkpoints of TensorFlow are read as they were written; a damaged one is refused by name."""

import numpy as np
import pytest

from pae_jax.errors import DataError
from pae_jax.faces.crc32c import crc32c, masked_crc32c
from pae_jax.faces.tensorflow_tensors import read_tensors


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    found = {f"net/layer_{i}/weights": rng.standard_normal((3, i % 4 + 1), np.float32) for i in range(90)}
    found |= {f"net/layer_{i}/mask": rng.integers(-3, 100, (3, i % 4 + 1)).astype(np.int8) for i in range(90)}
    found |= {"step": np.int64(-275), "flags": np.array([True, False]), "half": np.arange(3, dtype=np.float16)}
    return found | {"none": np.zeros((0, 2), np.float32), "net/layer_1": np.float64(1.5)}


@pytest.fixture(scope="module")
def files(write_checkpoint, arrays, tmp_path_factory):
    prefix = write_checkpoint(tmp_path_factory.mktemp("tensors") / "model.ckpt-1", arrays)
    return {path.name: path.read_bytes() for path in prefix.parent.iterdir()}


def read(folder, files, wanted=lambda name: True):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return read_tensors(folder / "model.ckpt-1", wanted)


def by_bytes(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000, 70_001])
def test_checksums_are_those_of_one_byte_after_the_other(size):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    assert crc32c(data) == by_bytes(data)


def test_checksums_are_the_published_ones():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert masked_crc32c(b"") == 0xA282EAD8


def test_tensors_are_read_as_they_were_written(files, arrays, tmp_path, assert_same):
    assert_same(read(tmp_path, files), {name: np.asarray(array) for name, array in arrays.items()})


def test_only_the_wanted_tensors_are_read(files, tmp_path):
    assert sorted(read(tmp_path, files, lambda name: name.endswith("7/mask"))) == [
        f"net/layer_{i}/mask" for i in sorted(map(str, range(7, 90, 10)))
    ]


def changed(content, at, value=None):
    return content[:at] + bytes([content[at] ^ 1 if value is None else value]) + content[at + 1 :]


INDEX, DATA = "model.ckpt-1.index", "model.ckpt-1.data-00000-of-00001"
DAMAGES = {
    "index cut": (INDEX, lambda c: c[:-1], "does not end as a table"),
    "index empty": (INDEX, lambda c: b"", "does not end as a table"),
    "another file": (INDEX, lambda c: b"x" * 500, "does not end as a table"),
    "entry changed": (INDEX, lambda c: changed(c, 100), "checksum of the block at byte 0 is wrong"),
    "footer changed": (INDEX, lambda c: changed(c, len(c) - 45), "is damaged"),
    "block cut out": (INDEX, lambda c: c[:400] + c[-48:], "is damaged"),
    "data cut": (DATA, lambda c: c[:-1], "ends before 'step' does"),
    "data empty": (DATA, lambda c: b"", "ends before '"),
    "value changed": (DATA, lambda c: changed(c, len(c) - 1), "'step' is damaged, its checksum"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(kind, files, tmp_path):
    name, damage, message = DAMAGES[kind]
    with pytest.raises(DataError, match=rf"{name}: .*{message}"):
        read(tmp_path, files | {name: damage(files[name])})


def test_no_byte_of_an_index_can_change_unnoticed_and_every_refusal_is_typed(files, tmp_path):
    content = files[INDEX]
    used = len(content) - 48  # the footer has unused bytes
    for at in np.linspace(0, used - 1, 60).astype(int):
        with pytest.raises(DataError, match="is damaged"):
            read(tmp_path, {INDEX: changed(content, at), DATA: files[DATA]}, lambda name: False)


def test_a_missing_file_is_named(files, tmp_path):
    with pytest.raises(DataError, match=rf"{DATA}: cannot be read"):
        read(tmp_path, {INDEX: files[INDEX]})
    with pytest.raises(DataError, match=r"none\.index: cannot be read"):
        read_tensors(tmp_path / "none", lambda name: True)


def test_numbers_in_another_order_and_impossible_headers_are_refused(write_checkpoint, tmp_path):
    for header, message in (({"big_endian": 1}, "big-endian"), ({"shards": 10**6}, "names 1000000 data files")):
        write_checkpoint(tmp_path / "model", {"a": np.float32(1)}, **header)
        with pytest.raises(DataError, match=message):
            read_tensors(tmp_path / "model", lambda name: True)

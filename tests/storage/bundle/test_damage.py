"""Bad input: damaged files, headers that lie, other models; all refused by a typed error, nothing changed."""

import json
import os
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

import pae_jax as pae
from pae_jax.storage.bundle import file as bundle_file


def test_a_bundle_of_another_model_is_refused_and_the_leaf_named(net, make, tmp_path):
    pae.write_bundle(tmp_path / "file", net, make("all"))
    other = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
    with pytest.raises(pae.StructureError, match=r"Dense_0/kernel.* Is it a bundle of this model"):
        pae.read_bundle(other, tmp_path / "file")
    with pytest.raises(pae.StructureError, match="Was the state made with this net"):
        pae.write_bundle(tmp_path / "other", other, make("all"))


def test_wrong_arguments_of_write_bundle_are_named_and_leave_no_file(net, make, tmp_path, empty):
    state = make("all")
    folder = tmp_path / "out"

    def write(where=folder / "file", state=state, **options):
        pae.write_bundle(where, net, state, **options)

    for error, message, call in (
        (pae.UnknownTaskError, "unknown task 'z'", lambda: write(tasks=["a", "z"])),
        (pae.UnknownTaskError, "unknown task 'z'", lambda: write(after="z")),
        (pae.UnknownTaskError, "unknown task 'z'", lambda: write(data={"z": ()})),
        (pae.ArgumentError, "collection of names, found 'a'", lambda: write(tasks="a")),
        (pae.ArgumentError, "no task after 'd'", lambda: write(after="d")),
        (pae.ArgumentError, "found no task", lambda: write(tasks=[])),
        (pae.ArgumentError, "found no task", lambda: write(state=empty)),
        (pae.ArgumentError, "but not 'b' itself", lambda: write(tasks=["a", "c"], after="b")),
        (pae.ArgumentError, "weights must be one of", lambda: write(weights="int4")),
        (pae.CheckpointError, "is remote", lambda: write("gs://bucket/file")),
        (pae.CheckpointError, "cannot write", lambda: write("/proc/nowhere/file")),
        (pae.CheckpointError, "no path", lambda: write(str(folder / "a\0b"))),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not folder.exists() or not list(folder.iterdir())
    write()
    with pytest.raises(pae.CheckpointError, match="exists; a bundle is written once"):
        write()
    assert [file.name for file in folder.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def files(net, make, tmp_path_factory):
    """A whole bundle, a delta, and the state it goes onto."""
    folder, state = tmp_path_factory.mktemp("files"), make("ternary")
    pae.write_bundle(folder / "all", net, state, tasks=["a", "b"], weights="int8")
    pae.write_bundle(folder / "delta", net, state, after="b", weights="int8")
    return folder, pae.read_bundle(net, folder / "all")


def test_every_flipped_bit_and_every_truncation_is_refused_and_the_state_untouched(net, files, tmp_path, state_facts):
    folder, onto = files
    raw, before = (folder / "delta").read_bytes(), state_facts(onto)
    draw = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for place, bit in zip(draw.integers(0, len(raw), 1000), draw.integers(0, 8, 1000), strict=True):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(pae.CheckpointError):
            pae.read_bundle(net, path, onto=onto)
    for size in [*range(0, 200), *draw.integers(200, len(raw), 50)]:
        path.write_bytes(raw[:size])
        with pytest.raises(pae.CheckpointError):
            pae.read_bundle(net, path, onto=onto)
    path.write_bytes(raw + b"\0")
    with pytest.raises(pae.CheckpointError):
        pae.read_bundle(net, path, onto=onto)
    assert state_facts(onto) == before
    pae.read_bundle(net, folder / "delta", onto=onto)


def test_a_flipped_bit_of_a_weight_stored_as_it_is_is_refused_and_its_task_named(net, make, tmp_path):
    state, path = make("all"), tmp_path / "file"
    pae.write_bundle(path, net, state)
    raw, draw = path.read_bytes(), np.random.default_rng(0)
    start = 8 + int.from_bytes(raw[:8], "little")
    values = [entry["data_offsets"] for name, entry in json.loads(raw[8:start]).items() if name.startswith("values/")]
    for first, end in values:
        for place in draw.integers(start + first, start + end, 15):
            damaged = bytearray(raw)
            damaged[place] ^= 1 << draw.integers(8)
            path.write_bytes(damaged)
            with pytest.raises(pae.CheckpointError, match=r"damaged: task '[abcd]' is not what was written"):
                pae.read_bundle(net, path)


def forged(source, target, change_header=None, change_tensors=None):
    """Write a bundle with another header or other tensors and a checksum that fits."""
    header, tensors = bundle_file.read(source)
    (change_header or (lambda h: None))(header)
    (change_tensors or (lambda t: None))(tensors)
    bundle_file.write(target, header, tensors)


def moved(counts):
    return [counts[0], counts[1] + 1, counts[2] - 1]


LIES = {
    "schema": lambda h: h.update(schema_version=99),
    "a huge leaf": lambda h: h["shared"]["Dense_0"].update(kernel="float32[1099511627776,8]"),
    "a huge width": lambda h: h.update(width=1e7),
    "a width that is none": lambda h: h.update(width="wide"),
    "counts": lambda h: h["owners"].update({"Dense_0/kernel": [10**12, 0, 0]}),
    "negative counts": lambda h: h["owners"].update({"Dense_0/kernel": [40, -8, 0]}),
    "counts of other numbers": lambda h: h["owners"].update({"Dense_0/kernel": moved(h["owners"]["Dense_0/kernel"])}),
    "an id": lambda h: h["tasks"][0].update(id=7),
    "no name": lambda h: h["tasks"][0].pop("name"),
    "a head": lambda h: h["tasks"][0].update(head=10**9),
    "a digest": lambda h: h["tasks"][1].update(sha256="0" * 64),
    "sharing": lambda h: h["tasks"][1].update(sharing="all", picking=None),
    "picks": lambda h: h["picks"].clear(),
    "tasks": lambda h: h["tasks"].clear(),
    "a list": lambda h: h.update(tasks=3),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused_before_more_than_the_file_is_allocated(net, files, tmp_path, name):
    folder, _ = files
    forged(folder / "all", tmp_path / f"{name} lie", LIES[name])
    with pytest.raises(pae.PaeError) as error:
        pae.read_bundle(net, tmp_path / f"{name} lie")
    assert "\n" not in str(error.value)


def test_tensors_that_are_missing_or_of_another_size_or_dtype_are_refused(net, files, tmp_path):
    folder, _ = files
    changes = {
        "missing": lambda t: t.pop("values/Dense_0/kernel"),
        "extra": lambda t: t.update(more=np.zeros(3)),
        "short": lambda t: t.update({"values/Dense_0/kernel": t["values/Dense_0/kernel"][1:]}),
        "rank": lambda t: t.update(owners=t["owners"][None]),
        "dtype": lambda t: t.update({"values/Dense_0/kernel": t["values/Dense_0/kernel"].astype(np.float32)}),
        "scales": lambda t: t.update({"scales/Dense_0/kernel": t["scales/Dense_0/kernel"][1:]}),
        "coded": lambda t: t.update(owners=t["owners"][:-2]),
        "no codes": lambda t: t.update(owners=t["owners"][:0]),
        "a length": lambda t: t.update(owners=np.r_[np.full(4, 255, np.uint8), t["owners"][4:]]),
        "local": lambda t: t.update({"tasks/1/float32": t["tasks/1/float32"][1:]}),
    }
    for name, change in changes.items():
        forged(folder / "all", tmp_path / name, None, change)
        with pytest.raises(pae.CheckpointError):
            pae.read_bundle(net, tmp_path / name)


def test_a_layout_that_would_fill_the_memory_is_refused(net, files, tmp_path):
    folder, _ = files
    tensors = safetensors.numpy.load_file(folder / "all")
    with safe_open(folder / "all", "np") as found:
        metadata = dict(found.metadata())
    tensors["layout"] = np.frombuffer(zlib.compress(b" " * 2**28, 9), np.uint8)
    header = json.loads(metadata["bundle"])
    metadata["sha256"] = bundle_file._digest(metadata["bundle"], header, tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "bomb", metadata)
    with pytest.raises(pae.CheckpointError, match="the layout is longer than a layout can be"):
        pae.read_bundle(net, tmp_path / "bomb")


def test_what_is_no_bundle_is_refused(net, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "plain")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "huge").write_bytes(b"\xff" * 8 + b"{}")
    for name, message in {
        "missing": "No such file",
        ".": "Is a directory; pae.load reads a stage",
        "fifo": "no regular file",
        "plain": "is not a bundle",
        "text": "is not a bundle",
        "empty": "is not a bundle",
        "huge": "is not a bundle",
    }.items():
        with pytest.raises(pae.CheckpointError, match=message):
            pae.read_bundle(net, tmp_path / name)


def test_an_interrupted_write_leaves_nothing(net, make, tmp_path, monkeypatch):
    for error in (KeyboardInterrupt, OSError("disk full")):
        with monkeypatch.context() as patch:

            def fail(_, error=error):
                raise error

            patch.setattr(os, "fsync", fail)
            with pytest.raises((KeyboardInterrupt, pae.CheckpointError)):
                pae.write_bundle(tmp_path / "file", net, make("all"))
        assert not list(tmp_path.iterdir())


def test_the_header_is_json_that_safetensors_shows(net, files):
    folder, _ = files
    with safe_open(folder / "delta", framework="numpy") as file:
        header = json.loads(file.metadata()["bundle"])
    assert [task["name"] for task in header["tasks"]] == ["c", "d"]
    assert [task["name"] for task in header["base"]["tasks"]] == ["a", "b"]
    assert header["weights"] == "int8"
    layout = json.loads(zlib.decompress(safetensors.numpy.load_file(folder / "delta")["layout"].tobytes()))
    assert layout["growth"][0]["wide"] == 1.5

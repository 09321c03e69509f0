"""An exported task runs without this library and gives the bits of `predict`."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import pae_jax as pae


@pytest.fixture(scope="module")
def picking(net, third):
    """Task "d", at a larger width, which picks among the weights of "a", "b" and "c"."""
    state = pae.expand(net, pae.freeze(pae.prune(third, "c", 0.5), "c"), width=1.5, key=jax.random.key(1))
    state = pae.pack(
        net, state, "d", head=3, key=jax.random.key(1), sharing="picked", picking=pae.Picking(ternary=True)
    )
    entry = state.tasks["d"]
    draw = np.random.default_rng(0)
    pick = jax.tree.map(lambda p: jnp.asarray(draw.choice([-0.1, 0, 0.1], p.shape), jnp.float32), entry.pick)
    return pae.freeze(state.replace(tasks={**state.tasks, "d": entry.replace(pick=pick)}), "d")


def same_bits(one, other):
    one, other = (jax.tree.map(np.asarray, tree) for tree in (one, other))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for found, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_a_program_gives_the_bits_of_predict_at_every_batch_size(net, picking, data, weights):
    for task in "ad":
        program = pae.export(net, picking, task, weights=weights)
        for size in (1, 7):
            same_bits(program.call(data[0][:size]), pae.predict(net, picking, task, data[0][:size]))
    together = pae.export(net, picking, weights=weights)
    assert together.tasks == ("a", "b", "c", "d")
    same_bits(together.call(data[0][:5]), {task: pae.predict(net, picking, task, data[0][:5]) for task in "abcd"})


def test_a_written_program_runs_where_pae_jax_cannot_be_imported(net, picking, data, tmp_path):
    x = data[0][:5]
    np.save(tmp_path / "x.npy", x)
    pae.export(net, picking, "d").write(tmp_path / "inside")
    pae.export(net, picking, weights="beside").write(tmp_path / "deep" / "beside")
    code = """
        import sys
        sys.modules["pae_jax"] = sys.modules["flax"] = None
        import pathlib, jax, jax.export, numpy as np
        jax.config.update("jax_disable_most_optimizations", True)
        x = np.load("x.npy")
        read = lambda name: jax.export.deserialize(bytearray(pathlib.Path(name).read_bytes()))
        np.save("inside.npy", read("inside").call(x))
        np.savez("beside.npz", **read("deep/beside").call(dict(np.load("deep/beside.npz")), x))
        try:
            import pae_jax
        except ImportError:
            print("alone")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "alone\n"
    same_bits(np.load(tmp_path / "inside.npy"), pae.predict(net, picking, "d", x))
    with np.load(tmp_path / "beside.npz") as found:
        same_bits(dict(found), {task: pae.predict(net, picking, task, x) for task in "abcd"})


class Tokens(nn.Module):
    """Several inputs of free length, several outputs, bfloat16 weights."""

    @nn.compact
    def __call__(self, x):
        one = nn.Embed(11, 4, param_dtype=jnp.bfloat16)(x["tokens"]).astype(jnp.float32)
        mean = (one * x["mask"][..., None]).sum(axis=1) / x["mask"].sum(axis=1, keepdims=True)
        return {"first": one[:, 0], "mean": mean}


@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_several_inputs_of_free_length_and_several_outputs(tmp_path, weights):
    sample = {"tokens": np.arange(6).reshape(2, 3).astype(np.int32), "mask": np.ones((2, 3), np.float32)}
    net = pae.linen(lambda width: Tokens(), sample, free_axes=(1,))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=None, key=jax.random.key(1))
    program = pae.export(net, state, "a", weights=weights)
    x = {"tokens": np.arange(20).reshape(4, 5).astype(np.int32) % 11, "mask": np.ones((4, 5), np.float32)}
    same_bits(program.call(x), pae.predict(net, state, "a", x))
    program.write(tmp_path / "file")


class OneSize(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x) * int(x.shape[0])


def test_a_model_for_one_batch_size_is_refused_or_exported_for_it():
    net = pae.linen(lambda width: OneSize(), jnp.zeros((2, 4)), couples_examples=True)
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    with pytest.raises(pae.StructureError, match=r"Give the one batch size it runs with: batch_size=\."):
        pae.export(net, state, "a")
    program = pae.export(net, state, "a", batch_size=2)
    same_bits(program.call(jnp.ones((2, 4))), pae.predict(net, state, "a", jnp.ones((2, 4))))
    with pytest.raises(pae.StructureError, match="input"):
        program.call(jnp.ones((3, 4)))


class Positions(nn.Module):
    """Sequences of at most 8 tokens."""

    @nn.compact
    def __call__(self, x):
        table = self.param("table", nn.initializers.normal(), (8, 4))
        return (nn.Embed(9, 4)(x) + table[None, : x.shape[1]]).mean(1)


@pytest.mark.parametrize("size", [None, 2])
def test_a_model_that_does_not_trace_for_any_length_is_refused_or_exported_for_one(size):
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5) % 9
    net = pae.linen(lambda width: Positions(), tokens, free_axes=(1,))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    advice = (
        r"open sizes of the free axes, \(1,\): export it with a net made without free_axes, with a sample of the one"
    )
    with pytest.raises(pae.StructureError, match=advice):
        pae.export(net, state, "a", batch_size=size)
    fixed = pae.linen(lambda width: Positions(), tokens[:, :3])
    program = pae.export(fixed, state, "a", batch_size=size)
    same_bits(program.call(tokens[:, :3]), pae.predict(net, state, "a", tokens[:, :3]))


def test_wrong_arguments_and_inputs_are_named(net, frozen, empty, data, tmp_path):
    program = pae.export(net, frozen, "a", platforms=["cpu", "cuda"])
    assert program.exported.platforms == ("cpu", "cuda")
    for x in (data[0][:, :3], data[0][:4].astype(np.int32), data[0][:0], {"x": data[0]}, "x", None):
        with pytest.raises(pae.StructureError, match="input"):
            program.call(x)
    for error, message, call in (
        (pae.UnknownTaskError, "unknown task 'z'", lambda: pae.export(net, frozen, "z")),
        (pae.ArgumentError, "at least one task", lambda: pae.export(net, empty)),
        (pae.ArgumentError, "platforms must be one of", lambda: pae.export(net, frozen, "a", platforms=["abacus"])),
        (pae.ArgumentError, "platforms must name", lambda: pae.export(net, frozen, "a", platforms=[])),
        (pae.ArgumentError, "weights must be one of", lambda: pae.export(net, frozen, "a", weights="outside")),
        (pae.CheckpointError, "cannot write", lambda: program.write("/proc/nowhere/file")),
        (pae.CheckpointError, "is remote", lambda: program.write("s3://bucket/file")),
        (pae.CheckpointError, "is no path", lambda: program.write(None)),
    ):
        with pytest.raises(error, match=message):
            call()
    program.write(tmp_path / "file")
    with pytest.raises(pae.CheckpointError, match="exists"):
        program.write(tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_program_and_the_weights_beside_it_are_written_both_or_neither(net, frozen, tmp_path, monkeypatch):
    program = pae.export(net, frozen, "a", weights="beside")
    for there in ("file", "file.npz"):
        (tmp_path / there).write_text("mine")
        with pytest.raises(pae.CheckpointError, match=f"{there} exists"):
            program.write(tmp_path / "file")
        assert [file.name for file in tmp_path.iterdir()] == [there]
        (tmp_path / there).unlink()
    writes = []

    def full(descriptor):
        writes.append(descriptor)
        if len(writes) == 2:
            raise OSError(28, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(pae.CheckpointError, match="disk full"):
            program.write(tmp_path / "file")
    assert not list(tmp_path.iterdir())
    unwritable = pae.pack(net, frozen, "no text \ud800", head=2, key=jax.random.key(0))
    with pytest.raises(pae.CheckpointError, match=r"cannot write the program .*surrogates"):
        pae.export(net, unwritable, weights="beside").write(tmp_path / "file")
    assert not list(tmp_path.iterdir())
    program.write(tmp_path / "file")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "file.npz"]

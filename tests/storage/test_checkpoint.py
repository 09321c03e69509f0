"""Law 9: a stage gives back the saved bits or a clear error, never something else."""

import gc
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae
from pae_jax.core import integrity
from pae_jax.trees import flatten

JSON = "_CHECKPOINT_METADATA"


@pytest.fixture(scope="module")
def stage(second, tmp_path_factory):
    """A stage of one frozen and one packed task; copy it before changing it."""
    path = tmp_path_factory.mktemp("stages") / "saved"
    pae.save(path, second, {"accuracy": 0.5})
    return path


@pytest.fixture
def copy(stage, tmp_path):
    return Path(shutil.copytree(stage, tmp_path / "copy"))


def edit_json(path, change):
    """Apply a function to the library's part of the JSON."""
    whole = json.loads((path / JSON).read_text())
    change(whole["custom_metadata"])
    (path / JSON).write_text(json.dumps(whole))


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.fixture
def leftovers():
    """Collect here, not in some later test, the coroutines that Orbax abandons when a file is damaged."""
    yield
    gc.collect()


def noisy(test):
    """Mark a test in which Orbax abandons coroutines; Python complains about them when it collects them."""
    ignored = ("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
    return pytest.mark.usefixtures("leftovers")(pytest.mark.filterwarnings(*ignored)(test))


# Identity


class Mixed(nn.Module):
    """bf16 and f16 kernels, NaN-able statistics, a scalar counter, a bool flag, integers of small types."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        count = self.variable("counts", "steps", lambda: jnp.zeros((), jnp.int32))
        self.variable("counts", "flags", lambda: jnp.array([True, False]))
        self.variable("counts", "bytes", lambda: jnp.array([[255, 0]], jnp.uint8))
        if train:
            count.value += 1
        x = nn.Dense(4, param_dtype=jnp.bfloat16)(x)
        return nn.Dense(3, param_dtype=jnp.float16, use_bias=False)(x).astype(jnp.float32)


class Hollow(nn.Module):
    """One local variable has no entries."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        self.variable("state", "queue", lambda: jnp.zeros((0, 3), jnp.float32))
        return nn.Dense(3)(x)


class NoLocal(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3, use_bias=False)(x)


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(32, use_bias=False)(x).sum(axis=1, keepdims=True)


class Lists(nnx.Module):
    """Eleven items, so that "10" sorts before "2" as text."""

    def __init__(self, width, rngs):
        self.layers = nnx.List([nnx.Param(jnp.full((4, 4), float(i))) for i in range(11)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x, train):
        for layer in self.layers:
            x = x @ layer[...]
        return self.norm(x, use_running_average=not train)


NETS = {
    "mixed dtypes": lambda: pae.linen(Mixed, jnp.zeros((1, 4))),
    "no local variables": lambda: pae.linen(NoLocal, jnp.zeros((1, 4))),
    "NNX lists": lambda: pae.nnx(Lists, jnp.zeros((1, 4))),
    "everything packable": lambda: pae.linen(
        lambda w: pae.models.MLP(w, (3,)), jnp.zeros((1, 4)), packable=lambda path, leaf: True
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_loading_gives_back_every_bit_dtype_and_record(name, tmp_path, state_facts, data):
    net = NETS[name]()
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    state = pae.prune(pae.pack(net, state, "b", head=3, key=jax.random.key(2), sharing="first"), "b", 0.2)
    odd = jax.tree.map(lambda w: w.at[(0,) * w.ndim].set(jnp.nan).at[(-1,) * w.ndim].set(-0.0), state.tasks["b"].head)
    state = state.replace(tasks={**state.tasks, "b": state.tasks["b"].replace(head=odd)})
    pae.save(tmp_path / "stage", state)
    loaded = pae.load(net, tmp_path / "stage")
    assert state_facts(loaded) == state_facts(state)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    pae.check(loaded)
    pae.verify(loaded)
    np.testing.assert_array_equal(pae.predict(net, loaded, "a", data[0]), pae.predict(net, state, "a", data[0]))


@noisy
def test_a_variable_without_entries_is_refused_by_name_at_init_or_saved(tmp_path, state_facts):
    net = pae.linen(Hollow, jnp.zeros((1, 4)))
    try:
        state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    except pae.StructureError as error:
        assert "state/queue" in str(error)
        return
    pae.save(tmp_path / "stage", state)
    assert state_facts(pae.load(net, tmp_path / "stage")) == state_facts(state)


def test_every_owner_id_an_int8_can_hold_comes_back(tmp_path, state_facts):
    net = pae.linen(lambda width: Flat(), jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "t1", head=1, key=jax.random.key(1))
    entry = pae.freeze(state, "t1").tasks["t1"]
    owner = {"Dense_0": {"kernel": jnp.arange(128, dtype=jnp.int8).reshape(4, 32)}}
    state = state.replace(owner=owner, tasks={f"t{i}": entry.replace(id=i) for i in range(1, 128)})
    pae.save(tmp_path / "stage", state)
    loaded = pae.load(net, tmp_path / "stage")
    assert int(loaded.owner["Dense_0"]["kernel"].max()) == 127
    assert state_facts(loaded) == state_facts(state)


def test_a_loaded_state_trains_on_to_the_same_bits(net, second, stage, quick_fit, assert_same):
    one, _ = quick_fit(second, "b")
    two, _ = quick_fit(pae.load(net, stage), "b")
    assert_same(
        (one.shared, one.tasks["b"].local, one.tasks["b"].head), (two.shared, two.tasks["b"].local, two.tasks["b"].head)
    )


def test_the_backbones_local_variables_come_back_before_the_first_task_and_after_it(
    net, vector_module, tmp_path, state_facts, bits
):
    variables = vector_module().init(jax.random.key(9), jnp.zeros((1, 4)), train=False)
    pretrained = jax.tree.map(lambda leaf: leaf + 0.5, variables)
    state = pae.from_variables(net, pretrained)
    first = pae.freeze(pae.prune(pae.pack(net, state, "a", head=2, key=jax.random.key(1)), "a", 0.5), "a")
    for number, one in enumerate((state, first, pae.expand(net, first, width=1.5, key=jax.random.key(2)))):
        pae.save(tmp_path / str(number), one)
        loaded = pae.load(net, tmp_path / str(number))
        assert loaded.local is not None
        assert state_facts(loaded) == state_facts(one)
        packed = [pae.pack(net, s, "b", head=2, key=jax.random.key(3)) for s in (loaded, one)]
        assert bits(packed[0].tasks["b"].local) == bits(packed[1].tasks["b"].local) == bits(one.local)


def test_a_task_without_a_head_comes_back_and_answers_with_the_features(net, empty, tmp_path, state_facts, data):
    state = pae.freeze(pae.prune(pae.pack(net, empty, "a", head=None, key=jax.random.key(1)), "a", 0.5), "a")
    state = pae.pack(net, state, "b", head=None, key=jax.random.key(2))
    pae.save(tmp_path / "stage", state)
    assert [task["head"] for task in pae.read_metadata(tmp_path / "stage")["tasks"]] == [None, None]
    loaded = pae.load(net, tmp_path / "stage")
    assert state_facts(loaded) == state_facts(state)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    pae.check(loaded, net)
    pae.verify(loaded)
    for task in "ab":
        found = pae.predict(net, loaded, task, data[0])
        np.testing.assert_array_equal(found, pae.predict(net, state, task, data[0]))
        np.testing.assert_array_equal(found, pae.features(net, state, task, data[0]))


class Deep(nn.Module):
    size: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(self.size)(x)))


def test_a_head_module_comes_back_with_the_module_that_load_is_given(net, empty, tmp_path, state_facts, data):
    state = pae.pack(net, empty, "a", head=Deep(), key=jax.random.key(1))
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    head = nnx.Linear(6, 2, rngs=nnx.Rngs(0))
    state = pae.pack(net, state, "n", head=head, key=jax.random.key(2))
    path = tmp_path / "stage"
    pae.save(path, state)
    loaded = pae.load(net, path, heads={"a": Deep(), "n": nnx.Linear(6, 2, rngs=nnx.Rngs(5))})
    assert state_facts(loaded)[:2] == state_facts(state)[:2]
    for task in "an":
        np.testing.assert_array_equal(pae.predict(net, loaded, task, data[0]), pae.predict(net, state, task, data[0]))
    pae.verify(loaded)
    with pytest.raises(
        pae.ArgumentError, match=r"task 'n' has the head module Linear; pass load\(..., heads=\{'n': module\}\)"
    ):
        pae.load(net, path, heads={"a": Deep()})
    with pytest.raises(pae.StructureError, match=r"head of task 'a'.*found 3, expected Deep"):
        pae.load(net, path, heads={"a": 3, "n": head})
    with pytest.raises(pae.StructureError, match=r"tasks/1/head/params/Dense_0/.*float32\[3.*float32\[5"):
        pae.load(net, path, heads={"a": Deep(5), "n": head})
    with pytest.raises(pae.PaeError, match="'z'"):
        pae.load(net, path, heads={"a": Deep(), "n": head, "z": Deep()})


# Picks


PICKING = {"binary": pae.Picking(), "ternary": pae.Picking(threshold=0.002, initial=0.02, ternary=True)}


@pytest.fixture(scope="module")
def make_picking(net, frozen):
    """Task "a" frozen, tasks "b" and "c" with picks drawn at random; both frozen if told so, else "c" is not."""

    def make(rule, frozen_too=True):
        state, draw = frozen, np.random.default_rng(0)
        for task, freeze in (("b", True), ("c", frozen_too)):
            state = pae.pack(net, state, task, head=2, key=jax.random.key(3), sharing="picked", picking=rule)
            entry = state.tasks[task]
            pick = jax.tree.map(lambda p: jnp.asarray(draw.choice([-0.1, 0.0, 0.1], p.shape), p.dtype), entry.pick)
            state = pae.prune(state.replace(tasks={**state.tasks, task: entry.replace(pick=pick)}), task, 0.25)
            state = pae.freeze(state, task) if freeze else state
        return state

    return make


def picks_of(state, bits):
    return {name: (entry.picking, bits(entry.pick)) for name, entry in state.tasks.items()}


@pytest.mark.parametrize("frozen_too", [True, False], ids=["frozen", "not frozen"])
@pytest.mark.parametrize("kind", PICKING)
def test_picks_come_back_bit_for_bit_scores_before_the_freeze_and_signs_after_it(
    net, make_picking, tmp_path, data, state_facts, bits, kind, frozen_too
):
    state = make_picking(PICKING[kind], frozen_too)
    pae.save(tmp_path / "stage", state)
    loaded = pae.load(net, tmp_path / "stage")
    assert state_facts(loaded) == state_facts(state)
    assert picks_of(loaded, bits) == picks_of(state, bits)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    pae.check(loaded)
    pae.verify(loaded)
    for task in "abc":
        np.testing.assert_array_equal(pae.predict(net, loaded, task, data[0]), pae.predict(net, state, task, data[0]))
    stored = pae.read_metadata(tmp_path / "stage")["arrays"]
    scores = {path: leaf["dtype"] for path, leaf in stored.items() if path.startswith("tasks/3/pick/")}
    assert scores == ({} if frozen_too else dict.fromkeys(scores, "float32"))
    assert len(scores) == (0 if frozen_too else 2)


@pytest.mark.parametrize("kind", PICKING)
def test_a_stored_pick_takes_one_bit_per_older_weight_and_two_if_ternary(make_picking, tmp_path, kind):
    state = make_picking(PICKING[kind])
    pae.save(tmp_path / "stage", state)
    stored = pae.read_metadata(tmp_path / "stage")["arrays"]
    for task_id in (2, 3):
        older = sum(int(((o > 0) & (o < task_id)).sum()) for o in jax.tree.leaves(state.owner))
        found = {path: leaf for path, leaf in stored.items() if path.startswith(f"tasks/{task_id}/pick")}
        size = math.ceil(older / 8) * (2 if kind == "ternary" else 1)
        assert {path: (leaf["dtype"], leaf["shape"]) for path, leaf in found.items()} == {
            f"tasks/{task_id}/pick": ("uint8", [size])
        }
        assert 0 < older < 80


def test_a_task_that_has_nothing_to_pick_from_comes_back(net, empty, tmp_path, bits):
    """The first task owns no weight, so the second has picks of none."""
    state = pae.freeze(pae.prune(pae.pack(net, empty, "a", head=2, key=jax.random.key(1)), "a", 1.0), "a")
    state = pae.freeze(pae.pack(net, state, "b", head=2, key=jax.random.key(2), sharing="picked"), "b")
    pae.save(tmp_path / "stage", state)
    loaded = pae.load(net, tmp_path / "stage")
    assert picks_of(loaded, bits) == picks_of(state, bits)
    pae.verify(loaded)


CHANGED_BITS = {
    "one byte less": lambda bits: bits[:-1],
    "one byte more": lambda bits: np.append(bits, np.uint8(0)),
    "another dtype": lambda bits: bits.astype(np.int16),
    "another rank": lambda bits: bits[None],
}


@pytest.mark.parametrize("name", CHANGED_BITS)
def test_picks_of_a_wrong_length_are_refused_and_the_task_named(net, make_picking, tmp_path, monkeypatch, name):
    """They are written wrongly, so that every checksum fits."""
    from pae_jax.core import picking

    original, change = picking.to_bits, CHANGED_BITS[name]

    def changed(signs, owner, task_id):
        bits = original(signs, owner, task_id)
        return change(bits) if task_id == 3 else bits

    monkeypatch.setattr(picking, "to_bits", changed)
    pae.save(tmp_path / "stage", make_picking(PICKING["ternary"]))
    with pytest.raises(pae.CheckpointError, match="the picks of task 3 are"):
        pae.load(net, tmp_path / "stage")


def test_a_flipped_bit_of_a_stored_pick_is_found_and_the_task_named(net, make_picking, tmp_path, monkeypatch):
    """Once on the way to the disk, after its checksum was taken; once before it, where only `verify` can tell."""
    from pae_jax.core import picking
    from pae_jax.storage import checkpoint, orbax_arrays

    state, save, to_bits = make_picking(PICKING["ternary"]), orbax_arrays.ocp.save, picking.to_bits

    def flip(bits):
        return bits ^ (np.arange(bits.size) == 1).astype(np.uint8)

    def save_flipped(path, arrays, **options):
        tasks = {**arrays["tasks"], "2": {**arrays["tasks"]["2"], "pick": flip(arrays["tasks"]["2"]["pick"])}}
        return save(path, {**arrays, "tasks": tasks}, **options)

    with monkeypatch.context() as patch:
        patch.setattr(orbax_arrays.ocp, "save", save_flipped)
        with pytest.raises(pae.CheckpointError, match=r"read back otherwise.*'tasks/2/pick' is not what was saved"):
            pae.save(tmp_path / "flipped", state)
        assert list(tmp_path.iterdir()) == []
        patch.setattr(checkpoint, "_require_whole", lambda *arguments: None)
        pae.save(tmp_path / "flipped", state)
    with pytest.raises(pae.CheckpointError, match=r"flipped is damaged: 'tasks/2/pick' is not what was saved"):
        pae.load(net, tmp_path / "flipped")
    with monkeypatch.context() as patch:
        patch.setattr(picking, "to_bits", lambda *operands: flip(to_bits(*operands)))
        pae.save(tmp_path / "wrong", state)
    with pytest.raises(pae.ForgettingError, match="task 'b' is frozen, but 'pick/"):
        pae.verify(pae.load(net, tmp_path / "wrong"))


PICK_DAMAGE = {
    "picking gone": lambda info: info["tasks"][1].update(picking=None),
    "threshold": lambda info: info["tasks"][1]["picking"].update(threshold=0.5),
    "ternary": lambda info: info["tasks"][1]["picking"].update(ternary=True),
    "unknown setting": lambda info: info["tasks"][1]["picking"].update(soft=True),
    "pick array gone": lambda info: info["arrays"].pop("tasks/2/pick"),
    "length": lambda info: info["arrays"]["tasks/2/pick"].update(shape=[3]),
    "sharing": lambda info: info["tasks"][1].update(sharing="all"),
}


def test_changed_json_about_picks_is_noticed_with_a_typed_error(net, make_picking, tmp_path):
    pae.save(tmp_path / "stage", make_picking(PICKING["binary"]))
    whole = (tmp_path / "stage" / JSON).read_text()
    for name, change in PICK_DAMAGE.items():
        edit_json(tmp_path / "stage", change)
        with pytest.raises(pae.CheckpointError, match="is damaged"):
            pytest.fail(f"loaded: {name}, {pae.load(net, tmp_path / 'stage')}")
        (tmp_path / "stage" / JSON).write_text(whole)
    pae.verify(pae.load(net, tmp_path / "stage"))


# Older schemas


def save_as(path, state, schema):
    """Write a stage in the layout of an older schema."""
    from pae_jax import files

    def older(info):
        info["schema_version"] = schema
        info["pretrained_local"] = info.pop("backbone_local")
        if schema == 1:  # it knew no picks
            for entry in info["tasks"]:
                del entry["picking"]
        del info["sha256"]
        info.update(files.sealed(info))

    # The backbone's local variables were kept only until the first task.
    pae.save(path, state.replace(local=None) if state.tasks else state)
    edit_json(path, older)
    assert pae.read_metadata(path)["schema_version"] == schema


@pytest.mark.parametrize("schema", [1, 2])
def test_a_stage_of_an_older_schema_still_loads(net, empty, second, tmp_path, state_facts, schema):
    for number, state in enumerate((empty, second)):
        save_as(tmp_path / str(number), state, schema)
        loaded = pae.load(net, tmp_path / str(number))
        assert state_facts(loaded) == state_facts(state if not state.tasks else state.replace(local=None))
        assert jax.tree.structure(loaded) == jax.tree.structure(state if not state.tasks else state.replace(local=None))
        pae.check(loaded, net)
        pae.verify(loaded)


def test_a_stage_of_the_second_schema_keeps_its_picks_and_its_expansion(
    net, make_picking, tmp_path, state_facts, bits, data
):
    state = pae.expand(net, make_picking(PICKING["ternary"]), width=1.5, key=jax.random.key(5))
    save_as(tmp_path / "stage", state, 2)
    loaded = pae.load(net, tmp_path / "stage")
    assert state_facts(loaded) == state_facts(state.replace(local=None))
    assert picks_of(loaded, bits) == picks_of(state, bits)
    pae.verify(loaded)
    for task in "abc":
        np.testing.assert_array_equal(pae.predict(net, loaded, task, data[0]), pae.predict(net, state, task, data[0]))


def test_a_network_of_an_older_schema_goes_on_and_is_saved_in_the_present_one(
    net, frozen, quick_fit, tmp_path, state_facts, bits
):
    """The backbone's local variables are not known any more; a new task says what it starts from."""
    save_as(tmp_path / "old", frozen, 2)
    state = pae.load(net, tmp_path / "old")
    state = pae.expand(net, state, width=1.5, key=jax.random.key(3))
    assert state.local is None
    with pytest.raises(pae.ArgumentError, match=r"local_init='backbone'.*local_init='a', or draw them"):
        pae.pack(net, state, "b", head=2, key=jax.random.key(4))
    state = pae.pack(net, state, "b", head=2, key=jax.random.key(4), local_init="fresh")
    state = pae.freeze(pae.prune(quick_fit(state, "b")[0], "b", 0.5), "b")
    pae.save(tmp_path / "new", state)
    assert pae.read_metadata(tmp_path / "new")["schema_version"] == 3
    loaded = pae.load(net, tmp_path / "new")
    assert state_facts(loaded) == state_facts(state)
    pae.check(loaded, net)
    pae.verify(loaded)


# What is saved can be loaded


def cast(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def turned(tree):
    return jax.tree.map(lambda leaf: leaf[None], tree)


def with_task(state, task, **changes):
    return state.replace(tasks={**state.tasks, task: state.tasks[task].replace(**changes)})


UNLIKE_THE_MODEL = {
    "weights of another dtype": lambda s: s.replace(shared=cast(s.shared)),
    "local variables of another dtype": lambda s: with_task(s, "b", local=cast(s.tasks["b"].local)),
    "a head of another dtype": lambda s: with_task(s, "b", head=cast(s.tasks["b"].head)),
    "a head of another shape": lambda s: with_task(s, "b", head=turned(s.tasks["b"].head)),
    "no local variables": lambda s: with_task(s, "b", local={}),
    "no head": lambda s: with_task(s, "b", head={}),
    "the backbone's local variables of another dtype": lambda s: s.replace(local=cast(s.local)),
    "no local variables of the backbone": lambda s: s.replace(local={}),
}
OF_NO_SUCH_NET = {
    "local variables of another shape": lambda s: with_task(s, "b", local=turned(s.tasks["b"].local)),
    "the backbone's local variables of another shape": lambda s: s.replace(local=turned(s.local)),
    "another number of classes": lambda s: with_task(s, "b", head_spec=5),
}


@pytest.mark.parametrize("what", [*UNLIKE_THE_MODEL, *OF_NO_SUCH_NET])
def test_what_load_would_refuse_check_refuses(net, second, what):
    change = UNLIKE_THE_MODEL.get(what) or OF_NO_SUCH_NET[what]
    pae.check(second, net)
    with pytest.raises(pae.StructureError):
        pae.check(change(second), net)


@pytest.mark.parametrize("what", UNLIKE_THE_MODEL)
def test_what_load_would_refuse_is_not_saved(second, tmp_path, what):
    with pytest.raises(pae.StructureError):
        pae.save(tmp_path / "stage", UNLIKE_THE_MODEL[what](second))
    assert list(tmp_path.iterdir()) == []


# The JSON


def test_the_metadata_is_readable_json_with_tasks_widths_sharing_versions_digests_and_metrics(second, stage):
    text = json.loads((stage / JSON).read_text())
    info = pae.read_metadata(stage)
    assert text["custom_metadata"] == info
    assert info["schema_version"] == 3
    assert info["backbone_local"] is True
    assert info["metadata"] == {"accuracy": 0.5}
    assert info["width"] == 1.0
    assert {"pae_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy"} <= info["versions"].keys()
    assert [(t["id"], t["name"], t["phase"], t["sharing"], t["head"], t["width"]) for t in info["tasks"]] == [
        (1, "a", "frozen", "all", 2, 1.0),
        (2, "b", "packed", "all", 2, 1.0),
    ]
    digests = integrity.recorded(second, second.tasks["a"])
    assert info["tasks"][0]["digests"] == {path: row.hex() for path, row in digests.items()}
    assert [bytes.fromhex(text) for text in info["tasks"][0]["digests"].values()] == [
        row.tobytes() for row in np.asarray(second.tasks["a"].digests)
    ]
    assert info["tasks"][1]["digests"] is None
    assert info["free_fraction"] == pae.free_fraction(second)
    assert info["arrays"]["owner/Dense_0/kernel"]["dtype"] == "int8"
    assert all(len(leaf["sha256"]) == 64 for leaf in info["arrays"].values())


def test_nothing_in_a_stage_is_pickled(stage):
    for file in files_of(stage):
        content = file.read_bytes()
        assert not content.startswith((b"\x80\x03", b"\x80\x04", b"\x80\x05")), file
        assert b"cpae_jax" not in content
        assert b"__reduce__" not in content


def test_metadata_comes_back_as_json_says_it(empty, tmp_path):
    metadata = {"deep": {"list": [1, 2.5, None, True, "päe"]}, "nan": math.nan, "inf": -math.inf, "large": 2**60}
    pae.save(tmp_path / "stage", empty, metadata)
    found = pae.read_metadata(tmp_path / "stage")["metadata"]
    assert math.isnan(found.pop("nan"))
    del metadata["nan"]
    assert found == metadata


@pytest.mark.parametrize("metadata", [{"x": np.float32(1)}, {"x": {1, 2}}, {"x": b"bytes"}, 3, "text", [1]], ids=str)
def test_metadata_that_json_cannot_say_is_refused_and_nothing_is_written(empty, tmp_path, metadata):
    with pytest.raises(pae.ArgumentError, match="metadata must be what JSON can say"):
        pae.save(tmp_path / "new" / "stage", empty, metadata)
    assert list(tmp_path.iterdir()) == []


# Damage


def outcome(net, path, wanted, state_facts):
    """Load and verify: the name of the typed error, or "same"; anything else fails."""
    try:
        state = pae.load(net, path)
        pae.verify(state)
    except pae.PaeError as error:
        assert str(path) in str(error) or "stage" in str(error) or "task" in str(error), str(error)
        return type(error).__name__
    assert state_facts(state) == wanted, "loaded something else than what was saved, without a word"
    return "same"


@noisy
@pytest.mark.parametrize("damage", ["emptied", "cut in half", "last byte gone", "deleted", "zeros", "longer"])
def test_a_damaged_file_is_noticed_or_harmless(net, stage, second, tmp_path, state_facts, damage):
    found = {}
    for file in files_of(stage):
        path = Path(shutil.copytree(stage, tmp_path / file.name))
        victim = path / file.relative_to(stage)
        content = file.read_bytes()
        if damage == "deleted":
            victim.unlink()
        else:
            changed = {
                "emptied": b"",
                "cut in half": content[: len(content) // 2],
                "last byte gone": content[:-1],
                "zeros": bytes(len(content)),
                "longer": content + b"\0" * 7,
            }[damage]
            victim.write_bytes(changed)
        found[str(file.relative_to(stage))] = outcome(net, path, state_facts(second), state_facts)
        shutil.rmtree(path)
    assert found[JSON] != "same"
    assert set(found.values()) <= {"same", "CheckpointError", "StructureError"}


@noisy
@pytest.mark.parametrize("files", ["metadata", "arrays"])
def test_a_bit_flipped_anywhere_in_any_file_is_noticed_or_harmless(net, copy, second, state_facts, files):
    wanted, draw = state_facts(second), random.Random(0)
    results = {}
    for file in files_of(copy):
        if (file.name == JSON) != (files == "metadata"):
            continue
        content = file.read_bytes()
        positions = draw.sample(range(len(content)), min(len(content), 100 if files == "metadata" else 8))
        for position in positions:
            changed = bytearray(content)
            changed[position] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
            try:
                results[file.name, position] = outcome(net, copy, wanted, state_facts)
            except Exception as error:
                pytest.fail(f"{file.name}, byte {position}: {type(error).__name__}: {error}")
        file.write_bytes(content)
    assert outcome(net, copy, wanted, state_facts) == "same"
    assert "CheckpointError" in results.values()


def put(key, value):
    def change(info):
        info[key] = value

    return change


def put_task(index, key, value):
    def change(info):
        info["tasks"][index][key] = value

    return change


def remove(*path):
    def change(info):
        for key in path[:-1]:
            info = info[key]
        del info[path[-1]]

    return change


JSON_DAMAGE = {
    "name of a task": put_task(0, "name", "z"),
    "name of the packed task": put_task(1, "name", "z"),
    "sharing of the packed task": put_task(1, "sharing", "first"),
    "sharing of the frozen task": put_task(0, "sharing", "first"),
    "sharing of no kind": put_task(1, "sharing", "alm"),
    "id": put_task(1, "id", 3),
    "id text": put_task(1, "id", "2"),
    "ids exchanged": lambda info: [task.update(id=3 - task["id"]) for task in info["tasks"]],
    "width": put("width", 2.0),
    "width text": put("width", "1.0"),
    "width zero": put("width", 0),
    "width of a task": put_task(1, "width", 0.5),
    "head": put_task(1, "head", 3),
    "head of no kind": put_task(1, "head", None),
    "digest": lambda info: info["tasks"][0]["digests"].update(settings="0" * 64),
    "digests gone": put_task(0, "digests", None),
    "digests new": put_task(1, "digests", {"settings": "0" * 64}),
    "digest missing": remove("tasks", 0, "digests", "settings"),
    "task missing": remove("tasks", 1),
    "tasks missing": remove("tasks"),
    "arrays missing": remove("arrays"),
    "array missing": remove("arrays", "owner/Dense_0/kernel"),
    "checksum missing": remove("arrays", "owner/Dense_0/kernel", "sha256"),
    "checksum": lambda info: info["arrays"]["owner/Dense_0/kernel"].update(sha256="0" * 64),
    "dtype": lambda info: info["arrays"]["owner/Dense_0/kernel"].update(dtype="int16"),
    "growth": put("growth", [{"narrow": 0.5, "wide": 1.0, "maps": {}}]),
    "growth of no kind": put("growth", 3),
    "growth missing": remove("growth"),
    "no local variables of the backbone": put("backbone_local", False),
    "pretrained local": put("pretrained_local", False),
    "format": put("format", "other"),
    "schema text": put("schema_version", "1"),
    "schema missing": remove("schema_version"),
    "older than the first schema": put("schema_version", -1),
    "width missing": remove("width"),
}


@pytest.mark.parametrize("name", JSON_DAMAGE)
def test_changed_json_is_noticed_with_a_typed_error(net, copy, second, state_facts, name):
    edit_json(copy, JSON_DAMAGE[name])
    assert outcome(net, copy, state_facts(second), state_facts) != "same"


def test_a_flipped_bit_in_a_stored_array_is_found_even_if_the_file_format_does_not_notice(
    net, second, tmp_path, monkeypatch
):
    """The array is changed on its way to the disk, after its checksum was taken."""
    from pae_jax.storage import checkpoint, orbax_arrays

    original = orbax_arrays.ocp.save

    def save(path, arrays, **options):
        kernel = np.array(arrays["shared"]["Dense_0"]["kernel"])
        kernel.view(np.uint32)[0, 0] ^= 1
        arrays = {**arrays, "shared": {**arrays["shared"], "Dense_0": {"kernel": kernel}}}
        return original(path, arrays, **options)

    monkeypatch.setattr(orbax_arrays.ocp, "save", save)
    with pytest.raises(pae.CheckpointError, match=r"read back otherwise.*shared/Dense_0/kernel"):
        pae.save(tmp_path / "stage", second)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(checkpoint, "_require_whole", lambda *arguments: None)
    pae.save(tmp_path / "stage", second)
    with pytest.raises(pae.CheckpointError, match="shared/Dense_0/kernel"):
        pae.load(net, tmp_path / "stage")


# Wrong places


def test_a_missing_stage_is_named(net, tmp_path):
    for call in (lambda: pae.load(net, tmp_path / "none"), lambda: pae.read_metadata(tmp_path / "none")):
        with pytest.raises(pae.CheckpointError, match=r"no stage at .*none: the folder does not exist"):
            call()
    (tmp_path / "file").write_text("x")
    with pytest.raises(pae.CheckpointError, match=r"file: it is a file; pae.read_bundle reads a bundle"):
        pae.load(net, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(pae.CheckpointError, match=r"folder is not a complete Orbax checkpoint: .*METADATA$"):
        pae.load(net, tmp_path / "folder")


def test_the_folder_of_a_run_names_a_stage_in_it(net, empty, tmp_path):
    pae.save(tmp_path / "01-a" / "frozen", empty)
    for folder in (tmp_path, tmp_path / "01-a"):
        with pytest.raises(pae.CheckpointError, match=r"it holds stages, such as .*/01-a/frozen$"):
            pae.load(net, folder)


def test_a_checkpoint_of_another_program_is_named(net, tmp_path):
    from orbax.checkpoint import v1 as ocp

    ocp.save(str(tmp_path / "other"), {"w": jnp.zeros(3)})
    with pytest.raises(pae.CheckpointError, match=r"other was not written by pae_jax.save"):
        pae.load(net, tmp_path / "other")
    ocp.save(str(tmp_path / "other2"), {"w": jnp.zeros(3)}, custom_metadata={"format": "mine"})
    with pytest.raises(pae.CheckpointError, match=r"was not written by pae_jax.save"):
        pae.read_metadata(tmp_path / "other2")


def test_a_newer_schema_is_refused_with_the_advice_to_update(net, copy):
    edit_json(copy, put("schema_version", 4))
    with pytest.raises(
        pae.CheckpointError, match=r"has schema version 4; this pae_jax .* reads up to 3. Update pae_jax"
    ):
        pae.load(net, copy)


def test_a_half_written_folder_never_loads(net, stage, tmp_path):
    for suffix in (".orbax-checkpoint-tmp", ".orbax-checkpoint-tmp-123"):
        path = shutil.copytree(stage, tmp_path / f"stage{suffix}")
        with pytest.raises(
            pae.CheckpointError, match=r"half-written stage; it can be removed. Use the stage before it"
        ):
            pae.load(net, path)


OTHER_NETS = {
    "another shape": (
        lambda: pae.linen(lambda w: pae.models.MLP(w, (8, 6)), jnp.zeros((1, 4))),
        "BatchNorm_0|Dense_0/bias",
    ),
    "another width": (
        lambda: pae.linen(lambda w: NETS["vector"](2 * w), jnp.zeros((1, 4))),
        r"BatchNorm_0/mean.*float32\[8\].*float32\[16\]",
    ),
    "other names": (lambda: pae.nnx(Lists, jnp.zeros((1, 4))), "leaf '"),
    "another dtype": (lambda: pae.linen(Mixed, jnp.zeros((1, 4))), "leaf '"),
    "other packable leaves": (
        lambda: pae.linen(NETS["vector"], jnp.zeros((1, 4)), packable=lambda p, leaf: p == "Dense_0/kernel"),
        "Dense_1/kernel",
    ),
}


@pytest.mark.parametrize("name", OTHER_NETS)
def test_a_stage_of_another_model_is_refused_by_leaf(stage, vector_module, monkeypatch, name):
    monkeypatch.setitem(NETS, "vector", vector_module)
    make, message = OTHER_NETS[name]
    with pytest.raises(pae.StructureError, match=rf"stage saved.*(?:{message}).*Is it a stage of this model\?"):
        pae.load(make(), stage)


def test_a_stage_is_written_once(second, stage):
    before = {file: file.read_bytes() for file in files_of(stage)}
    with pytest.raises(pae.CheckpointError, match=r"saved exists; a stage is written once. Choose another name"):
        pae.save(stage, second)
    assert {file: file.read_bytes() for file in files_of(stage)} == before


def test_an_existing_folder_or_file_is_never_overwritten(empty, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        with pytest.raises(pae.CheckpointError, match=f"{name} exists"):
            pae.save(tmp_path / name, empty)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_parent_that_is_a_file_or_cannot_be_made_is_named(empty, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(pae.CheckpointError, match=r"cannot write the stage .*file/stage.*Earlier stages are untouched"):
        pae.save(tmp_path / "file" / "stage", empty)
    with pytest.raises(pae.CheckpointError, match="cannot write the stage /proc/"):
        pae.save("/proc/no/stage", empty)
    assert (tmp_path / "file").read_text() == "mine"
    if os.geteuid() != 0:  # root may write everywhere but in /proc
        tmp_path.chmod(0o500)
        with pytest.raises(pae.CheckpointError, match="cannot write the stage"):
            pae.save(tmp_path / "stage", empty)


def test_a_path_may_be_text_relative_or_have_parents_to_make(net, empty, tmp_path, monkeypatch, state_facts):
    monkeypatch.chdir(tmp_path)
    pae.save("deep/er/stage", empty)
    assert state_facts(pae.load(net, "deep/er/stage")) == state_facts(empty)
    pae.save(Path("stage with spaces ✓"), empty)
    assert state_facts(pae.load(net, tmp_path / "stage with spaces ✓")) == state_facts(empty)


def test_saving_changes_nothing_in_the_state_and_its_arrays_stay_alive(second, tmp_path, state_facts):
    before = state_facts(second)
    pae.save(tmp_path / "stage", second)
    assert state_facts(second) == before
    assert not any(leaf.is_deleted() for leaf in flatten(second.shared).values())


# A process that is killed, a disk that is full

CHILD = """
    import os, resource, signal, sys
    import jax, jax.numpy as jnp
    import pae_jax as pae

    folder, what = sys.argv[1:]
    net = pae.linen(lambda width: pae.models.MLP(width, (64, 600)), jnp.zeros((1, 4)))
    state = pae.init(net, jax.random.key(0))
    pae.save(f"{folder}/0", state, {"stage": 0})
    state = pae.pack(net, state, "a", head=2, key=jax.random.key(1))
    rename = os.rename

    def kill(*paths, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    if what == "killed":
        os.rename = os.replace = kill
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        pae.save(f"{folder}/1", state)
    except pae.CheckpointError as error:
        print("typed:", error)
    else:
        print("saved")
"""


@pytest.mark.parametrize("what", ["killed", "full"])
def test_after_a_kill_or_a_full_disk_the_earlier_stage_loads_and_the_half_one_never_does(run_child, what):
    folder, done = run_child(CHILD, what)
    if what == "killed":
        assert done.returncode == -9, done.stderr
        assert [path for path in folder.iterdir() if path.name != "0"], "the kill came before anything was written"
    else:
        assert "typed: cannot write the stage" in done.stdout, done.stdout + done.stderr
        assert "Earlier stages are untouched" in done.stdout
    net = pae.linen(lambda width: pae.models.MLP(width, (64, 600)), jnp.zeros((1, 4)))
    assert pae.load(net, folder / "0").tasks == {}
    assert not (folder / "1").exists()
    for rest in folder.iterdir():
        if rest.name != "0":
            with pytest.raises(pae.CheckpointError):
                pae.load(net, rest)
    state = pae.pack(net, pae.load(net, folder / "0"), "a", head=2, key=jax.random.key(1))
    pae.save(folder / "1", state)  # what is left over is in nobody's way
    assert list(pae.load(net, folder / "1").tasks) == ["a"]


# Faults


def press_ctrl_c(patch, target, name):
    """Press Ctrl-C, from another thread as the system does, when a function is called; it then takes its time."""
    original = getattr(target, name)

    def call(*arguments, **options):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.05)
        return original(*arguments, **options)

    patch.setattr(target, name, call)


@pytest.mark.parametrize("moment", ["save", "sync_tree"])
def test_an_interrupted_save_leaves_nothing_and_the_same_call_works(net, second, tmp_path, state_facts, moment):
    from pae_jax import files
    from pae_jax.storage import orbax_arrays

    path = tmp_path / "stage"
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c(patch, orbax_arrays.ocp if moment == "save" else files, moment)
        with pytest.raises(KeyboardInterrupt):
            pae.save(path, second)
    assert list(tmp_path.iterdir()) == []
    pae.save(path, second)
    assert state_facts(pae.load(net, path)) == state_facts(second)


def test_an_interrupted_load_is_an_interrupt_and_the_same_call_works(net, stage, second, state_facts):
    from pae_jax.storage import orbax_arrays

    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c(patch, orbax_arrays.ocp, "load")
        with pytest.raises(KeyboardInterrupt):
            pae.load(net, stage)
    assert state_facts(pae.load(net, stage)) == state_facts(second)


def test_of_two_that_write_one_path_one_wins_and_the_other_says_so(net, empty, second, tmp_path, state_facts):
    from pae_jax import files

    path, sync_tree = tmp_path / "stage", files.sync_tree

    def late(folder):
        sync_tree(folder)
        patch.undo()
        pae.save(path, empty)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync_tree", late)
        with pytest.raises(pae.CheckpointError, match="stage exists; a stage is written once"):
            pae.save(path, second)
    assert state_facts(pae.load(net, path)) == state_facts(empty)
    assert [entry.name for entry in tmp_path.iterdir()] == ["stage"]


@pytest.mark.parametrize("name", ["x.orbax-checkpoint-tmp", ".saving-x"])
def test_a_name_that_load_would_refuse_is_refused_by_save(empty, tmp_path, name):
    with pytest.raises(pae.CheckpointError, match="the name of a half-written stage, which does not load"):
        pae.save(tmp_path / name, empty)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_does_not_write_waits_in_bounds_for_the_one_that_does(empty, second, tmp_path, monkeypatch):
    pae.save(tmp_path / "stage", empty)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    pae.save(tmp_path / "stage", empty)
    with pytest.raises(pae.CheckpointError, match="holds another state, or other metadata, than process 1 has"):
        pae.save(tmp_path / "stage", second)
    with pytest.raises(pae.CheckpointError, match=r"waited 0.1 s for process 0 to write .*none"):
        pae.save(tmp_path / "none", empty, timeout=0.1)


def test_a_pipe_in_a_stage_is_refused_and_not_waited_for(net, copy):
    for name in ("_METADATA", JSON):
        file = next(copy.rglob(name))
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(pae.CheckpointError, match="no regular file"):
            pae.load(net, copy)


def test_metadata_nested_too_deep_is_refused(empty, tmp_path):
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(pae.ArgumentError, match="metadata must be what JSON can say"):
        pae.save(tmp_path / "stage", empty, {"a": deep})


def test_sealed_metadata_of_another_meaning_is_a_typed_error(net, copy):
    from pae_jax import files

    def hostile(info):
        info["growth"] = [{"narrow": None}]
        del info["sha256"]
        info.update(files.sealed(info))

    edit_json(copy, hostile)
    with pytest.raises(pae.CheckpointError, match="is not what this pae_jax writes: KeyError"):
        pae.load(net, copy)


class Activated(nn.Module):
    """A backbone whose weights say nothing of its activation."""

    width: float
    activation: str = "relu"

    @nn.compact
    def __call__(self, x):
        return getattr(nn, self.activation)(nn.Dense(int(8 * self.width))(x))


class Tempered(nn.Module):
    temperature: float = 1.0

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x) / self.temperature


def test_a_model_or_head_of_the_same_shapes_that_computes_otherwise_is_refused(tmp_path, assert_same):
    net = pae.linen(Activated, jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=Tempered(), key=jax.random.key(1))
    state = pae.freeze(state, "a")
    pae.save(tmp_path / "stage", state)
    pae.write_bundle(tmp_path / "bundle", net, state)
    edited = pae.linen(lambda width: Activated(width, "tanh"), jnp.zeros((1, 4)))
    for other, head in ((edited, Tempered()), (net, Tempered(2.0))):
        for read in (pae.load, pae.read_bundle):
            path = tmp_path / ("stage" if read is pae.load else "bundle")
            with pytest.raises(pae.StructureError, match=r"program of task 'a': found digest .* same_program=False"):
                read(other, path, heads={"a": head})
            found = read(other, path, heads={"a": head}, same_program=False)
            assert_same(found.tasks["a"].head, state.tasks["a"].head)
    same = pae.linen(lambda width: Activated(width), jnp.ones((3, 4)))  # another sample and another object
    assert_same(pae.load(same, tmp_path / "stage", heads={"a": Tempered()}).shared, state.shared)


def test_a_net_of_inputs_of_another_dtype_is_refused(net, frozen, tmp_path, vector_module):
    """It would round the inputs before the task sees them."""
    pae.save(tmp_path / "stage", frozen)
    pae.write_bundle(tmp_path / "bundle", net, frozen)
    other = pae.linen(vector_module, jnp.zeros((1, 4), jnp.bfloat16))
    for read, name in ((pae.load, "stage"), (pae.read_bundle, "bundle")):
        with pytest.raises(pae.StructureError, match=r"task 'a': found inputs of bfloat16, expected float32, by which"):
            read(other, tmp_path / name)
        assert read(other, tmp_path / name, same_program=False).tasks["a"].frozen
    wide = pae.linen(vector_module, np.zeros((3, 4), np.float64))  # what JAX takes as float32
    assert pae.load(wide, tmp_path / "stage").tasks["a"].frozen


def test_a_program_is_the_same_whatever_was_packed_before_under_other_settings(net, tmp_path):
    for number, precision in enumerate(("highest", "float32", None)):
        with jax.default_matmul_precision(precision):
            state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
            pae.save(tmp_path / str(number), state)
            pae.clear_caches()
            pae.load(net, tmp_path / str(number))


def test_a_program_is_not_compared_under_other_circumstances(net, frozen, tmp_path):
    """Another version of JAX, or other settings of it, may write the same program otherwise."""
    entry = frozen.tasks["a"].replace(program=frozen.tasks["a"].program[16:].join(["0" * 16, " and more"]))
    pae.save(tmp_path / "stage", frozen.replace(tasks={"a": entry}))
    assert pae.load(net, tmp_path / "stage").tasks["a"].program == entry.program

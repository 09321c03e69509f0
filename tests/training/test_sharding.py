"""Training on many devices: 8 virtual ones in one process, and 2 processes, each started on its own."""

import os
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import pae_jax as pae

SCRIPT = Path(__file__).parent / "two_processes.py"
stream = runpy.run_path(str(SCRIPT))["stream"]


def devices(count, **options):
    """The devices of a mesh of many, to ask for layouts; all are the same one, so nothing can run there."""
    return pae.Devices(Mesh(np.asarray(jax.devices()[:1] * count), ("data",)), **options)


@pytest.fixture(scope="module")
def mlp():
    return pae.linen(lambda width: pae.models.MLP(width=width), jnp.zeros((1, 4)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, free_port, run_together):
    """Results of the same trainings on 8 devices of one process and on 2 processes."""
    folder = tmp_path_factory.mktemp("devices")
    address = f"localhost:{free_port()}"
    many = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"}
    calls = [(many, 1, 0, "eight"), ({}, 2, 0, "first"), ({}, 2, 1, "second")]
    programs = [
        ([SCRIPT, address, count, number, folder / f"{name}.npz"], environment)
        for environment, count, number, name in calls
    ]
    for output, status in run_together(programs):
        assert status == 0, output[-2000:]
    found = {name: dict(np.load(folder / f"{name}.npz")) for _, _, _, name in calls}
    return found, folder / "eight.npz"


def test_the_runs_really_had_that_many_devices(runs):
    found, _ = runs
    assert {name: int(run["mesh/devices"]) for name, run in found.items()} == {"eight": 8, "first": 2, "second": 2}


@pytest.mark.parametrize("run", ["eight", "first", "second"])
@pytest.mark.parametrize("how", ["mesh", "split"])
def test_many_devices_train_the_same_weights_up_to_the_order_of_summation(runs, run, how):
    found = runs[0][run]
    paths = [path.removeprefix("one/") for path in found if path.startswith("one/shared")]
    assert paths
    for path in paths:
        np.testing.assert_allclose(found[f"{how}/{path}"], found[f"one/{path}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("run", ["eight", "first", "second"])
@pytest.mark.parametrize("how", ["one", "mesh", "split"])
def test_the_frozen_weights_and_the_old_tasks_logits_are_the_same_bits_on_any_number_of_devices(runs, run, how):
    found, reference = runs[0][run], runs[0]["eight"]
    assert found[f"{how}/logits of the first task are the same bits"]
    for path in [path for path in reference if path.startswith("one/owner")]:
        frozen = reference[path] == 1
        weights = path.replace("owner", "shared").removeprefix("one/")
        assert frozen.any()
        assert found[f"{how}/{weights}"][frozen].tobytes() == reference[f"one/{weights}"][frozen].tobytes()
        assert ((found[path.replace("one/", f"{how}/")] == 1) == frozen).all()


def test_both_processes_end_with_the_same_bits(runs):
    first, second = runs[0]["first"], runs[0]["second"]
    assert first.keys() == second.keys()
    assert all(first[path].tobytes() == second[path].tobytes() for path in first)


def test_a_mesh_of_explicit_axes_as_jax_makes_it_now_trains_the_same_weights(runs):
    found = runs[0]["eight"]
    paths = [path.removeprefix("one/") for path in found if path.startswith("one/shared")]
    for path in paths:
        np.testing.assert_allclose(found[f"made/{path}"], found[f"one/{path}"], rtol=1e-4, atol=1e-6)
    assert found["made/logits of the first task are the same bits"]


def test_a_ragged_batch_is_refused_before_its_step_with_the_remedy(runs):
    found = runs[0]["eight"]
    assert "a batch of 6 examples, which the 8 devices of the mesh do not divide" in str(found["ragged"])
    assert "drop_remainder=True" in str(found["ragged"])
    assert found["ragged/steps"].tolist() == [1, 2]


def test_a_stage_saved_on_eight_devices_loads_on_one(runs, mlp):
    found, out = runs
    state = pae.load(mlp, f"{out}.stage")
    pae.verify(state)
    for path, leaf in pae.trees.flatten(state.shared).items():
        assert np.asarray(leaf).tobytes() == found["eight"][f"split/shared/{path}"].tobytes()


def test_a_run_begun_on_eight_devices_goes_on_with_one(runs, mlp, assert_same):
    _, out = runs
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    tasks, recipe = stream(
        {"first": (x, (x[:, 0] > 0).astype(np.int32)), "second": (x, (x[:, 1] > 0).astype(np.int32))}
    )
    empty, run = pae.load(mlp, f"{out}.empty"), pae.Run(f"{out}.run")
    begun, learned = (Path(f"{out}.run") / "events.jsonl").read_text(), pae.load(mlp, f"{out}.run/01-first/frozen")
    state = pae.learn_all(mlp, empty, tasks, recipe, key=jax.random.key(5), run=run).state
    since = (Path(f"{out}.run") / "events.jsonl").read_text().removeprefix(begun)
    assert '"first"' in begun and '"first"' not in since and '"second"' in since
    assert_same(
        [state.tasks["first"].local, state.tasks["first"].head],
        [learned.tasks["first"].local, learned.tasks["first"].head],
    )
    assert_same(state.tasks["first"].digests, learned.tasks["first"].digests)
    pae.verify(state)


def test_learning_on_a_mesh_is_learning(net, data, assert_same):
    tasks, recipe = stream({"a": data, "b": data})
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    options = {"key": jax.random.key(1)}
    empty = pae.init(net, jax.random.key(0))
    one = pae.learn_all(net, empty, tasks, recipe, **options)
    two = pae.learn_all(net, empty, tasks, recipe, devices=pae.Devices(mesh, split_weights=True), **options)
    assert_same(two.state, one.state)


def test_a_batch_that_the_devices_do_not_divide_is_refused_before_anything_is_written(tmp_path, net, data, empty):
    tasks, recipe = stream({"a": (data[0][:15], data[1][:15])})
    many = devices(4)
    for call in (pae.learn, pae.baseline):
        first = (net,) if call is pae.baseline else (net, empty)
        task = pae.Task("a", 2, tasks[0].train, val=data)
        with pytest.raises(pae.ArgumentError, match="must divide the batch, found 15"):
            call(*first, task, recipe, key=jax.random.key(1), run=pae.Run(tmp_path), devices=many)
    with pytest.raises(pae.ArgumentError, match="must divide the batch, found 15"):
        pae.learn_all(net, empty, tasks, recipe, key=jax.random.key(1), devices=many)
    assert not list(tmp_path.iterdir())


def test_each_array_is_split_along_its_longest_axis_that_the_devices_divide():
    split = devices(4, split_weights=True)
    spec = lambda shape: split.sharding(jax.ShapeDtypeStruct(shape, jnp.float32)).spec  # noqa: E731
    assert spec((3, 3, 8, 16)) == PartitionSpec(None, None, None, ("data",))
    assert spec((32, 16)) == PartitionSpec(("data",))
    assert spec((3, 5)) == PartitionSpec()
    assert spec((16,)) == PartitionSpec()
    whole = devices(4)
    assert whole.sharding(jax.ShapeDtypeStruct((32, 16), jnp.float32)).spec == PartitionSpec()


def test_a_mesh_of_one_device_trains_and_the_state_comes_back_where_it_was(quick_fit, packed, assert_same):
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    one = quick_fit(packed, "a")[0].shared
    for given in (mesh, jax.make_mesh((1,), ("data",)), pae.Devices(mesh), pae.Devices(mesh, split_weights=True)):
        state, _ = quick_fit(packed, "a", devices=given)
        assert_same(state.shared, one)
        assert not any(leaf.committed for leaf in jax.tree.leaves(state))


def test_a_batch_that_the_devices_do_not_divide_is_refused(packed, data, quick_fit, traces):
    with pytest.raises(pae.ArgumentError, match="must divide the batch, found 6"):
        devices(4).check_batch(6)
    with pytest.raises(pae.ArgumentError, match="must divide the batch, found 6"):
        quick_fit(packed, "a", batch_size=6, devices=devices(4))
    with pytest.raises(pae.DataError, match="a batch of 6 examples, which the 4 devices of the mesh do not divide"):
        devices(4).batch((data[0][:6], data[1][:6]))
    assert traces == []


def test_devices_refuse_what_is_no_mesh_and_what_has_none(packed, quick_fit):
    with pytest.raises(pae.ArgumentError, match="pass mesh="):
        pae.Devices(split_weights=True)
    with pytest.raises(pae.ArgumentError, match=r"mesh must be a jax.sharding.Mesh, found list"):
        pae.Devices(jax.devices())
    with pytest.raises(pae.ArgumentError, match=r"devices must be a jax.sharding.Mesh or pae.Devices, found \["):
        quick_fit(packed, "a", devices=jax.devices())


# Many steps in one call


def test_many_steps_in_one_call_train_what_single_steps_do(packed, rated_fit):
    schedule = pae.CubicSchedule(final=0.5, end=8, every=3)
    options = {"epochs": 3, "pruning": schedule, "rates": lambda step: (1.0, 1.0 / (1 + step))}
    single, history = rated_fit(packed, "a", **options)
    many, other = rated_fit(packed, "a", devices=pae.Devices(steps_per_call=4), **options)
    for one, two in zip(jax.tree.leaves(single), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=1e-5, atol=1e-6)
    assert [row["loss"] for row in other.rows] == pytest.approx([row["loss"] for row in history.rows], rel=1e-5)


def test_many_steps_in_one_call_stop_at_a_step_that_is_not_finite(packed, data, quick_fit):
    x, y = data
    loss = lambda logits, labels: jnp.where(labels[0] > 0, jnp.nan, 1.0) * jnp.mean(logits**2)  # noqa: E731
    with pytest.raises(pae.DivergedError) as found:
        many = pae.Devices(steps_per_call=5)
        quick_fit(packed, "a", (x, y.astype(np.float32)), loss=loss, devices=many, optimizer=optax.sgd(0.1))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(found.value.state.shared))


def test_many_steps_in_one_call_need_arrays(packed, data, quick_fit):
    with pytest.raises(pae.ArgumentError, match="data in arrays"):
        quick_fit(packed, "a", [data], devices=pae.Devices(steps_per_call=2))
    with pytest.raises(pae.ArgumentError, match="data in arrays and no mesh"):
        devices(1, steps_per_call=2)
    for count in (0, 1.5, True):
        with pytest.raises(pae.ArgumentError, match="steps_per_call must be an integer of at least 1, found"):
            pae.Devices(steps_per_call=count)


def test_many_steps_in_one_call_report_the_mean_loss_of_the_call(packed, quick_fit):
    single, many = [], []
    quick_fit(packed, "a", on_step=lambda row: single.append(float(row["loss"])))
    note = lambda row: many.append((row["step"], float(row["loss"])))  # noqa: E731
    quick_fit(packed, "a", on_step=note, devices=pae.Devices(steps_per_call=3))
    assert [step for step, _ in many] == [3, 5, 8, 10]
    expected = [np.mean(single[a:b]) for a, b in ((0, 3), (3, 5), (5, 8), (8, 10))]
    assert [loss for _, loss in many] == pytest.approx(expected, rel=1e-4)

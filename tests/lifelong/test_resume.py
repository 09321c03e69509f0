"""Law 10: killed at any moment, a run resumes and ends in the same bits as an uninterrupted run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import pae_jax as pae
from pae_jax import files
from pae_jax.lifelong import run_folder, stage_maker, task_folder
from pae_jax.storage import checkpoint

# One run with everything a stage can be: own networks, a goal that is missed at the first width, a ladder, picks and
# retraining. The test below runs it here, and in processes of its own that are killed.
PROGRAM = """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import pae_jax as pae
    from pae_jax.lifelong.recipes import Expansion, Ladder, Phase, Rate, Recipe

    def grows(net, state, task, data):
        accuracy = pae.evaluate(net, state, task, data)["accuracy"]
        return accuracy / 2 if task == "b" and state.width == 1.0 and len(state.tasks) == 2 else accuracy

    def tasks():
        rng = np.random.default_rng(0)
        for number, name in enumerate("ab"):
            x = rng.normal(size=(72, 4)).astype(np.float32)
            y = (x[:, number] + 0.3 * x[:, 3] > 0).astype(np.int32)
            parts = (x[:32], y[:32]), (x[32:52], y[32:52]), (x[52:], y[52:])
            yield pae.Task(name, 2, *parts, metric=pae.Metric("accuracy", grows))

    def recipe():
        rung = Phase(2, Rate(0.03, cosine=True))
        train = Phase(3, Rate(0.1), pick_rate=Rate(0.02))
        return Recipe(
            "small", train, 8, ladder=Ladder((0.3, 0.6), rung, ramp=1.0, every=2), retrain=train, goal="baseline",
            tolerance=0.2, expansion=Expansion(0.5, 1.5), sharing="picked", local_init="newest",
        )

    def small_run(net, path, background=False):
        state = pae.init(net, jax.random.key(0))
        return pae.learn_all(
            net, state, list(tasks()), recipe(), key=jax.random.key(1), run=pae.Run(path, background=background)
        )

    def network():
        return pae.linen(lambda width: pae.models.MLP(width, (8,)), jnp.zeros((1, 4)))
"""
STAGES = {
    "baseline-a": ["0-trained"],
    "01-a": ["0-trained", "0-pruned-0.300", "0-pruned-0.600"],
    "baseline-b": ["0-trained"],
    "02-b": ["0-trained", "1-trained", "1-pruned-0.300", "1-pruned-0.600", "1-retrained"],
}


@pytest.fixture(scope="module")
def program():
    """The run as functions of this process."""
    names = {}
    exec(textwrap.dedent(PROGRAM), names)
    return names


@pytest.fixture(scope="module")
def net(program):
    return program["network"]()


def facts_of(path):
    """Everything a run leaves that must not depend on when it was killed."""
    arrays = {stage.parent.name: pae.read_metadata(stage)["arrays"] for stage in path.glob("*/frozen")}
    facts = {stage.parent.name: pae.read_metadata(stage)["metadata"] for stage in path.glob("*/frozen")}
    texts = {
        str(file.relative_to(path)): file.read_text()
        for pattern in ("stages.csv", "accuracy.json", "*/records.json", "*/settings.json")
        for file in path.glob(pattern)
    }
    rest = sorted(str(entry.relative_to(path)) for entry in path.glob("*/*"))
    return arrays, facts, texts, rest


@pytest.fixture(scope="module")
def uninterrupted(program, net, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "uninterrupted"
    result = program["small_run"](net, path)
    assert [outcome.status.name for outcome in result.outcomes] == ["GOAL_MET", "GOAL_MET"], result.outcomes
    return path, result


def test_the_run_has_a_stage_of_every_kind(uninterrupted):
    path, result = uninterrupted
    found = {
        folder: [record["stage"] for record in json.loads((path / folder / "records.json").read_text())["records"]]
        for folder in STAGES
    }
    assert found == STAGES
    assert len(result.state.growth) == 1
    assert result.state.tasks["b"].pick is not None


class Interrupted(BaseException):
    """What nothing catches, as nothing catches a kill."""


class Interruptions:
    """Raises once after every step of the run that changes something on disk, and once after every training."""

    def __init__(self):
        self.seen = set()

    def after(self, name, function, what):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            moment = (name, *what(*arguments, **options))
            if moment not in self.seen:
                self.seen.add(moment)
                raise Interrupted(str(moment))
            return result

        return call

    @contextlib.contextmanager
    def installed(self):
        def file(path, *rest):
            return path.parent.name, path.name, *rest

        def stage(path, *rest):
            return path.parent.name, path.name

        def event(run, event, facts, *, once=False):
            return event, facts["folder"], facts.get("stage")

        def training(given, *rest):
            # A task and its own network have the same key, and other weights.
            state, weights = given.state, jax.tree.leaves(given.state.shared)[0]
            return len(state.tasks), state.width, given.task, str(given.key), str(weights)

        def folder(task_folder, keep):
            return (task_folder.path.name,)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "write_bytes", self.after("write", files.write_bytes, file))
            patch.setattr(task_folder, "save", self.after("save", task_folder.save, stage))
            patch.setattr(run_folder.Run, "log", self.after("log", run_folder.Run.log, event))
            patch.setattr(stage_maker, "trained", self.after("train", stage_maker.trained, training))
            patch.setattr(task_folder.TaskFolder, "tidy", self.after("tidy", task_folder.TaskFolder.tidy, folder))
            yield


def test_stopped_after_every_single_step_a_run_ends_in_the_same_bits(program, net, uninterrupted, tmp_path):
    """Each process gets one step further than the one before; there are as many as there are steps."""
    interruptions, count = Interruptions(), 0
    result = None
    with interruptions.installed():
        while result is None:
            count += 1
            assert count < 200
            with contextlib.suppress(Interrupted):
                result = program["small_run"](net, tmp_path)
    kinds = [moment[0] for moment in interruptions.seen]
    stages = sum(map(len, STAGES.values()))
    assert kinds.count("train") == stages
    assert kinds.count("save") == stages + len(STAGES)
    assert kinds.count("log") == 2 * stages + len(STAGES)  # all that happened is there, though each step was the last
    assert count == len(kinds) + 1
    assert facts_of(tmp_path) == facts_of(uninterrupted[0])
    np.testing.assert_array_equal(result.matrix.values, uninterrupted[1].matrix.values)
    for one, other in zip(result.outcomes, uninterrupted[1].outcomes, strict=True):
        assert (one.records, one.status, one.value, one.test) == (other.records, other.status, other.value, other.test)
    for task in program["tasks"]():
        one, other = (pae.predict(net, r.state, task.name, task.test[0]) for r in (result, uninterrupted[1]))
        np.testing.assert_array_equal(one, other)


# Stages written in the background


class Writing:
    """Holds back the stage `01-a/0-trained` until the next one trains; what a test wants happens then."""

    def __init__(self, path, patch):
        self.stage, self.trains = path / "01-a" / "0-trained", threading.Event()
        self.fails, self.interrupts, self.early, self.most = False, False, None, 0
        self.write, self.train, self.writing = checkpoint._write, stage_maker.trained, 0
        patch.setattr(checkpoint, "_write", self.written)
        patch.setattr(stage_maker, "trained", self.trained)

    def written(self, path, *rest):
        self.writing += 1
        self.most = max(self.most, self.writing)
        try:
            if path == self.stage:
                assert self.trains.wait(60), "the next stage does not train before this one is written"
                if self.fails:
                    raise pae.CheckpointError("the disk is full")
            self.write(path, *rest)
        finally:
            self.writing -= 1

    def trained(self, given, *rest):
        if given.pruning is not None and not self.trains.is_set():
            events = (self.stage.parent.parent / "events.jsonl").read_text().splitlines()
            logged = [event["stage"] for event in map(json.loads, events) if event["folder"] == "01-a"]
            self.early = self.stage.exists(), logged
            self.trains.set()
            if self.interrupts:
                raise Interrupted
        return self.train(given, *rest)


@pytest.fixture
def writing(tmp_path, monkeypatch):
    return Writing(tmp_path, monkeypatch)


def test_a_stage_is_written_while_the_next_one_trains_and_the_run_is_the_same(
    program, net, uninterrupted, tmp_path, writing
):
    program["small_run"](net, tmp_path, background=True)
    assert writing.early == (
        False,
        ["0-trained", "0-pruned-0.300"],
    )  # both started; what is not on disk is not finished
    assert writing.most == 1
    assert facts_of(tmp_path) == facts_of(uninterrupted[0])
    lines = [
        [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
        for path in (tmp_path, uninterrupted[0])
    ]
    ours, theirs = ({(e["event"], e["folder"], e.get("stage")) for e in events} for events in lines)
    assert ours == theirs


def test_learn_raises_only_once_the_last_stage_is_on_disk(program, net, tmp_path, writing):
    writing.interrupts = True
    with pytest.raises(Interrupted):
        program["small_run"](net, tmp_path, background=True)
    assert sorted(entry.name for entry in (tmp_path / "01-a").iterdir()) == ["0-trained", "settings.json"]


def test_a_stage_that_cannot_be_written_in_the_background_is_an_error_of_learn(
    program, net, uninterrupted, tmp_path, writing
):
    writing.fails = True
    with pytest.raises(pae.CheckpointError, match="the disk is full"):
        program["small_run"](net, tmp_path, background=True)
    assert not writing.stage.exists()
    writing.trains.clear()
    writing.interrupts = True
    with pytest.raises(Interrupted) as raised:
        program["small_run"](net, tmp_path, background=True)
    assert raised.value.__notes__ == ["the disk is full"]  # it takes no error's place, and is not lost
    writing.fails = writing.interrupts = False
    program["small_run"](net, tmp_path, background=True)
    assert facts_of(tmp_path) == facts_of(uninterrupted[0])


# Real kills

KILLS = {
    "stage by stage": [
        "event started 01-a 0-pruned-0.300",
        "rename 02-b/0-trained",  # all of the stage is written, under its temporary name
        "rename 02-b/records.json",
    ],
    "in the background": ["rename 02-b/0-trained"],  # by the thread that writes, while the next stage trains
}
KILLING = """
    import os, signal, sys

    path, moment, saving = sys.argv[1:]
    rename, replace, log = os.rename, os.replace, pae.Run.log

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def before(function):
        def call(source, target, *rest, **options):
            if moment.startswith("rename") and str(target).endswith(moment.split()[1]):
                kill()
            return function(source, target, *rest, **options)
        return call

    def logged(run, event, facts, *, once=False):
        log(run, event, facts, once=once)
        if moment == " ".join(["event", event, facts["folder"], facts.get("stage", "")]):
            kill()

    os.rename, os.replace, pae.Run.log = before(rename), before(replace), logged
    small_run(network(), path, saving == "in the background")
    print("ended")
"""


@pytest.mark.parametrize("saving", KILLS)
def test_killed_for_good_and_started_again_a_run_ends_in_the_same_bits(uninterrupted, tmp_path, saving):
    """kill -9 before a stage trains, while a stage is half on disk, and before the records of a task are there."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM) + textwrap.dedent(KILLING))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(pae.__file__).parent.parent),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(jax.config.read("jax_disable_most_optimizations"))),
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        # What one process has compiled, the next one need not; the run that they are compared with compiled its own.
        "JAX_COMPILATION_CACHE_DIR": str(uninterrupted[0].parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    path = tmp_path / "run"
    for moment in [*KILLS[saving], "never"]:
        call = [sys.executable, str(program), str(path), moment, saving]
        done = subprocess.run(call, env=environment, capture_output=True, text=True)
        assert done.returncode == (0 if moment == "never" else -signal.SIGKILL), done.stderr
        if moment.startswith("rename") and "records" not in moment:
            half = [entry.name for entry in (path / "02-b").iterdir() if entry.name.startswith(files.ASIDE)]
            assert half, "the kill came before anything was written"
    assert done.stdout == "ended\n"
    assert facts_of(path) == facts_of(uninterrupted[0])

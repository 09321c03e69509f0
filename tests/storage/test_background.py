"""Saved in the background, a stage is what `save` writes, and no error is lost."""

import errno
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax import files
from pae_jax.storage import orbax_arrays, stage


@pytest.fixture
def held(monkeypatch):
    """An event that everything written in the background waits for, before it reads anything."""
    go, describe = threading.Event(), stage.describe

    def late(*arguments):
        if threading.current_thread() is not threading.main_thread():
            assert go.wait(60)
        return describe(*arguments)

    monkeypatch.setattr(stage, "describe", late)
    yield go
    go.set()


@pytest.fixture
def full(monkeypatch):
    """A disk without room for what is written in the background; call it to make room."""

    def save(path, arrays, **options):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(orbax_arrays.ocp, "save", save)
        yield patch.undo


def test_save_returns_at_once_and_writes_the_stage_that_it_writes_otherwise(net, second, tmp_path, held, state_facts):
    pae.save(tmp_path / "one", second, {"accuracy": 0.5})
    saving = pae.save(tmp_path / "other", second, {"accuracy": 0.5}, wait=False)
    assert not saving.done
    assert not saving.path.exists()
    assert repr(saving) == f"Saving('{tmp_path / 'other'}', done=False)"
    held.set()
    saving.wait()
    assert saving.done
    assert pae.read_metadata(tmp_path / "other") == pae.read_metadata(tmp_path / "one")
    assert state_facts(pae.load(net, tmp_path / "other")) == state_facts(second)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["one", "other"]


def test_what_happens_to_the_arrays_after_the_call_does_not_reach_the_stage(net, second, tmp_path, held, state_facts):
    facts = state_facts(second)
    step = jax.jit(lambda shared: jax.tree.map(lambda w: w - 7, shared), donate_argnums=0)
    donated = second.replace(shared=jax.tree.map(jnp.copy, second.shared))
    saving = pae.save(tmp_path / "donated", donated, wait=False)
    jax.block_until_ready(step(donated.shared))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated.shared))
    held.set()
    saving.wait()
    held.clear()
    host = second.replace(owner=jax.tree.map(np.array, second.owner))
    saving = pae.save(tmp_path / "host", host, wait=False)
    jax.tree.map(lambda ids: ids.fill(0), host.owner)
    held.set()
    saving.wait()
    for name in ("donated", "host"):
        assert state_facts(pae.load(net, tmp_path / name)) == facts


def test_what_can_be_known_before_anything_is_written_is_raised_at_once(second, tmp_path):
    (tmp_path / "there").mkdir()
    damaged = second.replace(owner=jax.tree.map(lambda ids: ids + 5, second.owner))
    for error, path, state, metadata in (
        (pae.CheckpointError, "there", second, {}),
        (pae.CheckpointError, ".saving-x", second, {}),
        (pae.ArgumentError, "new", second, {"a": {1, 2}}),
        (pae.StructureError, "new", damaged, {}),
    ):
        with pytest.raises(error):
            pae.save(tmp_path / path, state, metadata, wait=False)
    with pytest.raises(pae.ArgumentError, match="wait must be True or False, found 60"):
        pae.save(tmp_path / "new", second, wait=60)
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


def test_wait_raises_the_error_of_save_each_time_and_the_same_call_works(empty, tmp_path, full):
    saving = pae.save(tmp_path / "stage", empty, wait=False)
    for _ in range(2):
        with pytest.raises(pae.CheckpointError, match=r"cannot write the stage .* Earlier stages are untouched"):
            saving.wait()
    full()
    pae.save(tmp_path / "stage", empty, wait=False).wait()
    assert [entry.name for entry in tmp_path.iterdir()] == ["stage"]


def test_an_error_that_nobody_waited_for_is_raised_by_the_next_save_of_that_thread(empty, tmp_path, full):
    for wait in (True, False):
        pae.save(tmp_path / "lost", empty, wait=False)
        with pytest.raises(pae.CheckpointError, match=r"cannot write the stage .*lost") as raised:
            pae.save(tmp_path / "next", empty, wait=wait)
        (note,) = raised.value.__notes__
        assert f"{tmp_path / 'next'} is not written either" in note
    saving = pae.save(tmp_path / "lost", empty, wait=False)
    while not saving.done:
        pass
    full()
    other = threading.Thread(target=lambda: pae.save(tmp_path / "other", empty))
    other.start()
    other.join()
    with pytest.raises(pae.CheckpointError, match="lost"):
        pae.save(tmp_path / "next", empty)
    pae.save(tmp_path / "next", empty)  # it is raised once
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["next", "other"]


def test_a_thread_writes_one_stage_at_a_time(empty, tmp_path, held):
    first = pae.save(tmp_path / "0", empty, wait=False)
    threading.Timer(0.05, held.set).start()
    second = pae.save(tmp_path / "1", empty, wait=False)
    assert first.done
    assert first.path.exists()
    with pytest.raises(pae.CheckpointError, match="1 exists; a stage is written once"):
        pae.save(tmp_path / "1", empty)
    second.wait()


def test_threads_that_save_at_once_do_not_disturb_each_other(net, empty, tmp_path, state_facts):
    """Orbax numbers the saves of a process, and takes one for the other where two run at once."""

    def go(name):
        for number in range(3):
            pae.save(tmp_path / name / str(number), empty, wait=False)
        pae.save(tmp_path / name / "last", empty)

    threads = [threading.Thread(target=go, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.glob("*/*"))) == 8
    for name in "ab":
        assert state_facts(pae.load(net, tmp_path / name / "last")) == state_facts(empty)


def test_ctrl_c_while_waiting_leaves_no_stage_and_the_same_call_works(empty, tmp_path, held, monkeypatch):
    sync_tree = files.sync_tree

    def pressed(folder):
        monkeypatch.undo()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        sync_tree(folder)

    def waits(seconds=None):
        held.set()  # the interrupt comes when the main thread waits
        return ended(seconds)

    monkeypatch.setattr(files, "sync_tree", pressed)
    saving = pae.save(tmp_path / "stage", empty, wait=False)
    ended, saving._ended.wait = saving._ended.wait, waits
    with pytest.raises(KeyboardInterrupt):
        saving.wait()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(pae.CheckpointError, match="an interrupt has stopped the writing"):
        saving.wait()
    pae.save(tmp_path / "stage", empty, wait=False).wait()


def test_a_process_that_does_not_write_waits_in_the_background_too(empty, second, tmp_path, monkeypatch):
    pae.save(tmp_path / "stage", empty)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    pae.save(tmp_path / "stage", empty, wait=False).wait()
    saving = pae.save(tmp_path / "stage", second, wait=False)
    with pytest.raises(pae.CheckpointError, match="holds another state"):
        saving.wait()


# Ends of processes

CHILD = """
    import os, signal, sys, threading, time
    import jax, jax.numpy as jnp, numpy as np
    import pae_jax as pae
    from pae_jax import files

    folder, what = sys.argv[1:]
    state = pae.init(pae.linen(lambda width: pae.models.MLP(width, (8,)), jnp.zeros((1, 4))), jax.random.key(0))
    pae.save(f"{folder}/0", state)
    rename, sync_tree, begun = os.rename, files.sync_tree, threading.Event()

    def end(source, target):
        if what == "killed" and str(target).endswith("/1"):
            os.kill(os.getpid(), signal.SIGKILL)
        if str(target).endswith("/2"):
            raise OSError("no such disk")
        rename(source, target)

    def slow(tree):
        begun.set()
        time.sleep(0.3)
        sync_tree(tree)

    os.rename, files.sync_tree = end, slow
    other = threading.Thread(target=lambda: pae.save(f"{folder}/2", state, wait=False))
    if what == "ended":
        other.start()
        other.join()
    saving = pae.save(f"{folder}/1", state, wait=False)
    begun.wait()
    if what == "killed":
        time.sleep(60)
    child = os.fork()
    if not child:
        try:
            saving.wait()
        except pae.CheckpointError as error:
            os._exit(7 if "the process that this one was forked from" in str(error) else 8)
        os._exit(9)
    print("forked:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print("whole at the end of the program:", os.path.exists(f"{folder}/1"))
"""


def small_net():
    return pae.linen(lambda width: pae.models.MLP(width, (8,)), jnp.zeros((1, 4)))


def test_after_a_kill_the_earlier_stage_loads_and_the_half_one_never_does(run_child):
    folder, done = run_child(CHILD, "killed")
    assert done.returncode == -signal.SIGKILL, done.stderr
    (half,) = [entry for entry in folder.iterdir() if entry.name != "0"]
    net = small_net()
    with pytest.raises(pae.CheckpointError):
        pae.load(net, half)
    state = pae.load(net, folder / "0")
    pae.save(folder / "1", state, wait=False).wait()  # what is left over is in nobody's way
    assert sorted(entry.name for entry in folder.iterdir()) == ["0", "1"]


def test_the_interpreters_exit_waits_and_warns_of_what_was_lost_and_a_forked_process_does_not_wait(run_child):
    folder, done = run_child(CHILD, "ended")
    assert done.stdout == "forked: 7\nwhole at the end of the program: False\n", done.stderr
    assert done.returncode == 0
    assert sorted(entry.name for entry in folder.iterdir()) == ["0", "1"]
    pae.load(small_net(), folder / "1")
    assert "RuntimeWarning: stages that nobody waited for were not saved: cannot write the stage" in done.stderr
    assert "no such disk" in done.stderr

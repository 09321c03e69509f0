"""Small files, folders and locks: whole or not at all, synced, sealed, and never waited for without end."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import pae_jax as pae
from pae_jax import files
from pae_jax.checks import local_path
from pae_jax.storage.shield import shielded


def test_a_file_is_written_completely_or_stays_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_bytes(path, b"before")
    for call in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, call, lambda *paths: (_ for _ in ()).throw(OSError(28, "disk full")))
            with pytest.raises(pae.CheckpointError, match=r"cannot write .*file: .*disk full"):
                files.write_bytes(path, b"after")
        assert path.read_bytes() == b"before"
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_and_its_name_are_on_the_disk_before_the_call_returns(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda n: (done.append(os.readlink(f"/proc/self/fd/{n}")), fsync(n)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    files.write_bytes(tmp_path / "file", b"x")
    assert [name.startswith(str(tmp_path / files.ASIDE)) for name in done] == [True, False, False]
    assert done[1:] == ["renamed", str(tmp_path)]


def test_a_sealed_file_gives_back_its_facts_and_refuses_every_flipped_bit(tmp_path):
    path, facts = tmp_path / "file", {"a": [1, 2.5, None], "ä\ud800": "人"}
    files.write_sealed(path, facts)
    content = path.read_bytes()
    assert files.read_sealed(path) == facts
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with pytest.raises(pae.CheckpointError, match=str(path)):
            pytest.fail(f"byte {position}: {files.read_sealed(path)}")


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{}", b"[" * 9999, b'{"sha256": 1}'], ids=repr)
def test_what_is_no_sealed_json_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(pae.CheckpointError, match="file is damaged"):
        files.read_sealed(tmp_path / "file")


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(pae.CheckpointError, match="no regular file"):
            files.read_bytes(path)


def test_a_line_that_a_power_cut_left_torn_does_not_damage_the_next(tmp_path):
    path = tmp_path / "lines"
    files.append_line(path, "one")
    with path.open("a") as file:
        file.write("tor")
    files.append_line(path, "two")
    assert path.read_text().splitlines() == ["one", "tor", "two"]


def test_leftovers_of_the_dead_are_removed_and_what_the_living_write_stays(tmp_path):
    dead = tmp_path / f"{files.ASIDE}dead"
    dead.mkdir()
    (dead / "lock").touch()
    (tmp_path / f"{files.ASIDE}file").write_text("{")
    with files.folder_aside(tmp_path) as mine:
        (mine / "stage").write_text("half")
        files.remove_leftovers(tmp_path)
        assert [entry.name for entry in tmp_path.iterdir()] == [mine.name]
        assert (mine / "stage").exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_held_is_waited_for_and_then_its_owner_is_named(tmp_path):
    path = tmp_path / "lock"
    with files.locked(path, 0.0):
        began = time.monotonic()
        with pytest.raises(pae.CheckpointError, match=rf"is in use: process {os.getpid()} of .* since 20"):
            files.locked(path, 0.1).__enter__()
        assert 0.1 <= time.monotonic() - began < 5
    assert not path.exists()
    with files.locked(path, 0.0):
        threading.Timer(0.05, lambda: None).start()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    program = f"""
        import pathlib, time
        from pae_jax import files
        with files.locked(pathlib.Path({str(tmp_path / "lock")!r}), 0.0):
            print("held", flush=True)
            time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(pae.__file__).parents[1])}
    call = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(pae.CheckpointError, match=f"process {process.pid} of"):
            files.locked(tmp_path / "lock", 0.0).__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
    with files.locked(tmp_path / "lock", 0.0):
        pass


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://b/r", "file:///tmp/x", Path("s3://bucket/run")], ids=str)
def test_a_remote_path_is_refused_by_name_and_nothing_is_made(tmp_path, monkeypatch, path, empty):
    monkeypatch.chdir(tmp_path)
    for call in (pae.Run, pae.read_metadata, lambda path: pae.save(path, empty)):
        with pytest.raises(pae.CheckpointError, match="is remote; stages and runs are local folders"):
            call(path)
    assert not list(tmp_path.iterdir())


def test_the_home_folder_is_expanded_and_what_is_no_path_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/run") == tmp_path / "run"
    for path in ("a\0b", "~nobody-of-this-name/x", "a\ud800", b"bytes", "", None, 5):
        with pytest.raises(pae.CheckpointError, match="is no path"):
            local_path(path)
    for call in (pae.Run, pae.read_metadata):
        with pytest.raises(pae.CheckpointError, match="File name too long"):
            call(tmp_path / ("n" * 300))


def test_an_interrupt_waits_for_work_that_is_told_to_stop(monkeypatch):
    begun, told, ended = threading.Event(), threading.Event(), []

    def work():
        begun.set()
        told.wait(10)
        ended.append("whole")

    def interrupt():
        begun.wait(10)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        shielded(work, told.set)
    assert ended == ["whole"]
    with pytest.raises(ZeroDivisionError):
        shielded(lambda: 1 / 0)
    assert shielded(lambda: 3) == 3

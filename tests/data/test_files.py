"""Only regular files are opened, and nothing waits for a file that never ends."""

import os
import socket

import pytest

from pae_jax.data import open_file, read_file
from pae_jax.errors import DataError

SPECIAL = {
    "FIFO": (lambda path: os.mkfifo(path), "a FIFO"),
    "link to a FIFO": (lambda path: (os.mkfifo(f"{path}.fifo"), os.symlink(f"{path}.fifo", path)), "a FIFO"),
    "device": (lambda path: os.symlink("/dev/zero", path), "a device"),
    "folder": (lambda path: os.mkdir(path), "a folder"),
    "socket": (lambda path: socket.socket(socket.AF_UNIX).bind(path), "a socket"),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("read", [open_file, read_file])
def test_what_is_no_regular_file_is_refused_by_name_and_not_opened(kind, read, tmp_path, monkeypatch):
    make, found = SPECIAL[kind]
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make("file")
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(DataError, match=f"file: found {found}, expected an image. Give a regular file"):
        read("file", "an image")


def test_a_file_that_becomes_a_fifo_meanwhile_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"whole")
    status = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda _: status)
    with pytest.raises(DataError, match="found a FIFO"):
        read_file(path, "an image")


@pytest.mark.parametrize("name", ["none", "no/folder", "a\0b", "x" * 5000])
def test_a_file_that_cannot_be_opened_is_named(tmp_path, name):
    with pytest.raises(DataError, match=r"cannot be read .*; expected an image"):
        read_file(tmp_path / name, "an image")


def test_a_file_is_read_as_it_is_and_through_links(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\r\n\0whole")
    (tmp_path / "link").symlink_to(path)
    for place in (path, str(path), tmp_path / "link"):
        assert read_file(place, "an image") == b"\r\n\0whole"
        with open_file(place, "an image") as file:
            assert file.read() == b"\r\n\0whole"


def test_a_file_above_the_limit_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(DataError, match="sparse: found 1,099,511,627,776 bytes, expected an image of at most 100"):
        read_file(path, "an image", 100)
    (tmp_path / "small").write_bytes(bytes(100))
    assert len(read_file(tmp_path / "small", "an image", 100)) == 100


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs a file that says it is empty and is not")
def test_a_file_whose_size_is_a_lie_is_read_up_to_the_limit():
    assert read_file("/proc/self/maps", "a table")
    with pytest.raises(DataError, match="found 11 bytes, expected a table of at most 10"):
        read_file("/proc/self/maps", "a table", 10)

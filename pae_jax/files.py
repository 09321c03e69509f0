"""Files and folders that are there whole or not at all: written aside, synced, renamed, and sealed by a checksum."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pae_jax.errors import CheckpointError, PaeError

ASIDE = ".saving-"
"""Start of the names of what is not whole yet."""


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn whatever the system says of its files into a `CheckpointError` that begins with `what`."""
    try:
        yield
    except PaeError:
        raise
    except OSError as error:
        raise CheckpointError(f"{what}: {error}") from error


def read_bytes(path: Path) -> bytes:
    """Return the content of a regular file; a pipe or a device is refused, so that nothing is waited for."""
    with disk_errors(f"cannot read {path}"):
        require_regular(path)
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read()


def require_regular(path: Path) -> None:
    """Raise `CheckpointError` for what is neither a file nor a folder: reading a pipe or a device may never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} is no regular file, but a pipe or a device. Remove it.")


def require_new(path: Path, what: str) -> None:
    """Raise `CheckpointError` if `what`, such as "stage", would replace something at this path."""
    with disk_errors(f"cannot write the {what} {path}"):
        if os.path.lexists(path):
            raise _exists(path, what)


def rename_new(folder: Path, path: Path, what: str) -> None:
    """Give a folder its name; raise `CheckpointError` if `what` it holds would replace something."""
    try:
        os.rename(folder, path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _exists(path, what) from error
        raise


def _exists(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} exists; a {what} is written once. Choose another name, or remove it first.")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that has all its bytes or stays what it was, after a power cut too.

    Args:
      path: the file; replaced if it exists. Its folder exists.
      content: its bytes.

    Raises:
      CheckpointError: it cannot be written; the file is what it was.
    """
    with written_aside(path) as aside:
        aside.write_bytes(content)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield another path to write a file at; once it is, all of it goes to the disk and takes the place of `path`.

    Raises:
      CheckpointError: it cannot be written; `path` is what it was, and nothing is left beside it.
    """
    with disk_errors(f"cannot write {path}"):
        aside, file = _claim(path.parent, "")
        try:
            with file:
                yield aside
                os.fsync(file.fileno())
                os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; one that a power cut left without its end is ended first."""
    with disk_errors(f"cannot write {path}"), path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        torn = bool(size) and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write((b"\n" if torn else b"") + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        if not size:
            sync_folder(path.parent)


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts with their checksum, the SHA-256 of their JSON with sorted keys."""
    text = json.dumps(facts, sort_keys=True)
    return {**facts, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(facts: Any) -> bool:
    """Say whether facts are what was sealed."""
    return isinstance(facts, dict) and sealed({k: v for k, v in facts.items() if k != "sha256"}) == facts


def write_sealed(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts as a file of JSON with its checksum; numbers must be finite."""
    write_bytes(path, (json.dumps(sealed(facts), indent=1, allow_nan=False) + "\n").encode())


def read_sealed(path: Path, *keys: str) -> dict[str, Any]:
    """Return what `write_sealed` wrote, or raise `CheckpointError`, also where one of the keys is missing."""
    facts = as_json(path, read_bytes(path))
    if not is_sealed(facts):
        raise CheckpointError(f"{path} is damaged: it is not what was written")
    missing = [key for key in keys if key not in facts]
    if missing:
        raise CheckpointError(f"{path} is another file than its name says: it has no {missing[0]!r}")
    del facts["sha256"]
    return facts


def as_json(path: Path, content: bytes) -> Any:
    """Return the JSON of a file, or raise `CheckpointError`."""
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is no JSON ({error})") from error


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_tree(path: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            with open(Path(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and wait until they are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


@contextlib.contextmanager
def folder_aside(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` under a name of its own; it is removed afterwards with all that is left in it."""
    remove_leftovers(parent)
    folder, lock = _claim(parent, "lock")
    try:
        with lock:
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left half-written in a folder; what a living one writes is locked and stays."""
    with contextlib.suppress(OSError):
        for entry in list(parent.glob(ASIDE + "*")):
            lock = entry / "lock" if entry.is_dir() else entry
            with contextlib.suppress(OSError), lock.open("ab") as file:
                if _try_lock(file.fileno()):
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()


@contextlib.contextmanager
def locked(path: Path, wait: float) -> Iterator[None]:
    """Hold a lock file, which says who holds it and since when.

    The system lets go of it when its process ends, however it ends, so none is ever stale.

    Args:
      path: the lock file; there only while it is held, or after a kill.
      wait: seconds to wait for another process or thread.

    Raises:
      CheckpointError: it is held for longer; names who holds it. Or the file system has no locks.
    """
    end = time.monotonic() + wait
    with disk_errors(f"cannot lock {path}"):
        while (file := _held(path)) is None:
            if time.monotonic() >= end:
                raise CheckpointError(
                    f"{path.parent} is in use: {_holder(path)}. Wait until that has ended, or use another folder."
                )
            time.sleep(0.02)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def _held(path: Path) -> Any:
    """Return the lock file, locked; None where another holds it."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            file.write(f"process {os.getpid()} of {socket.gethostname()} since {since}\n".encode())
            file.flush()
            return file
    except (BlockingIOError, FileNotFoundError):  # held by another; removed by the one that let go of it
        pass
    except BaseException:
        file.close()
        raise
    file.close()
    return None


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, CheckpointError):
        return read_bytes(path).decode(errors="replace").strip() or "by another process"
    return "by another process"


def _claim(parent: Path, inner: str) -> tuple[Path, BinaryIO]:
    """Make a file, or a folder with a file `inner`, that is locked as long as it is open: no leftover to anyone."""
    for _ in range(100):
        path = parent / (ASIDE + secrets.token_hex(8))
        if inner:
            path.mkdir()
        try:
            file = (path / inner).open("xb")
        except (FileExistsError, FileNotFoundError):
            if not parent.is_dir():
                raise
            continue  # another process took it for a leftover before it was locked
        try:
            if _try_lock(file.fileno()) is not False and (path / inner).exists():
                return path, file
        except BaseException:
            file.close()
            raise
        file.close()
    raise BlockingIOError(errno.EAGAIN, "other processes remove what is written", str(parent))


def _try_lock(number: int) -> bool | None:
    """Lock an open file for this process; False where another has it, None where the file system has no locks."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True

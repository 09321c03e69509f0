"""Read files named by users: only regular files are opened, and reads have a size limit."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from pae_jax.errors import DataError

LARGEST = 1 << 30  # default limit in bytes for a file read as a whole
LARGEST_IMAGE = 256 << 20


def open_file(path: str | Path, expected: str) -> BinaryIO:
    """Open a regular file for reading; links are followed.

    FIFOs and devices are not opened, because reading one can block forever or never end.

    Args:
      path: the file.
      expected: what the file should be, for errors.

    Returns:
      The open file.

    Raises:
      DataError: the file is missing, may not be read, or is a folder, FIFO, socket or device.

    Example:
      >>> open_file("/nowhere/faces.npz", "an .npz file")
      Traceback (most recent call last):
      pae_jax.errors.DataError: /nowhere/faces.npz: cannot be read (No such file or directory); expected an .npz file.
    """
    descriptor = None
    try:
        _require_regular(os.stat(path), path, expected)
        # The file may have been replaced by a FIFO since the check, so open without blocking and check the open file
        # again.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        _require_regular(os.fstat(descriptor), path, expected)
        return os.fdopen(descriptor, "rb")
    except (OSError, ValueError) as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}); expected {expected}.") from error


def read_file(path: str | Path, expected: str, limit: int = LARGEST) -> bytes:
    """Read a regular file as a whole.

    Args:
      path: the file.
      expected: what the file should be, for errors.
      limit: largest file that is read, in bytes.

    Returns:
      The file's content.

    Raises:
      DataError: as `open_file`; or the file is larger than the limit.

    Example:
      >>> import tempfile
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     _ = file.write(b"P5"), file.flush()
      ...     read_file(file.name, "an image")
      b'P5'
    """
    with open_file(path, expected) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            # Kernel files report size 0, and a file may become longer.
            content = file.read(min(size, limit) + 1) if size else file.read(limit + 1)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); expected {expected}.") from error
    if max(size, len(content)) > limit:
        raise DataError(
            f"{path}: found {max(size, len(content)):,} bytes, expected {expected} of at most {limit:,}. Is it the "
            "right file?"
        )
    return content


def require_inside(path: Path, root: Path) -> None:
    """Raise `DataError` if links make a path lead out of a folder."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Remove or repair the link.") from error
    if not target.is_relative_to(root.resolve()):
        raise DataError(
            f"{path}: is a link to {target}, outside of {root}. Copy the files, or allow links with follow_links=True."
        )


def _require_regular(status: os.stat_result, path: str | Path, expected: str) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    found = next((name for test, name in _KINDS if test(status.st_mode)), "no regular file")
    raise DataError(f"{path}: found {found}, expected {expected}. Give a regular file.")


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

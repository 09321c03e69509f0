"""The file of a bundle: safetensors with a JSON header, written whole or not at all, every bit under one checksum."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from pae_jax.errors import CheckpointError
from pae_jax.storage import files
from pae_jax.version import __version__

SCHEMA_VERSION = 1
_FORMAT = "pae_jax bundle"
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_UNSEALED = "0" * 64
_PLAIN = "?bhilqBHILQefd"  # NumPy's own bool, integers and floats; other dtypes are written as integers of their size


def write(path: Path, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write a bundle: beside its place first, flushed to the disk, then renamed."""
    with files.disk_errors(f"cannot write {path}"):
        if os.path.lexists(path):
            raise CheckpointError(f"{path} exists; a bundle is written once. Choose another name, or remove it first.")
        text = json.dumps({"schema_version": SCHEMA_VERSION, **header}, separators=(",", ":"))
        metadata = {"format": _FORMAT, "sha256": _UNSEALED, "bundle": text}
        raw = safetensors.numpy.save({name: _as_plain(array) for name, array in tensors.items()}, metadata)
        start, end = _seal(raw, path)
        files.make_folder(path.parent)
        files.write_bytes(path, b"".join((raw[:start], _digest(raw, start, end).encode(), memoryview(raw)[end:])))


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and tensors of a bundle whose checksum is right; raise `CheckpointError` otherwise."""
    with files.disk_errors(f"no bundle at {path}"):
        raw = files.read_bytes(path)
    start, end = _seal(raw, path)
    if _digest(raw, start, end).encode() != raw[start:end]:
        raise CheckpointError(f"{path} is damaged: its checksum differs. Fetch or write it again.")
    try:
        table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        header = json.loads(table["__metadata__"]["bundle"])
        schema = header["schema_version"]
        if not isinstance(schema, int) or schema > SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema version {schema}; this pae_jax {__version__} reads up to {SCHEMA_VERSION}. "
                "Update pae_jax."
            )
        return header, safetensors.numpy.load(raw)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def as_stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a tensor of a file in the dtype that it was written from."""
    if array.dtype != _plain_dtype(dtype):
        raise CheckpointError(f"a tensor of the bundle is {array.dtype}, expected {_plain_dtype(dtype)}")
    return array.view(dtype)


def _as_plain(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(_plain_dtype(array.dtype))


def _plain_dtype(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.char in _PLAIN else np.dtype(f"uint{8 * dtype.itemsize}")


def _seal(raw: bytes, path: Path) -> tuple[int, int]:
    """Return where the checksum stands in the header of a file."""
    size = int.from_bytes(raw[:8], "little")
    found = _SEAL.search(raw, 8, 8 + size) if 8 < 8 + size <= len(raw) else None
    if found is None or f'"{_FORMAT}"'.encode() not in raw[8 : 8 + size]:
        raise CheckpointError(f"{path} is not a bundle of pae_jax, or it is damaged")
    return found.start(1), found.end(1)


def _digest(raw: bytes, start: int, end: int) -> str:
    """Return the SHA-256 of a file with zeros in the place of its checksum."""
    whole = hashlib.sha256(memoryview(raw)[:start])
    whole.update(_UNSEALED.encode())
    whole.update(memoryview(raw)[end:])
    return whole.hexdigest()

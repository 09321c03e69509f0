"""The file of a bundle: safetensors with a JSON header, written whole or not at all, every bit under a checksum.

The header says in plain JSON which tasks the file holds and what it goes onto. Shapes, owner counts and expansions,
which would be most of a small file, are compressed JSON in the tensor "layout". Tensors without an entry are left out.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from pae_jax import files
from pae_jax.core import integrity
from pae_jax.errors import CheckpointError
from pae_jax.large_arrays import in_threads
from pae_jax.version import __version__

SCHEMA_VERSION = 2
_FORMAT = "pae_jax bundle"
_LAYOUT = ("owners", "picks", "shared", "local", "growth")
_LARGEST_RATIO = 64
"""A layout is at most this many times as long as its file, or a megabyte."""
_PLAIN = "?bhilqBHILQefd"  # NumPy's own bool, integers and floats; other dtypes are written as integers of their size


def write(path: Path, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write a bundle: beside its place first, flushed to the disk, then renamed."""
    files.require_new(path, "bundle")
    shown = {key: value for key, value in header.items() if key not in _LAYOUT}
    text = json.dumps({"schema_version": SCHEMA_VERSION, **shown}, separators=(",", ":"))
    layout = json.dumps({key: header[key] for key in _LAYOUT}, separators=(",", ":"))
    plain = {name: _as_plain(array) for name, array in tensors.items() if array.size}
    plain["layout"] = np.frombuffer(zlib.compress(layout.encode(), 9), np.uint8)
    metadata = {"format": _FORMAT, "sha256": _digest(text, header, plain), "bundle": text}
    with files.disk_errors(f"cannot write {path}"):
        files.make_folder(path.parent)
        with files.written_aside(path) as aside:
            try:
                safetensors.numpy.save_file(plain, aside, metadata)
            except SafetensorError as error:
                raise CheckpointError(f"cannot write {path}: {error}") from error


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and tensors of a bundle whose checksum is right; raise `CheckpointError` otherwise.

    Values stored as float32 are under the digests of their tasks instead, which `assembling.assembled` compares.
    """
    with files.disk_errors(f"no bundle at {path}"):
        if path.is_dir():
            raise CheckpointError(f"no bundle at {path}: Is a directory; pae.load reads a stage")
        raw = files.read_bytes(path)
    metadata = _metadata(raw, path)
    try:
        text = metadata["bundle"]
        header = json.loads(text)
        schema = header["schema_version"]
        if not isinstance(schema, int) or schema != SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema version {schema}; this pae_jax {__version__} reads {SCHEMA_VERSION}. "
                "Update pae_jax, or write the bundle again."
            )
        tensors = safetensors.numpy.load(raw)
        digest = _digest(text, header, tensors)
        if digest != metadata.get("sha256"):
            raise CheckpointError(f"{path} is damaged: its checksum differs. Fetch or write it again.")
        return header | _layout(tensors.pop("layout"), len(raw)), tensors
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _layout(tensor: np.ndarray, size: int) -> dict[str, Any]:
    """Return the layout of a file of so many bytes."""
    decoder = zlib.decompressobj()
    text = decoder.decompress(tensor.tobytes(), max(_LARGEST_RATIO * size, 1 << 20))
    if not decoder.eof:
        raise ValueError("the layout is longer than a layout can be")
    found = json.loads(text)
    return {key: found[key] for key in _LAYOUT}


def as_stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a tensor of a file in the dtype that it was written from."""
    if array.dtype != _plain_dtype(dtype):
        raise CheckpointError(f"a tensor of the bundle is {array.dtype}, expected {_plain_dtype(dtype)}")
    return array.view(dtype)


def _as_plain(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(_plain_dtype(array.dtype))


def _plain_dtype(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.char in _PLAIN else np.dtype(f"uint{8 * dtype.itemsize}")


def _metadata(raw: bytes, path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file keeps beside its tensors, if they are those of a bundle."""
    size = int.from_bytes(raw[:8], "little")
    try:
        found = json.loads(raw[8 : 8 + size])["__metadata__"] if 8 < 8 + size <= len(raw) else {}
        if found.get("format") == _FORMAT:
            return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"{path} is not a bundle of pae_jax, or it is damaged")


def _digest(text: str, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of a header and of the digests of its tensors.

    Values that are stored as they are have no digest here: those of the tasks, which the header holds and every reader
    compares, cover each bit of them.
    """
    names = sorted(name for name in tensors if header["weights"] != "float32" or not name.startswith("values/"))
    work = [lambda name=name: integrity.array_digest(tensors[name]) for name in names]
    digests = in_threads(work, [tensors[name].nbytes for name in names])
    return hashlib.sha256(json.dumps([text, *zip(names, digests, strict=True)]).encode()).hexdigest()

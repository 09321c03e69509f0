"""Read weight files as NumPy arrays: safetensors and files of `torch.save`. Nothing in a file is executed."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pae_jax.errors import DataError

_SAFETENSORS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


def read_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Read a file of named arrays.

    Args:
      path: a .safetensors file, or a state dict written by `torch.save`, as zip or in the format before PyTorch 1.6.
        Only arrays are read: an object of any other class is refused, no code in the file runs, and torch is not
        needed.

    Returns:
      `{name: array}` in the file's own dtypes. A state dict nested in a dict ("state_dict", "model") is unwrapped.

    Raises:
      DataError: the file is missing, damaged or holds something else; names it.

    Source: the formats of safetensors and of PyTorch's serialised tensors.
    """
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        return _understood(path, _read_safetensors)
    found = _understood(path, _read_pickle)
    for name in ("state_dict", "model"):
        inner = found.get(name) if isinstance(found, Mapping) else None
        found = inner if isinstance(inner, Mapping) else found
    entries = found.items() if isinstance(found, Mapping) else ()
    views = {str(name): view for name, view in entries if isinstance(view, _View)}
    if not views:
        raise DataError(f"{path}: holds no state dict, a mapping of names to arrays. Save model.state_dict().")
    return {name: _array(path, name, view) for name, view in views.items()}


def read_nested(path: str | Path) -> Any:
    """Read all that a file of `torch.save` holds: nested dicts and lists of arrays, numbers and texts.

    Args:
      path: as in `read_weights`, without safetensors.

    Returns:
      What was saved, its tensors as NumPy arrays; a tensor that is saved at several places is one array.

    Raises:
      DataError: the file is missing, damaged or holds an object of another class; names it.

    Source: the format of PyTorch's serialised tensors.
    """
    path = Path(path).expanduser()
    found = _understood(path, _read_pickle)
    return _understood(path, lambda path: _nested(path, found, "", {}))


def _understood(path: Path, read: Callable[[Path], Any]) -> Any:
    """Turn whatever a foreign or damaged file raises into a `DataError`."""
    try:
        return read(path)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read as weights: {error}. Get the file again.") from error


_UNFINISHED = object()


def _nested(path: Path, value: Any, name: str, done: dict[int, Any]) -> Any:
    """Return a tree with its views as arrays; a part that is met again is not built again."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if id(value) not in done:
        done[id(value)] = _UNFINISHED
        if isinstance(value, _View):
            found: Any = _array(path, name, value)
        elif isinstance(value, Mapping):
            found = {key: _nested(path, inner, f"{name}/{key}".lstrip("/"), done) for key, inner in value.items()}
        elif isinstance(value, (list, tuple)):
            found = [_nested(path, inner, f"{name}/{n}".lstrip("/"), done) for n, inner in enumerate(value)]
        else:
            raise DataError(f"{path}: '{name}' is a {type(value).__name__}; only arrays, numbers and texts are read.")
        done[id(value)] = found
    if done[id(value)] is _UNFINISHED:
        raise DataError(f"{path}: '{name}' holds itself; only trees are read. Get the file again.")
    return done[id(value)]


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = np.memmap(path, np.uint8, "r")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if not 2 <= length <= len(data) - 8:
        raise DataError(f"{path}: no safetensors file, or a cut one. Get the file again.")
    header = json.loads(data[8 : 8 + length].tobytes())
    body = data[8 + length :]
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS:
            raise DataError(f"{path}: '{name}' has the dtype {entry['dtype']}. Convert it to float32.")
        dtype, (start, end) = np.dtype(_SAFETENSORS[entry["dtype"]]), entry["data_offsets"]
        if not 0 <= start <= end <= len(body) or end - start != dtype.itemsize * math.prod(entry["shape"]):
            raise DataError(f"{path}: '{name}' does not lie in the file, which is cut. Get the file again.")
        arrays[name] = body[start:end].view(np.ndarray).copy().view(dtype).reshape(entry["shape"])
    return arrays


class _Kind(NamedTuple):
    """The class of a storage."""

    dtype: Any


class _View(NamedTuple):
    """A tensor: part of a storage, whose data may come later in the file."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Reader(pickle.Unpickler):
    """Builds mappings and views of storages; every other class is refused."""

    def __init__(self, stream: Any, storage: Callable[[str, Any, int], np.ndarray]):
        super().__init__(stream)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a class or function that the file names."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _View(storage, offset, shape, strides)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in _STORAGES:
            return _Kind(_STORAGES[name])
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, and only arrays are read")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Return the storage of a number of entries that the file refers to."""
        kind, storage, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(storage, _Kind) or (len(pid) > 5 and pid[5] is not None):
            raise pickle.UnpicklingError("it holds something that is no array")
        return self._storage(str(key), storage.dtype, count)


def _read_pickle(path: Path) -> Any:
    return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, and torch.save does not compress")
        (index,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        folder = index.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("numbers in big-endian order")

        def storage(key: str, dtype: Any, count: int) -> np.ndarray:
            return np.frombuffer(archive.read(f"{folder}data/{key}"), dtype, count)

        with archive.open(index) as stream:
            return _Reader(stream, storage).load()


def _read_legacy(path: Path) -> Any:
    """Read four pickles (a magic number, the version, machine information, the tree), then the storages in turn."""
    size, storages = path.stat().st_size, dict[str, np.ndarray]()

    def storage(key: str, dtype: Any, count: int) -> np.ndarray:
        if not 0 <= count * np.dtype(dtype).itemsize <= size:
            raise ValueError("an array is larger than the file")
        return storages.setdefault(key, np.zeros(count, dtype))

    with path.open("rb") as stream:
        magic, version, machine = (_Reader(stream, storage).load() for _ in range(3))
        if (magic, version) != (_MAGIC, 1001) or not machine.get("little_endian"):
            raise ValueError("it is neither a zip file nor one of PyTorch's older format")
        tree = _Reader(stream, storage).load()
        for key in _Reader(stream, storage).load():
            array = storages[str(key)]
            data = stream.read(8 + array.nbytes)
            if len(data) < 8 + array.nbytes or int.from_bytes(data[:8], "little") != len(array):
                raise ValueError("it is cut")
            array[:] = np.frombuffer(data, array.dtype, offset=8)
    return tree


_MAGIC = 0x1950A86A20F9469CFC6C


def _array(path: Path, name: str, view: _View) -> np.ndarray:
    """Copy a view; reading outside of its storage is refused."""
    last = view.offset + sum((size - 1) * step for size, step in zip(view.shape, view.strides, strict=True))
    if min((view.offset, *view.shape, *view.strides)) < 0 or (math.prod(view.shape) and last >= len(view.storage)):
        raise DataError(f"{path}: '{name}' reaches outside of its storage; the file is damaged. Get it again.")
    steps = [step * view.storage.itemsize for step in view.strides]
    array = np.lib.stride_tricks.as_strided(view.storage[view.offset :], view.shape, steps, writeable=False)
    # A view that repeats its values is not copied: a few bytes of a file may describe a huge one.
    return array if math.prod(view.shape) > len(view.storage) else array.copy()

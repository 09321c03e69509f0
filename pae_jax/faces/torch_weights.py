"""FaceNet as a state dict of facenet-pytorch."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pae_jax.data import open_file
from pae_jax.errors import DataError, StructureError
from pae_jax.faces.naming import LAYERS
from pae_jax.faces.placing import STATS, Entry, Weights, classifier, fold_scales, gather, nest
from pae_jax.trees import PARAMS, Tree


def read(path: Path, template: Tree) -> Weights:
    """Read a state dict from a file that `torch.save` wrote; only arrays are unpickled.

    Args:
      path: the file.
      template: our variables, concrete or abstract, for the shapes.

    Raises:
      DataError: the file cannot be read, or torch is not installed.
      StructureError: the weights of another network.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"{path}: reading a PyTorch file needs the package torch ({error}). Install it with pip install torch, or "
            "give the state dict itself: a mapping of names to arrays."
        ) from error
    with open_file(path, "a state dict of PyTorch") as file:
        try:
            _require_stored(path, file)
            weights = torch.load(file, map_location="cpu", weights_only=True)
        except DataError:
            raise
        except Exception as error:  # a foreign or damaged file can raise many exception types
            raise DataError(f"{path}: cannot be read as a state dict of PyTorch: {error}") from error
    return place(path.name, weights, template)


def _require_stored(path: Path, file: BinaryIO) -> None:
    """Refuse an archive that unpacks to more than its own size; `torch.save` does not compress."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > file.seek(0, io.SEEK_END):
            raise DataError(f"{path}: found an archive that unpacks to {unpacked:,} bytes, expected one of torch.save.")
    file.seek(0)


def place(source: str, weights: Any, template: Tree) -> Weights:
    """Map the arrays of a state dict to our variables; fold the scales of its batch norms into the kernels.

    Args:
      source: what to call the source in messages.
      weights: `{name: array or tensor}`.
      template: our variables, concrete or abstract, for the shapes.

    Raises:
      StructureError: no mapping of names to arrays, or the arrays of another network.
      DataError: an array contains invalid numbers.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise StructureError(source, "", type(weights).__name__, "a state dict: a mapping of names to arrays")
    entries = []
    for layer in LAYERS:
        # Torch has (out, in, height, width) and (out, in).
        axes = (1, 0) if layer.kernel == "Bottleneck" else (2, 3, 1, 0)
        entries.append(Entry(f"{PARAMS}/{layer.kernel}/kernel", f"{layer.torch}.weight", axes))
        if layer.norm is None:
            entries.append(Entry(f"{PARAMS}/{layer.kernel}/bias", f"{layer.torch}.bias"))
            continue
        entries.append(Entry(f"{PARAMS}/{layer.norm}/scale", f"{layer.torch_norm}.weight"))
        entries.append(Entry(f"{PARAMS}/{layer.norm}/bias", f"{layer.torch_norm}.bias"))
        entries.append(Entry(f"{STATS}/{layer.norm}/mean", f"{layer.torch_norm}.running_mean"))
        entries.append(Entry(f"{STATS}/{layer.norm}/var", f"{layer.torch_norm}.running_var"))

    def ignored(name: str) -> bool:
        return name.startswith("logits.") or name.endswith(".num_batches_tracked")

    leaves = fold_scales(gather(source, weights, entries, template, ignored))
    features = leaves[f"{PARAMS}/Bottleneck/kernel"].shape[-1]
    return Weights(nest(leaves), classifier(source, weights, "logits.weight", "logits.bias", (1, 0), features))

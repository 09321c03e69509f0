"""FaceNet as a TensorFlow checkpoint, in its published form, read by TensorFlow."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from pae_jax.data import open_file
from pae_jax.errors import DataError
from pae_jax.faces import tensorflow_weights
from pae_jax.faces.placing import Weights
from pae_jax.trees import Tree


def read(folder: Path, template: Tree) -> Weights:
    """Read the weights of the checkpoint in a folder, of the last step if there are several.

    Args:
      folder: holds NAME.index and NAME.data-00000-of-00001, as FaceNet's training writes them.
      template: our variables, concrete or abstract, for the shapes.

    Raises:
      DataError: no checkpoint, an unreadable one, or TensorFlow is not installed.
      StructureError: the weights of another network.
    """
    prefix = last_checkpoint(folder)
    try:
        import tensorflow  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"{folder}: reading a TensorFlow checkpoint needs the package tensorflow ({error}). Install it with "
            "pip install tensorflow-cpu, or use a frozen graph or a facenet-pytorch state dict instead."
        ) from error
    for part in folder.glob(f"{glob.escape(prefix.name)}.*"):
        open_file(part, "a part of a TensorFlow checkpoint").close()
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        names = [name for name in reader.get_variable_to_shape_map() if not name.startswith("_")]
        arrays = {name: reader.get_tensor(name) for name in names}
    except Exception as error:  # a damaged file can raise many exception types
        raise DataError(f"{prefix}: cannot be read as a checkpoint of TensorFlow: {error}") from error
    return tensorflow_weights.place(prefix.name, arrays, template)


def last_checkpoint(folder: Path) -> Path:
    """Return the path prefix of the last checkpoint: NAME of the NAME.index that ends in the largest number."""
    found = [path.with_suffix("") for path in folder.glob("*.index")]
    if not found:
        raise DataError(f"{folder}: found no checkpoint; expected NAME.index and NAME.data-00000-of-00001.")

    def step(prefix: Path) -> tuple[int, str]:
        number = re.search(r"-(\d+)$", prefix.name)
        return int(number.group(1)) if number else -1, prefix.name

    return max(found, key=step)

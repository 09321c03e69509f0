"""FaceNet as the TensorFlow checkpoint it was published as, read by TensorFlow."""

from __future__ import annotations

import re
from pathlib import Path

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
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        names = [name for name in reader.get_variable_to_shape_map() if not name.startswith("_")]
        arrays = {name: reader.get_tensor(name) for name in names}
    except Exception as error:  # a damaged file shows itself in many types
        raise DataError(f"{prefix}: cannot be read as a checkpoint of TensorFlow: {error}") from error
    return tensorflow_weights.place(prefix.name, arrays, template)


def last_checkpoint(folder: Path) -> Path:
    """Return the common path of a checkpoint's files: NAME of NAME.index with the largest number at its end."""
    found = [path.with_suffix("") for path in folder.glob("*.index")]
    if not found:
        raise DataError(f"{folder}: found no checkpoint; expected NAME.index and NAME.data-00000-of-00001.")

    def step(prefix: Path) -> tuple[int, str]:
        number = re.search(r"-(\d+)$", prefix.name)
        return int(number.group(1)) if number else -1, prefix.name

    return max(found, key=step)

"""FaceNet as a TensorFlow checkpoint, in its published form; TensorFlow is not needed."""

from __future__ import annotations

import re
from pathlib import Path

from pae_jax.errors import DataError
from pae_jax.faces import tensorflow_weights
from pae_jax.faces.placing import Weights
from pae_jax.faces.tensorflow_tensors import read_tensors
from pae_jax.trees import Tree


def read(folder: Path, template: Tree) -> Weights:
    """Read the weights of the checkpoint in a folder, of the last step if there are several.

    Args:
      folder: holds NAME.index and NAME.data-00000-of-00001, as FaceNet's training writes them.
      template: our variables, concrete or abstract, for the shapes.

    Raises:
      DataError: no checkpoint, or a damaged one.
      StructureError: the weights of another network.
    """
    prefix = last_checkpoint(folder)
    return tensorflow_weights.place(prefix.name, read_tensors(prefix, lambda name: not name.startswith("_")), template)


def last_checkpoint(folder: Path) -> Path:
    """Return the path prefix of the last checkpoint: NAME of the NAME.index that ends in the largest number."""
    found = [path.with_suffix("") for path in folder.glob("*.index")]
    if not found:
        raise DataError(f"{folder}: found no checkpoint; expected NAME.index and NAME.data-00000-of-00001.")

    def step(prefix: Path) -> tuple[int, str]:
        number = re.search(r"-(\d+)$", prefix.name)
        return int(number.group(1)) if number else -1, prefix.name

    return max(found, key=step)

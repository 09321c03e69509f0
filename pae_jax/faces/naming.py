"""Layer names of InceptionResnetV1 in this library, in TensorFlow's FaceNet and in facenet-pytorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Layer(NamedTuple):
    """A layer with a kernel.

    Attributes:
      kernel: path of the convolution or dense layer, as in our variables.
      norm: path of its batch norm; None for a residual projection, which has a bias instead.
      tensorflow: scope in a TensorFlow graph or checkpoint.
      torch: name of the convolution or linear layer in facenet-pytorch.
      torch_norm: name of its batch norm there.
    """

    kernel: str
    norm: str | None
    tensorflow: str
    torch: str
    torch_norm: str | None


# Per block: our unit, the TensorFlow scope, the facenet-pytorch module. A branch of a single unit has no letter in the
# TensorFlow name and no index in the facenet-pytorch name.
_STEM = (
    ("Conv2d_1a", "Conv2d_1a_3x3", "conv2d_1a"),
    ("Conv2d_2a", "Conv2d_2a_3x3", "conv2d_2a"),
    ("Conv2d_2b", "Conv2d_2b_3x3", "conv2d_2b"),
    ("Conv2d_3b", "Conv2d_3b_1x1", "conv2d_3b"),
    ("Conv2d_4a", "Conv2d_4a_3x3", "conv2d_4a"),
    ("Conv2d_4b", "Conv2d_4b_3x3", "conv2d_4b"),
)
_BLOCK35 = (
    ("Branch_0/Conv2d_0a", "Branch_0/Conv2d_1x1", "branch0"),
    ("Branch_1/Conv2d_0a", "Branch_1/Conv2d_0a_1x1", "branch1.0"),
    ("Branch_1/Conv2d_0b", "Branch_1/Conv2d_0b_3x3", "branch1.1"),
    ("Branch_2/Conv2d_0a", "Branch_2/Conv2d_0a_1x1", "branch2.0"),
    ("Branch_2/Conv2d_0b", "Branch_2/Conv2d_0b_3x3", "branch2.1"),
    ("Branch_2/Conv2d_0c", "Branch_2/Conv2d_0c_3x3", "branch2.2"),
)
_BLOCK17 = (
    ("Branch_0/Conv2d_0a", "Branch_0/Conv2d_1x1", "branch0"),
    ("Branch_1/Conv2d_0a", "Branch_1/Conv2d_0a_1x1", "branch1.0"),
    ("Branch_1/Conv2d_0b", "Branch_1/Conv2d_0b_1x7", "branch1.1"),
    ("Branch_1/Conv2d_0c", "Branch_1/Conv2d_0c_7x1", "branch1.2"),
)
_BLOCK8 = (
    ("Branch_0/Conv2d_0a", "Branch_0/Conv2d_1x1", "branch0"),
    ("Branch_1/Conv2d_0a", "Branch_1/Conv2d_0a_1x1", "branch1.0"),
    ("Branch_1/Conv2d_0b", "Branch_1/Conv2d_0b_1x3", "branch1.1"),
    ("Branch_1/Conv2d_0c", "Branch_1/Conv2d_0c_3x1", "branch1.2"),
)
_MIXED_6A = (
    ("Branch_0/Conv2d_0a", "Branch_0/Conv2d_1a_3x3", "branch0"),
    ("Branch_1/Conv2d_0a", "Branch_1/Conv2d_0a_1x1", "branch1.0"),
    ("Branch_1/Conv2d_0b", "Branch_1/Conv2d_0b_3x3", "branch1.1"),
    ("Branch_1/Conv2d_0c", "Branch_1/Conv2d_1a_3x3", "branch1.2"),
)
_MIXED_7A = (
    ("Branch_0/Conv2d_0a", "Branch_0/Conv2d_0a_1x1", "branch0.0"),
    ("Branch_0/Conv2d_0b", "Branch_0/Conv2d_1a_3x3", "branch0.1"),
    ("Branch_1/Conv2d_0a", "Branch_1/Conv2d_0a_1x1", "branch1.0"),
    ("Branch_1/Conv2d_0b", "Branch_1/Conv2d_1a_3x3", "branch1.1"),
    ("Branch_2/Conv2d_0a", "Branch_2/Conv2d_0a_1x1", "branch2.0"),
    ("Branch_2/Conv2d_0b", "Branch_2/Conv2d_0b_3x3", "branch2.1"),
    ("Branch_2/Conv2d_0c", "Branch_2/Conv2d_1a_3x3", "branch2.2"),
)
_Units = tuple[tuple[str, str, str], ...]
_BLOCKS: tuple[tuple[_Units, bool, str, str, str], ...] = (
    *((_BLOCK35, True, f"Block35_{i}", f"Repeat/block35_{i}", f"repeat_1.{i - 1}") for i in range(1, 6)),
    (_MIXED_6A, False, "Mixed_6a", "Mixed_6a", "mixed_6a"),
    *((_BLOCK17, True, f"Block17_{i}", f"Repeat_1/block17_{i}", f"repeat_2.{i - 1}") for i in range(1, 11)),
    (_MIXED_7A, False, "Mixed_7a", "Mixed_7a", "mixed_7a"),
    *((_BLOCK8, True, f"Block8_{i}", f"Repeat_2/block8_{i}", f"repeat_3.{i - 1}") for i in range(1, 6)),
    (_BLOCK8, True, "Block8_6", "Block8", "block8"),
)


def _layers() -> Iterator[Layer]:
    def unit(ours: str, tensorflow: str, torch: str) -> Layer:
        return Layer(f"{ours}/conv", f"{ours}/bn", f"{SCOPE}/{tensorflow}", f"{torch}.conv", f"{torch}.bn")

    for names in _STEM:
        yield unit(*names)
    for units, residual, ours, tensorflow, torch in _BLOCKS:
        for inner in units:
            yield unit(f"{ours}/{inner[0]}", f"{tensorflow}/{inner[1]}", f"{torch}.{inner[2]}")
        if residual:
            yield Layer(f"{ours}/Projection", None, f"{SCOPE}/{tensorflow}/Conv2d_1x1", f"{torch}.conv2d", None)
    yield Layer("Bottleneck", "Bottleneck_bn", f"{SCOPE}/Bottleneck", "last_linear", "last_bn")


SCOPE = "InceptionResnetV1"
LAYERS = tuple(_layers())

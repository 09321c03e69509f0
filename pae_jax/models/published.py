"""Layer names of the shipped backbones in published weight files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pae_jax.models.bert import Bert
from pae_jax.models.efficientnet import EfficientNetLite
from pae_jax.models.resnet import ResNet
from pae_jax.models.vit import ViT

CONV = (2, 3, 1, 0)
"""Axes of our kernel (height, width, in, out) in PyTorch's (out, in, height, width)."""

DENSE = (1, 0)


class Entry(NamedTuple):
    """Source of a leaf: `leaf = array[part of parts].transpose(axes)`, reshaped to the leaf's shape.

    Attributes:
      path: of the leaf in our variables, such as "params/Conv_stem/kernel".
      name: of the array in the file.
      axes: how its axes are permuted; None keeps their order.
      part: which of `parts` equal pieces along the first axis.
      parts: number of pieces.
    """

    path: str
    name: str
    axes: tuple[int, ...] | None = None
    part: int = 0
    parts: int = 1


class Naming(NamedTuple):
    """One way of naming the layers of a backbone.

    Attributes:
      source: publisher of the weights.
      entries: one per leaf.
      head: name of the classifier that was trained on top.
      rest: prefixes of further names that such files may contain.
    """

    source: str
    entries: list[Entry]
    head: str | None
    rest: tuple[str, ...] = ()


def namings(module: Any) -> list[Naming]:
    """Return the known namings of a backbone; none for other modules."""
    if isinstance(module, ResNet) and module.stem == "imagenet":
        return [Naming("torchvision", [*_resnet(module)], "fc")]
    if isinstance(module, EfficientNetLite):
        return [
            Naming("timm", [*_efficientnet(module)], "classifier"),
            Naming("lukemelas", [*_efficientnet_flat(module)], "_fc"),
        ]
    if isinstance(module, ViT):
        return [
            Naming("timm", [*_vit_timm(module)], "head", ("fc_norm", "pre_logits")),
            Naming("torchvision", [*_vit_torchvision(module, ("0", "3"))], "heads.head"),
            Naming("torchvision", [*_vit_torchvision(module, ("linear_1", "linear_2"))], "heads.head"),  # as published
        ]
    if isinstance(module, Bert):
        rest = ("pooler.", "cls.", "embeddings.position_ids", "classifier.")
        return [Naming("Hugging Face", [*_bert(module)], None, rest)]
    return []


def _conv(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"params/{ours}/kernel", f"{theirs}.weight", CONV)


def _dense(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"params/{ours}/kernel", f"{theirs}.weight", DENSE)
    yield Entry(f"params/{ours}/bias", f"{theirs}.bias")


def _layer_norm(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"params/{ours}/scale", f"{theirs}.weight")
    yield Entry(f"params/{ours}/bias", f"{theirs}.bias")


def _batch_norm(ours: str, theirs: str) -> Iterator[Entry]:
    yield from _layer_norm(ours, theirs)
    yield Entry(f"batch_stats/{ours}/mean", f"{theirs}.running_mean")
    yield Entry(f"batch_stats/{ours}/var", f"{theirs}.running_var")


def _resnet(module: ResNet) -> Iterator[Entry]:
    yield from _conv("Conv_stem", "conv1")
    yield from _batch_norm("BatchNorm_stem", "bn1")
    bottleneck = module.block == "bottleneck"
    for stage, blocks in enumerate(module.stages, start=1):
        for block in range(1, blocks + 1):
            ours, theirs = f"Block_{stage}_{block}", f"layer{stage}.{block - 1}"
            for number in range(1, 4 if bottleneck else 3):
                yield from _conv(f"{ours}/Conv_{number}", f"{theirs}.conv{number}")
                yield from _batch_norm(f"{ours}/BatchNorm_{number}", f"{theirs}.bn{number}")
            if block == 1 and (stage > 1 or bottleneck):
                yield from _conv(f"{ours}/Conv_shortcut", f"{theirs}.downsample.0")
                yield from _batch_norm(f"{ours}/BatchNorm_shortcut", f"{theirs}.downsample.1")


def _efficientnet_layers(expanding: bool) -> tuple[str, ...]:
    return (*(("expand",) if expanding else ()), "depthwise", "project")


def _efficientnet(module: EfficientNetLite) -> Iterator[Entry]:
    yield from _conv("Conv_stem", "conv_stem")
    yield from _batch_norm("BatchNorm_stem", "bn1")
    for stage, (_, factor, _, _, blocks) in enumerate(module.stages, start=1):
        convs = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl" if factor > 1 else "conv_pw"}
        for block in range(1, blocks + 1):
            ours, theirs = f"Block_{stage}_{block}", f"blocks.{stage - 1}.{block - 1}"
            for number, layer in enumerate(_efficientnet_layers(factor > 1), start=1):
                yield from _conv(f"{ours}/Conv_{layer}", f"{theirs}.{convs[layer]}")
                yield from _batch_norm(f"{ours}/BatchNorm_{layer}", f"{theirs}.bn{number}")
    yield from _conv("Conv_last", "conv_head")
    yield from _batch_norm("BatchNorm_last", "bn2")


def _efficientnet_flat(module: EfficientNetLite) -> Iterator[Entry]:
    yield from _conv("Conv_stem", "_conv_stem")
    yield from _batch_norm("BatchNorm_stem", "_bn0")
    index = 0
    for stage, (_, factor, _, _, blocks) in enumerate(module.stages, start=1):
        for block in range(1, blocks + 1):
            ours, theirs = f"Block_{stage}_{block}", f"_blocks.{index}"
            for layer in _efficientnet_layers(factor > 1):
                number = ("expand", "depthwise", "project").index(layer)
                yield from _conv(f"{ours}/Conv_{layer}", f"{theirs}._{layer}_conv")
                yield from _batch_norm(f"{ours}/BatchNorm_{layer}", f"{theirs}._bn{number}")
            index += 1
    yield from _conv("Conv_last", "_conv_head")
    yield from _batch_norm("BatchNorm_last", "_bn1")


def _attention(ours: str, weight: str, bias: str) -> Iterator[Entry]:
    """Query, key and value concatenated in one array."""
    for part, name in enumerate(("query", "key", "value")):
        yield Entry(f"params/{ours}/attention/{name}/kernel", weight, DENSE, part, 3)
        yield Entry(f"params/{ours}/attention/{name}/bias", bias, None, part, 3)


def _vit_timm(module: ViT) -> Iterator[Entry]:
    yield Entry("params/token", "cls_token")
    yield Entry("params/position", "pos_embed")
    yield from _conv("Conv_patch", "patch_embed.proj")
    yield Entry("params/Conv_patch/bias", "patch_embed.proj.bias")
    for number in range(1, module.depth + 1):
        ours, theirs = f"Block_{number}", f"blocks.{number - 1}"
        yield from _layer_norm(f"{ours}/LayerNorm_attention", f"{theirs}.norm1")
        yield from _attention(ours, f"{theirs}.attn.qkv.weight", f"{theirs}.attn.qkv.bias")
        yield from _dense(f"{ours}/attention/out", f"{theirs}.attn.proj")
        yield from _layer_norm(f"{ours}/LayerNorm_network", f"{theirs}.norm2")
        yield from _dense(f"{ours}/Dense_in", f"{theirs}.mlp.fc1")
        yield from _dense(f"{ours}/Dense_out", f"{theirs}.mlp.fc2")
    yield from _layer_norm("LayerNorm_last", "norm" if module.pool == "token" else "fc_norm")


def _vit_torchvision(module: ViT, layers: tuple[str, str]) -> Iterator[Entry]:
    yield Entry("params/token", "class_token")
    yield Entry("params/position", "encoder.pos_embedding")
    yield from _conv("Conv_patch", "conv_proj")
    yield Entry("params/Conv_patch/bias", "conv_proj.bias")
    for number in range(1, module.depth + 1):
        ours, theirs = f"Block_{number}", f"encoder.layers.encoder_layer_{number - 1}"
        yield from _layer_norm(f"{ours}/LayerNorm_attention", f"{theirs}.ln_1")
        attention = f"{theirs}.self_attention"
        yield from _attention(ours, f"{attention}.in_proj_weight", f"{attention}.in_proj_bias")
        yield from _dense(f"{ours}/attention/out", f"{attention}.out_proj")
        yield from _layer_norm(f"{ours}/LayerNorm_network", f"{theirs}.ln_2")
        yield from _dense(f"{ours}/Dense_in", f"{theirs}.mlp.{layers[0]}")
        yield from _dense(f"{ours}/Dense_out", f"{theirs}.mlp.{layers[1]}")
    yield from _layer_norm("LayerNorm_last", "encoder.ln")


def _bert(module: Bert) -> Iterator[Entry]:
    for ours, theirs in (("word", "word"), ("position", "position"), ("type", "token_type")):
        yield Entry(f"params/Embed_{ours}/embedding", f"embeddings.{theirs}_embeddings.weight")
    yield from _layer_norm("LayerNorm_embed", "embeddings.LayerNorm")
    for number in range(1, module.depth + 1):
        ours, theirs = f"Block_{number}", f"encoder.layer.{number - 1}"
        for name in ("query", "key", "value"):
            yield from _dense(f"{ours}/attention/{name}", f"{theirs}.attention.self.{name}")
        yield from _dense(f"{ours}/attention/out", f"{theirs}.attention.output.dense")
        yield from _layer_norm(f"{ours}/LayerNorm_attention", f"{theirs}.attention.output.LayerNorm")
        yield from _dense(f"{ours}/Dense_in", f"{theirs}.intermediate.dense")
        yield from _dense(f"{ours}/Dense_out", f"{theirs}.output.dense")
        yield from _layer_norm(f"{ours}/LayerNorm_network", f"{theirs}.output.LayerNorm")

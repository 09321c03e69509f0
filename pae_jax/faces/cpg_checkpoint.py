"""Checkpoints of CPG's authors: a packed VGG16 of several tasks with picks, written by PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.core import Picking, State
from pae_jax.errors import StructureError
from pae_jax.faces import placing
from pae_jax.faces.packed_state import Frame, Member, assemble, frame, head_variables, require_order, without_free
from pae_jax.faces.placing import STATS, Entry
from pae_jax.models import read_nested
from pae_jax.nets import Net
from pae_jax.trees import PARAMS, Tree, describe, flatten


class _Layer(NamedTuple):
    """A layer with a kernel.

    Attributes:
      kernel: path of the convolution or dense layer in our variables.
      norm: path of its batch norm; None for a dense layer, which has a bias.
      name: of the layer in the checkpoint; its batch norm is the next one.
    """

    kernel: str
    norm: str | None
    name: str

    @property
    def axes(self) -> tuple[int, ...]:
        """Torch has (out, in, height, width) and (out, in): `ours = theirs.transpose(axes)`."""
        return (1, 0) if self.norm is None else (2, 3, 1, 0)


def _layers() -> tuple[_Layer, ...]:
    found, at = [], 0
    for block, convolutions in enumerate((2, 2, 3, 3, 3), start=1):
        for number in range(1, convolutions + 1):
            found.append(_Layer(f"Conv_{block}_{number}", f"BatchNorm_{block}_{number}", f"features.{at}"))
            at += 3  # the convolution, its norm, ReLU
        at += 1  # the pool
    # A flattening comes before the first dense layer, a ReLU before the second.
    return (*found, _Layer("Dense_1", None, f"features.{at + 1}"), _Layer("Dense_2", None, f"features.{at + 3}"))


_LAYERS = _layers()
_NORM = {
    f"{PARAMS}/{{}}/scale": "bn_layer_weight",
    f"{PARAMS}/{{}}/bias": "bn_layer_bias",
    f"{STATS}/{{}}/mean": "bn_layer_running_mean",
    f"{STATS}/{{}}/var": "bn_layer_running_var",
}


def load_cpg_checkpoint(net: Net, path: str | Path) -> State:
    """Read a checkpoint of CPG's authors as a state with frozen tasks; nothing in the file is executed.

    Task k computes with its own weights and with the older ones that it picks, those whose real mask is above 0.005.
    Names, order, classes and widths of the tasks are in the checkpoint. Weights that no task owns become 0.

    No checkpoint of the authors was at hand. The names and layouts are those of their code for CIFAR-100
    (`custom_vgg_cifar100`), and the format that of PyTorch; `verify` and the accuracy on your test data tell whether
    yours was read as it was meant.

    Args:
      net: `pae.linen(pae.models.VGG16, sample)` with 32 x 32 images.
      path: a .pth.tar file of `torch.save`. PyTorch is not needed.

    Returns:
      A state at the width of the last task. Tasks of the authors start from the norms of the one before:
      `pae.pack(..., sharing="picked", local_init=NAME)`.

    Raises:
      DataError: a missing or damaged file, one that holds other objects, or an array with NaN, infinity or a negative
        variance; named.
      StructureError: names or shapes of another network; a mask with an id that no task has, that reaches outside of
        its task's width, or whose weights the task itself does not pick.
      ArgumentError: widths that fall from task to task.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.VGG16, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
      >>> state = pae.faces.load_cpg_checkpoint(net, "checkpoint-100.pth.tar")  # doctest: +SKIP

    Source: Hung et al., NeurIPS 2019, and the layout of the authors' checkpoints, ivclab/CPG.
    """
    path = Path(path).expanduser()
    tree, source = read_nested(path), path.name
    members = _members(source, tree)
    require_order(members)
    _require_network(net, members)
    place = frame(net, members)
    arrays, masks = _mapping(source, tree, "model_state_dict"), _masks(source, tree)
    shared, owner = _weights(source, arrays, masks, place)
    local, logits, picks = [], [], []
    for number, member in enumerate(members, start=1):
        info = _mapping(source, tree, "shared_layer_info", member.name)
        local.append(_local(source, info, place, member))
        features = jax.tree.leaves(net.layout(member.width).features)[0].shape[-1]
        weight, bias = f"classifiers.{number - 1}.weight", f"classifiers.{number - 1}.bias"
        found = placing.classifier(source, arrays, weight, bias, (1, 0), features)
        logits.append(head_variables(net, member, found, source))
        picks.append(_picks(source, info, place, member, owner, number) if number > 1 else None)
    return assemble(place, members, shared, owner, local, logits, picks)


def _mapping(source: str, tree: Any, *keys: str) -> Mapping[str, Any]:
    """Return a dict inside of the checkpoint."""
    for depth, key in enumerate(keys, start=1):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
        if not isinstance(tree, Mapping):
            found = "nothing" if tree is None else type(tree).__name__
            raise StructureError(source, "/".join(keys[:depth]), found, "a dict", "Is it a checkpoint of CPG?")
    return tree


def _members(source: str, tree: Any) -> list[Member]:
    """Return the tasks of a checkpoint, in order."""
    classes, members = _mapping(source, tree, "dataset2num_classes"), []
    history = tree.get("dataset_history")
    names = isinstance(history, list) and all(isinstance(name, str) for name in history)
    if not names or len(set(history)) != len(history):
        raise StructureError(source, "dataset_history", repr(history)[:60], "a list of the tasks' names")
    for name in history:
        info = _mapping(source, tree, "shared_layer_info", name)
        width, count = info.get("network_width_multiplier"), classes.get(name)
        if not isinstance(width, (int, float)) or not 0 < width < math.inf:
            where = f"shared_layer_info/{name}/network_width_multiplier"
            raise StructureError(source, where, repr(width), "the width of the task, a number above 0")
        if not isinstance(count, int) or count < 1:
            raise StructureError(source, f"dataset2num_classes/{name}", repr(count), "a number of classes")
        members.append(Member(name, count, float(width), "picked" if members else "all"))
    return members


def _require_network(net: Net, members: list[Member]) -> None:
    """Raise unless the network is CPG's for CIFAR-100, whose last map has one pixel."""
    weights = flatten(net.layout(members[0].width).shared)
    same = weights.keys() == {f"{layer.kernel}/kernel" for layer in _LAYERS}
    if not same or weights["Dense_1/kernel"].shape[0] != weights["Conv_5_3/kernel"].shape[-1]:
        found = f"{net.source} with {len(weights)} shared leaves"
        raise StructureError("network", "", found, "pae.linen(pae.models.VGG16, sample) with 32 x 32 images")


def _masks(source: str, tree: Any) -> dict[str, np.ndarray]:
    """Return the masks by the names of their layers."""
    masks = {str(name).removeprefix("module."): mask for name, mask in _mapping(source, tree, "masks").items()}
    names = [layer.name for layer in _LAYERS]
    missing, unexpected = [n for n in names if n not in masks], [n for n in masks if n not in names]
    if missing or unexpected:
        found = f"{len(missing)} missing{placing.listing(missing)}, {len(unexpected)} unexpected"
        raise StructureError(source, "masks", found + placing.listing(unexpected), f"those of {len(names)} layers")
    return masks


def _weights(
    source: str, arrays: Mapping[str, Any], masks: Mapping[str, Any], place: Frame
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return weights and owners by path."""
    wanted, shared, owner = place.variables(place.width), {}, {}
    for layer in _LAYERS:
        path, name = f"{PARAMS}/{layer.kernel}/kernel", f"{layer.name}.weight"
        leaf, mask, weights = wanted[path], masks[layer.name], _array(source, arrays, name)
        shape = tuple(leaf.shape[axis] for axis in np.argsort(layer.axes))
        if getattr(mask, "shape", None) != shape or not np.issubdtype(mask.dtype, np.integer):
            expected = f"uint8[{','.join(map(str, shape))}]"
            raise StructureError(source, f"masks/{layer.name}", describe(mask), expected, "Is it another network?")
        weights = without_free(weights, mask)
        converted = placing.converted(source, Entry(path, name, layer.axes), weights, leaf)
        shared[path] = place.placed(path, converted, place.width)
        owner[path] = place.placed(path, mask.transpose(layer.axes), place.width)
    return shared, owner


def _local(source: str, info: Mapping[str, Any], place: Frame, member: Member) -> dict[str, np.ndarray]:
    """Return the norms and biases of a task by path."""
    own, found = place.variables(member.width), {}
    for layer in _LAYERS:
        kinds = {f"{PARAMS}/{layer.kernel}/bias": "bias"}
        name = layer.name
        if layer.norm is not None:
            kinds = {path.format(layer.norm): kind for path, kind in _NORM.items()}
            name = f"features.{int(layer.name.rpartition('.')[2]) + 1}"
        for path, kind in kinds.items():
            value = _array(source, info, kind, name, inside=f"shared_layer_info/{member.name}")
            value = placing.converted(source, Entry(path, f"{member.name}/{kind}/{name}"), value, own[path])
            found[path] = place.placed(path, value, member.width)
    return found


def _picks(
    source: str, info: Mapping[str, Any], place: Frame, member: Member, owner: Mapping[str, np.ndarray], number: int
) -> Tree:
    """Return the scores of a task's picks, parallel to the weights at its width; all its own weights are picked."""
    own, found, inside = place.variables(member.width), {}, f"shared_layer_info/{member.name}"
    for layer in _LAYERS:
        path = f"{PARAMS}/{layer.kernel}/kernel"
        value = _array(source, info, "piggymask", layer.name, inside=inside)
        entry = Entry(path, f"{member.name}/piggymask/{layer.name}", layer.axes)
        found[path] = place.placed(path, placing.converted(source, entry, value, own[path]), member.width)
        ids = owner[path]
        for growth in reversed(place.growth[place.widths.index(member.width) :]):
            ids = dict(growth.maps.leaves)[path].take(ids)
        left = np.count_nonzero((ids == number) & ~(found[path] > np.float32(Picking().threshold)))
        if left:
            hint = "Such a checkpoint does not come from CPG's training."
            raise StructureError(source, entry.name, f"{left} own weights that are not picked", "none", hint)
    return jax.tree.map(jnp.asarray, placing.nest(found)[PARAMS])


def _array(source: str, tree: Mapping[str, Any], *keys: str, inside: str = "model_state_dict") -> np.ndarray:
    """Return an array inside of the checkpoint."""
    *outer, last = keys
    value = (_mapping(source, tree, *outer) if outer else tree).get(last)
    if not isinstance(value, np.ndarray):
        found = "nothing" if value is None else type(value).__name__
        raise StructureError(source, "/".join((inside, *keys)), found, "an array", "Is it a checkpoint of CPG's VGG16?")
    return value

"""Checkpoints of CPG's authors: a packed network of several tasks with picks, written by PyTorch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.core import Picking, State
from pae_jax.errors import StructureError
from pae_jax.faces import placing
from pae_jax.faces.angular import AngularHead
from pae_jax.faces.cpg_layers import Layer, layers_of
from pae_jax.faces.packed_state import Frame, Member, assemble, frame, head_variables, require_order, without_free
from pae_jax.faces.placing import Entry
from pae_jax.models import read_nested
from pae_jax.nets import Net, check_net
from pae_jax.trees import PARAMS, Tree, describe, listing

# Dicts of a task's variables in `shared_layer_info`.
_KINDS = (
    "bias",
    "bn_layer_weight",
    "bn_layer_bias",
    "bn_layer_running_mean",
    "bn_layer_running_var",
    "prelu_layer_weight",
)


def load_cpg_checkpoint(net: Net, path: str | Path) -> State:
    """Read a checkpoint of CPG's authors as a state with frozen tasks; nothing in the file is executed.

    Task k computes with its own weights and with the older ones that it picks, those whose real mask is above 0.005.
    Names, order, classes and widths of the tasks are in the checkpoint. Weights that no task owns become 0.

    | network | in the authors' code | experiment |
    |---|---|---|
    | `pae.models.VGG16`, 32 x 32 images | `custom_vgg_cifar100` | twenty tasks of CIFAR-100 |
    | `pae.models.resnet50` | `resnet50` | ImageNet to fine-grained |
    | `pae.models.SphereNet20`, 112 x 112 images | `spherenet20` | faces |

    Not tested on a checkpoint of the authors. The names and layouts are those of their code, and the format that of
    PyTorch; `verify` and the accuracy on your test data tell whether yours was read as it was meant.

    Args:
      net: `pae.linen(build, sample)` with one of these networks.
      path: a .pth.tar file of `torch.save`. PyTorch is not needed.

    Returns:
      A state at the width of the last task. Tasks of the authors start from the norms of the one before:
      `pae.pack(..., sharing="picked", local_init=NAME)`. The head of a task with an embedding, such as
      `face_verification`, is a `pae.faces.losses.AngularHead`, which `pae.load` is to be given: `heads={NAME: head}`.

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
    check_net(net)
    path = Path(path).expanduser()
    tree, source = read_nested(path), path.name
    members = _members(source, tree)
    require_order(members)
    layers = layers_of(net, members[0].width)
    file = _File(source, tree, layers, frame(net, members))
    shared, owner = _weights(file)
    local, heads, picks = [], [], []
    for number, member in enumerate(members, start=1):
        local.append(_local(file, member))
        heads.append(head_variables(net, member, _head(file, member, number), source))
        # The first task may have a mask too: of its own weights, all of which it must pick.
        masked = number > 1 or file.info(member).get("piggymask")
        picks.append(_picks(file, member, owner, number) if masked else None)
    return assemble(file.place, members, shared, owner, local, heads, [None, *picks[1:]])


@dataclasses.dataclass(frozen=True, eq=False)
class _File:
    """What is read: the contents of a file, and the layers and widths of the network that it is read for."""

    source: str
    tree: Any
    layers: tuple[Layer, ...]
    place: Frame

    @property
    def arrays(self) -> Mapping[str, Any]:
        """The variables of the last task's model, of which the kernels and all classifiers are read."""
        return _mapping(self.source, self.tree, "model_state_dict")

    @property
    def names(self) -> list[str]:
        """The layers in the checkpoint."""
        return [layer.name for layer in self.layers]

    def info(self, member: Member) -> Mapping[str, Any]:
        """Return the variables that a task has for itself."""
        return _mapping(self.source, self.tree, "shared_layer_info", member.name)


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
    classes, arrays = (_mapping(source, tree, key) for key in ("dataset2num_classes", "model_state_dict"))
    members: list[Member] = []
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
        embedding = f"classifiers.{len(members)}.0.bias"  # a task of classes has `classifiers.N.bias`
        head = AngularHead(count, _array(source, arrays, embedding).size) if embedding in arrays else count
        members.append(Member(name, head, float(width), "picked" if members else "all"))
    return members


def _require_names(source: str, where: str, found: Mapping[str, Any], names: list[str]) -> None:
    """Raise unless a dict has one entry for each layer."""
    missing, unexpected = [n for n in names if n not in found], [n for n in found if n not in names]
    if missing or unexpected:
        text = f"{len(missing)} missing{listing(missing)}, {len(unexpected)} unexpected"
        expected = f"those of {len(names)} layers"
        raise StructureError(source, where, text + listing(unexpected), expected, "Is it another network?")


def _weights(file: _File) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return weights and owners by path."""
    source, place, arrays = file.source, file.place, file.arrays
    masks = {str(name).removeprefix("module."): mask for name, mask in _mapping(source, file.tree, "masks").items()}
    _require_names(source, "masks", masks, file.names)
    wanted, shared, owner = place.variables(place.width), {}, {}
    for layer in file.layers:
        path, name = layer.path, f"{layer.name}.weight"
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


def _local(file: _File, member: Member) -> dict[str, np.ndarray]:
    """Return the norms, biases and slopes of a task by path."""
    source, place, info = file.source, file.place, file.info(member)
    own, found, inside = place.variables(member.width), {}, f"shared_layer_info/{member.name}"
    wanted = [local for layer in file.layers for local in layer.local]
    for kind in _KINDS:  # one that is not read would change the task's function
        if info.get(kind) or kind in {local.kind for local in wanted}:
            names = [local.name for local in wanted if local.kind == kind]
            _require_names(source, f"{inside}/{kind}", _mapping(source, info, kind), names)
    for path, kind, name in wanted:
        value = _array(source, info, kind, name, inside=inside)
        value = placing.converted(source, Entry(path, f"{member.name}/{kind}/{name}"), value, own[path])
        found[path] = place.placed(path, value, member.width)
    return found


def _head(file: _File, member: Member, number: int) -> Tree:
    """Return the variables of a task's head: a dense layer, before which the authors flatten channel by channel."""
    source, place, arrays = file.source, file.place, file.arrays
    features = jax.tree.leaves(place.net.layout(member.width).features)[0].shape[-1]
    channels = place.variables(member.width)[file.layers[-1].path].shape[-1]
    name = f"classifiers.{number - 1}"
    dense = f"{name}.0" if isinstance(member.head, AngularHead) else name
    found = placing.classifier(source, arrays, f"{dense}.weight", f"{dense}.bias", (1, 0), features)
    if found is None:
        return {}
    kernel, bias = found
    kernel = kernel.reshape(channels, -1, len(bias)).swapaxes(0, 1).reshape(features, -1)
    if not isinstance(member.head, AngularHead):
        return {PARAMS: {"kernel": kernel, "bias": bias}}
    wanted = jax.ShapeDtypeStruct((len(bias), member.head.identities), np.float32)
    directions = _array(source, arrays, f"{name}.1.weight")
    directions = placing.converted(source, Entry("directions", f"{name}.1.weight"), directions, wanted)
    params = {"embedding": {"kernel": kernel, "bias": bias}, "directions": directions}
    return {PARAMS: params, "schedule": {"steps": np.zeros((), np.float32)}}


def _picks(file: _File, member: Member, owner: Mapping[str, np.ndarray], number: int) -> Tree:
    """Return the scores of a task's picks, parallel to the weights at its width; all its own weights are picked."""
    source, place, info = file.source, file.place, file.info(member)
    own, found, inside = place.variables(member.width), {}, f"shared_layer_info/{member.name}"
    _require_names(source, f"{inside}/piggymask", _mapping(source, info, "piggymask"), file.names)
    for layer in file.layers:
        path = layer.path
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
        raise StructureError(source, "/".join((inside, *keys)), found, "an array", "Is it a checkpoint of CPG?")
    return value

"""Checkpoints of PAE's authors: a packed InceptionResnetV1 of several tasks, written by TensorFlow 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from pae_jax.core import State
from pae_jax.data import read_file
from pae_jax.errors import ArgumentError, DataError, StructureError
from pae_jax.faces import placing
from pae_jax.faces.naming import LAYERS, SCOPE, Layer
from pae_jax.faces.packed_state import Frame, Member, assemble, frame, head_variables, require_order, without_free
from pae_jax.faces.placing import STATS, Entry
from pae_jax.faces.tensorflow_tensors import read_tensors
from pae_jax.nets import Net, check_net
from pae_jax.trees import PARAMS, Tree, describe, flatten, listing

Sharing = Literal["all", "first"]
_TASK = re.compile(r"task_([1-9]\d*)")
_NORM = {f"{PARAMS}/{{}}/bias": "beta", f"{STATS}/{{}}/mean": "moving_mean", f"{STATS}/{{}}/var": "moving_variance"}


def load_pae_checkpoint(
    net: Net,
    path: str | Path,
    *,
    heads: Mapping[str, Any],
    widths: Mapping[str, float] | None = None,
    sharing: Sharing | Mapping[str, Sharing] = "all",
) -> State:
    """Read a checkpoint of PAE's authors as a state with frozen tasks; TensorFlow is not needed.

    Task k sees `1 <= mask <= k`, or `mask in {1, k}` with sharing "first". A checkpoint holds neither the names of the
    tasks, nor their widths, nor the sharing rule; there they are flags of every call. So they are arguments here. Take
    them from the scripts that wrote the checkpoint: with another value, another function is computed.

    Weights that no task owns become 0. Norms and biases of a task are cut to its own width: the authors stretch those
    of older tasks with random numbers when they expand. Optimizer slots, steps and thresholds are not read.

    Not tested on a checkpoint of the authors. The names and layouts are those of their code, and the format that of
    TensorFlow; `verify` and the accuracy on your test data tell whether yours was read as it was meant.

    Args:
      net: `pae.linen(pae.models.InceptionResnetV1, sample)`.
      path: a checkpoint without its ".index", or a folder: the one that its file "checkpoint" names, else its only one.
      heads: `{task: head}` in the order of learning, all tasks of the checkpoint: the number of classes of the task's
        `task_k/Logits`; a module with the variables of a linear layer, such as `FeatureHead(8631)`; or None to leave
        them out, so that the features are the output.
      widths: `{task: channel factor}` of tasks whose network was not of width 1, such as `pae.width_for(1.2)`; at most
        two widths, which do not fall.
      sharing: "all"; "first" for `--share_only_task_1`; or `{task: rule}` where they differ, the others "all".

    Returns:
      A state at the last width. Tasks packed later start from fresh norms, as in PAE.

    Raises:
      ArgumentError: an argument out of range, or one that names another task.
      DataError: no checkpoint, a damaged one, or an array with NaN, infinity or a negative variance; named.
      StructureError: names or shapes of another network; a mask with an id that no task has, or that reaches outside of
        its task's width.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.InceptionResnetV1, jax.ShapeDtypeStruct((1, 160, 160, 3), jnp.float32))
      >>> state = pae.faces.load_pae_checkpoint(  # doctest: +SKIP
      ...     net, "weights/age/fold_0", heads={"face": None, "age": 8}
      ... )

    Source: Hung et al., ICMR 2019, and the variable names of the authors' repository, ivclab/PAE.
    """
    check_net(net)
    members = _members(heads, widths or {}, sharing)
    require_order(members)
    _require_network(net, members)
    place = frame(net, members)
    prefix = _prefix(Path(path).expanduser())
    arrays = read_tensors(prefix, lambda name: not name.startswith("_"))
    _require_names(prefix.name, arrays, members)
    shared, owner = _weights(prefix.name, arrays, place)
    local = [_local(prefix.name, arrays, place, member, f"task_{k}") for k, member in enumerate(members, start=1)]
    logits = [_head(prefix.name, arrays, net, member, f"task_{k}") for k, member in enumerate(members, start=1)]
    return assemble(place, members, shared, owner, local, logits, [None] * len(members))


def _members(heads: Mapping[str, Any], widths: Mapping[str, float], sharing: Any) -> list[Member]:
    rules: dict[str, Any] = dict(sharing) if isinstance(sharing, Mapping) else dict.fromkeys(heads, sharing)
    for name, given in (("widths", widths), ("sharing", rules)):
        unknown = sorted(given.keys() - heads.keys())
        if unknown:
            raise ArgumentError(f"{name} has {unknown}, which heads does not name; tasks: {list(heads)}")
    if "picked" in rules.values():
        raise ArgumentError("sharing must be one of 'all', 'first', found 'picked'; PAE has no picks")
    return [Member(name, head, widths.get(name, 1.0), rules.get(name, "all")) for name, head in heads.items()]


def _require_network(net: Net, members: list[Member]) -> None:
    """Raise unless the order of channels of such a checkpoint is known."""
    widths = sorted({member.width for member in members})
    weights = flatten(net.layout(widths[0]).shared)
    if weights.keys() != {f"{layer.kernel}/kernel" for layer in LAYERS}:
        found = f"{net.source} with {len(weights)} shared leaves"
        raise StructureError("network", "", found, "pae.linen(pae.models.InceptionResnetV1, sample)")
    # The authors cut the pooled branch of the second reduction at int(896 width); only if it has as many channels, the
    # old ones come first, in their old order.
    pooled = weights["Mixed_7a/Branch_0/Conv2d_0a/conv/kernel"].shape[2]
    if len(widths) > 2 or (len(widths) == 2 and int(896 * widths[0]) != pooled):
        raise ArgumentError(f"widths: found {widths}, expected at most two, the first of which is 1, as in the papers")


def _prefix(path: Path) -> Path:
    """Return the path of a checkpoint without ".index"."""
    if not path.is_dir():
        return path.with_suffix("") if path.suffix == ".index" else path
    pointer = path / "checkpoint"
    if pointer.exists():
        text = read_file(pointer, "the text file that names the last checkpoint", 1 << 20).decode(errors="replace")
        named = re.search(r'^model_checkpoint_path:\s*"([^"]+)"', text, re.MULTILINE)
        if named is None:
            raise DataError(f"{pointer}: names no checkpoint. Pass the path of one, without '.index'.")
        return path / re.split(r"[/\\]", named[1])[-1]
    found = sorted(entry.name for entry in path.glob("*.index"))
    if len(found) != 1:
        raise DataError(f"{path}: found {found or 'no checkpoint'}, expected one. Pass its path, without '.index'.")
    return path / found[0].removesuffix(".index")


def _require_names(source: str, arrays: Mapping[str, Any], members: list[Member]) -> None:
    """Raise unless the arrays are those of the network with these tasks; scopes are compared as whole parts."""
    tasks = [f"task_{number}" for number in range(1, len(members) + 1)]
    expected = {f"{layer.tensorflow}/{name}" for layer in LAYERS for name in ("weights", "mask")}
    for task, member in zip(tasks, members, strict=True):
        expected |= {name for layer in LAYERS for name in _task_names(layer, task).values()}
        expected |= set() if member.head is None else {f"{task}/Logits/weights", f"{task}/Logits/biases"}
    others = {match[0] for name in arrays for match in map(_TASK.fullmatch, name.split("/")) if match} - set(tasks)
    if others:
        hint = "Name every task in heads, in the order of learning; None leaves its head out."
        raise StructureError(source, "", f"scopes of {sorted(others)}", f"those of {tasks} only", hint)
    optional = {f"{layer.tensorflow}/threshold" for layer in LAYERS}
    known = expected | optional
    missing = sorted(expected - arrays.keys())
    unexpected = [
        name for name in arrays if name.startswith(f"{SCOPE}/") and name not in known and not _is_slot(name, known)
    ]
    if missing or unexpected:
        found = f"{len(missing)} arrays missing{listing(missing)}, "
        found += f"{len(unexpected)} unexpected{listing(unexpected)}"
        wanted = f"those of PAE's InceptionResnetV1 with {len(tasks)} tasks"
        hint = "FaceNet's own checkpoint, without masks, is read by load_facenet."
        raise StructureError(source, "", found, wanted, hint)


def _is_slot(name: str, known: set[str]) -> bool:
    """Return whether a name is that of an optimizer's slot or an average, which lies under its weight's name."""
    return name.rpartition("/")[0] in known


def _task_names(layer: Layer, task: str) -> dict[str, str]:
    """Return the names of a layer's variables of one task, by our paths."""
    scope = f"{layer.tensorflow}/{task}"
    if layer.norm is None:
        return {f"{PARAMS}/{layer.kernel}/bias": f"{scope}/biases"}
    return {path.format(layer.norm): f"{scope}/BatchNorm/{name}" for path, name in _NORM.items()}


def _weights(
    source: str, arrays: Mapping[str, np.ndarray], place: Frame
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return weights and owners by path, in our order of channels."""
    wanted, shared, owner = place.variables(place.width), {}, {}
    for layer in LAYERS:
        path, scope = f"{PARAMS}/{layer.kernel}/kernel", layer.tensorflow
        weights, mask = arrays[f"{scope}/weights"], arrays[f"{scope}/mask"]
        leaf = wanted[path]
        if mask.shape != leaf.shape or mask.dtype != np.int8:
            expected = f"int8[{','.join(map(str, leaf.shape))}]"
            raise StructureError(
                source, f"{scope}/mask", describe(mask), expected, "Are these the widths of the tasks?"
            )
        weights = without_free(weights, mask)
        shared[path] = place.placed(
            path, placing.converted(source, Entry(path, f"{scope}/weights"), weights, leaf), place.width
        )
        owner[path] = place.placed(path, mask, place.width)
    return shared, owner


def _local(
    source: str, arrays: Mapping[str, np.ndarray], place: Frame, member: Member, task: str
) -> dict[str, np.ndarray]:
    """Return the norms and biases of a task by path, in our order of channels and cut to its width."""
    own, last, found = place.variables(member.width), place.variables(place.width), {}
    for layer in LAYERS:
        for path, name in _task_names(layer, task).items():
            value, leaf = arrays[name], own[path]
            if value.shape == last[path].shape:
                value = value[: leaf.shape[0]]  # behind it, an expansion has put random numbers
            found[path] = place.placed(path, placing.converted(source, Entry(path, name), value, leaf), member.width)
    return found


def _head(source: str, arrays: Mapping[str, np.ndarray], net: Net, member: Member, task: str) -> Tree:
    features = jax.tree.leaves(net.layout(member.width).features)[0].shape[-1]
    names = (f"{task}/Logits/weights", f"{task}/Logits/biases")
    logits = None if member.head is None else placing.classifier(source, arrays, *names, (0, 1), features)
    found = {} if logits is None else {PARAMS: dict(zip(("kernel", "bias"), logits, strict=True))}
    return head_variables(net, member, found, source)

"""What decides the stages of a task, as JSON: a run goes on only with the same."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from pae_jax.caching import jax_settings, program_text
from pae_jax.core import State, find, integrity, names, spread_arrays
from pae_jax.lifelong.describing import code_of, name_of, short
from pae_jax.lifelong.recipe import Recipe, plain
from pae_jax.lifelong.session import Session
from pae_jax.lifelong.task import CheckedTask, MeanOf, Task
from pae_jax.nets import Net, examples, heads
from pae_jax.training import form
from pae_jax.trees import describe, flatten, merge


def settings_of(
    session: Session, checked: CheckedTask, state: State, goal: float | None, upcoming: int | None, title: str
) -> dict[str, Any]:
    """Return what decides the stages of a task; a resumed run must have the same.

    What cannot be known: data that only iterating would show, such as a factory of batches; what a measure reads from
    outside; what a loss reads from outside where the data is such a factory.
    """
    net, recipe, key, task = session.net, session.recipe, session.key, checked.task
    ladder = recipe.ladder
    counts_upcoming = ladder is not None and (
        ladder.equal_share or not ladder.prune_last or goal is not None or ladder.choose != "last"
    )
    return {
        "task": title,
        "environment": environment(key),
        "head": heads.describe(task.head),
        "head values": _head_values(task.head, key),
        "model": _model(net, state.width, task.head),
        "loss": _loss(net, state.width, checked),
        "loss_per": task.loss_per,
        "metric": {**plain(task.metric), "measure": checked.facts["measure"]},
        "augment": checked.facts["augment"],
        "recipe": checked.facts["recipe"],
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "goal": goal,
        "upcoming": upcoming if counts_upcoming else None,
        "width": state.width,
        "earlier network": _network(state),
        "data": {part: checksums(getattr(task, part)) for part in ("train", "val", "test")},
    }


def facts_of(task: Task, recipe: Recipe) -> dict[str, Any]:
    """Return what the objects of a task and a recipe hold before anything is learned; some change when used."""
    return {"measure": _measure(task), "augment": code_of(task.augment), "recipe": recipe.to_json()}


def environment(key: jax.Array) -> dict[str, Any]:
    """Return the settings of JAX that change what is computed."""
    return {**jax_settings(), "key": str(jax.random.key_impl(key))}


def _head_values(head: Any, key: jax.Array) -> dict[str, str] | None:
    """Return the checksums of what an NNX head starts from, its present values; other heads are drawn by the key."""
    return checksums(heads.program(head).init(key, None)) if isinstance(head, nnx.Module) else None


def _model(net: Net, width: float, head: Any) -> str:
    """Return a digest of the programs of backbone and head, in training and in evaluation."""
    backbone, layout, output = net.program(width), net.layout(width), heads.program(head)
    variables, own = merge(layout.shared, layout.local), heads.layout(net, head, width)[0]

    def both(variables: Any, own: Any, x: Any, key: jax.Array) -> Any:
        parts = []
        for train in (True, False):
            features, updates = backbone.apply(variables, x, train, key if train else None)
            parts.append((updates, output.apply(own, features, train, key if train else None)))
        return parts

    text = program_text(both, variables, own, net.sample, jax.random.key(0))
    return f"{text[:16]} by jax {jax.__version__}"


def _loss(net: Net, width: float, checked: CheckedTask) -> str | None:
    """Return the name of the user's loss, and a digest of its program, or of its code where no data is at hand."""
    task = checked.task
    if task.loss is None:
        return None
    if checked.train is None or not isinstance(task.train, (tuple, Mapping, list)):
        return code_of(task.loss)
    _, y = checked.train.arrays or next(checked.train.epoch(0, None))
    out = form(net, width, task.head, False).output(net.sample)
    count = examples(net.sample)
    like = lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype))  # noqa: E731
    try:
        return f"{name_of(task.loss)} {short(*checked.objective.text(out, jax.tree.map(like, y)))}"
    except Exception:  # of other labels, which the augmentation makes
        return code_of(task.loss)


def _measure(task: Task) -> str | None:
    measure = task.metric.measure
    return code_of(measure.values if isinstance(measure, MeanOf) else measure)


def _network(state: State) -> int:
    older = {
        name: {p: row.hex() for p, row in integrity.recorded(state, find(state, name)).items()} for name in names(state)
    }
    network = {"tasks": older, "shared": checksums(state.shared), "local": checksums(state.local)}
    return zlib.crc32(json.dumps(network, sort_keys=True).encode())


def checksums(data: Any) -> Any:
    """Return `{path: dtype, shape and CRC-32}` of trees of arrays, one text for a list of batches, None for others."""
    if isinstance(data, list):
        batches = [checksums(tuple(batch) if isinstance(batch, list) else batch) for batch in data]
        whole = zlib.crc32(json.dumps(batches).encode())
        return f"{len(data)} batches {whole:08x}"
    if not isinstance(data, (tuple, Mapping)):
        return None
    arrays = jax.tree.map(_host, _as_dicts(data), is_leaf=_makes_array)
    return {name: f"{describe(leaf)} {_crc(leaf):08x}" for name, leaf in flatten(arrays).items()}


def _as_dicts(data: Any) -> Any:
    """Return data with a dict for each other mapping, such as an open `.npz` file, which is no tree to JAX."""
    if isinstance(data, Mapping):
        return {name: _as_dicts(part) for name, part in data.items()}
    return tuple(map(_as_dicts, data)) if type(data) is tuple else data


def _makes_array(part: Any) -> bool:
    """Return whether this is a list of numbers or texts; a list of arrays of other shapes is a tree."""
    if not isinstance(part, list):
        return False
    try:
        np.asarray(part)
    except ValueError:
        return False
    return True


def _host(part: Any) -> Any:
    return part if spread_arrays.is_spread(part) else np.asarray(part)


def _crc(leaf: Any) -> int:
    """Return the CRC-32 of an array; of one that is spread over devices, a block of rows at a time is on the host."""
    if leaf.dtype.hasobject:  # its bytes are addresses
        return zlib.crc32(repr(leaf.tolist()).encode(errors="surrogatepass"))
    crc = 0
    for (piece,) in spread_arrays.pieces(leaf):
        crc = zlib.crc32(np.ascontiguousarray(piece).view(np.uint8).data, crc)
    return crc

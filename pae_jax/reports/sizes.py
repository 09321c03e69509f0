"""How large a network is, in three ways: `paper` (the published formula), `stored` (on disk) and `dense` (in memory).

They differ greatly for the same network, so a `Sizes` always states its kind. Sizes are bytes; tables show KiB or MiB.
The paper's MB is the MiB, 2^20 bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pae_jax.checks import check_width, local_path
from pae_jax.core import State, TaskState, check_state, find, names, ownership, spread_arrays
from pae_jax.nets import Net, check_net, heads
from pae_jax.reports.paper_size import CSV_COLUMNS as CSV_COLUMNS
from pae_jax.reports.paper_size import Counts as Counts
from pae_jax.reports.paper_size import count as count
from pae_jax.reports.paper_size import csv_columns as csv_columns
from pae_jax.reports.paper_size import paper as paper
from pae_jax.reports.paper_size import weights_at
from pae_jax.reports.size_table import MB as MB
from pae_jax.reports.size_table import Sizes as Sizes
from pae_jax.reports.size_table import itemsize, nbytes, values
from pae_jax.storage import checkpoint
from pae_jax.trees import flatten

_SCORE = 4  # float32


def stored(path: str | Path) -> Sizes:
    """Measure a stage on disk.

    Args:
      path: a folder written by `pae.save`.

    Returns:
      The bytes of its files: `(arrays)`, which Orbax compresses, and `(metadata)`: the meaning, names, shapes and
      checksums of the arrays, and the metadata given to `save`.

    Raises:
      CheckpointError: not a complete stage of this library.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, pae_jax as pae
      >>> from pae_jax.reports import sizes
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> folder = tempfile.mkdtemp()
      >>> pae.save(f"{folder}/0-empty", pae.init(net, jax.random.key(0)))
      >>> found = sizes.stored(f"{folder}/0-empty")
      >>> found.total == sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
      True
    """
    folder = local_path(path)
    arrays = checkpoint.read_metadata(folder)["arrays"].values()
    plain = sum(math.prod(array["shape"]) * jnp.dtype(array["dtype"]).itemsize for array in arrays)
    total = {"(arrays)": 0, "(metadata)": 0}
    for file in folder.rglob("*"):
        if file.is_file():
            part = "(metadata)" if _describes(file.relative_to(folder)) else "(arrays)"
            total[part] += file.stat().st_size
    rows = [{"part": part, "bytes": size} for part, size in total.items()]
    return Sizes("stored", "files of a stage, measured on disk", rows, (f"uncompressed arrays: {plain:,} bytes",))


def stored_estimate(state: State) -> Sizes:
    """Estimate the smallest size of a stage: the owned weights and the owner map.

    `sum over owned weights of their bytes + ceil(log2(T + 1)) bits per weight for the owners of T tasks`, one bit per
    older weight for a task that picks (2 if ternary; 4 bytes, its score, until it is frozen), and each task's local
    variables and head.

    Args:
      state: the network.

    Returns:
      One row per task, `(owner map)`, and, if there are any, `(expansions)` and `(backbone)`: the local variables that
      tasks start from, and also the weights as long as there is no task.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> from pae_jax.reports import sizes
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "age", head=2, key=jax.random.key(1))
      >>> print(sizes.stored_estimate(pae.prune(state, "age", 0.5)))
      stored: estimate of what a stage needs, in KiB
                   weights  picks  local   head    KiB
      age            0.625  0.000  0.125  0.133  0.883
      (owner map)                                0.039
      (backbone)                                 0.125
      total                                      1.047
      - before compression and without metadata; `stored` measures a stage
      - with tasks, free weights count nothing but their place in the owner map
    """
    check_state(state)
    counts = ownership.owner_counts(state)
    weights = _owned_bytes(state, counts)
    rows = []
    for name in names(state):
        entry = state.tasks[name]
        parts = {
            "weights": int(weights[entry.id]),
            "picks": _pick_bytes(entry, counts),
            "local": nbytes(entry.local),
            "head": nbytes(entry.head),
        }
        rows.append({"part": name, **parts, "bytes": sum(parts.values())})
    bits = len(state.tasks).bit_length()  # ceil(log2(tasks + 1))
    rows.append({"part": "(owner map)", "bytes": -(-values(state.owner) * bits // 8)})
    if state.growth:
        rows.append({"part": "(expansions)", "bytes": sum(len(json.dumps(g.maps.to_json())) for g in state.growth)})
    # Before the first task, no task owns the weights that were drawn by `init` or pretrained.
    backbone = nbytes(state.local) + (0 if state.tasks else nbytes(state.shared))
    if backbone:
        rows.append({"part": "(backbone)", "bytes": backbone})
    notes = (
        "before compression and without metadata; `stored` measures a stage",
        "with tasks, free weights count nothing but their place in the owner map",
    )
    return Sizes("stored", "estimate of what a stage needs", rows, notes)


def deployed(state: State, task: str) -> Sizes:
    """Return the bytes needed to run one task alone.

    `(bytes of the visible weights) + 1 bit per weight of the task's width, visible or not + local variables + head`.

    Args:
      state: the network.
      task: name of a task, in any phase.

    Returns:
      One row of the task: `own`, `older` (weights of older tasks that it uses), `mask`, `local`, `head`.

    Raises:
      UnknownTaskError: no task of this name.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> from pae_jax.reports import sizes
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "age", head=2, key=jax.random.key(1))
      >>> sizes.deployed(pae.prune(state, "age", 0.5), "age").rows
      [{'part': 'age', 'own': 640, 'older': 0, 'mask': 40, 'local': 128, 'head': 136, 'bytes': 944}]
    """
    entry = find(state, task)
    owner_bytes = _owned_bytes(state, ownership.owner_counts(state))
    masks = flatten(ownership.masks(state, task))
    visible = sum(
        int(spread_arrays.whole(masks[path]).sum()) * itemsize(leaf) for path, leaf in flatten(state.shared).items()
    )
    parts = {
        "own": int(owner_bytes[entry.id]),
        "older": visible - int(owner_bytes[entry.id]),
        "mask": -(-weights_at(state, entry.width) // 8),
        "local": nbytes(entry.local),
        "head": nbytes(entry.head),
    }
    note = "signs of ternary picks are taken into the weights, other picks into the mask"
    rows = [{"part": task, **parts, "bytes": sum(parts.values())}]
    return Sizes("stored", "estimate of one task alone", rows, (note,) if entry.pick is not None else ())


def dense(state: State) -> Sizes:
    """Return the bytes of all arrays of a state in memory.

    Args:
      state: the network; its arrays may be abstract.

    Returns:
      One row per task (`picks`, `local`, `head`, `digests`), `(shared weights)`, `(owner ids)` and, if there are any,
      `(backbone)`, the local variables that tasks start from.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> from pae_jax.reports import sizes
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> sizes.dense(pae.init(net, jax.random.key(0))).rows
      [{'part': '(shared weights)', 'bytes': 1280}, {'part': '(owner ids)', 'bytes': 320},
       {'part': '(backbone)', 'bytes': 128}]
    """
    rows = []
    for name in names(state):
        entry = state.tasks[name]
        trees = {"picks": entry.pick, "local": entry.local, "head": entry.head, "digests": entry.digests}
        parts = {part: nbytes(tree) for part, tree in trees.items()}
        rows.append({"part": name, **parts, "bytes": sum(parts.values())})
    rows.append({"part": "(shared weights)", "bytes": nbytes(state.shared)})
    rows.append({"part": "(owner ids)", "bytes": nbytes(state.owner)})
    if state.local is not None:
        rows.append({"part": "(backbone)", "bytes": nbytes(state.local)})
    return Sizes("dense", "allocated arrays of one network", rows)


def dense_networks(net: Net, tasks: State | Mapping[str, Any], *, width: float = 1.0) -> Sizes:
    """Return the bytes of one separate network of the same architecture per task, for comparison.

    Args:
      net: the network description.
      tasks: a state, for its tasks; or `{task: head}`, a head being classes or a Flax module.
      width: channel factor of each network.

    Returns:
      One row per task: `weights`, `local`, `head`.

    Raises:
      ArgumentError: width is not positive and finite, or a head is neither.

    Example:
      >>> import jax.numpy as jnp, pae_jax as pae
      >>> from pae_jax.reports import sizes
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> sizes.dense_networks(net, {"age": 8, "gender": 2}).total
      3496
    """
    check_net(net)
    specs = {name: tasks.tasks[name].head_spec for name in names(tasks)} if isinstance(tasks, State) else dict(tasks)
    width = check_width(width)
    layout = net.layout(width)
    rows = []
    for name, spec in specs.items():
        head, _ = heads.layout(net, heads.check_head(spec), width)
        parts = {"weights": nbytes(layout.shared), "local": nbytes(layout.local), "head": nbytes(head)}
        rows.append({"part": name, **parts, "bytes": sum(parts.values())})
    return Sizes("dense", f"{len(rows)} separate networks at width {width:.3g}", rows)


def _owned_bytes(state: State, counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the bytes of the weights of each owner, int64 of shape (tasks + 1,), free ones first."""
    return np.sum([counts[path] * itemsize(leaf) for path, leaf in flatten(state.shared).items()], axis=0)


def _pick_bytes(entry: TaskState, counts: Mapping[str, np.ndarray]) -> int:
    if entry.pick is None or entry.picking is None:
        return 0
    last = entry.id + (entry.seeing == "masked")
    older = sum(int(leaf[1:last].sum()) for leaf in counts.values())
    if not entry.frozen:
        return older * _SCORE
    return -(-older // 8) * (2 if entry.picking.ternary else 1)


def _describes(file: Path) -> bool:
    """Return whether a file of a stage holds no values: Orbax's own metadata, and the markers of a complete stage."""
    return (
        file.name.startswith("_")
        or file.name in ("manifest.ocdbt", "commit_success.txt", "orbax.checkpoint")
        or "array_metadatas" in file.parts
    )

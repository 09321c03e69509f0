"""Stages on disk, by Orbax. The only file that imports it.

A stage is one folder, written aside and renamed, so it is there completely or not at all. Arrays are Orbax's; what
they mean is readable JSON in the file `_CHECKPOINT_METADATA`. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from pae_jax.core import Growth, Picking, State, TaskState, integrity, layout_of, names, ownership, picking
from pae_jax.errors import ArgumentError, CheckpointError, StructureError
from pae_jax.nets import Net, heads
from pae_jax.trees import Tree, abstract, describe, flatten, require_match
from pae_jax.version import __version__
from pae_jax.widening import WidenMaps

SCHEMA_VERSION = 3  # 2 kept the backbone's local variables only until the first task
_FORMAT = "pae_jax stage"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def save(path: str | Path, state: State, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a stage: one new folder that holds the whole state.

    Args:
      path: the folder; it must not exist, its parent is made if need be.
      state: the network; its structural laws are checked first.
      metadata: anything JSON can say, such as metrics; `read_metadata` gives it back.

    Raises:
      ArgumentError: metadata is not JSON.
      StructureError: the state breaks a structural law.
      CheckpointError: the folder exists, cannot be written or the disk is full; other stages are untouched.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> stage = tempfile.mkdtemp() + "/0-empty"
      >>> pae.save(stage, state, {"note": "no task yet"})
      >>> equal = jax.tree.map(lambda a, b: bool((a == b).all()), pae.load(net, stage), state)
      >>> all(jax.tree.leaves(equal))
      True
    """
    path = Path(path).absolute()
    integrity.check(state)
    try:
        extra = json.loads(json.dumps(dict(metadata or {}), allow_nan=True))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"metadata must be what JSON can say: {error}") from error
    if path.exists():
        raise CheckpointError(f"{path} exists; a stage is written once. Choose another name, or remove it first.")
    arrays = _arrays(state)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ocp.save(str(path), arrays, custom_metadata=_sealed(_describe(state, arrays, extra)))
    except Exception as error:  # Orbax and TensorStore raise many types for a full or read-only disk
        raise CheckpointError(f"cannot write the stage {path}: {error}. Earlier stages are untouched.") from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the JSON of a stage without reading its arrays.

    Args:
      path: a folder written by `save`.

    Returns:
      `schema_version`, `versions` of packages, `width`, `tasks` by id with their digests, `growth`, `arrays` with
      shapes and checksums, and `metadata` as given to `save`.

    Raises:
      CheckpointError: no complete stage of this library, or one of a newer schema.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> folder = tempfile.mkdtemp()
      >>> pae.save(f"{folder}/0-empty", pae.init(net, jax.random.key(0)), {"note": "no task yet"})
      >>> pae.read_metadata(f"{folder}/0-empty")["metadata"]
      {'note': 'no task yet'}
    """
    return _read(Path(path).absolute())[0]


def load(net: Net, path: str | Path, *, heads: Mapping[str, Any] | None = None) -> State:
    """Read a stage. Strict: every leaf must have the path, shape, dtype and checksum that was saved.

    Args:
      net: the same network description as at `save`.
      path: a folder written by `save`.
      heads: `{task: Flax module}` for tasks whose head is not a plain number of classes.

    Returns:
      The state, equal to the saved one bit for bit.

    Raises:
      CheckpointError: missing, half-written or damaged; not a stage of this library; a newer schema.
      StructureError: the stage belongs to another model; names the leaf.
      ArgumentError: a head module is missing.

    Example: see `save`.
    """
    path = Path(path).absolute()
    info, stored = _read(path)
    template = _template(net, info, dict(heads or {}))
    expected = _arrays(template)
    require_match(f"stage {path.name}", stored, expected, "Is it a stage of this model?")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), expected)
    try:
        arrays = ocp.load(str(path), target)
    except Exception as error:  # a damaged file shows itself in many types
        raise CheckpointError(f"the arrays of stage {path} cannot be read; it is damaged: {error}") from error
    for name, leaf in flatten(arrays).items():
        if integrity.array_digest(leaf) != info["arrays"][name]["sha256"]:
            raise CheckpointError(f"stage {path} is damaged: '{name}' is not what was saved. Use another stage.")
    # Orbax ties arrays to a device; compiled functions would compile again for such operands.
    return _join(template, info, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), arrays))


def _arrays(state: State) -> Tree:
    """Return the arrays of a state as nested dicts without empty branches."""
    parts = {
        "shared": state.shared,
        "owner": state.owner,
        "local": state.local or {},
        "tasks": {
            str(entry.id): {"local": entry.local, "head": entry.head, "pick": _stored_pick(state, entry)}
            for entry in state.tasks.values()
        },
    }
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(parts))


def _stored_pick(state: State, entry: TaskState) -> Tree:
    """Return the picks of a task as they are stored: scores as they are, signs as bits; {} if there are none."""
    if entry.pick is None:
        return {}
    if isinstance(entry.pick, jax.ShapeDtypeStruct):  # of a template: the bits, whose number only the stage knows
        return entry.pick
    if not entry.frozen:
        return entry.pick
    return picking.to_bits(entry.pick, ownership.at_width(state, state.owner, entry.width), entry.id)


def _join(template: State, info: dict[str, Any], arrays: Tree) -> State:
    """Put loaded arrays, and the digests of the metadata, in the places of a template."""
    owners = template.replace(owner=arrays["owner"])
    frozen = {entry["id"]: entry["digests"] for entry in info["tasks"] if entry["digests"] is not None}

    def task(entry: TaskState) -> TaskState:
        parts = arrays.get("tasks", {}).get(str(entry.id), {})
        pick = parts.get("pick")
        if pick is not None and entry.id in frozen:
            owner = ownership.at_width(owners, owners.owner, entry.width)
            assert entry.picking is not None
            pick = picking.from_bits(np.asarray(pick), owner, entry.id, entry.picking.ternary)
        entry = entry.replace(local=parts.get("local", {}), head=parts.get("head", {}), pick=pick)
        if entry.id not in frozen:
            return entry
        return entry.replace(digests=_rows(frozen[entry.id], owners, entry))

    return template.replace(
        shared=arrays["shared"],
        owner=arrays["owner"],
        local=None if template.local is None else arrays.get("local", {}),
        tasks={name: task(entry) for name, entry in template.tasks.items()},
    )


def _rows(digests: dict[str, str], state: State, entry: TaskState) -> jax.Array:
    """Return digests, which a stage keeps by path, in the order of the arrays."""
    paths = integrity.recorded(state, entry)
    if paths.keys() != digests.keys():
        differing = min(paths.keys() ^ digests.keys())
        raise CheckpointError(f"the stage is damaged: task {entry.id} has no digest of '{differing}', or no such array")
    return integrity.as_rows({path: bytes.fromhex(digests[path]) for path in paths})


def _describe(state: State, arrays: Tree, extra: dict[str, Any]) -> dict[str, Any]:
    tasks = []
    for name in names(state):
        entry = state.tasks[name]
        own, _ = ownership.host_counts(state.owner, entry.id)
        tasks.append(
            {
                "id": entry.id,
                "name": name,
                "width": entry.width,
                "sharing": entry.sharing,
                "picking": None if entry.picking is None else asdict(entry.picking),
                "head": heads.describe(entry.head_spec),
                "phase": entry.phase,
                "weights": int(own.sum()),
                "digests": {path: row.hex() for path, row in integrity.recorded(state, entry).items()}
                if entry.frozen
                else None,
            }
        )
    return {
        "format": _FORMAT,
        "schema_version": SCHEMA_VERSION,
        "versions": {"pae_jax": __version__} | {package: version(package) for package in _PACKAGES},
        "width": state.width,
        "backbone_local": state.local is not None,
        "free_fraction": ownership.free_fraction(state),
        "tasks": tasks,
        "growth": [{"narrow": g.narrow, "wide": g.wide, "maps": g.maps.to_json()} for g in state.growth],
        "arrays": {
            path: {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "sha256": integrity.array_digest(leaf)}
            for path, leaf in flatten(arrays).items()
        },
        "metadata": extra,
    }


def _sealed(info: dict[str, Any]) -> dict[str, Any]:
    """Return metadata with its own checksum, over its JSON with sorted keys."""
    text = json.dumps(info, sort_keys=True)
    return {**info, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _read(path: Path) -> tuple[dict[str, Any], Tree]:
    """Return the JSON of a stage and the shapes and dtypes that Orbax stored."""
    if not path.is_dir():
        raise CheckpointError(f"no stage at {path}: the folder does not exist")
    if ".orbax-checkpoint-tmp" in path.name:
        raise CheckpointError(f"{path} is a half-written stage; it can be removed. Use the stage before it.")
    try:
        found = ocp.metadata(str(path))
    except Exception as error:
        raise CheckpointError(f"{path} is not a complete Orbax checkpoint: {error}") from error
    info: Any = found.custom_metadata
    if not isinstance(info, dict) or info.get("format") != _FORMAT:
        raise CheckpointError(f"{path} was not written by pae_jax.save")
    schema = info.get("schema_version")
    if not isinstance(schema, int):
        raise CheckpointError(f"{path} is damaged: its schema version is {schema!r}")
    if schema > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {info['schema_version']}; this pae_jax {__version__} reads up to "
            f"{SCHEMA_VERSION}. Update pae_jax."
        )
    if _sealed({key: value for key, value in info.items() if key != "sha256"}) != info:
        raise CheckpointError(f"{path} is damaged: its metadata is not what was saved. Use another stage.")
    stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found.metadata)
    listed = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in info["arrays"].items()}
    for name, leaf in flatten(stored).items():
        if listed.pop(name, None) != f"{leaf.dtype}{list(leaf.shape)}":
            raise CheckpointError(f"{path} is damaged: array '{name}' is {describe(leaf)}, not what its metadata lists")
    if listed:
        raise CheckpointError(f"{path} is damaged: the array '{min(listed)}' is missing")
    return info, stored


def _template(net: Net, info: dict[str, Any], modules: dict[str, Any]) -> State:
    """Return the state that the metadata describes, its arrays abstract, as this network would build it."""
    layout = net.layout(info["width"])
    tasks = {}
    for entry in info["tasks"]:
        spec = modules.pop(entry["name"], entry["head"])
        if isinstance(spec, str):
            name = repr(entry["name"])
            raise ArgumentError(f"task {name} has the head module {spec}; pass load(..., heads={{{name}: module}})")
        if heads.describe(spec) != entry["head"]:
            raise StructureError(f"head of task {entry['name']!r}", "", heads.describe(spec), entry["head"])
        variables, _ = heads.layout(net, spec, entry["width"])
        parts = net.layout(entry["width"])
        rule = None if entry.get("picking") is None else Picking(**entry["picking"])
        pick = _pick_template(info, entry, parts.shared)
        tasks[entry["name"]] = TaskState(
            local=parts.local,
            head=variables,
            digests=integrity.no_digests(parts.shared, parts.local, variables, None if pick is None else parts.shared),
            pick=pick,
            id=entry["id"],
            width=entry["width"],
            head_spec=spec,
            layout=layout_of(local=parts.local, head=variables),
            sharing=entry["sharing"],
            picking=rule,
        )
    if modules:
        raise ArgumentError(f"heads names {sorted(modules)}, which the stage does not have")
    return State(
        shared=layout.shared,
        owner=jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, "int8"), layout.shared),
        tasks=tasks,
        width=info["width"],
        growth=tuple(_growth(record) for record in info["growth"]),
        local=abstract(layout.local) if info.get("backbone_local", info.get("pretrained_local")) else None,
        layout=layout_of(shared=layout.shared, local=layout.local),
    )


def _pick_template(info: dict[str, Any], entry: dict[str, Any], shared: Tree) -> Tree:
    bits = info["arrays"].get(f"tasks/{entry['id']}/pick")
    if bits is not None:
        return jax.ShapeDtypeStruct(tuple(bits["shape"]), bits["dtype"])
    scored = any(path.startswith(f"tasks/{entry['id']}/pick/") for path in info["arrays"])
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, "float32"), shared) if scored else None


def _growth(record: dict[str, Any]) -> Growth:
    return Growth(record["narrow"], record["wide"], WidenMaps.from_json(record["maps"]))

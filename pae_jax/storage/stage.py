"""What a stage holds and says: a state as arrays and as JSON, and back."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from pae_jax.checks import check_name
from pae_jax.core import Growth, Picking, State, TaskState, integrity, layout_of, names, ownership, picking
from pae_jax.errors import ArgumentError, CheckpointError, StructureError
from pae_jax.nets import Net, heads
from pae_jax.trees import Tree, abstract, flatten
from pae_jax.version import __version__
from pae_jax.widening import WidenMaps

SCHEMA_VERSION = 3  # 2 kept the backbone's local variables only until the first task
FORMAT = "pae_jax stage"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def arrays_of(state: State) -> Tree:
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


def digests(state: State) -> dict[str, str]:
    """Return the start of the SHA-256 of every array of a state, by path."""
    return {path: integrity.array_digest(leaf)[:16] for path, leaf in flatten(arrays_of(state)).items()}


def _stored_pick(state: State, entry: TaskState) -> Tree:
    """Return the picks of a task as they are stored: scores as they are, signs as bits; {} if there are none."""
    if entry.pick is None:
        return {}
    if isinstance(entry.pick, jax.ShapeDtypeStruct):  # of a template: the bits, whose number only the stage knows
        return entry.pick
    if not entry.frozen:
        return entry.pick
    return picking.to_bits(entry.pick, ownership.at_width(state, state.owner, entry.width), entry.id)


def describe(state: State, arrays: Tree, extra: dict[str, Any]) -> dict[str, Any]:
    """Return what a stage says: everything that its arrays alone do not."""
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
                "program": entry.program,
                "phase": entry.phase,
                "weights": int(own.sum()),
                "digests": {path: row.hex() for path, row in integrity.recorded(state, entry).items()}
                if entry.frozen
                else None,
            }
        )
    return {
        "format": FORMAT,
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


def template(net: Net, info: dict[str, Any], modules: dict[str, Any]) -> State:
    """Return the state that the metadata describes, its arrays abstract, as this network would build it."""
    layout = net.layout(info["width"])
    tasks = {}
    for entry in info["tasks"]:
        check_name(entry["name"])
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
            program=entry.get("program", ""),
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


def join(template: State, info: dict[str, Any], arrays: Tree) -> State:
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

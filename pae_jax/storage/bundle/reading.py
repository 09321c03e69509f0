"""Reading a bundle: as a network's state, or as what the file says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pae_jax.checks import check_mapping, local_path
from pae_jax.core import Placement, State, integrity, layout_of, placement
from pae_jax.errors import ArgumentError, StructureError
from pae_jax.nets import Net, check_net, heads, require_program
from pae_jax.storage.bundle import assembling, file
from pae_jax.trees import require_match


def read_bundle(
    net: Net,
    path: str | Path,
    *,
    onto: State | None = None,
    heads: Mapping[str, Any] | None = None,
    sharding: Placement | None = None,
    same_program: bool = True,
) -> State:
    """Read a bundle; every task's digest is recomputed and compared.

    Args:
      net: the same network description as at writing.
      path: a file written by `write_bundle`.
      onto: for a delta, the state it adds to, with exactly the tasks that came before. It is not changed.
      heads: `{task: Flax module}` for tasks of the file whose head is not a plain number of classes.
      sharding: where the arrays lie, as for `init`, once they are put together in the memory of the host; None is one
        device.
      same_program: as for `load`.

    Returns:
      The tasks, and no weight that none of them uses: those are free and 0. With `onto`, all older tasks as well, bit
      for bit.

    Raises:
      CheckpointError: missing or damaged; not a bundle; a newer schema; or `onto` is another state than the one the
        delta was made for: names the task that differs.
      StructureError: the bundle belongs to another model; names the leaf, or the task whose program differs.
      ArgumentError: a delta without `onto`, a whole bundle with it, a head module is missing, or `sharding` is refused
        as by `init`.
      ForgettingError: `onto` is damaged.

    Example: see `write_bundle`.
    """
    check_net(net)
    modules = check_mapping("heads", heads, "{task: Flax module}")
    header, tensors = file.read(local_path(path))
    specs = _specs(header, modules)
    _require_model(net, header, specs)
    for entry in header["tasks"] if same_program else ():
        require_program(net, entry["width"], specs[entry["name"]], entry["name"], entry.get("program", ""))
    state = assembling.assembled(header, tensors, onto, specs)
    layout = layout_of(shared=state.shared, local=net.layout(state.width).local)
    state = state.replace(layout=layout, local=_backbone_local(state, onto))
    integrity.check(state, net)
    return placement.place(net, state, sharding)


def bundle_header(path: str | Path) -> dict[str, Any]:
    """Return what a bundle says of itself; its checksum is right."""
    return file.read(local_path(path))[0]


def open_bundle(path: Path, onto: State | None = None) -> tuple[dict[str, Any], State]:
    """Return header and state of a bundle without its network: all can be checked, nothing computed."""
    header, tensors = file.read(path)
    heads = {entry["name"]: entry["head"] for entry in header["tasks"]}
    specs = {name: assembling.Placeholder.of(head) if isinstance(head, str) else head for name, head in heads.items()}
    state = assembling.assembled(header, tensors, onto, specs)
    local = _backbone_local(state, onto)
    if local is not None:
        state = state.replace(layout=layout_of(shared=state.shared, local=local), local=local)
    integrity.check(state)
    return header, state


def _backbone_local(state: State, onto: State | None) -> Any:
    """Return the backbone's local variables of the state that a delta adds to; None where they have another width."""
    return onto.local if onto is not None and onto.width == state.width else None


@assembling.understood()
def _specs(header: Mapping[str, Any], modules: dict[str, Any]) -> dict[str, Any]:
    """Return the heads of a bundle's tasks, modules taken from those that were given."""
    specs = {}
    for entry in header["tasks"]:
        name = entry["name"]
        given = isinstance(entry["head"], str)
        spec = heads.check_head(_module(entry, modules) if given else modules.pop(name, entry["head"]))
        if heads.describe(spec) != entry["head"]:
            raise StructureError(f"head of task {name!r}", "", heads.describe(spec), entry["head"])
        specs[name] = spec
    if modules:
        raise ArgumentError(f"heads names {sorted(modules)}, which the bundle does not have")
    return specs


def _module(entry: Mapping[str, Any], modules: dict[str, Any]) -> Any:
    name, kind = entry["name"], entry["head"]
    if name not in modules:
        raise ArgumentError(f"task {name!r} has the head module {kind}; pass heads={{{name!r}: module}}")
    return modules.pop(name)


@assembling.understood()
def _require_model(net: Net, header: Mapping[str, Any], specs: Mapping[str, Any]) -> None:
    """Raise `StructureError` unless the bundle's shapes are those of the network; nothing is allocated before."""
    hint = "Is it a bundle of this model?"
    shared, local, variables = assembling.layouts(header)
    require_match("bundle", shared, net.layout(header["width"]).shared, hint)
    for width, tree in local.items():
        require_match(f"local variables at width {width:g}", tree, net.layout(width).local, hint)
    for entry in header["tasks"]:
        expected, _ = heads.layout(net, specs[entry["name"]], entry["width"])
        require_match(f"head of task {entry['name']!r}", variables[entry["name"]], expected, hint)

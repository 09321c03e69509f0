"""Bundles: one small file with some or all tasks of a network, or with what some tasks add to those before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pae_jax.checks import check_choice
from pae_jax.core import State, integrity, layout_of
from pae_jax.errors import ArgumentError, StructureError, UnknownTaskError
from pae_jax.nets import Net, heads
from pae_jax.storage import bundle_file, bundle_parts, bundle_reading, bundle_tasks, files
from pae_jax.storage.bundle_values import PRECISIONS, Precision
from pae_jax.training import evaluate
from pae_jax.trees import require_match
from pae_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "safetensors")


def write_bundle(
    path: str | Path,
    net: Net,
    state: State,
    *,
    tasks: Iterable[str] | None = None,
    after: str | None = None,
    weights: Precision = "float32",
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write frozen tasks, and what they use of others, into one file.

    Each weight is stored once, at the places that somebody uses; who uses which place is coded near its entropy. The
    file is a safetensors file whose metadata is JSON. A bundle without a task holds nothing that only it owned.

    Args:
      path: the new file; its folder is made if need be.
      net: the network description the state was made with.
      state: the network.
      tasks: names of frozen tasks; None takes all of them.
      after: name of a task: the file then is a delta, which holds only what the later tasks add, expansions included.
        `tasks` may leave out later tasks, and name those older ones that the reader has, if it has not all of them.
      weights: how the shared weights are stored. "float32": as they are. "bfloat16" and "int8", with a scale per task
        and channel: rounded; the rounded weights then define the task, and the digests are taken of them. Local
        variables and heads are stored as they are.
      data: `{task: examples}`, as for `evaluate`: what each of these tasks reaches as stored is written down.

    Returns:
      The header as the file has it: `weights`, `width`, `tasks` with digests and what was measured, `owners` counted
      by leaf, `base` of a delta.

    Raises:
      ArgumentError: no task to write, or an option unknown.
      UnknownTaskError: no task of this name.
      PhaseError: a task is not frozen.
      StructureError: the state is not one of this net, or weights that are not finite cannot be rounded.
      ForgettingError: the state is damaged.
      CheckpointError: the file exists, is remote or cannot be written; nothing is left of it.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> for name in ("a", "b"):
      ...     state = pae.pack(net, state, name, head=2, key=jax.random.key(1))
      ...     state = pae.freeze(pae.prune(state, name, 0.5), name)
      >>> folder, x = tempfile.mkdtemp(), jnp.ones((2, 4))
      >>> header = pae.write_bundle(f"{folder}/a", net, state, tasks=["a"])
      >>> header = pae.write_bundle(f"{folder}/b", net, state, after="a")
      >>> device = pae.read_bundle(net, f"{folder}/b", onto=pae.read_bundle(net, f"{folder}/a"))
      >>> bool((pae.predict(net, device, "b", x) == pae.predict(net, state, "b", x)).all())
      True
    """
    path = files.local_path(path)
    integrity.check(state, net)
    return write_state(path, state, tasks, after, weights, lambda whole: _measured(net, whole, dict(data or {})))


def write_state(
    path: str | Path, state: State, tasks: Any, after: str | None, weights: Precision, measure: Any = None
) -> dict[str, Any]:
    """Do the work of `write_bundle` for a state that has been checked; `measure` is called with what is written."""
    check_choice("weights", weights, PRECISIONS)
    listed, have = bundle_tasks.chosen(state, tasks, after)
    integrity.verify(state)
    exact = bundle_tasks.restricted(state, listed)
    whole = bundle_parts.with_precision(exact, weights)
    parts, tensors = bundle_parts.state_parts(whole, exact, have, weights)
    header = {
        "versions": {"pae_jax": __version__} | {package: version(package) for package in _PACKAGES},
        "weights": weights,
        "base": _base(exact, whole, listed[:have], weights) if have else None,
        **parts,
    }
    found = {} if measure is None else measure(whole)
    for name in found:
        if name not in listed[have:]:
            raise UnknownTaskError(name, listed[have:], "the bundle")
    for entry in header["tasks"]:
        entry["measured"] = found.get(entry["name"])
    bundle_file.write(files.local_path(path), header, tensors)
    return header


def _measured(net: Net, state: State, data: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {name: evaluate(net, state, name, examples) for name, examples in data.items()}


def _base(exact: State, whole: State, tasks: list[str], weights: str) -> dict[str, Any]:
    """Describe the state that a delta goes onto: with its weights as they were trained, or as they are stored."""
    states = {"float32": exact, weights: whole}
    base = bundle_tasks.restricted(exact, tasks)
    return {
        "tasks": [{"id": base.tasks[name].id, "name": name} for name in tasks],
        "digests": {
            kind: {name: bundle_parts.task_digest(state, state.tasks[name]) for name in tasks}
            for kind, state in states.items()
        },
        "growth": [bundle_parts.growth_digest(growth) for growth in base.growth],
    }


def read_bundle(
    net: Net, path: str | Path, *, onto: State | None = None, heads: Mapping[str, Any] | None = None
) -> State:
    """Read a bundle; every task's digest is recomputed and compared.

    Args:
      net: the same network description as at writing.
      path: a file written by `write_bundle`.
      onto: for a delta, the state it adds to, with exactly the tasks that came before. It is not changed.
      heads: `{task: Flax module}` for tasks of the file whose head is not a plain number of classes.

    Returns:
      The tasks, and no weight that none of them uses: those are free and 0. With `onto`, all older tasks as well, bit
      for bit.

    Raises:
      CheckpointError: missing or damaged; not a bundle; a newer schema; or `onto` is another state than the one the
        delta was made for: names the task that differs.
      StructureError: the bundle belongs to another model; names the leaf.
      ArgumentError: a delta without `onto`, a whole bundle with it, or a head module is missing.
      ForgettingError: `onto` is damaged.

    Example: see `write_bundle`.
    """
    header, tensors = bundle_file.read(files.local_path(path))
    specs = _specs(header, dict(heads or {}))
    _require_model(net, header, specs)
    state = bundle_reading.assembled(header, tensors, onto, specs)
    layout = layout_of(shared=state.shared, local=net.layout(state.width).local)
    local = onto.local if onto is not None and onto.width == state.width else None
    state = state.replace(layout=layout, local=local)
    integrity.check(state, net)
    return state


def bundle_header(path: str | Path) -> dict[str, Any]:
    """Return what a bundle says of itself; its checksum is right."""
    return bundle_file.read(files.local_path(path))[0]


def open_bundle(path: Path, onto: State | None = None) -> tuple[dict[str, Any], State]:
    """Return header and state of a bundle without its network: all can be checked, nothing computed."""
    header, tensors = bundle_file.read(path)
    heads = {entry["name"]: entry["head"] for entry in header["tasks"]}
    specs = {
        name: bundle_reading.Placeholder.of(head) if isinstance(head, str) else head for name, head in heads.items()
    }
    return header, bundle_reading.assembled(header, tensors, onto, specs)


@bundle_reading.understood()
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


@bundle_reading.understood()
def _require_model(net: Net, header: Mapping[str, Any], specs: Mapping[str, Any]) -> None:
    """Raise `StructureError` unless the bundle's shapes are those of the network; nothing is allocated before."""
    hint = "Is it a bundle of this model?"
    shared, local, variables = bundle_reading.layouts(header)
    require_match("bundle", shared, net.layout(header["width"]).shared, hint)
    for width, tree in local.items():
        require_match(f"local variables at width {width:g}", tree, net.layout(width).local, hint)
    for entry in header["tasks"]:
        expected, _ = heads.layout(net, specs[entry["name"]], entry["width"])
        require_match(f"head of task {entry['name']!r}", variables[entry["name"]], expected, hint)

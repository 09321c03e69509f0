"""Writing a bundle: one small file with some or all tasks of a network, or with what some add to those before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pae_jax import files
from pae_jax.checks import check_choice, check_mapping, local_path
from pae_jax.core import State, check_values, integrity, spread_arrays
from pae_jax.errors import UnknownTaskError
from pae_jax.nets import Net, check_net
from pae_jax.storage.bundle import file, parts
from pae_jax.storage.bundle import tasks as choice
from pae_jax.storage.bundle.values import FLOATING, PRECISIONS, Floating, Precision
from pae_jax.training import evaluate
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
    local: Floating = "float32",
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
      weights: how the shared weights are stored. "float32": as they are. "bfloat16", "float16" and "int8", with a scale
        per task and channel: rounded; the rounded weights then define the task, and the digests are taken of them.
      local: how local variables and heads are stored: "float32", as they are, or rounded to "bfloat16" or "float16".
      data: `{task: examples}`, as for `evaluate`: what each of these tasks reaches as stored is written down.

    Returns:
      The header as the file has it: `weights`, `width`, `tasks` with digests and what was measured, `owners` counted
      by leaf, `base` of a delta.

    Raises:
      ArgumentError: no task to write, or an option unknown.
      UnknownTaskError: no task of this name.
      PhaseError: a task is not frozen.
      StructureError: the state is not one of this net, or values that are not finite, or too large, cannot be rounded.
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
    check_values("write_bundle", state)
    check_net(net)
    spread_arrays.require_here("write_bundle", state)
    integrity.check(state, net)
    examples = check_mapping("data", data, "{task: examples}")
    return write_state(path, state, tasks, after, weights, local, lambda whole: _measured(net, whole, examples))


def write_state(
    path: str | Path,
    state: State,
    tasks: Any,
    after: str | None,
    weights: Precision,
    local: Floating = "float32",
    measure: Any = None,
) -> dict[str, Any]:
    """Do the work of `write_bundle` for a state that has been checked; `measure` is called with what is written."""
    check_choice("weights", weights, PRECISIONS)
    check_choice("local", local, FLOATING)
    place = local_path(path)
    files.require_new(place, "bundle")
    listed, have = choice.chosen(state, tasks, after)
    integrity.verify(state)
    exact = choice.restricted(state, listed)
    whole = parts.with_precision(exact, weights, local)
    described, tensors = parts.state_parts(whole, exact, have, weights, local)
    header = {
        "versions": {"pae_jax": __version__} | {package: version(package) for package in _PACKAGES},
        "weights": weights,
        "local_values": local,
        "base": _base(exact, whole, listed[:have]) if have else None,
        **described,
    }
    found = {} if measure is None else measure(whole)
    for name in found:
        if name not in listed[have:]:
            raise UnknownTaskError(name, listed[have:], "the bundle")
    for entry in header["tasks"]:
        entry["measured"] = found.get(entry["name"])
    file.write(place, header, tensors)
    return header


def _measured(net: Net, state: State, data: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {name: evaluate(net, state, name, examples) for name, examples in data.items()}


def _base(exact: State, whole: State, tasks: list[str]) -> dict[str, Any]:
    """Describe the state that a delta goes onto: with its values as they were trained, or as they are stored."""
    states = {"trained": exact, "stored": whole}
    width = exact.tasks[tasks[-1]].width
    return {
        "tasks": [{"id": exact.tasks[name].id, "name": name} for name in tasks],
        "digests": {
            kind: {name: parts.task_digest(state, state.tasks[name]) for name in tasks}
            for kind, state in states.items()
        },
        "growth": [parts.growth_digest(growth) for growth in exact.growth if growth.wide <= width],
    }

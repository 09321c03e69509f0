"""A certificate: which tasks are bit-identical in two states, and by which digests that was found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from pae_jax.core import State, TaskState, integrity, names, ownership
from pae_jax.errors import ArgumentError
from pae_jax.nets import heads
from pae_jax.trees import flatten
from pae_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


@dataclass(frozen=True)
class TaskProof:
    """What was found of one task.

    Attributes:
      task: name.
      before, after: SHA-256 over all that the task computes with, None where there is no such frozen task.
      arrays: number of arrays compared.
      differing: paths of the arrays that differ.
    """

    task: str
    before: str | None
    after: str | None
    arrays: int
    differing: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether the task computes with the same bits in both states."""
        return self.before is not None and self.before == self.after


@dataclass(frozen=True)
class Certificate:
    """Which tasks are provably bit-identical in two states; `str(certificate)` says it in words.

    Attributes:
      proofs: one `TaskProof` for each task of either state.
      time: when the states were compared, ISO 8601.
      versions: packages that compared them.
    """

    proofs: tuple[TaskProof, ...]
    time: str
    versions: dict[str, str]

    @property
    def identical(self) -> tuple[str, ...]:
        """Names of the tasks that are bit-identical."""
        return tuple(proof.task for proof in self.proofs if proof.identical)

    @property
    def holds(self) -> bool:
        """Whether every frozen task of the first state is bit-identical in the second."""
        return all(proof.identical for proof in self.proofs if proof.before is not None)

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as what JSON can say."""
        tasks = [dataclasses.asdict(proof) | {"identical": proof.identical} for proof in self.proofs]
        return {"holds": self.holds, "time": self.time, "versions": self.versions, "tasks": tasks}

    def __str__(self) -> str:
        before = [proof for proof in self.proofs if proof.before is not None]
        same = sum(proof.identical for proof in before)
        lines = [f"{same} of {len(before)} frozen tasks are bit-identical, compared on {self.time}"]
        lines += [f"- {_sentence(proof)}" for proof in self.proofs]
        lines.append("Each digest covers the weights the task uses, its local variables, its head and its settings.")
        lines.append("With the same program on the same kind of machine, equal digests mean equal answers.")
        lines.append(", ".join(f"{name} {number}" for name, number in self.versions.items()))
        return "\n".join(lines)


def _sentence(proof: TaskProof) -> str:
    if proof.before is None:
        return f"{proof.task}: new, SHA-256 {proof.after}"
    if proof.after is None:
        return f"{proof.task}: no longer there, SHA-256 was {proof.before}"
    if proof.identical:
        return f"{proof.task}: identical in all {proof.arrays} arrays, SHA-256 {proof.after}"
    first, *more = proof.differing
    others = f" and {len(more)} more" if more else ""
    return f"{proof.task}: NOT identical, '{first}'{others} differ, SHA-256 {proof.before}, now {proof.after}"


def certificate(before: State, after: State, *, time: datetime | str | None = None) -> Certificate:
    """Compare what each frozen task computes with in two states, bit for bit.

    All digests are taken of the arrays themselves, at the task's own width: the weights that the task sees, with 0
    where it sees none, its local variables and its head. So ids may have closed up, and owners may have been joined by
    a bundle of some tasks, without a difference.

    Args:
      before: the network at first; its recorded digests are verified.
      after: the network later, or on another machine; its recorded digests are verified.
      time: what the certificate says of when; None reads the clock once.

    Returns:
      A `Certificate`; tasks that are not frozen have no part in it.

    Raises:
      ForgettingError: one of the states is not even what its own digests say.
      StructureError: one of them breaks a structural law.
      ArgumentError: the time is neither a text nor a `datetime`.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> state = pae.freeze(pae.prune(state, "a", 0.5), "a")
      >>> later = pae.pack(net, state, "b", head=2, key=jax.random.key(2))
      >>> found = pae.certificate(state, later, time="2026-01-01")
      >>> found.holds, found.identical
      (True, ('a',))
    """
    if time is not None and not isinstance(time, (str, datetime)):
        raise ArgumentError(f"time must be a text, a datetime or None, found {time!r}")
    for state in (before, after):
        integrity.check(state)
        integrity.verify(state)
    moment = datetime.now(UTC) if time is None else time
    text = moment if isinstance(moment, str) else moment.isoformat(timespec="seconds")
    versions = {"pae_jax": __version__} | {package: version(package) for package in _PACKAGES}
    order = [*names(before), *(name for name in names(after) if name not in before.tasks)]
    found = [_proof(name, before, after) for name in order]
    return Certificate(tuple(proof for proof in found if proof.before or proof.after), text, versions)


def _proof(task: str, before: State, after: State) -> TaskProof:
    old, new = (_digests(state, state.tasks.get(task)) for state in (before, after))
    differing = tuple(sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path)))
    return TaskProof(task, _whole(old), _whole(new), len(old or new), differing if old and new else ())


def _digests(state: State, entry: TaskState | None) -> dict[str, str]:
    """Return the SHA-256 of everything a task computes with; {} for one that is not there or not frozen."""
    if entry is None or not entry.frozen:
        return {}
    settings = json.dumps([entry.width, heads.describe(entry.head_spec)])
    trees = {"weights": ownership.task_weights(state, entry), "local": entry.local, "head": entry.head}
    arrays = {f"{part}/{path}": leaf for part, tree in trees.items() for path, leaf in flatten(tree).items()}
    return {
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
        **{path: integrity.array_digest(leaf) for path, leaf in arrays.items()},
    }


def _whole(digests: dict[str, str]) -> str | None:
    text = json.dumps(sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest() if digests else None

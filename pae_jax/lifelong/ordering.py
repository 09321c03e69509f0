"""The order in which the tasks of a stream are learned: as given, by name, or drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from pae_jax.checks import check_key
from pae_jax.errors import ArgumentError, kind_of
from pae_jax.lifelong.task import Task, require_task


class _Reordered(Sequence):
    """A sequence in another order, whose items are created on access."""

    def __init__(self, items: Sequence[Any], positions: list[int]):
        self._items, self._positions = items, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        return self._items[self._positions[index]]

    def __iter__(self) -> Iterator[Any]:
        return (self._items[position] for position in self._positions)


def in_order(tasks: Sequence[Task], order: Sequence[str] | jax.Array | None) -> tuple[Sequence[Task], list[int]]:
    """Return tasks in the order of learning, and their positions before.

    Args:
      tasks: as they were passed; checked later, but for what an order needs.
      order: names, a random key, or None.

    Raises:
      ArgumentError: an order that is neither, or names that are not those of the tasks.
    """
    if not hasattr(tasks, "__len__") or isinstance(tasks, (Mapping, str)):
        raise ArgumentError(f"tasks must be a sequence, whose length is known; found {kind_of(tasks)}")
    listed = isinstance(tasks, (list, tuple))
    for number, task in enumerate(tasks if listed else ()):
        require_task(task, f"tasks[{number}]")
    positions = _positions([task.name for task in tasks] if listed else [], len(tasks), order, listed)
    if order is None:
        return tasks, positions
    return [tasks[position] for position in positions] if listed else _Reordered(tasks, positions), positions


def as_passed(tasks: Sequence[Task], positions: list[int]) -> list[str] | int:
    """Return the names of tasks as they were passed, or their number where they are created on access."""
    if not isinstance(tasks, (list, tuple)):
        return len(positions)
    names = dict(zip(positions, (task.name for task in tasks), strict=True))
    return [names[position] for position in range(len(names))]


def _positions(names: list[str], count: int, order: Any, listed: bool) -> list[int]:
    if order is None:
        return list(range(count))
    if isinstance(order, jax.Array):
        return jax.random.permutation(check_key(order), count).tolist()
    named = isinstance(order, Sequence) and not isinstance(order, str) and all(isinstance(one, str) for one in order)
    if not named:
        raise ArgumentError(f"order must be the names of all tasks or a random key, found {order!r}")
    if not listed:
        raise ArgumentError(
            "order by name needs a list of tasks, whose names are known; pass a random key, or sort them"
        )
    if sorted(order) != sorted(names):
        differing = sorted({*order} ^ {*names}) or sorted({name for name in order if list(order).count(name) > 1})
        raise ArgumentError(
            f"order must hold each of the {count} tasks once, found {len(order)} names; first difference: "
            f"{differing[0]!r}"
        )
    return [names.index(name) for name in order]

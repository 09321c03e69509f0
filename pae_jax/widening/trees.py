"""The outline of a pytree as plain nested tuples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from pae_jax.trees import path_name

Skeleton = tuple[Any, ...]


def skeleton(tree: Any) -> Skeleton:
    """Outline of a tree of tuples, lists and dicts; nodes of other types count as dicts of their children's names."""
    return _skeleton(tree, iter(range(len(jax.tree.leaves(tree)))))


def _skeleton(tree: Any, numbers: Any) -> Skeleton:
    if tree is None:
        return ("none",)
    if jax.tree_util.all_leaves([tree]):
        return ("leaf", next(numbers))
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    parts = [_skeleton(child, numbers) for _, child in children]
    if type(tree) in (tuple, list):
        return (type(tree).__name__, *parts)
    return ("dict", *((path_name(path), part) for (path, _), part in zip(children, parts, strict=True)))


def rebuild(outline: Skeleton, leaves: Sequence[Any]) -> Any:
    """The tree of this outline with the given leaves."""
    kind, *parts = outline
    match kind:
        case "none":
            return None
        case "leaf":
            return leaves[parts[0]]
        case "dict":
            return {name: rebuild(part, leaves) for name, part in parts}
        case _:
            return (tuple if kind == "tuple" else list)(rebuild(part, leaves) for part in parts)

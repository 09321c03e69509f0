"""Trees of arrays: leaf paths, strict comparison, and the split of variables into shared and local ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from pae_jax.errors import StructureError

Tree = Any
"""A nested dict of arrays."""

PARAMS = "params"
"""Name of the collection that the optimizer trains, in Linen and, by our NNX adapter, in NNX."""


def path_name(path: Any) -> str:
    """Return a key path as text, `"params/Conv_0/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Return `{path: leaf}` in flattening order, paths as text."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def describe(leaf: Any) -> str:
    """Return dtype and shape of a leaf as text, `float32[3,3,1,8]`."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    text = repr(leaf)
    return f"{type(leaf).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def listing(names: Sequence[str]) -> str:
    """Return the first names of a list in parentheses, to put behind their number."""
    shown = ", ".join(repr(name) for name in names[:3])
    return f" ({shown}{', ...' if len(names) > 3 else ''})" if names else ""


def sketch(tree: Tree, entries: int = 4) -> str:
    """Return a one-line summary of a tree, `{image: float32[8,4], mask: ...}`, of limited length."""
    if isinstance(tree, dict):
        shown = [f"{name}: {sketch(child, 2)}" for name, child in list(tree.items())[:entries]]
        return "{" + ", ".join(shown + ["..."] * (len(tree) > entries)) + "}"
    if isinstance(tree, (tuple, list)) and tree:
        kind, count = type(tree).__name__, len(tree)
        shown = [sketch(child, 2) for child in tree[:entries]]
        return f"{kind} of {count} ({', '.join(shown + ['...'] * (count > entries))})"
    return describe(tree)


def abstract(tree: Tree) -> Tree:
    """Return the tree with every array replaced by its shape and dtype."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


def require_match(name: str, tree: Tree, expected: Tree, hint: str = "") -> None:
    """Raise `StructureError` unless two trees have the same paths, shapes and dtypes.

    Args:
      name: name of the tree in the error message.
      tree: tree of arrays, concrete or abstract.
      expected: tree of arrays, concrete or abstract.
      hint: last sentence of the message, which says what to do.
    """
    found_leaves, expected_leaves = flatten(tree), flatten(expected)
    for path in expected_leaves:
        if path not in found_leaves:
            raise StructureError(name, path, "nothing", describe(expected_leaves[path]), hint)
    for path, leaf in found_leaves.items():
        if path not in expected_leaves:
            raise StructureError(name, path, describe(leaf), "nothing", hint)
        wanted = expected_leaves[path]
        same = getattr(leaf, "shape", None) == wanted.shape and getattr(leaf, "dtype", None) == wanted.dtype
        if not same:
            raise StructureError(name, path, describe(leaf), describe(wanted), hint)
    if jax.tree.structure(tree) != jax.tree.structure(expected):
        # Same paths, but different containers: a list for a dict, or an empty branch.
        raise StructureError(name, "", jax.tree.structure(tree), jax.tree.structure(expected), hint)


def split(variables: Mapping[str, Tree], is_shared: Callable[[str, Any], bool]) -> tuple[Tree, Tree]:
    """Split variables into the shared weights and the local variables.

    Args:
      variables: `{collection: nested dict of leaves}`, as Flax gives them.
      is_shared: predicate of path inside `params` and leaf.

    Returns:
      `(shared, local)`: a nested dict of the shared leaves of `params`, and the variables without them. Empty
      branches are left out on both sides, so both trees are determined by their leaves.
    """
    shared, local = {}, {}
    for path, leaf in traverse_util.flatten_dict(dict(variables)).items():
        if path[0] == PARAMS and is_shared("/".join(path[1:]), leaf):
            shared[path[1:]] = leaf
        else:
            local[path] = leaf
    return traverse_util.unflatten_dict(shared), traverse_util.unflatten_dict(local)


def merge(shared: Tree, local: Tree) -> Tree:
    """Join the two results of `split`."""
    flat = {(PARAMS, *path): leaf for path, leaf in traverse_util.flatten_dict(shared).items()}
    return traverse_util.unflatten_dict({**traverse_util.flatten_dict(local), **flat})

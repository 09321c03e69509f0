"""Convert variables of a model in any Flax form to plain nested dicts, and check that they fit a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta, unfreeze

from pae_jax.errors import ArgumentError, StructureError
from pae_jax.nets.network import Net
from pae_jax.nets.nnx import variables_of
from pae_jax.trees import PARAMS, Tree, describe, flatten, listing, merge, require_match


def plain_variables(variables: Any) -> dict[str, Tree]:
    """Return the variables of a module as nested dicts: unboxed, unfrozen, extracted from NNX modules and states.

    None, empty branches and collections of sown values are left out.
    """
    if isinstance(variables, (nnx.Module, nnx.State)):
        return variables_of(variables)
    if not isinstance(variables, Mapping):
        raise StructureError("variables", "", describe(variables), "{collection: nested dict}, or an NNX module")
    plain = {}
    for name, tree in meta.unbox(unfreeze(dict(variables))).items():
        found = _named(nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree)
        if name == PARAMS or not _is_sown(found):
            plain[str(name)] = found
    return plain


def _named(tree: Any) -> Any:
    """Return nested dicts whose keys are strings; NNX uses integers for list items."""
    if isinstance(tree, nnx.Variable):
        return tree.get_value()
    if not isinstance(tree, Mapping):
        return tree
    found = {str(name): _named(child) for name, child in tree.items() if child is not None}
    return {name: child for name, child in found.items() if not isinstance(child, dict) or child}


def _is_sown(tree: Any) -> bool:
    """Whether every leaf of a collection is in a tuple, as `sow` stores them."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return bool(paths) and all(path and isinstance(path[-1], jax.tree_util.SequenceKey) for path in paths)


def own_variables(net: Net, variables: Any, width: float, dtype: Any = None) -> dict[str, Tree]:
    """Return variables as arrays of JAX in a network's own structure, shapes and dtypes.

    Args:
      net: the network.
      variables: as for `plain_variables`; from the variables of a whole task, as `as_flax` returns them, the backbone
        is used.
      width: channel factor they belong to.
      dtype: floating leaves are cast to it first; None does not cast.

    Raises:
      StructureError: leaves, shapes or dtypes differ; says which.
      ArgumentError: a dtype that is not floating.
    """
    layout = net.layout(width)
    expected = merge(layout.shared, layout.local)
    plain = _backbone(plain_variables(variables), expected)
    if dtype is not None:
        plain = _cast(plain, dtype)
    require_match("variables", plain, expected, _advice(flatten(plain), flatten(expected)))
    return jax.tree.map(jnp.array, plain)


def _cast(tree: Tree, dtype: Any) -> Tree:
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        raise ArgumentError(f"dtype must be a floating dtype, such as jnp.float32, found {dtype!r}") from None
    if not jnp.issubdtype(wanted, jnp.floating):
        raise ArgumentError(f"dtype must be a floating dtype, such as jnp.float32, found {wanted}")

    def cast(leaf: Any) -> Any:
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        return array.astype(wanted) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree.map(cast, tree)


def _backbone(plain: dict[str, Tree], expected: Tree) -> dict[str, Tree]:
    """Take the backbone out of the variables of a whole task."""
    parts = {"backbone", "head"}
    params = plain.get(PARAMS)
    if not isinstance(params, Mapping) or "backbone" not in params or "backbone" in expected[PARAMS]:
        return plain
    found = {name: tree for name, tree in plain.items() if isinstance(tree, Mapping) and set(tree) <= parts}
    return {name: tree["backbone"] for name, tree in found.items() if "backbone" in tree}


def _advice(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return all that is missing or unexpected, and what to do."""
    missing = [path for path in wanted if path not in found]
    extra = [path for path in found if path not in wanted]
    if found and {f"{PARAMS}/{path}" for path in found} <= wanted.keys():
        return 'These are the parameters alone: pass {"params": ...}, and other collections of the model beside it.'
    other = [path for path in wanted if path in found and getattr(found[path], "dtype", None) != wanted[path].dtype]
    if other and all(jnp.issubdtype(np.asarray(found[path]).dtype, jnp.floating) for path in other):
        return "To cast floating leaves, pass dtype=, such as dtype=jnp.float32."
    text = "The variables must come from the same model at the same width."
    if len(missing) + len(extra) > 1:
        counts = f"{len(missing)} leaves are missing{listing(missing)} and {len(extra)} unexpected{listing(extra)}"
        text = f"In all {counts}. {text}"
    return text

"""A train state as bytes: placeholders for functions that pickle cannot keep, and the state dict of Flax."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp

from pae_jax.errors import ArgumentError
from pae_jax.trees import flatten, require_match


class LeftOut:
    """Placeholder for a function that cannot be pickled; set the function again by `replace`."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise ArgumentError(
            f"this TrainState was unpickled without its {self.name}, which pickle cannot keep: put it back by "
            f"ts.replace({self.name}=...)"
        )


def picklable(value: Any, name: str) -> Any:
    try:
        pickle.dumps(value)
    except Exception:  # pickle raises many types
        return LeftOut(name)
    return value


def to_state_dict(ts: Any) -> dict[str, jax.Array]:
    """Return the arrays of a train state by their paths, for `flax.serialization`; random keys as their data."""
    return {path: jax.random.key_data(leaf) if _is_key(leaf) else leaf for path, leaf in flatten(ts).items()}


def from_state_dict(ts: Any, arrays: dict[str, Any]) -> Any:
    """Return a train state of the same task and optimizer with other arrays, as `to_state_dict` returned them."""
    hint = "The train state to fill must be created for the same task, with the same optimizer and parts."
    require_match("train state", arrays, to_state_dict(ts), hint)

    def restored(path: str, leaf: jax.Array) -> jax.Array:
        found = jnp.asarray(arrays[path])
        return jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else found

    return jax.tree.unflatten(jax.tree.structure(ts), [restored(path, leaf) for path, leaf in flatten(ts).items()])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

"""What a task's program is, as a short text that a stage keeps."""

from __future__ import annotations

from typing import Any

import flax
import jax

from pae_jax.caching import Cache, program_text
from pae_jax.errors import StructureError
from pae_jax.nets import heads
from pae_jax.nets.forward import task_function
from pae_jax.nets.network import Net
from pae_jax.trees import Tree, describe, flatten

_KNOWN = Cache(64)
_ROWS = 2
_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_threefry_partitionable")


def fingerprint(net: Net, width: float, head: Any) -> str:
    """Return `digest by circumstances` of a task's program in evaluation.

    Only digests under the same circumstances can be compared: versions, backend, settings of JAX, sizes of the inputs.
    """
    sample = _sample(net)
    found = [jax.__version__, flax.__version__, jax.default_backend()]
    found += [str(getattr(jax.config, name, None)) for name in _OPTIONS]
    found += [describe(leaf) for leaf in flatten(sample).values()]

    def make() -> str:
        layout, (variables, _) = net.layout(width), heads.layout(net, head, width)
        return program_text(task_function(net, width, head), layout.shared, layout.local, variables, sample)[:16]

    key = (net, width, heads.key_of(head), tuple(found))
    return f"{_KNOWN.get(key, make)} by {' '.join(found)}"


def require_program(net: Net, width: float, head: Any, task: str, known: str) -> None:
    """Raise `StructureError` if a task was packed with another program, as far as the circumstances are the same.

    Args:
      net: the network description.
      width: of the task.
      head: of the task.
      task: its name.
      known: its fingerprint; empty if there is none.
    """
    if not known:
        return
    now = fingerprint(net, width, head)
    if now != known and now.partition(" by ")[2] == known.partition(" by ")[2]:
        raise StructureError(
            f"program of task {task!r}",
            "",
            f"digest {now[:16]}",
            f"{known[:16]}: the model or the head computes otherwise than the one it was packed with",
            "Use that one, or pass same_program=False to take the weights all the same.",
        )


def _sample(net: Net) -> Tree:
    """Return the sample's shapes, for a fixed number of examples where that does not matter."""

    def sized(leaf: Any) -> jax.ShapeDtypeStruct:
        rows = leaf.shape[0] if net.couples_examples else _ROWS
        return jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.map(sized, net.sample)

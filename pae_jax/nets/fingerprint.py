"""What a task's program is, as a short text that a stage keeps."""

from __future__ import annotations

import platform
import re
from typing import Any

import flax
import jax
import numpy as np

from pae_jax.caching import jax_settings
from pae_jax.errors import StructureError
from pae_jax.nets.answers import program_digest
from pae_jax.nets.network import Net

_DTYPE = re.compile(r"\w+(?=\[)")


def fingerprint(net: Net, width: float, head: Any) -> str:
    """Return `digest by circumstances` of a task's program in evaluation.

    Only digests under the same circumstances can be compared: versions, machine, settings of JAX, sizes of the inputs.
    Under these, inputs of another dtype are another program.
    """
    first = 0 if net.couples_examples else 1
    inputs = [f"{leaf.dtype}{list(leaf.shape[first:])}" for leaf in jax.tree.leaves(net.sample)]
    # NumPy may have made constants of the program, which another machine may round otherwise.
    versions = [jax.__version__, flax.__version__, np.__version__, platform.machine(), jax.default_backend()]
    found = [*versions, *map(str, jax_settings().values()), *inputs]
    return f"{program_digest(net, head, width)} by {' '.join(found)}"


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
    here, there = (_DTYPE.sub("", text.partition(" by ")[2]) for text in (now, known))
    if now == known or here != there:
        return
    dtypes, before = (", ".join(_DTYPE.findall(text)) for text in (now, known))
    if dtypes != before:
        found, expected, remedy = f"inputs of {dtypes}", before, "Make the net with such a sample"
        expected += ", by which it was packed"
    else:
        found, expected, remedy = f"digest {now[:16]}", known[:16], "Use that one"
        expected += ": the model or the head computes otherwise than the one it was packed with"
    hint = f"{remedy}, or pass same_program=False to take the weights all the same."
    raise StructureError(f"program of task {task!r}", "", found, expected, hint)

"""`Session`: settings shared by all tasks of one call of the lifelong loop."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import jax

from pae_jax.lifelong.recipes import Recipe
from pae_jax.lifelong.run_folder import Run
from pae_jax.nets import Net
from pae_jax.processes import Processes
from pae_jax.training import Devices


@dataclass(frozen=True)
class Session:
    """Settings shared by all tasks of one call of `learn`, `learn_all` or `baseline`.

    Attributes:
      net: the network description.
      recipe: settings of the loop.
      key: random key of the whole stream.
      run: run folder, so that the call can be resumed; None keeps everything in memory.
      devices: where to train.
      progress: whether to show progress bars.
      processes: those that share the call.
    """

    net: Net
    recipe: Recipe
    key: jax.Array
    run: Run | None
    devices: Devices
    progress: bool
    processes: Processes

    def stage_key(self, task: str, stage: str) -> jax.Array:
        """Return the random key of a stage."""
        return stage_key(self.key, task, stage)


def stage_key(key: jax.Array, task: str, stage: str) -> jax.Array:
    """Return the random key of a stage; it depends only on names, so a resumed run draws the same numbers."""
    of_task = jax.random.fold_in(key, zlib.crc32(task.encode(errors="surrogatepass")))
    return jax.random.fold_in(of_task, zlib.crc32(stage.encode()))

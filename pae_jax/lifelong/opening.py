"""What a call to learn opens and closes: a session of all processes, and what learns a task with its folder held."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from pae_jax.checks import check_key, check_kind
from pae_jax.core import State
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.one_task import Learner
from pae_jax.lifelong.recipes import Recipe
from pae_jax.lifelong.run_folder import Run
from pae_jax.lifelong.session import Session
from pae_jax.lifelong.settings import settings_of
from pae_jax.lifelong.task import CheckedTask
from pae_jax.nets import Net, check_net
from pae_jax.processes import together
from pae_jax.training import Devices, devices_of


@contextlib.contextmanager
def open_session(
    net: Net, recipe: Recipe, key: jax.Array, run: Run | None, devices: Devices | Mesh | None, progress: bool
) -> Iterator[Session]:
    """Yield the settings of a call, which all processes that own the devices make."""
    check_net(net)
    check_kind("recipe", recipe, Recipe, "of type Recipe, such as pae.recipes.pae()")
    where = devices_of(devices)
    owners = None if where.mesh is None else where.mesh.devices.flatten()
    if run is not None:
        check_kind("run", run, Run, "of type Run: pae.Run(folder)")
        _require_all(owners)
    with together("learn", owners) as processes:
        yield Session(net, recipe, check_key(key), run, where, progress and processes.first, processes)


def _require_all(devices: Iterable[Any] | None) -> None:
    """Raise `ArgumentError` if some processes of this job alone would write a run folder."""
    found = 1 if devices is None else len({device.process_index for device in devices})
    if found != jax.process_count():
        raise ArgumentError(
            f"run= in a job of {jax.process_count()} processes needs devices= of all of them, found {found}. "
            "Pass pae.Devices(jax.make_mesh((jax.device_count(),), ('data',))), or learn without run=."
        )


@contextlib.contextmanager
def open_learner(
    session: Session,
    checked: CheckedTask,
    state: State,
    goal: float | None,
    upcoming: int | None,
    name: str,
    title: str,
) -> Iterator[Learner]:
    """Yield what learns a task, with its folder held if there is a run."""
    with contextlib.ExitStack() as stack:
        folder = None
        if session.run is not None or not session.processes.alone:
            settings = settings_of(session, checked, state, goal, upcoming, title)
            session.processes.require_same(f"task {title}", settings)
            if session.run is not None:
                folder = stack.enter_context(session.run.task_folder(name, settings, session.processes))
        yield Learner(session, checked, state, goal, upcoming, folder, title)

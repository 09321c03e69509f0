"""A task's own network: the recipe's training without anything else, from scratch or from an earlier task."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import jax
from jax.sharding import Mesh

from pae_jax.core import State, check_state, find, from_variables, init, names, task_variables
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.opening import open_learner, open_session
from pae_jax.lifelong.phases import WEIGHTS
from pae_jax.lifelong.preconditions import check_place, check_task
from pae_jax.lifelong.recipes import Recipe
from pae_jax.lifelong.run_folder import Run, folder_name
from pae_jax.lifelong.session import Session
from pae_jax.lifelong.task import CheckedTask, Task, require_task
from pae_jax.nets import Net
from pae_jax.training import Devices

_STARTS = 5  # own networks that a goal of finetuning averages over; CPG's scripts take 5


def baseline(
    net: Net,
    task: Task,
    recipe: Recipe,
    *,
    key: jax.Array,
    run: Run | None = None,
    start: State | None = None,
    devices: Devices | Mesh | None = None,
    progress: bool = False,
) -> float:
    """Return the validation metric of the task's own network: the recipe's training without anything else.

    Args:
      net: the network description.
      task: what to learn.
      recipe: its `head_first`, `train` and `batch_size` are used; nothing is pruned and nothing grows.
      key: random key.
      run: folder that keeps the network, in `baseline-<task>`; asked again, it is not trained again.
      start: a network without tasks to start from, such as a pretrained one, which trains the recipe's `parts`; None
        draws one at width 1, which trains as a whole.
      devices: as for `fit`; a run may go on with another number of devices and processes.
      progress: show progress bars.

    Returns:
      The metric on validation data.

    Raises:
      ArgumentError: no validation data, a start that has tasks, or a training that met values that are not finite.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> x = jax.random.normal(jax.random.key(2), (64, 4))
      >>> data = (x, (x[:, 0] > 0).astype(int))
      >>> recipe = pae.Recipe("quick", train=pae.recipes.Phase(30, pae.recipes.Rate(0.03)))
      >>> task = pae.Task("sign", head=2, train=data, val=data)
      >>> pae.baseline(net, task, recipe, key=jax.random.key(0)) > 0.9
      True
    """
    with open_session(net, recipe, key, run, devices, progress) as session:
        require_task(task)
        if start is not None:
            _require_no_tasks(start)
        return _own_value(session, task, start)


def _require_no_tasks(start: State) -> None:
    check_state(start)
    if start.tasks:
        raise ArgumentError(
            f"start has the tasks {', '.join(names(start))}, and a task's own network has none: pass the backbone "
            "of one, pae.from_variables(net, pae.task_variables(net, start, name)['backbone'], start.tasks[name].width)"
        )


def _own_value(
    session: Session, task: Task, start: State | None, earlier: str = "", checked: CheckedTask | None = None
) -> float:
    """Return the metric of a task's own network, from disk if it is there; train it otherwise."""
    recipe = session.recipe
    train = recipe.finetune if earlier and recipe.finetune is not None else recipe.train
    # A network that is drawn anew trains as a whole; so does one whose recipe leaves the shared weights to the picks.
    whole = start is None or "shared" not in recipe.train.parts
    parts = WEIGHTS if whole else recipe.train.parts
    alone = replace(
        recipe,
        name=f"own network of {recipe.name}",
        train=replace(train, pick_rate=None, lone_pick_rate=None, parts=parts),
        sharing="all",
        picking=None,
        picks_from="own",
        head_first=None if recipe.head_first is None or recipe.head_first.pick_rate else recipe.head_first,
        ladder=None,
        retrain=None,
        finetune=None,
        budget=None,
        goal=None,
        expansion=None,
        first=None,
    )
    session = replace(session, recipe=alone)
    if start is None:
        start = init(session.net, session.stage_key(task.name, "init"))
    if task.val is None:
        raise ArgumentError(f"task {task.name!r} has no validation data; a baseline is measured on it")
    if checked is None:
        check_place(session.net, start, task, session.run)
        checked = check_task(session.net, start, task, alone, None, None, session.devices)
    name, title = folder_name("baseline-", task.name), f"{task.name} (own network)"
    if earlier:
        name = folder_name(f"finetune-{zlib.crc32(earlier.encode(errors='surrogatepass')):08x}-", task.name)
        title = f"{task.name} (own network from {earlier})"
    with open_learner(session, checked, start, None, None, name, title) as learner:
        known = learner.finished_value()
        if known is not None:
            return known
        found = learner.learn()
    if not found.status.added:
        raise ArgumentError(f"the own network of task {found.task!r} {found.status.value}: lower its learning rate")
    return found.value


def own_goal(session: Session, state: State, checked: CheckedTask, kind: str) -> float:
    """Return the metric of a task's own network, or mean or best of those that start from earlier tasks."""
    task = checked.task
    if kind == "baseline" or not state.tasks:
        return _finite(_own_value(session, task, None, checked=checked), task)
    earlier = names(state)
    order = jax.random.permutation(session.stage_key(task.name, kind), len(earlier)).tolist()
    values = []
    for name in (earlier[number] for number in order[:_STARTS]):
        start = from_variables(
            session.net, task_variables(session.net, state, name)["backbone"], find(state, name).width
        )
        values.append(_own_value(session, task, start, name, checked))
    return _finite(
        sum(values) / len(values) if kind == "finetune_average" else max(values, key=task.metric.score), task
    )


def _finite(value: float, task: Task) -> float:
    """Return a goal, or raise `ArgumentError` if no network can be compared with it."""
    if not math.isfinite(value):
        raise ArgumentError(
            f"the goal of task {task.name!r} is its own network's {task.metric.name!r}, which is {value}: give goal= a "
            "number, or measure on validation data with a finite value"
        )
    return value

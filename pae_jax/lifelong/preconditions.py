"""Checks made before a lifelong run computes or writes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pae_jax.checks import check_count, check_mapping, check_number
from pae_jax.core import MAX_TASKS, State, find, integrity, names, newest, require_expandable, spread_arrays
from pae_jax.errors import ArgumentError, CapacityError, PhaseError
from pae_jax.lifelong.policy import next_width, starting_width
from pae_jax.lifelong.recipes import Ladder, Recipe
from pae_jax.lifelong.run_folder import Run, folder_name
from pae_jax.lifelong.settings import facts_of
from pae_jax.lifelong.task import CheckedTask, Task, require_task
from pae_jax.nets import Net, heads
from pae_jax.training import Devices, require_classes


def recipe_for(state: State, recipe: Recipe) -> Recipe:
    """Return the recipe of the next task of a network."""
    return recipe.first if recipe.first is not None and not state.tasks else recipe


def check_place(net: Net, state: State, task: Task, run: Run | None = None) -> None:
    """Check that a network can take a task of this name, and that a run can keep its stages."""
    require_task(task)
    if run is not None and spread_arrays.over_processes(state):
        raise ArgumentError(
            "run= needs arrays that each process holds whole, and those of this network are spread over several "
            "processes. Learn without run= and pae.save the outcome in all of them, or pae.load the network whole."
        )
    integrity.check(state)
    last = newest(state)
    integrity.require_own_net(net, state, [] if last is None else [find(state, last)])
    if last is not None and not state.tasks[last].frozen:
        raise PhaseError(f"learn of {task.name!r}", last, "packed but not frozen", "fit, prune, freeze or drop")
    if len(state.tasks) >= MAX_TASKS:
        raise CapacityError(f"a network holds at most {MAX_TASKS} tasks; use a second one")
    if task.name in state.tasks:
        raise ArgumentError(
            f"task {task.name!r} exists already; tasks: {', '.join(names(state))}. Choose another name."
        )


def check_task(
    net: Net,
    state: State,
    task: Task,
    recipe: Recipe,
    goal: float | None = None,
    upcoming: int | None = None,
    devices: Devices | None = None,
    first: bool = True,
) -> CheckedTask:
    """Check a task, its data and its goal against a recipe; return the checked task.

    Args:
      net: the network description.
      state: the network before this task, or before the stream that it belongs to.
      task: what to learn.
      recipe: settings of the loop.
      goal: value to reach; None takes the recipe's.
      upcoming: tasks still to come after this one.
      devices: where it will be trained.
      first: whether it is the next task of this network, not a later one of a stream.
    """
    rule = recipe.picking
    if rule is not None and rule.top is not None and not rule.own and first and not state.tasks:
        raise ArgumentError(
            f"recipe {recipe.name!r} picks among older weights, and the network has none; give the random ones to "
            "a task: state = pae.freeze(pae.pack(net, state, 'random', head=None, key=key), 'random')"
        )
    if recipe.local_init == "backbone" and state.local is None and (state.tasks or not first):
        raise ArgumentError(
            f"recipe {recipe.name!r} starts task {task.name!r} from the backbone's local variables, which this "
            "network, from a bundle or an old stage, lacks: use Recipe(local_init=) 'fresh', 'newest' or 'nearest'"
        )
    heads.layout(net, heads.check_head(task.head), state.width)
    if goal is not None:
        check_number("goal", goal)
    if task.metric.measure is None:
        _check_accuracies(recipe, goal)
    if upcoming is not None:
        check_count("upcoming", upcoming, 0)
    ladder, retrains = recipe.ladder, recipe.retrain is not None and bool(state.tasks or not first)
    chooses = goal is not None or recipe.goal is not None or (ladder is not None and ladder.choose != "last")
    if task.val is None and (chooses or retrains or any(phase.plateau for phase in recipe.phases)):
        raise ArgumentError(
            f"task {task.name!r} has no validation data, but recipe {recipe.name!r} chooses by it: hold out a part of "
            "the training data as val="
        )
    if goal is not None or recipe.goal is not None:
        _check_gain(task, ladder)
    if task.train is None:
        raise ArgumentError(f"task {task.name!r} has no training data: train=None")
    floored = any(part is not None and part.floor is not None for part in (ladder, recipe.expansion))
    checked = CheckedTask.of(net, task, state.width, recipe.batch_size, floored)
    assert checked.train is not None
    for part in (checked.val, checked.test, checked.train if floored else None):
        checked.check_accuracy(part, state.width)
    if (
        "nearest" in (recipe.picks_from, recipe.local_init)
        and checked.train.arrays is not None
        and task.augment is None
    ):
        require_classes(checked.train.arrays[1])
    if devices is not None and checked.train.arrays is not None:
        devices.check_batch(checked.train.size(recipe.batch_size))
    if checked.train.steps is None and (
        (ladder is not None and ladder.ramp) or any(phase.needs_steps for phase in recipe.phases)
    ):
        raise ArgumentError(
            f"task {task.name!r}: the training data has no length, so the epochs of a rate or a ramp have no number of "
            "steps; give data with a length, or constant rates and ramp=0"
        )
    checked.check_objective(state.width, recipe.batch_size)
    if first:
        _check_expansion(net, state, recipe, goal)
    return replace(checked, facts=facts_of(task, recipe))


def _check_expansion(net: Net, state: State, recipe: Recipe, goal: float | None) -> None:
    """Raise `NotPreservableError` if the recipe may have to expand a network that cannot be."""
    width = starting_width(net, state, recipe)
    if width == state.width and recipe.expansion is not None:
        aims = goal is not None or recipe.goal is not None or recipe.expansion.floor is not None
        width = next_width(net, state.width, recipe.expansion) if aims else None
    if width is not None and width > state.width:
        otherwise = f"keep the width: dataclasses.replace(recipe, expansion=None) of recipe {recipe.name!r}"
        require_expandable(net, state.width, width, otherwise)


def _check_gain(task: Task, ladder: Ladder | None) -> None:
    """Raise `ArgumentError` if no epoch of a rung would have the metric that the goal is compared with."""
    if ladder is None or ladder.gain is None or task.metric.measure is None:
        return
    if ladder.phase.keep == "last":
        raise ArgumentError(
            f"Ladder(gain=) compares epochs with the goal of task {task.name!r}, but {task.metric.name!r} is not "
            "measured in a Phase(keep='last'): use keep='best', or gain=None"
        )


def _check_accuracies(recipe: Recipe, goal: float | None) -> None:
    """Raise `ArgumentError` if an accuracy, which is a fraction, is given in per cent."""
    for value in (goal, recipe.goal):
        if isinstance(value, (int, float)) and not 0.0 <= value <= 1.0:
            raise ArgumentError(f"goal is {value:g}, but an accuracy lies in [0, 1]: 90 per cent is 0.9")
    if recipe.tolerance >= 1.0:
        raise ArgumentError(f"tolerance is {recipe.tolerance:g} of an accuracy, so anything passes: 1 point is 0.01")


def check_stream(
    net: Net,
    state: State,
    tasks: Sequence[Task],
    recipe: Recipe,
    goals: Mapping[str, float] | None,
    devices: Devices | None,
) -> dict[str, CheckedTask]:
    """Check a stream before any of it is learned; return the checked tasks, as far as all tasks are there already."""
    check_mapping("goals", goals, "{task: value}")
    if len(state.tasks) + len(tasks) > MAX_TASKS:
        raise CapacityError(
            f"a network holds at most {MAX_TASKS} tasks; it has {len(state.tasks)} and {len(tasks)} are to come: use a "
            "second one"
        )
    if not isinstance(tasks, (list, tuple)):
        return {}  # tasks are created one after the other
    known = [task.name for task in tasks]
    twice = sorted({name for name in known if known.count(name) > 1})
    if twice:
        raise ArgumentError(f"tasks must have distinct names, found {twice[0]!r} twice")
    folders = {folder_name("", name): name for name in known}
    for name in known:
        other = folders[folder_name("", name)]
        if other != name:
            raise ArgumentError(f"tasks {name!r} and {other!r} would share a folder of a run; rename one")
    for name in goals or {}:
        if name not in known:
            raise ArgumentError(f"goals has {name!r}, which is no task; tasks: {', '.join(known)}")
    checked: dict[str, CheckedTask] = {}
    for number, task in enumerate(tasks):
        check_place(net, state, task)
        later = recipe if number else recipe_for(state, recipe)
        goal = None if goals is None else goals.get(task.name)
        checked[task.name] = check_task(net, state, task, later, goal, None, devices, first=not number)
    return checked

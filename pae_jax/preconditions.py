"""What would stop the lifelong loop later, found before anything is computed or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from pae_jax import heads, verification
from pae_jax.batching import feed
from pae_jax.errors import ArgumentError, CapacityError, PhaseError
from pae_jax.evaluation import require_own_net
from pae_jax.network import Net
from pae_jax.phases import check_count, check_number
from pae_jax.placement import placement_over
from pae_jax.recipes import Recipe
from pae_jax.state import MAX_TASKS, State, find, names, newest
from pae_jax.tasks import Task
from pae_jax.trees import require_match


def recipe_for(state: State, recipe: Recipe) -> Recipe:
    """Return the recipe of the next task of a network."""
    return recipe.first if recipe.first is not None and not state.tasks else recipe


def check_call(
    net: Net,
    state: State,
    task: Task,
    recipe: Recipe,
    goal: float | None = None,
    upcoming: int | None = None,
    mesh: Mesh | None = None,
    split_weights: bool = False,
    first: bool = True,
) -> None:
    """Raise for whatever would stop the loop later, before anything is computed or written."""
    verification.check(state)
    last = newest(state)
    if last is not None:
        require_own_net(net, state, find(state, last))
        if not state.tasks[last].frozen:
            raise PhaseError(f"learn of {task.name!r}", last, "packed but not frozen", "fit, prune, freeze or drop")
    require_match("state.shared", state.shared, net.layout(state.width).shared, "Was the state made with this net?")
    if len(state.tasks) >= MAX_TASKS:
        raise CapacityError(f"a network holds at most {MAX_TASKS} tasks; use a second one")
    if task.name in state.tasks:
        raise ArgumentError(
            f"task {task.name!r} exists already; tasks: {', '.join(names(state))}. Choose another name."
        )
    heads.check_head(task.head)
    if goal is not None:
        check_number("goal", goal)
    if upcoming is not None:
        check_count("upcoming", upcoming, 0)
    ladder, retrains = recipe.ladder, recipe.retrain is not None and bool(state.tasks or not first)
    chooses = goal is not None or recipe.goal is not None or (ladder is not None and ladder.choose != "last")
    if task.val is None and (chooses or retrains or any(phase.plateau for phase in recipe.phases)):
        raise ArgumentError(
            f"task {task.name!r} has no validation data, but recipe {recipe.name!r} chooses by it: hold out a part of "
            "the training data as val="
        )
    _, logits = heads.layout(net, task.head, state.width)
    classes = task.loss is None
    for data in (task.val, task.test):
        if data is not None:
            feed(net, data, logits, recipe.batch_size, classes)
    for data in (task.val, task.test, task.train if ladder is not None and ladder.floor is not None else None):
        task.check_accuracy(data, logits)
    train = feed(net, task.train, logits, recipe.batch_size, classes, task.augment)
    placement_over(mesh, split_weights, train.size(recipe.batch_size))
    if train.steps is None and (
        (ladder is not None and ladder.ramp) or any(phase.needs_steps for phase in recipe.phases)
    ):
        raise ArgumentError(
            f"task {task.name!r}: the training data has no length, so the epochs of a rate or a ramp have no number of "
            "steps; give data with a length, or constant rates and ramp=0"
        )


def check_stream(
    net: Net,
    state: State,
    tasks: Sequence[Task],
    recipe: Recipe,
    goals: Mapping[str, float] | None,
    mesh: Mesh | None,
    split_weights: bool,
) -> None:
    """Raise before anything is learned for what a later task would stop at, where all tasks are at hand."""
    if not hasattr(tasks, "__len__"):
        raise ArgumentError(f"tasks must be a sequence, whose length is known; found {type(tasks).__name__}")
    if not isinstance(tasks, (list, tuple)):
        return  # made one after the other
    known = [task.name for task in tasks]
    twice = sorted({name for name in known if known.count(name) > 1})
    if twice:
        raise ArgumentError(f"tasks must have distinct names, found {twice[0]!r} twice")
    for name in goals or {}:
        if name not in known:
            raise ArgumentError(f"goals has {name!r}, which is no task; tasks: {', '.join(known)}")
    for number, task in enumerate(tasks):
        later = recipe if number else recipe_for(state, recipe)
        goal = None if goals is None else goals.get(task.name)
        check_call(net, state, task, later, goal, None, mesh, split_weights, first=not number)

"""The lifelong loop: `learn` one task, `learn_all` of a stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh

from pae_jax import html
from pae_jax.core import State, check_state
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.metrics import AccuracyMatrix
from pae_jax.lifelong.opening import open_learner, open_session
from pae_jax.lifelong.ordering import as_passed, in_order
from pae_jax.lifelong.own_network import own_goal
from pae_jax.lifelong.policy import Outcome, starting_width
from pae_jax.lifelong.preconditions import check_place, check_stream, check_task, recipe_for
from pae_jax.lifelong.recipes import Recipe
from pae_jax.lifelong.run_folder import Run, folder_name, matrix_of
from pae_jax.lifelong.session import Session
from pae_jax.lifelong.task import CheckedTask, Task
from pae_jax.nets import Net
from pae_jax.progress import progress_bar
from pae_jax.training import Devices


def learn(
    net: Net,
    state: State,
    task: Task,
    recipe: Recipe,
    *,
    key: jax.Array,
    run: Run | None = None,
    goal: float | None = None,
    upcoming: int | None = None,
    devices: Devices | Mesh | None = None,
    progress: bool = False,
) -> Outcome:
    """Learn one task by a recipe and freeze it; all choices go by its validation data.

    Train. While the goal is missed and the recipe lets the network grow: widen the network as it was before the task
    and start again. Then climb the pruning ladder, take the rung that the recipe chooses, retrain, freeze. A run that
    was killed goes on from its last finished stage and ends in the same bits.

    With a mesh over several processes, each of them makes the same call with the same whole arrays. Process 0 writes,
    and its scores decide; after each stage all compare all arrays. Batches of a factory must be the same everywhere,
    which cannot be checked. Without such a mesh every process learns for itself.

    Args:
      net: the network description the state was made with.
      state: the network; its newest task, if any, is frozen.
      task: what to learn.
      recipe: settings of the loop.
      key: random key of the whole stream; each stage draws from one that depends on the names of task and stage.
      run: folder that makes the call resumable and keeps records; None works in memory alone.
      goal: value of the metric to reach; None takes the recipe's.
      upcoming: tasks still to come after this one; sets equal shares, and the room left when the goal is missed.
      devices: as for `fit`; a run may go on with another number of devices and processes.
      progress: show progress bars.

    Returns:
      An `Outcome`; where the status is "no capacity" or "diverged", its state is the one given.

    Raises:
      ArgumentError: the name is taken, validation data is missing where something is chosen by it, or a setting is
        out of range; before anything is written.
      PhaseError: the newest task is not frozen.
      DataError, StructureError: unusable data, named.
      CheckpointError: the run folder belongs to other settings.
      ProcessError: another process of the mesh failed, was given something else, or made no such call in 300 s.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> x = jax.random.normal(jax.random.key(2), (64, 4))
      >>> data = (x, (x[:, 0] > 0).astype(int))
      >>> task = pae.Task("sign", head=2, train=data, val=data)
      >>> quick = pae.recipes.Phase(5, pae.recipes.Rate(0.03))
      >>> recipe = pae.Recipe("quick", train=quick, ladder=pae.recipes.Ladder((0.5, 0.8), quick), goal=0.9)
      >>> state = pae.init(net, jax.random.key(0))
      >>> outcome = pae.learn(net, state, task, recipe, key=jax.random.key(1))
      >>> outcome.status.value, outcome.state.tasks["sign"].phase
      ('goal met', 'frozen')

    Source: Hung et al., ICMR 2019 (PAE) and NeurIPS 2019 (CPG).
    """
    check_state(state)
    with open_session(net, recipe, key, run, devices, progress) as session:
        session = replace(session, recipe=recipe_for(state, recipe))
        check_place(net, state, task, run)
        checked = check_task(net, state, task, session.recipe, goal, upcoming, session.devices)
        return _learn(session, state, checked, goal, upcoming)


def _learn(
    session: Session,
    state: State,
    checked: CheckedTask,
    goal: float | None,
    upcoming: int | None,
    begun: Callable[[], None] | None = None,
) -> Outcome:
    """Do the work of `learn`; `begun` is called once nothing speaks against it and its folder is open."""
    net, recipe, task = session.net, session.recipe, checked.task
    wanted = recipe.goal if goal is None else goal
    if isinstance(wanted, str):
        # A task that cannot start needs no goal, which would cost a training of its own.
        stuck = starting_width(net, state, recipe) is None
        wanted = None if stuck else own_goal(session, state, checked, wanted)
    value = None if wanted is None else float(wanted)
    with open_learner(session, checked, state, value, upcoming, _folder(state, task), task.name) as learner:
        if begun is not None:
            begun()
        return learner.learn()


def _folder(state: State, task: Task) -> str:
    """Return the name of the folder of a task that is learned next."""
    return folder_name(f"{len(state.tasks) + 1:02d}-", task.name)


@dataclass(frozen=True)
class Stream:
    """Results of a stream of tasks.

    Attributes:
      state: the network with all tasks that were added.
      outcomes: one per task tried, in order. They all hold `state`, in which older tasks are what they were, so that
        one network is kept in memory and not one per task.
      matrix: test metric of the tasks after each one, of those with test data and a metric between 0 and 1 of which
        more is better; None without such a task.
    """

    state: State
    outcomes: tuple[Outcome, ...]
    matrix: AccuracyMatrix | None

    def __repr__(self) -> str:
        return f"Stream({', '.join(f'{one.task!r} {one.status.value}' for one in self.outcomes) or 'no tasks'})"

    def _repr_html_(self) -> str:
        columns = ("task", "status", "validation", "goal", "test", "pruned", "size ratio")
        rows = [
            (one.task, one.status.value, one.value, one.goal, one.test, f"{one.pruned:.1%}", f"{one.width**2:.3g}")
            for one in self.outcomes
        ]
        return html.table(columns, rows) + self.state._repr_html_()


def learn_all(
    net: Net,
    state: State,
    tasks: Sequence[Task],
    recipe: Recipe,
    *,
    key: jax.Array,
    run: Run | None = None,
    goals: Mapping[str, float] | None = None,
    order: Sequence[str] | jax.Array | None = None,
    devices: Devices | Mesh | None = None,
    progress: bool = False,
) -> Stream:
    """Learn a stream of tasks, and measure every task's test data after each one.

    Several processes learn together as by `learn`.

    Args:
      net: the network description the state was made with.
      state: the network before the first of these tasks.
      tasks: what to learn; any sequence, read one after the other.
      recipe: settings of the loop.
      key: random key of the whole stream.
      run: folder that makes the call resumable; None works in memory alone.
      goals: `{task: value}` for those that have one; the recipe's goal for the others.
      order: the order of learning: all names of a list of tasks, or a random key that draws a permutation. None takes
        the tasks as they come. A run records it and refuses another one.
      devices: as for `fit`; a run may go on with another number of devices and processes.
      progress: show progress bars.

    Returns:
      A `Stream`. It ends early at a task that could not be added.

    Raises:
      ArgumentError, DataError, StructureError: a task, goal, order or recipe that does not fit, before anything is
        trained or written.
      PhaseError: the newest task of the state is not frozen.
      CheckpointError: the run was begun with other settings, or its folder cannot be read or written.
      ProcessError: processes that learn together differ, or one of them failed.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> x = jax.random.normal(jax.random.key(2), (64, 4))
      >>> tasks = [pae.Task(f"sign {i}", 2, *[(x, (x[:, i] > 0).astype(int))] * 3) for i in range(2)]
      >>> quick = pae.recipes.Phase(5, pae.recipes.Rate(0.03))
      >>> recipe = pae.Recipe("quick", quick, ladder=pae.recipes.Ladder((0.6,), quick, choose="last"))
      >>> stream = pae.learn_all(net, pae.init(net, jax.random.key(0)), tasks, recipe, key=jax.random.key(1))
      >>> stream.matrix.forgetting()
      0.0
    """
    check_state(state)
    with open_session(net, recipe, key, run, devices, progress) as session:
        return _learn_all(session, state, *in_order(tasks, order), goals)


def _learn_all(
    session: Session, state: State, tasks: Sequence[Task], positions: list[int], goals: Mapping[str, float] | None
) -> Stream:
    """Do the work of `learn_all`."""
    net, run, ask = session.net, session.run, session.processes.ask
    known_tasks = check_stream(net, state, tasks, session.recipe, goals, session.devices)
    given = as_passed(tasks, positions)
    if run is not None:
        ask("order", lambda run=run: run.require_order(given, positions))
    outcomes: list[Outcome] = []
    rows: dict[str, dict[str, float]] = {}
    measured: list[CheckedTask] = []
    stages: dict[str, str] = {}
    title, recipe = session.recipe.name, session.recipe
    for number, task in enumerate(progress_bar(tasks, title=title, unit="task", shown=session.progress)):
        session = replace(session, recipe=recipe_for(state, recipe))
        goal, upcoming = None if goals is None else goals.get(task.name), len(tasks) - number - 1
        check_place(net, state, task, run)
        _require_goals_fit(goals, {*(one.task for one in outcomes), task.name}, upcoming)
        checked = known_tasks.pop(task.name, None)
        if checked is None:
            checked = check_task(net, state, task, session.recipe, goal, upcoming, session.devices)
        folder = _folder(state, task)
        begun = None if run is None or number else functools.partial(run.record_order, given, positions)
        outcome = _learn(session, state, checked, goal, upcoming, begun)
        state = outcome.state
        outcomes = [replace(one, state=state) for one in (*outcomes, outcome)]
        if not outcome.status.added:
            break
        if outcome.test is None or not task.metric.higher_is_better or not 0.0 <= outcome.test <= 1.0:
            continue
        measured.append(checked)
        if run is not None:
            stages[task.name] = ask("stage", lambda run=run, folder=folder: run.stage_digest(folder))
        rows[task.name] = _measured_after(session, outcome, measured, folder, stages)
        # Only the test data is needed from now on.
        measured[-1] = replace(
            checked, task=replace(checked.task, train=None, val=None), train=None, val=None, plain=None
        )
    return Stream(state, tuple(outcomes), matrix_of(rows))


def _require_goals_fit(goals: Mapping[str, float] | None, seen: set[str], upcoming: int) -> None:
    """Raise `ArgumentError` if more goals are left than tasks: one of them has the name of no task."""
    left = [name for name in goals or {} if name not in seen]
    if len(left) > upcoming:
        raise ArgumentError(f"goals has {', '.join(map(repr, left))}, but {upcoming} tasks are to come; names differ")


def _measured_after(
    session: Session, outcome: Outcome, tasks: list[CheckedTask], folder: str, stages: dict[str, str]
) -> dict[str, float]:
    """Return the accuracy of each task after the newest was learned, from the run where it was measured there."""
    run, known = session.run, {}
    if run is not None:
        known = session.processes.ask("accuracies", lambda: run.accuracies(folder, stages))
    missing = [one for one in tasks if one.task.name not in known]
    if not missing:
        return known
    found = {one.task.name: one.measured(outcome.state, "test") for one in missing if one is not tasks[-1]}
    found = session.processes.agree("accuracies of all tasks", {**known, **found, outcome.task: outcome.test})
    accuracies = {one.task.name: found[one.task.name] for one in tasks}
    if run is not None:
        run.record_accuracies(folder, accuracies, stages)
    return accuracies

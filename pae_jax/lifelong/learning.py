"""The lifelong loop: `learn` one task, `learn_all` of a stream, `baseline` of a task's own network."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from pae_jax import html
from pae_jax.checks import check_key
from pae_jax.core import State, find, from_variables, init, names, task_variables
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.metrics import AccuracyMatrix
from pae_jax.lifelong.one_task import Learner
from pae_jax.lifelong.ordering import as_passed, in_order
from pae_jax.lifelong.phases import WEIGHTS
from pae_jax.lifelong.policy import Outcome, starting_width
from pae_jax.lifelong.preconditions import check_place, check_stream, check_task, recipe_for
from pae_jax.lifelong.recipes import Recipe
from pae_jax.lifelong.run_folder import Run, folder_name, matrix_of
from pae_jax.lifelong.session import Session
from pae_jax.lifelong.settings import settings_of
from pae_jax.lifelong.task import CheckedTask, Task
from pae_jax.nets import Net
from pae_jax.processes import together
from pae_jax.progress import progress_bar
from pae_jax.training import Devices, devices_of

_STARTS = 5  # own networks that a goal of finetuning averages over; CPG's scripts take 5


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
    with _session(net, recipe_for(state, recipe), key, run, devices, progress) as session:
        check_place(net, state, task, run)
        checked = check_task(net, state, task, session.recipe, goal, upcoming, session.devices)
        return _learn(session, state, checked, goal, upcoming)


@contextlib.contextmanager
def _session(
    net: Net, recipe: Recipe, key: jax.Array, run: Run | None, devices: Devices | Mesh | None, progress: bool
) -> Iterator[Session]:
    """Yield the settings of a call, which all processes that own the devices make."""
    where = devices_of(devices)
    owners = None if where.mesh is None else where.mesh.devices.flatten()
    if run is not None:
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


def _learn(session: Session, state: State, checked: CheckedTask, goal: float | None, upcoming: int | None) -> Outcome:
    """Do the work of `learn`."""
    net, recipe, task = session.net, session.recipe, checked.task
    wanted = recipe.goal if goal is None else goal
    if isinstance(wanted, str):
        # A task that cannot start needs no goal, which would cost a training of its own.
        stuck = starting_width(net, state, recipe) is None
        wanted = None if stuck else _own_goal(session, state, checked, wanted)
    value = None if wanted is None else float(wanted)
    name = folder_name(f"{len(state.tasks) + 1:02d}-", task.name)
    with _learner(session, checked, state, value, upcoming, name, task.name) as learner:
        return learner.learn()


def _own_goal(session: Session, state: State, checked: CheckedTask, kind: str) -> float:
    """Return the metric of a task's own network, or mean or best of those that start from earlier tasks."""
    task = checked.task
    if kind == "baseline" or not state.tasks:
        return _alone(session, task, None, checked=checked).value()
    earlier = names(state)
    order = jax.random.permutation(session.stage_key(task.name, kind), len(earlier)).tolist()
    values = []
    for name in (earlier[number] for number in order[:_STARTS]):
        start = from_variables(
            session.net, task_variables(session.net, state, name)["backbone"], find(state, name).width
        )
        values.append(_alone(session, task, start, name, checked).value())
    return sum(values) / len(values) if kind == "finetune_average" else max(values, key=task.metric.score)


@contextlib.contextmanager
def _learner(
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
      ArgumentError: no validation data, or a training that met values that are not finite.

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
    with _session(net, recipe, key, run, devices, progress) as session:
        return _alone(session, task, start).value()


def own_network(
    net: Net,
    task: Task,
    recipe: Recipe,
    *,
    key: jax.Array,
    run: Run | None = None,
    start: State | None = None,
    devices: Devices | Mesh | None = None,
    progress: bool = False,
) -> Outcome:
    """Train the task's own network, as `baseline` does, and return all that came of it."""
    with _session(net, recipe, key, run, devices, progress) as session:
        return _alone(session, task, start).outcome()


@dataclass(frozen=True)
class _OwnNetwork:
    """A task's own network, trained or about to be."""

    session: Session
    checked: CheckedTask
    start: State
    earlier: str

    def outcome(self) -> Outcome:
        """Train it; raise where that fails."""
        with self._learner() as learner:
            return self._trained(learner)

    def value(self) -> float:
        """Return its metric, from disk if it is there."""
        with self._learner() as learner:
            known = learner.finished_value()
            return self._trained(learner).value if known is None else known

    def _learner(self) -> contextlib.AbstractContextManager[Learner]:
        task = self.checked.task.name
        name, title = folder_name("baseline-", task), f"{task} (own network)"
        if self.earlier:
            name = folder_name(f"finetune-{zlib.crc32(self.earlier.encode(errors='surrogatepass')):08x}-", task)
            title = f"{task} (own network from {self.earlier})"
        return _learner(self.session, self.checked, self.start, None, None, name, title)

    def _trained(self, learner: Learner) -> Outcome:
        found = learner.learn()
        if not found.status.added:
            raise ArgumentError(f"the own network of task {found.task!r} {found.status.value}: lower its learning rate")
        return found


def _alone(
    session: Session, task: Task, start: State | None, earlier: str = "", checked: CheckedTask | None = None
) -> _OwnNetwork:
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
    return _OwnNetwork(session, checked, start, earlier)


@dataclass(frozen=True)
class Stream:
    """What came of learning a stream of tasks.

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
    with _session(net, recipe, key, run, devices, progress) as session:
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
    title, recipe = session.recipe.name, session.recipe
    for number, task in enumerate(progress_bar(tasks, title=title, unit="task", shown=session.progress)):
        session = replace(session, recipe=recipe_for(state, recipe))
        goal, upcoming = None if goals is None else goals.get(task.name), len(tasks) - number - 1
        check_place(net, state, task, run)
        checked = known_tasks.pop(task.name, None)
        if checked is None:
            checked = check_task(net, state, task, session.recipe, goal, upcoming, session.devices)
        outcome = _learn(session, state, checked, goal, upcoming)
        if run is not None and not number:  # nothing is written by a call that is refused
            run.record_order(given, positions)
        state = outcome.state
        outcomes = [replace(one, state=state) for one in (*outcomes, outcome)]
        if not outcome.status.added:
            break
        if outcome.test is None or not task.metric.higher_is_better or not 0.0 <= outcome.test <= 1.0:
            continue
        known = None if run is None else ask("accuracies", lambda run=run, task=task: run.accuracies(task.name))
        if known is None:
            known = {one.task.name: one.measured(state, "test") for one in measured}
            known[task.name] = outcome.test
            known = session.processes.agree("accuracies of all tasks", known)
            if run is not None:
                run.record_accuracies(task.name, known)
        rows[task.name] = known
        # Only the test data is needed from now on.
        measured.append(replace(checked, task=replace(task, train=None, val=None), train=None, val=None))
    return Stream(state, tuple(outcomes), matrix_of(rows))

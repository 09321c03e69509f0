"""The lifelong loop: `learn` one task, `learn_all` of a stream, `baseline` of a task's own network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh
from tqdm.auto import tqdm

from pae_jax.checks import check_key
from pae_jax.core import State, init
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.metrics import AccuracyMatrix
from pae_jax.lifelong.one_task import Learner
from pae_jax.lifelong.phases import WEIGHTS
from pae_jax.lifelong.policy import Outcome, starting_width
from pae_jax.lifelong.preconditions import check_call, check_stream, recipe_for
from pae_jax.lifelong.recipes import Recipe
from pae_jax.lifelong.run_folder import Run, matrix_of, settings_of
from pae_jax.lifelong.session import Session
from pae_jax.lifelong.task import CheckedTask, Task
from pae_jax.nets import Net
from pae_jax.training import EVAL_BATCH, Devices, devices_of


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

    Args:
      net: the network description the state was made with.
      state: the network; its newest task, if any, is frozen.
      task: what to learn.
      recipe: settings of the loop.
      key: random key of the whole stream; each stage draws from one that depends on the names of task and stage.
      run: folder that makes the call resumable and keeps records; None works in memory alone.
      goal: value of the metric to reach; None takes the recipe's.
      upcoming: tasks still to come after this one; sets equal shares, and the room left when the goal is missed.
      devices: as for `fit`; a run may go on with another number of devices.
      progress: show progress bars.

    Returns:
      An `Outcome`; where the status is "no capacity" or "diverged", its state is the one given.

    Raises:
      ArgumentError: the name is taken, validation data is missing where something is chosen by it, or a setting is
        out of range; before anything is written.
      PhaseError: the newest task is not frozen.
      DataError, StructureError: unusable data, named.
      CheckpointError: the run folder belongs to other settings.

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
    session = Session(net, recipe_for(state, recipe), check_key(key), run, devices_of(devices), progress)
    return _learn(session, state, task, goal, upcoming)


def _learn(session: Session, state: State, task: Task, goal: float | None, upcoming: int | None) -> Outcome:
    """Do the work of `learn`."""
    net, recipe = session.net, session.recipe
    checked = check_call(net, state, task, recipe, goal, upcoming, session.devices)
    wanted = recipe.goal if goal is None else goal
    if wanted == "baseline":
        # A task that cannot start needs no goal, which would cost a training of its own.
        stuck = starting_width(net, state, recipe) is None
        wanted = None if stuck else _alone(session, task, None).value()
    value = None if wanted is None else float(wanted)
    folder = None
    if session.run is not None:
        settings = settings_of(state, task, recipe, session.key, value, upcoming)
        folder = session.run.task_folder(f"{len(state.tasks) + 1:02d}-{task.name}", settings)
    return Learner(session, checked, state, value, upcoming, folder, task.name).learn()


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
      devices: as for `fit`; a run may go on with another number of devices.
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
    session = Session(net, recipe, check_key(key), run, devices_of(devices), progress)
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
    session = Session(net, recipe, check_key(key), run, devices_of(devices), progress)
    return _alone(session, task, start).outcome()


@dataclass(frozen=True)
class _OwnNetwork:
    """A task's own network, trained or about to be."""

    learner: Learner

    def outcome(self) -> Outcome:
        """Train it; raise where that fails."""
        found = self.learner.learn()
        if not found.status.added:
            raise ArgumentError(f"the own network of task {found.task!r} {found.status.value}: lower its learning rate")
        return found

    def value(self) -> float:
        """Return its metric, from disk if it is there."""
        known = self.learner.finished_value()
        return self.outcome().value if known is None else known


def _alone(session: Session, task: Task, start: State | None) -> _OwnNetwork:
    recipe = session.recipe
    # A network that is drawn anew trains as a whole; so does one whose recipe leaves the shared weights to the picks.
    whole = start is None or "shared" not in recipe.train.parts
    parts = WEIGHTS if whole else recipe.train.parts
    alone = replace(
        recipe,
        name=f"own network of {recipe.name}",
        train=replace(recipe.train, pick_rate=None, parts=parts),
        sharing="all",
        picking=None,
        ladder=None,
        retrain=None,
        goal=None,
        expansion=None,
        first=None,
    )
    session = replace(session, recipe=alone)
    if start is None:
        start = init(session.net, session.stage_key(task.name, "init"))
    if task.val is None:
        raise ArgumentError(f"task {task.name!r} has no validation data; a baseline is measured on it")
    checked = check_call(session.net, start, task, alone, None, None, session.devices)
    title, folder = f"{task.name} (own network)", None
    if session.run is not None:
        settings = settings_of(start, task, alone, session.key, None, None, title)
        folder = session.run.task_folder(f"baseline-{task.name}", settings)
    return _OwnNetwork(Learner(session, checked, start, None, None, folder, title))


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


def learn_all(
    net: Net,
    state: State,
    tasks: Sequence[Task],
    recipe: Recipe,
    *,
    key: jax.Array,
    run: Run | None = None,
    goals: Mapping[str, float] | None = None,
    devices: Devices | Mesh | None = None,
    progress: bool = False,
) -> Stream:
    """Learn a stream of tasks, and measure every task's test data after each one.

    Args:
      net: the network description the state was made with.
      state: the network before the first of these tasks.
      tasks: what to learn, in order; any sequence, read one after the other.
      recipe: settings of the loop.
      key: random key of the whole stream.
      run: folder that makes the call resumable; None works in memory alone.
      goals: `{task: value}` for those that have one; the recipe's goal for the others.
      devices: as for `fit`; a run may go on with another number of devices.
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
    where = devices_of(devices)
    check_stream(net, state, tasks, recipe, goals, where)
    outcomes: list[Outcome] = []
    rows: dict[str, dict[str, float]] = {}
    measured: list[CheckedTask] = []
    for number, task in enumerate(tqdm(tasks, desc=recipe.name, unit="task", disable=not progress)):
        session = Session(net, recipe_for(state, recipe), check_key(key), run, where, progress)
        goal = None if goals is None else goals.get(task.name)
        outcome = _learn(session, state, task, goal, len(tasks) - number - 1)
        state = outcome.state
        outcomes = [replace(one, state=state) for one in (*outcomes, outcome)]
        if not outcome.status.added:
            break
        if outcome.test is None or not task.metric.higher_is_better or not 0.0 <= outcome.test <= 1.0:
            continue
        known = run.accuracies(task.name) if run is not None else None
        if known is None:
            known = {one.task.name: one.measured(state, "test") for one in measured}
            known[task.name] = outcome.test
            if run is not None:
                run.record_accuracies(task.name, known)
        rows[task.name] = known
        # Data that nobody asks for any more may be let go.
        measured.append(CheckedTask.of(net, replace(task, train=None, val=None), state.width, EVAL_BATCH))
    return Stream(state, tuple(outcomes), matrix_of(rows))

"""The lifelong loop: `learn` one task, `learn_all` of a stream, `baseline` of a task's own network."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import numpy as np
from tqdm import tqdm

from pae_jax import heads, verification
from pae_jax.batching import feed
from pae_jax.errors import ArgumentError
from pae_jax.evaluation import require_own_net
from pae_jax.learner import Learner, Outcome, stage_key
from pae_jax.lifecycle import init
from pae_jax.metrics import AccuracyMatrix
from pae_jax.network import Net, as_key
from pae_jax.recipes import Recipe
from pae_jax.runs import Run
from pae_jax.state import State, find, names, newest
from pae_jax.tasks import Task
from pae_jax.trees import flatten


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
    progress: bool = True,
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
      key: random key of the whole stream; each stage draws from `stage_key(key, task.name, stage)`.
      run: folder that makes the call resumable and keeps records; None works in memory alone.
      goal: value of the metric to reach; None takes the recipe's.
      upcoming: tasks still to come after this one; sets equal shares, and the room left when the goal is missed.
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
      >>> outcome = pae.learn(net, state, task, recipe, key=jax.random.key(1), progress=False)
      >>> outcome.status.value, outcome.state.tasks["sign"].phase
      ('goal met', 'frozen')

    Source: Hung et al., ICMR 2019 (PAE) and NeurIPS 2019 (CPG).
    """
    recipe = recipe.first if recipe.first is not None and not state.tasks else recipe
    key = as_key(key)
    check_call(net, state, task, recipe)
    if goal is None and recipe.goal == "baseline":
        goal = baseline(net, task, recipe, key=key, run=run, progress=progress)
    elif goal is None:
        goal = cast("float | None", recipe.goal)
    folder = None
    if run is not None:
        settings = settings_of(state, task, recipe, key, goal, upcoming)
        folder = run.task_folder(f"{len(state.tasks) + 1:02d}-{task.name}", settings)
    return Learner(net, state, task, recipe, key, goal, upcoming, run, folder, progress).learn()


def baseline(
    net: Net,
    task: Task,
    recipe: Recipe,
    *,
    key: jax.Array,
    run: Run | None = None,
    start: State | None = None,
    progress: bool = True,
) -> float:
    """Return the validation metric of the task's own network: the recipe's training without anything else.

    Args:
      net: the network description.
      task: what to learn.
      recipe: its `head_first`, `train` and `batch_size` are used; nothing is pruned and nothing grows.
      key: random key.
      run: folder that keeps the network, in `baseline-<task>`; asked again, it is not trained again.
      start: a network without tasks to start from, such as a pretrained one; None draws one at width 1.
      progress: show progress bars.

    Returns:
      The metric on validation data.

    Raises:
      ArgumentError: no validation data.
      DivergedError: training met values that are not finite.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> x = jax.random.normal(jax.random.key(2), (64, 4))
      >>> data = (x, (x[:, 0] > 0).astype(int))
      >>> recipe = pae.Recipe("quick", train=pae.recipes.Phase(30, pae.recipes.Rate(0.03)))
      >>> task = pae.Task("sign", head=2, train=data, val=data)
      >>> pae.baseline(net, task, recipe, key=jax.random.key(0), progress=False) > 0.9
      True
    """
    return own_network(net, task, recipe, key=key, run=run, start=start, progress=progress).value


def own_network(
    net: Net,
    task: Task,
    recipe: Recipe,
    *,
    key: jax.Array,
    run: Run | None = None,
    start: State | None = None,
    progress: bool = True,
) -> Outcome:
    """Train the task's own network, as `baseline` does, and return all that came of it."""
    alone = replace(
        recipe,
        name=f"own network of {recipe.name}",
        train=replace(recipe.train, pick_rate=None, parts=("shared", "local", "head")),
        sharing="all",
        picking=None,
        ladder=None,
        retrain=None,
        goal=None,
        expansion=None,
        first=None,
    )
    key = as_key(key)
    if start is None:
        start = init(net, stage_key(key, task.name, "init"))
    if task.val is None:
        raise ArgumentError(f"task {task.name!r} has no validation data; a baseline is measured on it")
    check_call(net, start, task, alone)
    folder = None
    if run is not None:
        folder = run.task_folder(f"baseline-{task.name}", settings_of(start, task, alone, key, None, None))
    outcome = Learner(net, start, task, alone, key, None, None, run, folder, progress).learn()
    if not outcome.status.added:
        raise ArgumentError(f"the own network of task {task.name!r} {outcome.status.value}: lower its learning rate")
    return outcome


@dataclass(frozen=True)
class Stream:
    """What came of learning a stream of tasks.

    Attributes:
      state: the network with all tasks that were added.
      outcomes: one per task tried, in order.
      matrix: test metric of every task after each one; None without test data.
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
    progress: bool = True,
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
      >>> stream = pae.learn_all(net, pae.init(net, jax.random.key(0)), tasks, recipe, key=jax.random.key(1),
      ...                        progress=False)
      >>> stream.matrix.forgetting()
      0.0
    """
    outcomes: list[Outcome] = []
    rows: dict[str, dict[str, float]] = {}
    seen: list[Task] = []
    for number, task in enumerate(tqdm(tasks, desc=recipe.name, unit="task", disable=not progress)):
        outcome = learn(
            net,
            state,
            task,
            recipe,
            key=key,
            run=run,
            goal=None if goals is None else goals.get(task.name),
            upcoming=len(tasks) - number - 1,
            progress=progress,
        )
        outcomes.append(outcome)
        if not outcome.status.added:
            break
        state = outcome.state
        seen.append(task)
        if any(one.test is None for one in seen):
            continue
        known = run.accuracies(task.name) if run is not None else None
        rows[task.name] = known or {one.name: one.metric.of(net, state, one.name, one.test, one.loss) for one in seen}
        if run is not None and known is None:
            run.record_accuracies(task.name, rows[task.name])
    matrix = AccuracyMatrix(list(rows)) if rows else None
    for after, accuracies in rows.items():
        for name, value in accuracies.items():
            if matrix is not None and name in rows:
                matrix.record(after, name, value)
    return Stream(state, tuple(outcomes), matrix)


def check_call(net: Net, state: State, task: Task, recipe: Recipe) -> None:
    """Raise for whatever would stop the loop later, before anything is computed or written."""
    verification.check(state)
    last = newest(state)
    if last is not None:
        require_own_net(net, state, find(state, last))
    if task.name in state.tasks:
        raise ArgumentError(
            f"task {task.name!r} exists already; tasks: {', '.join(names(state))}. Choose another name."
        )
    heads.check_head(task.head)
    chooses = recipe.goal is not None or (recipe.ladder is not None and recipe.ladder.choose != "last")
    if task.val is None and chooses:
        raise ArgumentError(
            f"task {task.name!r} has no validation data, but recipe {recipe.name!r} chooses by it: hold out a part of "
            "the training data as val="
        )
    _, logits = heads.layout(net, task.head, state.width)
    for data in (task.train, task.val, task.test):
        if data is not None:
            feed(net, data, logits, recipe.batch_size, class_labels=task.loss is None)


def settings_of(
    state: State, task: Task, recipe: Recipe, key: jax.Array, goal: float | None, upcoming: int | None
) -> dict[str, Any]:
    """Return what decides the stages of a task; a resumed run must have the same."""
    older = [find(state, name).digests for name in names(state)]
    return {
        "task": task.name,
        "head": heads.describe(task.head),
        "recipe": recipe.to_json(),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "goal": goal,
        "upcoming": upcoming,
        "width": state.width,
        "before": zlib.crc32(repr((older, _checksums(state.shared))).encode()),
        "data": {name: _checksums(getattr(task, name)) for name in ("train", "val", "test")},
    }


def _checksums(data: Any) -> Any:
    """Return checksums of data that is arrays; None for what only iterating would show."""
    if not isinstance(data, (tuple, dict)):
        return None
    leaves = {name: leaf for name, leaf in flatten(data).items() if hasattr(leaf, "dtype")}
    return {name: zlib.crc32(np.ascontiguousarray(leaf).tobytes()) for name, leaf in leaves.items()}

"""Life cycle of a task: `init` and `from_variables` make a network, `pack` adds a task, `freeze` and `drop` end it."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pae_jax.checks import check_choice, check_key, check_name, check_width, is_traced
from pae_jax.core import claiming, integrity, ownership, placement
from pae_jax.core.picking import Picking, settle
from pae_jax.core.placement import Placement
from pae_jax.core.spread_arrays import sharding_of
from pae_jax.core.starting_weights import WEIGHT_INITS, WeightInit, starting_weights
from pae_jax.core.state import (
    MAX_TASKS,
    SHARING,
    State,
    TaskState,
    check_values,
    find,
    find_trainable,
    layout_of,
    names,
    newest,
)
from pae_jax.errors import ArgumentError, CapacityError, PhaseError
from pae_jax.nets import Net, check_net, fingerprint, heads, own_variables, require_single_answers
from pae_jax.trees import Tree, require_match


def init(net: Net, key: jax.Array, width: float = 1.0, *, sharding: Placement | None = None) -> State:
    """Make a network in which every shared weight is free and no task exists.

    Args:
      net: from `pae.linen` or `pae.nnx`.
      key: random key; draws the initial values as the model does.
      width: channel factor handed to `build`, positive.
      sharding: where the arrays lie, if on several devices: a function `(path, leaf) -> jax.sharding.Sharding`, or
        `(mesh, specs)` with a PartitionSpec for each variable that is split, by path or as a tree; all others are whole
        on every device. Paths are those of `pae.layout`. Every later state keeps this layout, on a mesh of automatic
        axes.

    Returns:
      A state without tasks.

    Raises:
      StructureError: the model has no shareable leaf, or a leaf that cannot be handled (named).
      ArgumentError: width is not positive and finite, key is not a key, or `sharding` names an unknown variable or does
        not divide a shared weight.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0), width=1.5)
      >>> jax.tree.map(jnp.shape, state.shared)
      {'Dense_0': {'kernel': (4, 24)}, 'Dense_1': {'kernel': (24, 24)}}
    """
    check_net(net)
    width = check_width(width)
    net.layout(width)
    return _without_tasks(*placement.drawn(net, check_key(key), width, sharding), width)


def from_variables(net: Net, variables: Any, width: float = 1.0, *, dtype: Any = None) -> State:
    """Make a network from pretrained variables; every shared weight is free and keeps its value.

    Every task packed later starts from the pretrained local variables, unless told otherwise. To keep the pretrained
    function unchanged, pack a first task with `head=None` and freeze it.

    Args:
      net: from `pae.linen` or `pae.nnx`.
      variables: `{collection: nested dict}` of the backbone, with the model's shapes and dtypes, as JAX or NumPy
        arrays, as returned by `module.init`, including partitioning boxes; for NNX the module, its `nnx.state`, or
        nested dicts with `nnx.Param` under "params" and `nnx.BatchStat` under "batch_stats". The result of `as_flax` is
        also accepted; its backbone is used.
      width: channel factor the variables belong to.
      dtype: floating dtype to cast floating leaves to, such as `jnp.float32` for float64 or half-precision variables;
        None casts nothing.

    Returns:
      A state without tasks.

    Raises:
      StructureError: a missing, extra, mis-shaped or mis-typed leaf; names its path.
      ArgumentError: a dtype that is not floating.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> model = pae.models.MLP()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4)), train=False)
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.from_variables(net, variables), "a", head=2, key=jax.random.key(1))
      >>> x = jnp.ones((2, 4))
      >>> bool(jnp.allclose(pae.features(net, state, "a", x), model.apply(variables, x, train=False)))
      True
    """
    check_net(net)
    width = check_width(width)
    shared, local = net.split(own_variables(net, variables, width, dtype))
    return _without_tasks(shared, local, width)


def _without_tasks(shared: Tree, local: Tree, width: float) -> State:
    owner = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.int8, device=sharding_of(w)), shared)
    return State(
        shared=shared, owner=owner, tasks={}, width=width, local=local, layout=layout_of(shared=shared, local=local)
    )


def pack(
    net: Net,
    state: State,
    task: str,
    *,
    head: Any,
    key: jax.Array,
    sharing: Literal["all", "first", "picked"] = "all",
    picking: Picking | None = None,
    picks_from: str | None = None,
    local_init: Literal["backbone", "fresh"] | str = "backbone",
    weight_init: WeightInit = "preserve",
    budget: float | None = None,
    budget_scores: Tree | None = None,
    allow_empty: bool = False,
) -> State:
    """Add a task: it becomes the newest, claims every free weight or as many as its budget allows, and can be trained.

    `owner <- k where owner == 0`. Its forward pass sees its own weights and those of older tasks.

    Args:
      net: the network description the state was made with.
      state: the network; its newest task, if any, is frozen.
      task: name, not used before.
      head: number of classes, for a linear layer on the features; a Flax module called on the features, which are 0
        when it is initialised, a Linen one without arrays in its fields; or None, where the features are the output.
      key: random key; draws local variables and head.
      sharing: which older weights the task sees: "all", "first" (those of task 1 only), or "picked" (those that it
        learns to pick, initially all; `fit` also trains the picks).
      picking: threshold and kind of the picks with sharing "picked"; None takes the published settings.
      picks_from: older task whose weights are picked at first, with sharing "picked" and without ternary; None starts
        as `Picking` says.
      local_init: what the local variables (norm scales and statistics, biases) start from: "backbone", those drawn by
        `init` or given to `from_variables`; "fresh", newly drawn; or the name of an older task, whose local variables
        are copied.
      weight_init: what the weights that the task claims start from. "preserve": the task starts with the function of
        the older weights that it sees and its own local variables, up to rounding. Claimed weights without a path to
        the features are drawn, so that a freed or new channel is active. The others, such as that channel's outgoing
        weights, are 0. Where older weights read a channel that no older weight feeds, they are 2^-24 of the drawn
        values instead, because a rectifier has no gradient at exactly 0; not in a layer where that changes the features
        of trial inputs by more than rounding, as in one with a step. If no input reaches the features through older
        weights, all are drawn. "zeros": freed weights stay 0, and weights added by `expand` keep their drawn values
        (PAE); a leaf that is entirely free and 0 is drawn. "fresh": freed weights are drawn as the model draws them.
      budget: share in (0, 1] of all shared weights that the task may own: `round(budget * weights)` of them, or all
        free ones if they are fewer; the others stay free and unchanged. The task claims the weights with the largest
        `budget_scores`; without scores they are drawn with `key`, uniformly among all free weights. None sets no limit.
        Prune such a task with `of="own"`, because most of the weights available to it are already free.
      budget_scores: tree parallel to `state.shared`, finite floats of at least 0, such as those of
        `pae.gradient_scores`.
      allow_empty: accept a task when no free weight is left; it uses older weights, its local variables and its head.

    Returns:
      A new state.

    Raises:
      ArgumentError: the name is taken or empty, an option is unknown, or a budget outside its range or too small for
        one weight.
      PhaseError: the newest task is not frozen yet.
      CapacityError: no free weight is left, or 127 tasks exist.
      StructureError: the state belongs to another model, or the head does not fit the features.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> state = pae.pack(net, state, "age", head=8, key=jax.random.key(1))
      >>> pae.free_fraction(state), state.tasks["age"].id
      (0.0, 1)

    Source: Hung et al., ICMR 2019 ("open" with ratio 1); Mallya and Lazebnik, CVPR 2018.
    """
    check_net(net)
    head = _check_new_task(state, task, head)
    check_choice("sharing", sharing, SHARING)
    if picking is not None and sharing != "picked":
        raise ArgumentError(f"picking needs sharing='picked', found sharing={sharing!r}")
    if picks_from is not None:
        find(state, picks_from)
        if sharing != "picked" or (picking or Picking()).ternary:
            raise ArgumentError("picks_from needs sharing='picked' and goes without ternary")
    if local_init not in ("backbone", "fresh") and local_init not in state.tasks:
        choices = ", ".join(map(repr, ("backbone", "fresh", *names(state))))
        raise ArgumentError(f"local_init must be one of {choices}, found {local_init!r}")
    check_choice("weight_init", weight_init, WEIGHT_INITS)
    claiming.check(state, budget, budget_scores)
    require_match("state.shared", state.shared, net.layout(state.width).shared, "Was the state made with this net?")
    heads.layout(net, head, state.width)
    task_id = len(state.tasks) + 1
    with jax.ensure_compile_time_eval():  # inside jit, the owners of a network from outside have values
        full = not allow_empty and not is_traced(state.owner) and not ownership.free_fraction(state)
    if full:
        raise CapacityError(
            f"no free weight is left for task {task!r}. Prune a task before freezing it, widen the network with "
            "pae.expand, or pass allow_empty=True to train only a head and local variables on the older weights."
        )
    require_single_answers(net, head, state.width)
    local_key, head_key, weight_key = jax.random.split(check_key(key), 3)
    owner = claiming.claimed(state.owner, task_id, budget, budget_scores, weight_key)
    local = placement.beside(_starting_local(net, state, local_key, local_init), state)
    shared = starting_weights(net, state, weight_key, weight_init, sharing, local)
    if budget is not None:
        shared = claiming.kept_free(state.shared, shared, owner)
    rule = (picking or Picking()) if sharing == "picked" else None
    variables = placement.beside(heads.initial(net, head, head_key, state.width), state)
    picks = rule is not None and (rule.own or bool(state.tasks))
    pick = rule.scores(shared, jax.random.fold_in(weight_key, 1)) if rule is not None and picks else None
    if rule is not None and pick is not None and picks_from is not None:
        pick = rule.starting_at(pick, ownership.masks(state, picks_from))
    entry = TaskState(
        local=local,
        head=variables,
        digests=integrity.no_digests(shared, local, variables, pick),
        pick=pick,
        id=task_id,
        width=state.width,
        head_spec=head,
        layout=layout_of(local=local, head=variables),
        sharing=sharing,
        picking=rule,
        program=fingerprint(net, state.width, head),
    )
    return state.replace(shared=shared, owner=owner, tasks={**state.tasks, task: entry})


def freeze(state: State, task: str) -> State:
    """Make a task permanent: it can no longer change, and its digest is recorded.

    The scores of picks become signs, 1 bit each. Own weights that `Picking(own=True)` leaves out are released.

    Args:
      state: the network.
      task: the newest task, not frozen.

    Returns:
      A new state, which `verify` compares with the recorded digest.

    Raises:
      UnknownTaskError: no task of this name.
      PhaseError: the task is frozen already.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> pae.freeze(state, "a").tasks["a"].phase
      'frozen'
    """
    entry = find_trainable(state, task, "freeze")
    check_values("freeze", state)
    integrity.require_owner(state)
    state, signs = release_unpicked(state, task), ownership.signs(entry)
    if signs is not None:
        owner = ownership.at_width(state, state.owner, entry.width)
        entry = entry.replace(pick=settle(signs, owner, ownership.id_array(entry.id)) if entry.id > 1 else None)
    entry = entry.replace(digests=integrity.as_rows(integrity.task_digests(state, entry)))
    return state.replace(tasks={**state.tasks, task: entry})


def release_unpicked(state: State, task: str) -> State:
    """Release the task's own weights that its picks leave out; it computes the same. No change without own picks."""
    freed = ownership.hidden(state, find(state, task))
    if freed is None:
        return state
    shared, owner = ownership.release(state.shared, state.owner, freed)
    return state.replace(shared=shared, owner=owner)


def drop(state: State, task: str) -> State:
    """Remove a task: its weights become free and exactly 0, and later tasks are renumbered without a gap.

    Args:
      state: the network.
      task: any task, frozen or not, that no later task can see: sharing "all" sees every older task that owns a weight,
        "first" the first task, "picked" the tasks of which it picks a weight, or, until it is frozen, may pick one.

    Returns:
      A new state without the task.

    Raises:
      UnknownTaskError: no task of this name.
      PhaseError: later tasks can see it; names them.
      ForgettingError: a later task is damaged, so its digest cannot be recomputed.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> pae.free_fraction(pae.drop(state, "a"))
      1.0
    """
    entry = find(state, task)
    later = names(state)[entry.id :]
    if later and is_traced(state):
        raise ArgumentError(
            f"drop of a task that is not the newest looks at values, here of {later}; call it outside jit"
        )
    integrity.require_owner(state)
    seeing = [name for name in later if _can_see(state, state.tasks[name], entry)]
    if seeing:
        who = ", ".join(map(repr, seeing))
        raise PhaseError("drop", task, f"older than tasks that can see its weights: {who}", f"drop of {who}")
    if later:
        integrity.verify(state)
    shared, owner = ownership.release(
        state.shared, state.owner, ownership.owned(state.owner, ownership.id_array(entry.id))
    )
    if later:
        owner = jax.tree.map(lambda o: jnp.where(o > entry.id, o - 1, o), owner)
    tasks = {
        name: other.replace(id=other.id - (other.id > entry.id)) for name, other in state.tasks.items() if name != task
    }
    dropped = state.replace(shared=shared, owner=owner, tasks=tasks)
    return dropped.replace(tasks={n: _renumbered(dropped, e) if n in later else e for n, e in tasks.items()})


def _can_see(state: State, later: TaskState, entry: TaskState) -> bool:
    """Return whether a later task sees a weight of an older one, or would see other weights without it."""
    if later.sharing == "first":
        return entry.id == 1 and (later.id > 2 or _owns(state, entry))
    if later.pick is None or later.picking is None or not later.frozen:
        return _owns(state, entry)
    owner = jax.tree.leaves(ownership.at_width(state, state.owner, later.width))
    picks = zip(owner, jax.tree.leaves(later.pick), strict=True)
    return any(bool(((o == entry.id) & (pick != 0)).any()) for o, pick in picks)


def _owns(state: State, entry: TaskState) -> bool:
    return bool(ownership.host_counts(state.owner, entry.id)[0].any())


def _renumbered(state: State, entry: TaskState) -> TaskState:
    """Return a task whose digests, if it has any, are those of its new id."""
    return entry.replace(digests=integrity.as_rows(integrity.task_digests(state, entry))) if entry.frozen else entry


def _check_new_task(state: State, task: str, head: Any) -> Any:
    last = newest(state)
    if check_name(task) in state.tasks:
        raise ArgumentError(f"task {task!r} exists already; tasks: {', '.join(names(state))}. Choose another name.")
    head = heads.check_head(head)
    if last is not None and not state.tasks[last].frozen:
        raise PhaseError(f"pack of {task!r}", last, "packed but not frozen", "fit, prune, freeze or drop of that task")
    if len(state.tasks) >= MAX_TASKS:
        raise CapacityError(f"a network holds at most {MAX_TASKS} tasks, because owner ids are int8; use a second one")
    return head


def _starting_local(net: Net, state: State, key: jax.Array, source: str) -> Tree:
    if source == "backbone" and state.local is not None:
        return state.local
    if source == "backbone" and state.tasks:
        raise ArgumentError(
            "local_init='backbone': this network, from a bundle or an old stage, does not hold the backbone's local "
            f"variables. Start from those of a task, local_init={names(state)[0]!r}, or draw them, local_init='fresh'."
        )
    _, fresh = net.initial(key, state.width)
    if source in ("backbone", "fresh"):
        return fresh
    return ownership.local_at_width(state, state.tasks[source], fresh)

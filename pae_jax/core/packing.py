"""A task's life: `init` and `from_variables` make a network, `pack` adds a task, `freeze` and `drop` end it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta, unfreeze

from pae_jax.checks import check_choice, check_key, check_name, check_width, is_traced
from pae_jax.core import integrity, ownership
from pae_jax.core.picking import Picking, settle
from pae_jax.core.state import MAX_TASKS, SHARING, State, TaskState, find, find_trainable, layout_of, names, newest
from pae_jax.errors import ArgumentError, CapacityError, PhaseError, StructureError
from pae_jax.nets import Net, heads, require_single_answers, variables_of
from pae_jax.trees import Tree, merge, require_match


def init(net: Net, key: jax.Array, width: float = 1.0) -> State:
    """Make a network in which every shared weight is free and no task exists.

    Args:
      net: from `pae.linen` or `pae.nnx`.
      key: random key; draws the initial values as the model does.
      width: channel factor handed to `build`, positive.

    Returns:
      A state without tasks.

    Raises:
      StructureError: the model has no shareable leaf, a leaf that cannot be handled (named), or no `train` argument.
      ArgumentError: width is not positive and finite, or key is not a key.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0), width=1.5)
      >>> jax.tree.map(jnp.shape, state.shared)
      {'Dense_0': {'kernel': (4, 24)}, 'Dense_1': {'kernel': (24, 24)}}
    """
    width = check_width(width)
    net.layout(width)
    return _without_tasks(*net.initial(check_key(key), width), width)


def from_variables(net: Net, variables: dict[str, Tree], width: float = 1.0) -> State:
    """Make a network from pretrained variables; every shared weight is free and keeps its value.

    Every task packed later starts from the pretrained local variables, unless told otherwise. To own the pretrained
    function as it is, pack a first task with `head=None` and freeze it.

    Args:
      net: from `pae.linen` or `pae.nnx`.
      variables: `{collection: nested dict}` of the backbone, in its own shapes and dtypes, as `module.init` gives them,
        partitioning boxes included; for NNX the module, its `nnx.state`, or nested dicts with `nnx.Param` under
        "params" and `nnx.BatchStat` under "batch_stats".
      width: channel factor the variables belong to.

    Returns:
      A state without tasks.

    Raises:
      StructureError: a missing, extra, mis-shaped or mis-typed leaf; names its path.

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
    width = check_width(width)
    layout = net.layout(width)
    hint = "The variables must come from the same model at the same width."
    plain = plain_variables(variables)
    require_match("variables", plain, merge(layout.shared, layout.local), hint)
    shared, local = (jax.tree.map(jnp.array, tree) for tree in net.split(plain))
    return _without_tasks(shared, local, width)


def _without_tasks(shared: Tree, local: Tree, width: float) -> State:
    owner = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.int8), shared)
    return State(
        shared=shared, owner=owner, tasks={}, width=width, local=local, layout=layout_of(shared=shared, local=local)
    )


def plain_variables(variables: Any) -> dict[str, Tree]:
    """Return the variables of a module as nested dicts: unboxed, unfrozen, taken out of NNX modules and states."""
    if isinstance(variables, (nnx.Module, nnx.State)):
        return variables_of(variables)
    if not isinstance(variables, Mapping):
        raise StructureError("variables", "", type(variables).__name__, "{collection: nested dict}")
    plain = {}
    for name, tree in meta.unbox(unfreeze(dict(variables))).items():
        plain[name] = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    return _named(plain)


def _named(tree: Any) -> Any:
    """Return nested dicts whose keys are strings; NNX numbers the items of lists."""
    return {str(name): _named(child) for name, child in tree.items()} if isinstance(tree, Mapping) else tree


def pack(
    net: Net,
    state: State,
    task: str,
    *,
    head: Any,
    key: jax.Array,
    sharing: Literal["all", "first", "picked"] = "all",
    picking: Picking | None = None,
    local_init: Literal["backbone", "fresh"] | str = "backbone",
    reclaim_init: Literal["zeros", "fresh"] = "zeros",
    allow_empty: bool = False,
) -> State:
    """Add a task: it becomes the newest, owns every free weight and may be trained.

    `owner <- k where owner == 0`. Its forward pass sees its own weights and those of older tasks.

    Args:
      net: the network description the state was made with.
      state: the network; its newest task, if any, is frozen.
      task: name, not used before.
      head: number of classes, for a linear layer on the features; a Flax module called on the features; or None: the
        features are the output.
      key: random key; draws local variables and head.
      sharing: which older weights the task sees: "all", "first" (those of task 1 only), or "picked" (those that it
        learns to pick, all of them at first; fit trains the picks as well).
      picking: threshold and kind of the picks with sharing "picked"; None takes the published one.
      local_init: what the local variables (norm scales and statistics, biases) start from: "backbone", those that
        `init` drew or `from_variables` was given; "fresh", drawn anew; or the name of an older task, to copy its.
      reclaim_init: weights that an older task gave back start at "zeros", so that the task's first function uses
        exactly the older knowledge, or "fresh" as the model draws them. A leaf without any nonzero weight is always
        drawn fresh: zeros on both sides of a channel have no gradient.
      allow_empty: accept a task for which no free weight is left; it uses older weights, its local variables and its
        head.

    Returns:
      A new state.

    Raises:
      ArgumentError: the name is taken or empty, or an option unknown.
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
    head = _check_new_task(state, task, head)
    check_choice("sharing", sharing, SHARING)
    if picking is not None and sharing != "picked":
        raise ArgumentError(f"picking needs sharing='picked', found sharing={sharing!r}")
    if local_init not in ("backbone", "fresh") and local_init not in state.tasks:
        choices = ", ".join(map(repr, ("backbone", "fresh", *names(state))))
        raise ArgumentError(f"local_init must be one of {choices}, found {local_init!r}")
    check_choice("reclaim_init", reclaim_init, ("zeros", "fresh"))
    require_match("state.shared", state.shared, net.layout(state.width).shared, "Was the state made with this net?")
    heads.layout(net, head, state.width)
    task_id = len(state.tasks) + 1
    if not allow_empty and not is_traced(state.owner) and not ownership.free_fraction(state):
        raise CapacityError(
            f"no free weight is left for task {task!r}. Prune a task before freezing it, widen the network with "
            "pae.expand, or pass allow_empty=True to train only a head and local variables on the older weights."
        )
    require_single_answers(net, head, state.width)
    local_key, head_key, weight_key = jax.random.split(check_key(key), 3)
    shared = _reclaimed(net, state, weight_key, fresh=reclaim_init == "fresh")
    rule = (picking or Picking()) if sharing == "picked" else None
    local = _starting_local(net, state, local_key, local_init)
    variables = heads.initial(net, head, head_key, state.width)
    pick = rule.scores(shared) if rule is not None and state.tasks else None
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
    )
    owner = ownership.claim(state.owner, ownership.id_array(task_id))
    return state.replace(shared=shared, owner=owner, tasks={**state.tasks, task: entry})


def freeze(state: State, task: str) -> State:
    """Make a task permanent: nothing of it can change from now on, and its digest is recorded.

    The scores of picks become signs, 1 bit each.

    Args:
      state: the network.
      task: the newest task, not frozen.

    Returns:
      A new state; `verify` will compare it with the digest for ever.

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
    if is_traced(state):
        raise ArgumentError(
            "freeze takes digests of values, which a traced function does not have; call it outside jit"
        )
    integrity.require_owner(state)
    signs = ownership.signs(entry)
    if signs is not None:
        entry = entry.replace(pick=settle(signs, state.owner, ownership.id_array(entry.id)))
    entry = entry.replace(digests=integrity.as_rows(integrity.task_digests(state, entry)))
    return state.replace(tasks={**state.tasks, task: entry})


def drop(state: State, task: str) -> State:
    """Forget the newest task on purpose: its weights become free and exactly 0.

    Args:
      state: the network.
      task: the newest task, frozen or not.

    Returns:
      A new state without the task.

    Raises:
      UnknownTaskError: no task of this name.
      PhaseError: a later task exists, which may build on this one.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> pae.free_fraction(pae.drop(state, "a"))
      1.0
    """
    entry = find(state, task)
    last = newest(state)
    if task != last:
        raise PhaseError("drop", task, f"older than {last!r}, which may use its weights", f"drop of {last!r}")
    integrity.require_owner(state)
    mine = ownership.owned(state.owner, ownership.id_array(entry.id))
    shared, owner = ownership.release(state.shared, state.owner, mine)
    return state.replace(shared=shared, owner=owner, tasks={k: v for k, v in state.tasks.items() if k != task})


def _check_new_task(state: State, task: str, head: Any) -> Any:
    if check_name(task) in state.tasks:
        raise ArgumentError(f"task {task!r} exists already; tasks: {', '.join(names(state))}. Choose another name.")
    head = heads.check_head(head)
    last = newest(state)
    if last is not None and not state.tasks[last].frozen:
        raise PhaseError(f"pack of {task!r}", last, "packed but not frozen", "fit, prune, freeze or drop of that task")
    if len(state.tasks) >= MAX_TASKS:
        raise CapacityError(f"a network holds at most {MAX_TASKS} tasks, because owner ids are int8; use a second one")
    return head


def _starting_local(net: Net, state: State, key: jax.Array, source: str) -> Tree:
    if source == "backbone" and state.local is not None:
        return state.local
    _, fresh = net.initial(key, state.width)
    if source in ("backbone", "fresh"):
        return fresh
    return ownership.local_at_width(state, state.tasks[source], fresh)


def _reclaimed(net: Net, state: State, key: jax.Array, fresh: bool) -> Tree:
    """Return the shared weights with the values that free weights start from."""
    restart = _empty_leaves(state.shared, state.owner)
    if not is_traced(restart):
        untouched = not state.tasks and not np.asarray(restart).all()  # its zeros are the model's own
        if untouched or (not fresh and not np.asarray(restart).any()):
            return state.shared
    drawn, _ = net.initial(key, state.width)
    return _redraw(state.shared, state.owner, drawn, restart | fresh)


@jax.jit
def _empty_leaves(shared: Tree, owner: Tree) -> jax.Array:
    """Say per leaf whether it is all free and all zero; bool of shape (leaves,)."""
    pairs = zip(jax.tree.leaves(shared), jax.tree.leaves(owner), strict=True)
    return jnp.stack([jnp.all((w == 0) & (o == ownership.FREE)) for w, o in pairs])


@jax.jit
def _redraw(shared: Tree, owner: Tree, drawn: Tree, leaves: jax.Array) -> Tree:
    """Give zero free weights of the marked leaves their drawn value."""
    chosen = jax.tree.unflatten(jax.tree.structure(shared), list(leaves))
    return jax.tree.map(
        lambda w, o, new, leaf: jnp.where((o == ownership.FREE) & (w == 0) & leaf, new, w), shared, owner, drawn, chosen
    )

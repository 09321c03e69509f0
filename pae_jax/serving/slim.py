"""`slim`: a task alone as a smaller dense network, without the channels that it does not use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from pae_jax.core import (
    State,
    TaskState,
    check,
    check_values,
    find,
    freeze,
    integrity,
    layout_of,
    ownership,
    placement,
    spread_arrays,
    verify,
)
from pae_jax.errors import ArgumentError, NotPreservableError, PhaseError
from pae_jax.nets import (
    Net,
    Program,
    Rngs,
    apply_task,
    as_complex,
    batch_size,
    check_net,
    features_function,
    full_precision,
    input_sizes,
    largest,
    relative_limit,
    trial_inputs,
)
from pae_jax.trees import PARAMS, Tree, flatten, merge
from pae_jax.widening import Cuts, find_cuts


@dataclasses.dataclass(frozen=True)
class Cut:
    """A leaf of a task that has become smaller.

    Attributes:
      path: its path in the backbone, or in the head after "head/".
      before: shape at the task's width.
      after: shape in the slimmed network.
    """

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SlimNet(Net):
    """A net of one width that computes one task, on the channels that the task uses.

    `print` it to see which kernels became smaller. It evaluates; it cannot be trained or built at another width.

    Attributes:
      build, sample, example, packable, free_axes, source, kind, rngs, couples_examples: as in `Net`.
      cuts: the leaves that became smaller.
      sizes: weights of backbone and head before and after.
    """

    cuts: tuple[Cut, ...] = ()
    sizes: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        before, after = self.sizes
        return f"SlimNet({self.source}, {after:,} of {before:,} numbers)"

    def __str__(self) -> str:
        kernels = [cut for cut in self.cuts if len(cut.before) > 1]
        space = max((len(cut.path) for cut in kernels), default=0)
        return "\n".join(
            [repr(self), *(f"  {c.path:{space}}  {_shape(c.before)} -> {_shape(c.after)}" for c in kernels)]
        )


def slim(net: Net, state: State, task: str) -> tuple[SlimNet, State]:
    """Return a frozen task alone as a smaller dense network: the channels that it does not use are cut out.

    A channel belongs to several layers: to those that compute it, to those that read it, and, around a residual
    connection, to all that add to it. It is cut from all of them if, for every input, whatever each reader sums over it
    is 0: the reader's weights there are 0 for this task, or the channel is the constant 0, as one without incoming
    weights is behind a rectifier. Each layer gets a size of its own. Channels over which a layer norm, a group of a
    group norm or a softmax is taken stay; so do those that an operation without a rule reads, such as the loop of an
    `nn.scan`. The smaller network is compared with the task on the net's sample before it is returned.

    Args:
      net: the network description the state was made with.
      state: the network. It is not changed.
      task: name of a frozen task.

    Returns:
      `(net, state)` for `predict`, `evaluate`, `check`, `save`, `load`, `export` and `write_bundle`. The net evaluates,
      at the task's width alone; the state holds the task alone. Outputs are those of the task up to the order of
      summation (about 1e-7 relative in float32). With a number of classes as head, `features` holds only those that the
      head uses; with a module or None all of them. `print(net)` lists the kernels that became smaller. A stage of the
      slimmed state is loaded with the slimmed net, which the same call makes again; a program of `export` needs no net.

    Raises:
      UnknownTaskError: no task of this name.
      PhaseError: the task is not frozen.
      ForgettingError: the state is damaged.
      StructureError: the state belongs to another model, or the model does not trace.
      NotPreservableError: the smaller network computes something else on the sample.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> state = pae.freeze(pae.prune(state, "a", 0.9), "a")
      >>> small, alone = pae.slim(net, state, "a")
      >>> small
      SlimNet(MLP slimmed for 'a', ... of 386 numbers)
      >>> x = jnp.ones((3, 4))
      >>> bool(jnp.allclose(pae.predict(small, alone, "a", x), pae.predict(net, state, "a", x), atol=1e-5))
      True

    Source: structured removal as in Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, but only of filters
      without effect.
    """
    check_net(net)
    entry = find(state, task)
    if not entry.frozen:
        raise PhaseError("slim", task, "packed but not frozen", "fit, prune, freeze or drop of that task")
    check_values("slim", state)
    spread_arrays.require_here("slim", state)
    integrity.require_own_net(net, state, [entry])
    verify(state)
    state = placement.automatic(state)
    entry = find(state, task)
    features, variables = features_function(net, entry.width), merge(ownership.task_weights(state, entry), entry.local)
    sizes = input_sizes(net, features, variables, batches=(1, 2, 3))
    cuts = find_cuts(features, variables, sizes, _rows_in_use(entry))
    head = _cut_head(entry, cuts)
    small = _net(net, state, task, cuts, head)
    alone = _state(small, state, task, cuts, head)
    check(alone, small)
    _compare(net, state, small, alone, task, max(map(batch_size, sizes)))
    return small, alone


def _rows_in_use(entry: TaskState) -> np.ndarray | None:
    """Return which features a linear head reads; None for another head, which may read all of them."""
    if not isinstance(entry.head_spec, int):
        return None
    return np.asarray((entry.head[PARAMS]["kernel"] != 0).any(axis=1))


def _cut_head(entry: TaskState, cuts: Cuts) -> Tree:
    if not isinstance(entry.head_spec, int):
        return entry.head
    [features] = cuts.outputs
    kernel = entry.head[PARAMS]["kernel"]
    kept = kernel if features[-1] is None else kernel[np.flatnonzero(features[-1])]
    return {**entry.head, PARAMS: {**entry.head[PARAMS], "kernel": kept}}


def _net(net: Net, state: State, task: str, cuts: Cuts, head: Tree) -> SlimNet:
    own_width, source = state.tasks[task].width, f"{net.source} slimmed for {task!r}"
    whole = net.program(own_width)
    before = {**flatten(cuts.variables), **_named(state.tasks[task].head)}
    after = {**flatten(jax.eval_shape(cuts.take, cuts.variables)), **_named(head)}
    shared = set(flatten(net.layout(own_width).shared))

    def init(key: jax.Array, x: Tree) -> dict[str, Tree]:
        return cuts.take(whole.init(key, x))

    def apply(variables: dict[str, Tree], x: Tree, train: bool, rngs: Rngs) -> tuple[Tree, dict[str, Tree]]:
        if train:
            raise ArgumentError(f"{source} cannot be trained; train the whole network, then call pae.slim again")
        return cuts.apply(variables, x), {}

    program = Program(init, apply, SlimModule(init, apply))

    def build(width: float) -> Program:
        if width != own_width:
            raise ArgumentError(f"{source} has width {own_width:g} alone, found {width:g}; widen the whole network")
        return program

    return SlimNet(
        build=build,
        sample=net.sample,
        example=net.example,
        packable=lambda path, leaf: path in shared,
        free_axes=net.free_axes,
        source=source,
        kind="linen",
        rngs=net.rngs,
        couples_examples=net.couples_examples,
        cuts=tuple(Cut(p, a.shape, after[p].shape) for p, a in before.items() if a.shape != after[p].shape),
        sizes=(_count(before), _count(after)),
    )


class SlimModule(nn.Module):
    """A slimmed backbone as a Linen module."""

    make: Callable[..., Any]
    run: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Tree, train: bool = False) -> Tree:
        """Return the features that are in use."""
        if self.is_initializing():
            for collection, tree in self.make(self.make_rng(PARAMS), x).items():
                for name, value in tree.items():
                    self.put_variable(collection, name, value)
        return self.run(dict(self.variables), x, train, None)[0]


def _named(head: Tree) -> dict[str, Any]:
    return {f"head/{path}": leaf for path, leaf in flatten(head).items()}


def _count(leaves: dict[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def _state(small: Net, state: State, task: str, cuts: Cuts, head: Tree) -> State:
    entry = state.tasks[task]
    whole = merge(ownership.task_weights(state, entry), entry.local)
    shared, local = small.split(cuts.take(whole))
    ids = ownership.at_width(state, state.owner, entry.width)
    seen = ownership.visible(ids, ownership.id_array(entry.id), entry.sharing, ownership.signs(entry))
    owner = cuts.take({PARAMS: jax.tree.map(lambda mask: mask.astype(jnp.int8), seen)})[PARAMS]
    alone = TaskState(
        local=local,
        head=head,
        digests=integrity.no_digests(shared, local, head, None),
        id=1,
        width=entry.width,
        head_spec=entry.head_spec,
        layout=layout_of(local=local, head=head),
    )
    layout = layout_of(shared=shared, local=local)
    return freeze(State(shared, owner, {task: alone}, width=entry.width, layout=layout), task)


def _compare(net: Net, state: State, small: Net, alone: State, task: str, rows: int) -> None:
    """Raise `NotPreservableError` unless both networks compute the same for drawn inputs."""
    x = trial_inputs(net, rows)
    with full_precision():
        answers = [_answer(n, s, task, x) for n, s in ((net, state), (small, alone))]
    for (path, old), new in zip(flatten(answers[0]).items(), jax.tree.leaves(answers[1]), strict=True):
        if not jnp.issubdtype(old.dtype, jnp.inexact):
            continue  # another order of summation may turn an argmax or a comparison
        worst, scale = largest(as_complex(new) - as_complex(old)), largest(old)
        limit = relative_limit(old.dtype, 1e-5) * scale
        if not worst <= limit:  # also true for NaN
            where = f" at {path}" if path else ""
            raise NotPreservableError(
                f"task {task!r}: the slimmed network computes other outputs{where}: largest difference {worst:.3g} at "
                f"a largest output of {scale:.3g}, {limit:.3g} is allowed. If the task's own outputs are finite on its "
                "sample's values, please report the model; else give the net a sample of values that suit it."
            )


def _answer(net: Net, state: State, task: str, x: Tree) -> Tree:
    entry = state.tasks[task]
    run = apply_task(net, entry.width, entry.head_spec)
    return run(ownership.task_weights(state, entry), entry.local, entry.head, x)


def _shape(sizes: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, sizes))}]"

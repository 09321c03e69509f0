"""Serve frozen tasks: one task, all tasks, a batch of mixed tasks, or task inference for an input.

The work that `predict` repeats at every call (checks, weights at the task's width, masks) is done once here. Tasks then
run through the function that `predict` compiles, on the same operands, so outputs are bit-identical by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Literal

import jax
import numpy as np

from pae_jax.checks import check_choice, check_count, check_mapping, check_names
from pae_jax.core import State, TaskState, check_values, find, integrity, names, ownership
from pae_jax.errors import ArgumentError, DataError, PhaseError, UnknownTaskError, kind_of
from pae_jax.nets import Net, apply_task, check_net, heads, inputs
from pae_jax.serving import all_tasks
from pae_jax.serving.all_tasks import By, Inference
from pae_jax.training import EVAL_BATCH
from pae_jax.trees import Tree


class Server:
    """Serve the frozen tasks of a state, which is checked and prepared once.

    Switching tasks compiles nothing: there is one compiled function per width and kind of head. Heads are not padded to
    one size, because a matrix product of another size may sum in another order and so change bits. Later changes of the
    network do not affect the server; create a new server for new tasks. Digests are not recomputed: see `pae.verify`.

    Attributes:
      tasks: names of the tasks it serves, in order of learning.
      ids: their owner ids, parallel to `tasks`.
      nbytes: bytes of the weights, or of weights and owners, in memory.

    Args:
      net: the network description the state was made with.
      state: the network.
      tasks: names of the tasks to serve; None takes all that are frozen.
      resident: what is kept in memory. "weights", the fastest: masked weights, one copy of the shared weights per
        task; the program of all tasks together compiles each task's part. "masks": shared weights and owners, one copy
        per width for any number of tasks; every call first masks them, a pass over all weights, which is noticeable for
        small batches; the program of all tasks together compiles one backbone per width, with a traced task id. The
        outputs of `predict` have the same bits.

    Raises:
      ArgumentError: no task to serve, or `resident` is neither.
      UnknownTaskError: no task of this name.
      PhaseError: a task that is not frozen.
      StructureError: the state belongs to another network, or is damaged.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> from pae_jax.serving.server import Server
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.init(net, jax.random.key(0))
      >>> for name in ("a", "b"):
      ...     state = pae.pack(net, state, name, head=3, key=jax.random.key(len(name)))
      ...     state = pae.freeze(pae.prune(state, name, 0.5), name)
      >>> server, x = Server(net, state), jnp.ones((2, 4))
      >>> bool((server.predict("b", x) == pae.predict(net, state, "b", x)).all())
      True
      >>> sorted(server.predict_all(x)), len(server.predict_mixed(["b", "a"], x))
      (['a', 'b'], 2)
      >>> server.infer_task(x, by="entropy").scores.shape
      (2, 2)
    """

    def __init__(
        self,
        net: Net,
        state: State,
        *,
        tasks: Iterable[str] | None = None,
        resident: Literal["weights", "masks"] = "weights",
    ):
        check_net(net)
        check_choice("resident", resident, ("weights", "masks"))
        check_values("Server", state)
        integrity.check(state)
        self._net, self._resident = net, resident
        self._entries = _chosen(state, tasks)
        integrity.require_own_net(net, state, self._entries.values())
        self.tasks = tuple(self._entries)
        self.ids = tuple(entry.id for entry in self._entries.values())
        self._unfrozen = {key for name, e in state.tasks.items() if not e.frozen for key in (name, e.id)}
        self._apply = {name: apply_task(net, e.width, e.head_spec) for name, e in self._entries.items()}
        outputs = {name: heads.layout(net, e.head_spec, e.width)[1] for name, e in self._entries.items()}
        shapes = {name: getattr(out, "shape", ()) for name, out in outputs.items()}
        self._without_softmax = [name for name, shape in shapes.items() if len(shape) < 2 or shape[-1] < 2]
        self._weights: dict[str, Tree] = {}
        self._at: dict[float, State] = {}
        if resident == "weights":
            self._weights = {name: ownership.task_weights(state, entry) for name, entry in self._entries.items()}
        else:
            self._at = all_tasks.at_widths(state, self._entries.values())
        self.nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((self._weights, self._at)))
        self._together: tuple[Callable[..., Any], Any] | None = None

    def __repr__(self) -> str:
        return f"Server({', '.join(map(repr, self.tasks))}; {self._resident}, {self.nbytes:,} bytes)"

    def predict(self, task: str | int, x: Tree, *, batch_size: int | None = None) -> jax.Array:
        """Return a task's logits, the same bits as `pae.predict` of this task on this batch.

        Args:
          task: name or id of a task.
          x: inputs (batch, ...), NumPy or JAX arrays, shapes and dtypes as in the net's sample.
          batch_size: compute in chunks of this size, with the last one padded; None computes all at once, and has to
            be used inside jit.

        Returns:
          The head's output (batch, ...).

        Raises:
          UnknownTaskError, PhaseError: no task of this name or id is served, or it is not frozen.
          StructureError, DataError: inputs of a wrong shape or dtype, or parts of unequal length.
        """
        name = self._name(task)
        apply, operands = self._apply[name], self._operands(name)
        return inputs.in_pieces(self._net, x, batch_size, lambda x: apply(*operands, x))

    def predict_all(self, x: Tree, *, together: bool = False, batch_size: int | None = None) -> dict[str, jax.Array]:
        """Return the logits of every task on one batch.

        Args:
          x: as for `predict`.
          together: run all tasks in one compiled program instead of one call per task. This saves the overhead of
            calls, but compiles once per batch shape, and the last bits may differ from `predict`.
          batch_size: as for `predict`.

        Returns:
          `{task: logits (batch, ...)}`, in order of learning.

        Raises:
          StructureError, DataError: as `predict`.
        """
        if together:
            return self._all_together(x, batch_size)[0]
        return {name: self.predict(name, x, batch_size=batch_size) for name in self.tasks}

    def predict_mixed(
        self, tasks: Iterable[str | int] | np.ndarray | jax.Array, x: Tree, *, batch_size: int | None = None
    ) -> list[Any]:
        """Return for each example the logits of its given task.

        Examples of one task run together, padded to a power of two, so that few batch shapes compile. Examples do not
        influence each other, but the number of examples of a task may change the summation order.

        Args:
          tasks: one name or id per example.
          x: as for `predict`; copied through host memory.
          batch_size: largest number of examples run together; None sets no limit.

        Returns:
          One array (..., classes of the example's own head) per example, or the tree that the head returns, in the
          order of the examples.

        Raises:
          ArgumentError: `tasks` is a single name, no collection, or one without an order of examples, as a set is.
          DataError: not one task per example.
          UnknownTaskError, PhaseError, StructureError: as `predict`.
        """
        if isinstance(tasks, (str, Set, Mapping)) or not isinstance(tasks, Iterable):
            given = f"the name {tasks!r}" if isinstance(tasks, str) else kind_of(tasks)
            raise ArgumentError(f"tasks must be one name or id per example, found {given}; use predict for one task")
        listed = tasks.tolist() if isinstance(tasks, (np.ndarray, jax.Array)) else list(tasks)
        x, count = inputs.checked(self._net, x)
        if len(listed) != count:
            raise DataError(f"tasks names {len(listed)} tasks and x has {count} examples; they must be equal")
        limit = None if batch_size is None else check_count("batch_size", batch_size, 1)
        rows: dict[str, list[int]] = {}
        for row, task in enumerate(listed):
            rows.setdefault(self._name(task), []).append(row)
        host, running = jax.tree.map(np.asarray, x), []
        for name, own in rows.items():
            apply, operands = self._apply[name], self._operands(name)
            for piece, size in inputs.powers_of_two(own, limit):
                running.append((piece, apply(*operands, inputs.filled_rows(host, piece, size))))
        # All chunks are dispatched before waiting for the first result.
        found: dict[int, Any] = {}
        for piece, out in running:
            on_host = jax.tree.map(np.asarray, out)
            found |= {row: jax.tree.map(lambda leaf, i=i: leaf[i], on_host) for i, row in enumerate(piece)}
        return [found[row] for row in range(count)]

    def infer_task(
        self,
        x: Tree,
        *,
        by: By = "confidence",
        per: Literal["example", "batch"] = "example",
        batch_size: int | None = None,
    ) -> Inference:
        """Infer the task of inputs: run all tasks in one compiled program and take the most confident one.

        With p = softmax(logits) over the C classes of a task's head, its score is max p by "confidence", and
        1 - H(p) / log C by "entropy", where dividing by log C makes heads of different sizes comparable. For outputs
        with further axes the score is the mean over them. A score that is NaN is never the largest.

        By "gradient" one network is run for all tasks: its weights, local variables and head are their means. A task's
        score is the rate at which the entropy H(p) falls as its share increases, `-dH / da` at equal shares. This takes
        one forward and one backward pass for any number of tasks, which must have the same width and kind of head. It
        is intended for tasks whose weights are masks of the same weights.

        Args:
          x: as for `predict`.
          by: "confidence", "entropy" or "gradient".
          per: choose for each "example", or one task for the whole "batch", by the mean of the scores.
          batch_size: compute in chunks of this size, with the last one padded; None computes all at once, as does
            `by="gradient"` with `per="batch"`.

        Returns:
          The chosen tasks, the scores, and the logits of all tasks.

        Raises:
          ArgumentError: `by` or `per` is none of these, a head has one output, so that it has no softmax, or
            `by="gradient"` with tasks of several widths or kinds of heads.
          DataError: no examples with `per="batch"`.
          StructureError, DataError: as `predict`.

        Source: Wortsman et al., "Supermasks in Superposition", NeurIPS 2020 (least entropy over all tasks); Hendrycks
        and Gimpel, "A Baseline for Detecting Misclassified Examples", ICLR 2017 (softmax confidence).
        """
        check_choice("by", by, ("confidence", "entropy", "gradient"))
        check_choice("per", per, ("example", "batch"))
        if self._without_softmax:
            found = f"the heads of {self._without_softmax} have no array of 2 or more outputs and so no softmax"
            raise ArgumentError(f"{found}; leave these tasks out: Server(..., tasks=)")
        if by == "gradient":
            return self._by_gradient(x, per == "batch", batch_size)
        logits, scores = self._all_together(x, batch_size)
        table = np.asarray(scores[by])
        if per == "batch":
            if not len(table):
                raise DataError("x has no examples, so no task can be chosen for it")
            table = all_tasks.grouped(table, len(table))
        return Inference([self.tasks[column] for column in all_tasks.surest(table)], table, logits)

    def task_inference_accuracy(
        self, data: Mapping[str, Tree], *, by: By = "confidence", group: int = 1, batch_size: int | None = None
    ) -> dict[str, Any]:
        """Measure how often `infer_task` finds the true task of inputs.

        Args:
          data: `{task: inputs (examples, ...)}`, held-out examples of tasks that are served.
          by: as for `infer_task`.
          group: number of consecutive examples of a task that are decided together, by the mean of their scores; 1
            decides on each example.
          batch_size: as for `infer_task`; None takes the largest set of examples, at most 256.

        Returns:
          `{"accuracy": share of right decisions, "count": decisions, "per_task": {task: share}}`.

        Raises:
          ArgumentError: `group` is not a positive integer, or as `infer_task`.
          DataError: no data, or none for a task.
          UnknownTaskError, PhaseError, StructureError: as `predict`.
        """
        group = check_count("group", group, 1)
        check_mapping("data", data, "{task: inputs}")
        columns = {task: self.tasks.index(self._name(task)) for task in data}
        counts = {task: inputs.checked(self._net, x)[1] for task, x in data.items()}
        if not counts or not min(counts.values()):
            raise DataError(f"every task needs at least 1 example, found {counts or 'no task'}")
        size = min(EVAL_BATCH, max(counts.values())) if batch_size is None else batch_size
        right = {}
        for task, x in data.items():
            table = self.infer_task(x, by=by, batch_size=size).scores
            right[task] = all_tasks.surest(all_tasks.grouped(table, group)) == columns[task]
        every = np.concatenate(list(right.values()))
        per_task = {task: float(hits.mean()) for task, hits in right.items()}
        return {"accuracy": float(every.mean()), "count": len(every), "per_task": per_task}

    def _name(self, task: str | int) -> str:
        if isinstance(task, str) and task in self._entries:
            return str(task)
        if isinstance(task, (int, np.integer)) and not isinstance(task, bool) and task in self.ids:
            return self.tasks[self.ids.index(int(task))]
        if isinstance(task, (str, int)) and task in self._unfrozen:
            phase = "not frozen in the state this server was made from"
            raise PhaseError("Server.predict", str(task), phase, "pae.predict; pae.freeze, then a new Server")
        raise UnknownTaskError(task, list(self.tasks), "this server")

    def _operands(self, name: str) -> tuple[Tree, Tree, Tree]:
        entry = self._entries[name]
        weights = self._weights.get(name)
        if weights is None:
            weights = ownership.task_weights(self._at[entry.width], entry)
        return weights, entry.local, entry.head

    def _by_gradient(self, x: Tree, together: bool, batch_size: int | None) -> Inference:
        entries = list(self._entries.values())
        # The first task's program runs for all, so a head must be the same down to what a module was made with.
        first, *rest = ((entry.width, heads.key_of(entry.head_spec)) for entry in entries)
        others = [name for name, kind in zip(self.tasks[1:], rest, strict=True) if kind != first]
        if others:
            raise ArgumentError(
                f"by='gradient' mixes the tasks' weights, so they need one width and one kind of head; "
                f"{others} differ from {self.tasks[0]!r}. Use by='entropy', or Server(..., tasks=) for one kind."
            )
        x, count = inputs.checked(self._net, x)
        if together and not count:
            raise DataError("x has no examples, so no task can be chosen for it")
        run = all_tasks.by_gradient(self._net, entries, together)
        operands = [self._operands(name) for name in self.tasks]
        one = lambda x: run(operands, x)  # noqa: E731
        table = np.asarray(one(x) if together else inputs.in_pieces(self._net, x, batch_size, one))
        return Inference([self.tasks[column] for column in all_tasks.surest(table)], table, {})

    def _all_together(self, x: Tree, batch_size: int | None) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        if self._together is None:
            entries = list(self._entries.values())
            if self._resident == "weights":
                operands = [self._operands(name) for name in self.tasks]
                self._together = all_tasks.by_weights(self._net, entries), operands
            else:
                self._together = all_tasks.by_id(self._net, entries, self._at)
        run, operands = self._together
        logits, scores = inputs.in_pieces(self._net, x, batch_size, lambda x: run(operands, x))
        return dict(zip(self.tasks, logits, strict=True)), scores


def _chosen(state: State, tasks: Iterable[str] | None) -> dict[str, TaskState]:
    """Return the records of the tasks to serve, in order of learning."""
    order = names(state)
    frozen = [name for name in order if state.tasks[name].frozen]
    wanted = frozen or order if tasks is None else check_names("tasks", tasks)
    for name in wanted:
        if not find(state, name).frozen:
            raise PhaseError("Server", name, "not frozen", "pae.predict; pae.freeze, then Server")
    if not wanted:
        raise ArgumentError(f"Server needs at least one frozen task, found none; the state has {order or 'no tasks'}")
    return {name: state.tasks[name] for name in order if name in wanted}

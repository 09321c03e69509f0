"""Typed errors: each message states what was found, what was expected and what to do."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any


class PaeError(Exception):
    """Base class of all errors that pae_jax raises."""

    def __reduce__(self) -> Any:
        # Pickle rebuilds exceptions from their message alone, but ours take more arguments.
        return _rebuild, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        # KeyError would print the repr of its message, line breaks escaped.
        return str(self.args[0]) if self.args else ""


def _rebuild(kind: type[PaeError], args: tuple[Any, ...], attributes: dict[str, Any]) -> PaeError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


def kind_of(value: Any) -> str:
    """Return what a value is, without its contents."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isfunction(value):
        return f"the function {value.__name__}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


class ArgumentError(PaeError, ValueError):
    """An argument lies outside its documented range."""


class UnknownTaskError(PaeError, KeyError):
    """No task of this name is in the state."""

    def __init__(self, name: object, known: list[str], holder: str = "the state"):
        self.name = name
        self.known = known
        listing = ", ".join(repr(task) for task in known) or "none yet"
        if not isinstance(name, (str, int)):
            super().__init__(f"a task is given by its name, found {kind_of(name)}; {holder} has: {listing}.")
            return
        hint = f" Add it with pae.pack(net, state, {name!r}, ...)." if holder == "the state" else ""
        super().__init__(f"unknown task {name!r}; {holder} has: {listing}.{hint}")


class PhaseError(PaeError, RuntimeError):
    """A call is not allowed in the present phase of a task."""

    def __init__(self, call: str, task: str, phase: str, valid: str):
        self.task = task
        self.phase = phase
        super().__init__(f"{call} cannot be called now: task {task!r} is {phase}. Valid calls: {valid}.")


class CapacityError(PaeError, RuntimeError):
    """No capacity is left, such as free weights or task ids."""


class StructureError(PaeError, ValueError):
    """A tree, leaf, input or model has another structure, shape or dtype than expected."""

    def __init__(self, tree: str, path: str, found: Any, expected: Any, hint: str = ""):
        self.tree = tree
        self.path = path
        self.found = found
        self.expected = expected
        place = f"{tree}, leaf '{path}'" if path else tree
        text = f"{place}: found {found}, expected {expected}."
        super().__init__(f"{text} {hint}".rstrip())


class DataError(PaeError, ValueError):
    """Data that cannot be read, or examples or labels that training and evaluation cannot use."""


@contextlib.contextmanager
def found_at(place: str) -> Iterator[None]:
    """Say in errors of data and structure where the data belongs."""
    try:
        yield
    except (DataError, StructureError) as error:
        error.args = (f"{place}: {error}", *error.args[1:])
        raise


class DivergedError(PaeError, ArithmeticError):
    """Training stopped because a loss, gradients or updates were not finite.

    Attributes:
      step: 0-based training step, counted from the start of this `fit`, where that happened.
      state: the state after the last good step, all finite. If the loss and its gradient with respect to the network's
        outputs were finite and only later values were not, each weight whose own result was finite has taken that step.
      history: the `History` up to that step.
    """

    def __init__(self, task: str, step: int, state: Any, history: Any):
        self.step = step
        self.state = state
        self.history = history
        super().__init__(
            f"task {task!r}: the loss, its gradients or their updates became NaN or infinite at step {step}; training "
            "stopped. "
            "The state after the last good step is this error's `.state`. "
            "A smaller learning rate, gradient clipping or a look at the data of that step may help."
        )


class TrainingInterrupted(KeyboardInterrupt):
    """Training was interrupted by hand, such as by Ctrl-C or by stopping a notebook cell.

    Attributes:
      state: the network after the last step that was finished.
      history: the `History` of the finished epochs; `fit(resume=error.history)` takes the interrupted one again, from
        these weights.
    """

    def __init__(self, task: str, step: int, state: Any, history: Any):
        self.state = state
        self.history = history
        super().__init__(
            f"task {task!r}: training was interrupted after {step} steps. The network after the last of them is this "
            "exception's `.state`, its history `.history`; in a notebook, `sys.last_value.state`."
        )


class ForgettingError(PaeError, RuntimeError):
    """An array that a frozen task depends on has changed since the task was frozen."""


class NotPreservableError(PaeError, ValueError):
    """Widening would change what an old task computes.

    Attributes:
      reasons: one text per place, each naming the layer, the reason and what to do.
    """

    def __init__(self, message: str, reasons: tuple[str, ...] = ()):
        self.reasons = reasons
        super().__init__(message)


class ProcessError(PaeError, RuntimeError):
    """Another process that shares a call has failed, or is not where this one is."""


class CheckpointError(PaeError, OSError):
    """A stage cannot be written, or is missing, incomplete, damaged or of another kind."""

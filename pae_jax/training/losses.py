"""Losses and metrics of a task: their allowed forms, and checks of both before training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pae_jax.caching import program_text
from pae_jax.checks import check_choice, check_kind
from pae_jax.errors import ArgumentError, DataError
from pae_jax.trees import Tree, describe, sketch

Loss = Callable[..., jax.Array]
"""`(outputs, y) -> losses`, a scalar or an array that starts with the batch axis."""
LossPer = Literal["example", "batch"]
Values = Callable[..., jax.Array]
"""`(outputs, y) -> one number per example`."""

_PRIMES = (11, 13, 17, 19, 23, 29, 31, 37)


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of each example, in float32; the default loss."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels.astype(jnp.int32))


def class_numbers(labels: Any) -> bool:
    """Return whether labels may be class numbers: integers or bool."""
    return hasattr(labels, "dtype") and any(jnp.issubdtype(labels.dtype, kind) for kind in (jnp.integer, jnp.bool_))


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the share of correct predictions of each example, float32 (batch,); NaN among the logits is none."""
    numbers = labels.astype(jnp.int32) if labels.dtype == jnp.bool_ else labels
    right = ((jnp.argmax(logits, axis=-1) == numbers) & ~jnp.isnan(logits).any(axis=-1)).astype(jnp.float32)
    return right.reshape(right.shape[0], -1).mean(axis=1)


@dataclass(frozen=True)
class Objective:
    """The loss and the metrics of a task.

    Attributes:
      loss: `(outputs, y) -> losses`; None is the softmax cross-entropy of class numbers.
      per: "example": the loss of a batch is the mean of its examples' losses. "batch": it is a function of all of them.
      metrics: `(name, (outputs, y) -> one number per example)`, measured beside the loss.
    """

    loss: Loss | None = None
    per: LossPer = "example"
    metrics: tuple[tuple[str, Values], ...] = ()

    @property
    def takes_classes(self) -> bool:
        """Whether labels must be class numbers."""
        return self.loss is None

    def losses(self, out: Tree, y: Tree) -> jax.Array:
        """Return the losses of a batch in the form that the user's function returns."""
        return _called(self.loss or softmax_cross_entropy, out, y)

    def mean_loss(self, out: Tree, y: Tree) -> jax.Array:
        """Return the loss of a batch, a float32 scalar."""
        return jnp.mean(self.losses(out, y)).astype(jnp.float32)

    def example_losses(self, out: Tree, y: Tree) -> jax.Array:
        """Return the loss of each example, float32 (batch,), whether the user's loss averages or not."""
        losses = jax.eval_shape(self.losses, out, y)
        if losses.shape:
            return self.losses(out, y).reshape(losses.shape[0], -1).mean(axis=1).astype(jnp.float32)
        one = lambda o, t: self.mean_loss(*jax.tree.map(lambda leaf: leaf[None], (o, t)))  # noqa: E731
        return jax.vmap(one)(out, y)

    def values(self, out: Tree, y: Tree) -> dict[str, jax.Array]:
        """Return the metrics of each example, float32 (batch,)."""
        return {name: _called(function, out, y).astype(jnp.float32) for name, function in self.metrics}

    def check(self, out: Tree, y: Tree, train: bool = False) -> None:
        """Raise `DataError` if loss or metrics have an invalid form, judged on abstract outputs and labels.

        A loss object may have a method `check_training(outputs)`, to refuse outputs that it cannot train on.
        """
        loss: Any = self.loss
        if train and hasattr(loss, "check_training"):
            loss.check_training(out)
        losses = _traced(self.loss or softmax_cross_entropy, out, y, "loss")
        count = jax.tree.leaves(out)[0].shape[0]
        if losses.shape and losses.shape[0] != count:
            raise DataError(
                f"the loss has shape {losses.shape} for {count} examples; it must be a scalar or start with the batch "
                "axis"
            )
        if not jnp.issubdtype(losses.dtype, jnp.floating):
            raise DataError(f"the loss is {describe(losses)}; it must be a float")
        if self.per == "example" and self.loss is not None and _mixes(self.loss, out, y):
            hint = "For a loss over the batch, such as a contrastive one, say loss_per='batch'."
            raise DataError(f"{_mixing('the loss', out, y)} {hint}")
        for name, function in self.metrics:
            found = _traced(function, out, y, f"metric {name!r}")
            if found.shape != (count,):
                raise DataError(
                    f"metric {name!r} must be one number per example, shape ({count},); found {found.shape}"
                )
            if self.per == "example":
                require_apart(f"metric {name!r}", function, out, y)

    def check_scalar(self, out: Tree, y: Tree) -> None:
        """Raise `DataError` if a scalar loss is no mean or sum over examples, so that evaluation cannot split it.

        Args:
          out: abstract outputs.
          y: labels of as many examples.
        """
        if self.loss is None or self.per == "batch" or jax.eval_shape(self.losses, out, y).shape:
            return
        rng = np.random.default_rng(0)
        drawn = jax.tree.map(lambda leaf: _drawn(rng, leaf), out)
        with np.errstate(all="ignore"):
            whole, parts = jax.jit(lambda o, t: (self.mean_loss(o, t), self.example_losses(o, t)))(drawn, y)
        whole, parts = float(whole), np.asarray(parts, np.float64)
        if not any(np.isclose(whole, value, rtol=1e-3, atol=1e-6) for value in (parts.mean(), parts.sum())):
            raise DataError(
                f"the loss of a batch is {whole:.4g}, but its examples' losses have mean {parts.mean():.4g}: it is no "
                "mean over examples, which evaluation takes. Return one loss per example, or say loss_per='batch'."
            )

    def text(self, out: Tree, y: Tree) -> tuple[str, ...]:
        """Return digests of the user's functions in their present state; values they capture may have changed."""
        every = (self.loss, *(metric for _, metric in self.metrics))
        functions = [function for function in every if function not in (None, accuracy)]
        return tuple(program_text(lambda o, t, f=f: _called(f, o, t), out, y) for f in functions)


def objective(loss: Loss | None, per: LossPer, metrics: Mapping[str, Values] | None) -> Objective:
    """Return the objective for the given arguments; without a custom loss, the accuracy is measured too."""
    check_choice("loss_per", per, ("example", "batch"))
    if loss is not None and not callable(loss):
        raise ArgumentError(f"loss must be a function (outputs, y) -> losses, found {loss!r}")
    if metrics is None:
        metrics = {"accuracy": accuracy} if loss is None else {}
    check_kind("metrics", metrics, Mapping, "{name: (outputs, y) -> one number per example}")
    for name, function in metrics.items():
        taken = name in ("loss", "count", "epoch", "score") or (isinstance(name, str) and name.startswith("val_"))
        if taken or not callable(function):
            raise ArgumentError(
                "metrics maps names other than 'loss', 'count', 'epoch', 'score' and 'val_...' to functions "
                f"(outputs, y) -> values; found {name!r}"
            )
    return Objective(loss, per, tuple(metrics.items()))


def with_accuracy(objective: Objective) -> Objective:
    """Return an objective that also measures the accuracy of class numbers."""
    known = dict(objective.metrics)
    return objective if "accuracy" in known else replace(objective, metrics=(*known.items(), ("accuracy", accuracy)))


def require_apart(name: str, function: Values, out: Tree, y: Tree) -> None:
    """Raise `DataError` if a function that gives one number per example mixes examples, as far as it can be traced."""
    if _mixes(function, out, y):
        raise DataError(_mixing(name, out, y))


def _called(function: Any, out: Tree, y: Tree) -> jax.Array:
    """Call a function of outputs and labels; a function of more arguments gets the parts of a tuple of labels."""
    if isinstance(y, tuple) and len(y) > 1 and _required(function) == 1 + len(y):
        return jnp.asarray(function(out, *y))
    return jnp.asarray(function(out, y))


def _required(function: Any) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _traced(function: Any, out: Tree, y: Tree, name: str) -> Any:
    try:
        return jax.eval_shape(lambda o, t: _called(function, o, t), out, y)
    except (TypeError, ValueError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"the {name} fails on outputs {sketch(out)} and labels {sketch(y)}: {cause}") from error


def _mixing(name: str, out: Tree, y: Tree) -> str:
    return (
        f"{name} mixes examples: inside it an array has the batch axis twice, as outputs (n, 1) minus labels (n,) have."
        f" Outputs are {sketch(out)}, labels {sketch(y)}: make their shapes equal, for instance out[:, 0]."
    )


def _mixes(function: Any, out: Tree, y: Tree) -> bool:
    """Return whether some array inside a loss has the batch axis twice, by a batch size that no other axis has."""
    taken = {size for leaf in jax.tree.leaves((out, y)) for size in leaf.shape[1:]}
    count = next(prime for prime in _PRIMES if prime not in taken)
    resized = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), (out, y))
    try:
        jaxpr = jax.make_jaxpr(lambda o, t: _called(function, o, t))(*resized)
    except Exception:  # the loss accepts only one batch size; nothing is known
        return False
    return any(shape.count(count) > 1 for shape in _shapes(jaxpr.jaxpr))


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _shapes(inner)


def _drawn(rng: np.random.Generator, leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return rng.normal(size=leaf.shape).astype(leaf.dtype)
    return np.zeros(leaf.shape, leaf.dtype)

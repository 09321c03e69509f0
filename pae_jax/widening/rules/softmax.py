"""Softmax bookkeeping: a sum of exp(x - max(x)) is at least 1.

Without it, the engine could not tell that the softmax of a new attention head is finite when masks make its logits
unknown. A value remembers that it is the maximum of another one (`Peak` of kind "maximum", "aligned" once it is
broadcast back) or that its largest entry along some axes is a known number (kind "level").

A mask of -inf is tracked as well (kind "masked"): if it hides the same positions at old and new coordinates, the
softmax of a new head is finite wherever that of the old heads is, since it cannot hide all entries of a softmax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from pae_jax.widening.ranges import Range
from pae_jax.widening.steps import Step
from pae_jax.widening.values import Peak, Value


def after_maximum(operand: Value, axes: frozenset[int], result: Value) -> Value:
    """The result of a reduce_max over `axes`."""
    return dataclasses.replace(result, peak=Peak("maximum", axes, of=operand))


def after_broadcast(operand: Value, dims: tuple[int, ...], result: Value) -> Value:
    """The result of a broadcast that puts the reduced axes back."""
    peak = operand.peak
    if peak is None or peak.kind != "maximum" or peak.of is None:
        return result
    kept = tuple(i for i in range(len(peak.of.axes)) if i not in peak.axes)
    back = len(result.axes) == len(peak.of.axes) and dims == kept
    pairs = [(result.axes[i], axis) for i, axis in zip(dims, operand.axes, strict=True)]
    if not back or any((a.n, a.w) != (b.n, b.w) for a, b in pairs):
        return result
    return dataclasses.replace(result, peak=dataclasses.replace(peak, kind="aligned"))


def after_elementwise(step: Step, operands: Sequence[Value], result: Value) -> Value:
    """The result of an elementwise operation."""
    first = operands[0]
    if step.primitive in ("stop_gradient", "copy"):
        return dataclasses.replace(result, peak=first.peak)
    if step.primitive == "convert_element_type" and first.peak and first.peak.kind == "level":
        kept = first.peak.level in (0.0, 1.0) and jnp.issubdtype(step.params["new_dtype"], jnp.floating)
        return dataclasses.replace(result, peak=first.peak) if kept else result
    if step.primitive == "max":
        for value, other in ((operands[0], operands[1]), (operands[1], operands[0])):
            if not other.axes and other.old.lo == other.old.hi == -math.inf:
                return dataclasses.replace(result, peak=value.peak)
    if step.primitive == "sub":
        peak = operands[1].peak
        known = _is_masked(first) or (first.old.finite and first.new.finite)
        if peak and peak.kind == "aligned" and peak.of is first and known:
            return _leveled(result, Peak("level", peak.axes, level=0.0))
    if step.primitive == "exp" and first.peak and first.peak.kind == "level":
        # No entry is NaN or above the level, and exp(-inf) is 0.
        old, new = (dataclasses.replace(r, finite=True) for r in (result.old, result.new))
        result = dataclasses.replace(result, old=old, new=new)
        return _leveled(result, Peak("level", first.peak.axes, level=math.exp(first.peak.level)))
    return dataclasses.replace(result, peak=Peak("masked", frozenset())) if _masks(step, operands) else result


def _is_masked(value: Value) -> bool:
    return value.peak is not None and value.peak.kind == "masked"


def _masks(step: Step, operands: Sequence[Value]) -> bool:
    """Whether an operation sets the same positions to -inf at old and new coordinates, and keeps all others finite."""
    if step.primitive == "select_n" and len(operands) == 3:
        which, *cases = operands
        hidden = [all(cells.lo == cells.hi == -math.inf for cells in _cells(case)) for case in cases]
        shown = [case for case, hides in zip(cases, hidden, strict=True) if not hides]
        return any(hidden) and not which.growing and all(map(_finite_or_masked, shown))
    if step.primitive in ("add", "sub"):
        masks = [_is_masked(value) or _hides(value) for value in operands]
        return (
            masks[0] != masks[1]
            and not (step.primitive == "sub" and masks[1])
            and all(masked or _finite_or_masked(value) for masked, value in zip(masks, operands, strict=True))
        )
    if step.primitive in ("mul", "div"):
        return _is_masked(operands[0]) and all(cells.positive for cells in _cells(operands[1]))
    return step.primitive in ("convert_element_type", "reduce_precision") and _is_masked(operands[0])


def _finite_or_masked(value: Value) -> bool:
    return _is_masked(value) or all(cells.finite for cells in _cells(value))


def _cells(value: Value) -> tuple[Range, ...]:
    """Return the meaningful ranges of a value."""
    return (value.old, value.new) if value.growing else (value.old,)


def _hides(value: Value) -> bool:
    """Whether a value that does not grow may contain -inf: it has exactly the values of the narrow network."""
    return not value.growing and not value.old.finite and value.old.lo == -math.inf and value.old.hi < math.inf


def after_sum(operand: Value, axes: frozenset[int], result: Value) -> Value:
    """The result of a reduce_sum over `axes`: at least the level if no entry is negative."""
    peak = operand.peak
    if peak is None or peak.kind != "level" or not peak.axes <= axes:
        return result

    def raised(total: Range, entries: Range) -> Range:
        return dataclasses.replace(total, lo=max(total.lo, peak.level)) if entries.lo >= 0 else total

    return dataclasses.replace(result, old=raised(result.old, operand.old), new=raised(result.new, operand.new))


def _leveled(result: Value, peak: Peak) -> Value:
    old, new = (dataclasses.replace(r, hi=min(r.hi, peak.level)) for r in (result.old, result.new))
    return dataclasses.replace(result, old=old, new=new, peak=peak)

"""Softmax bookkeeping: a sum of exp(x - max(x)) is at least 1.

Without it, the engine could not tell that the softmax of a new attention head is finite when masks make its logits
unknown. A value remembers that it is the maximum of another one (`Peak` of kind "maximum", "aligned" once it is
broadcast back) or that its largest entry along some axes is a known number (kind "level").
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
    if step.primitive == "convert_element_type" and first.peak and first.peak.level in (0.0, 1.0):
        kept = first.peak.kind == "level" and jnp.issubdtype(step.params["new_dtype"], jnp.floating)
        return dataclasses.replace(result, peak=first.peak) if kept else result
    if step.primitive == "max":
        for value, other in ((operands[0], operands[1]), (operands[1], operands[0])):
            if not other.axes and other.old.lo == other.old.hi == -math.inf:
                return dataclasses.replace(result, peak=value.peak)
    if step.primitive == "sub":
        peak = operands[1].peak
        if peak and peak.kind == "aligned" and peak.of is first and first.old.finite and first.new.finite:
            return _leveled(result, Peak("level", peak.axes, level=0.0))
    if step.primitive == "exp" and first.peak and first.peak.kind == "level":
        return _leveled(result, Peak("level", first.peak.axes, level=math.exp(first.peak.level)))
    return result


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

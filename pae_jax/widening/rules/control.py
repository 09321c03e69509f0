"""Calls, branches and loops: the walk enters the programs they contain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pae_jax.widening import programs
from pae_jax.widening.ranges import Range, anything, hull
from pae_jax.widening.registry import rule
from pae_jax.widening.rules.unknown import unknown_primitive
from pae_jax.widening.steps import Step
from pae_jax.widening.terms import Copies, Same, Term, copies, resolve
from pae_jax.widening.values import NO_REASONS, Value

_ROUNDS = 4  # rounds before the ranges of a loop's carry are set to unknown


def _bodies(step: Step) -> list[tuple[programs.Body, programs.Body]]:
    pairs = [list(programs.bodies(eqn.params)) for eqn in (step.narrow, step.wide)]
    if len(pairs[0]) != len(pairs[1]):
        raise step.mismatch(f"{len(pairs[1])} branches", f"{len(pairs[0])}")
    return [(n, w) for (_, n), (_, w) in zip(*pairs, strict=True)]


def _mark(step: Step, values: Sequence[Value]) -> list[Value]:
    """Refusals inside keep their marks; a refusal here marks every result."""
    return [dataclasses.replace(v, reasons=v.reasons | step.reasons) for v in values]


_CALLS = (
    "jit", "pjit", "closed_call", "core_call", "call", "remat", "remat2", "checkpoint", "composite",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
)  # fmt: skip


# Other parameters of a call (names, shardings, policies, derivative rules) do not change its values.
@rule(*_CALLS, may_differ=("*",))
def call(step: Step, operands: Sequence[Value]) -> list[Value]:
    """A function called once: read its body."""
    pairs = _bodies(step)
    if len(pairs) != 1 or len(pairs[0][0].invars) != len(operands):
        return unknown_primitive(step, ("body",))
    return step.walk(step, *pairs[0], operands)


@rule("cond", may_differ=("branches",))
def cond(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Every branch must agree about the results' axes."""
    which, *arguments = operands
    outcomes = [step.walk(step, narrow, wide, arguments) for narrow, wide in _bodies(step)]
    results = []
    for options in zip(*outcomes, strict=True):
        axes = [_joint(step, [value.axes[i] for value in options]) for i in range(len(options[0].axes))]
        reasons = which.reasons.union(*(value.reasons for value in options))
        # A branch whose result is broadcast along an axis holds old entries at its new coordinates.
        cells = [value.new for value in options]
        if any(_is_copies(axis) for value in options for axis in value.axes):
            cells += [value.old for value in options]
        results.append(Value(tuple(axes), hull(v.old for v in options), hull(cells), reasons, options[0].leaf))
    return _mark(step, results)


def _is_copies(axis: Term) -> bool:
    return isinstance(resolve(axis), Copies)


def _joint(step: Step, terms: Sequence[Term]) -> Term:
    solid = [term for term in terms if not _is_copies(term)]
    for term in solid[1:]:
        step.unify(solid[0], term, "the branches")
    return solid[0] if solid else copies(terms[0].n, terms[0].w)


@rule("scan", may_differ=("jaxpr", "_split_transpose"))
def scan(step: Step, operands: Sequence[Value]) -> list[Value]:
    """Carry axes start undecided and are unified with the carry after one round."""
    ((narrow, wide),) = _bodies(step)
    consts_count, carry_count = programs.scan_counts(step.narrow, narrow)
    if programs.scan_counts(step.wide, wide) != (consts_count, carry_count):
        raise step.mismatch("another carry", f"{carry_count} arrays")
    consts, start = operands[:consts_count], operands[consts_count : consts_count + carry_count]
    slices = [_first(step, value) for value in operands[consts_count + carry_count :]]

    def once(carry: Sequence[Value]) -> tuple[list[Value], list[Value]]:
        results = step.walk(step, narrow, wide, [*consts, *carry, *slices])
        return results[:carry_count], results[carry_count:]

    carry, outs = fixpoint(step, start, once)
    length = step.params["length"]
    stacked = [dataclasses.replace(v, axes=(Same(length), *v.axes), content=None, peak=None) for v in outs]
    return _mark(step, [*carry, *stacked])


def _first(step: Step, value: Value) -> Value:
    """One slice of a scanned operand."""
    if value.axes[0].n != value.axes[0].w:
        hint = "The number of scanned layers may not change."
        raise step.mismatch(f"{value.axes[0].w} rounds", f"{value.axes[0].n}", hint)
    return dataclasses.replace(value, axes=value.axes[1:], content=None, peak=None)


@rule("while", may_differ=("cond_jaxpr", "body_jaxpr"))
def while_(step: Step, operands: Sequence[Value]) -> list[Value]:
    """As `scan`; the test that ends the loop must be preserved."""
    test_count, body_count = step.params["cond_nconsts"], step.params["body_nconsts"]
    test_consts, body_consts = operands[:test_count], operands[test_count : test_count + body_count]
    bodies = dict(zip([name for name, _ in programs.bodies(step.narrow.params)], _bodies(step), strict=True))

    def once(carry: Sequence[Value]) -> tuple[list[Value], list[Value]]:
        return step.walk(step, *bodies["body_jaxpr"], [*body_consts, *carry]), []

    carry, _ = fixpoint(step, operands[test_count + body_count :], once)
    (test,) = step.walk(step, *bodies["cond_jaxpr"], [*test_consts, *carry])
    return _mark(step, [dataclasses.replace(value, reasons=value.reasons | test.reasons) for value in carry])


def fixpoint(step: Step, start: Sequence[Value], once: object) -> tuple[list[Value], list[Value]]:
    """A carry that another round does not change, and the other outputs of that round.

    Unification only adds equalities, so rounds may be repeated. Ranges and reasons only grow, and ranges that do not
    converge are set to unknown.
    """
    carry = [
        Value(
            tuple(step.open_axis(axis.n, axis.w) for axis in value.axes),
            value.old,
            hull((value.new, value.old)) if any(map(_is_copies, value.axes)) else value.new,
            value.reasons,
            value.leaf,
        )
        for value in start
    ]
    for before, value in zip(start, carry, strict=True):
        for axis, own in zip(before.axes, value.axes, strict=True):
            step.unify(axis, own, "the start of the loop and its rounds")
    rounds = 0
    while True:
        ends, outs = once(carry)  # type: ignore[operator]
        following = []
        for value, end in zip(carry, ends, strict=True):
            for axis, own in zip(end.axes, value.axes, strict=True):
                step.unify(axis, own, "two rounds of the loop")
            spread = any(map(_is_copies, end.axes))
            old = _widened(value.old, end.old, rounds)
            new = _widened(value.new, hull((end.new, end.old)) if spread else end.new, rounds)
            following.append(
                dataclasses.replace(value, old=old, new=new, reasons=value.reasons | end.reasons | NO_REASONS)
            )
        settled = all(
            (a.old, a.new, a.reasons) == (b.old, b.new, b.reasons) for a, b in zip(carry, following, strict=True)
        )
        carry = following
        rounds += 1
        if settled:
            return carry, outs


def _widened(before: Range, after: Range, rounds: int) -> Range:
    both = hull((before, after))
    if both == before or rounds < _ROUNDS:
        return both
    return dataclasses.replace(anything(both), finite=both.finite) if rounds < 2 * _ROUNDS else anything(both)

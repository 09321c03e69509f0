"""Elementwise primitives as functions of ranges: one table, name -> (params, *ranges) -> range.

The walk treats a primitive as elementwise exactly if it is in `POINTWISE`. The returned range contains every value of
the primitive on its operand ranges; where exact bounds are not useful, it is only finite or unknown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.widening.ranges import (
    ANYTHING,
    Range,
    add,
    anything,
    divide,
    exactly,
    hull,
    multiply,
    negative,
    outward,
    span,
    unknown,
)

Pointwise = Callable[..., Range]


def apply(primitive: str, params: Mapping[str, Any], dtype: Any, operands: tuple[Range, ...]) -> Range:
    """The range of an elementwise primitive's results."""
    out = POINTWISE[primitive](params, *operands)
    if jnp.issubdtype(dtype, jax.dtypes.extended) or jnp.issubdtype(dtype, jnp.complexfloating):
        # Intervals order real numbers only; zero and finite mean the same for complex ones.
        return out if out.zero else dataclasses.replace(unknown(*operands), finite=out.finite)
    kind = np.dtype(dtype)
    if kind == np.bool_ or np.issubdtype(kind, np.integer):
        bounds = (0, 1) if kind == np.bool_ else (np.iinfo(kind).min, np.iinfo(kind).max)
        if not (bounds[0] <= out.lo and out.hi <= bounds[1]):  # the integer may have overflowed
            out = unknown(out)
        return dataclasses.replace(out, finite=True)
    limits = jnp.finfo(kind)
    if any(math.isfinite(bound) and abs(bound) > float(limits.max) for bound in (out.lo, out.hi)):
        return anything(out)
    return outward(out, float(limits.smallest_normal))


def _ends(fn: Callable[[float], float], a: Range) -> Range:
    """An increasing function that is finite where its operand is."""
    with np.errstate(all="ignore"):
        return span(float(fn(a.lo)), float(fn(a.hi)), a)


def _increasing(fn: Callable[[float], float]) -> Pointwise:
    return lambda params, a: _ends(fn, a)


def _above(fn: Callable[[float], float], least: float, strict: bool = True) -> Pointwise:
    """An increasing function that is defined only above `least`."""

    def rule(params: Mapping[str, Any], a: Range) -> Range:
        inside = a.lo > least or (a.lo == least and not strict)
        return _ends(fn, a) if inside and a.finite else anything(a)

    return rule


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _rsqrt(params: Mapping[str, Any], a: Range) -> Range:
    if not a.positive:
        return anything(a)
    return span(1 / math.sqrt(a.hi), 1 / math.sqrt(a.lo), a)


def _power(a: Range, exponent: int) -> Range:
    if exponent < 0:
        return divide(exactly(1.0), _power(a, -exponent))
    with np.errstate(all="ignore"):
        lo, hi = float(np.float64(a.lo) ** exponent), float(np.float64(a.hi) ** exponent)
    if exponent % 2:
        return span(lo, hi, a)
    return span(0.0 if a.lo <= 0 <= a.hi else min(lo, hi), max(lo, hi), a)


def _pow(params: Mapping[str, Any], a: Range, b: Range) -> Range:
    if a.positive and b.finite:
        return span(0.0, math.inf, a, b)
    return anything(a, b)


def _magnitude(params: Mapping[str, Any], a: Range) -> Range:
    return span(0.0 if a.lo <= 0 <= a.hi else min(abs(a.lo), abs(a.hi)), max(abs(a.lo), abs(a.hi)), a)


def _extremum(pick: Callable[[float, float], float], neutral: float) -> Pointwise:
    def rule(params: Mapping[str, Any], a: Range, b: Range) -> Range:
        for one, other in ((a, b), (b, a)):
            if one.lo == one.hi == neutral:  # max with -inf and min with inf, the initial values of reductions
                return other
        return span(pick(a.lo, b.lo), pick(a.hi, b.hi), a, b)

    return rule


def _compare(certain: Callable[[Range, Range], bool], impossible: Callable[[Range, Range], bool]) -> Pointwise:
    def rule(params: Mapping[str, Any], a: Range, b: Range) -> Range:
        if a.finite and b.finite and certain(a, b):
            return span(1.0, 1.0, a, b)
        if a.finite and b.finite and impossible(a, b):
            return span(0.0, 0.0, a, b)
        return span(0.0, 1.0, Range(0, 0, leaves=a.leaves), Range(0, 0, leaves=b.leaves))

    return rule


def _margin(x: float, y: float) -> float:
    """How far apart two bounds must be to differ in every float type."""
    return 0.0 if x.is_integer() and y.is_integer() else 0.01 * max(abs(x), abs(y))


def _less(a: Range, b: Range) -> bool:
    return a.hi < b.lo - _margin(a.hi, b.lo)


def _less_equal(a: Range, b: Range) -> bool:
    return _less(a, b) or (a.hi == b.lo and a.hi.is_integer())


def _equal(a: Range, b: Range) -> bool:
    return a.exact and b.exact and a.lo == b.lo and a.lo.is_integer()


def _apart(a: Range, b: Range) -> bool:
    return _less(a, b) or _less(b, a)


def _flip(rule: Callable[[Range, Range], bool]) -> Callable[[Range, Range], bool]:
    return lambda a, b: rule(b, a)


def _bits(certain: Callable[[int, int], int]) -> Pointwise:
    """A bitwise operation on booleans or integers: exact on exact operands."""

    def rule(params: Mapping[str, Any], a: Range, b: Range) -> Range:
        if a.exact and b.exact:
            value = certain(int(a.lo), int(b.lo))
            return span(value, value, a, b)
        if all(0 <= r.lo and r.hi <= 1 for r in (a, b)):
            values = [certain(x, y) for x in {int(a.lo), int(a.hi)} for y in {int(b.lo), int(b.hi)}]
            return span(min(values), max(values), a, b)
        return unknown(a, b)

    return rule


def _not(params: Mapping[str, Any], a: Range) -> Range:
    inside = 0 <= a.lo and a.hi <= 1
    return span(1 - a.hi, 1 - a.lo, a) if inside else unknown(a)


def _select(params: Mapping[str, Any], which: Range, *cases: Range) -> Range:
    if which.exact:
        chosen = cases[int(which.lo)]
        return span(chosen.lo, chosen.hi, chosen, which)
    return hull((*cases, Range(cases[0].lo, cases[0].hi, leaves=which.leaves)))


def _clamp(params: Mapping[str, Any], lo: Range, a: Range, hi: Range) -> Range:
    raised = span(max(a.lo, lo.lo), max(a.hi, lo.hi), a, lo)
    return span(min(raised.lo, hi.lo), min(raised.hi, hi.hi), raised, hi)


def _convert(params: Mapping[str, Any], a: Range) -> Range:
    dtype = np.dtype(params["new_dtype"])
    if dtype == np.bool_:
        if a.exact:
            return span(float(a.lo != 0), float(a.lo != 0), a)
        return span(1.0 if _apart(a, exactly(0)) and a.finite else 0.0, 1.0, a)
    if np.issubdtype(dtype, np.integer):
        bounds = np.iinfo(dtype)
        inside = a.finite and bounds.min <= a.lo and a.hi <= bounds.max
        return _ends(np.trunc, a) if inside else unknown(Range(0, 0, leaves=a.leaves))
    return a


def _rounded(params: Mapping[str, Any], a: Range) -> Range:
    if a.lo.is_integer() and a.hi.is_integer():
        return a
    return span(np.floor(a.lo - _margin(a.lo, a.lo)), np.ceil(a.hi + _margin(a.hi, a.hi)), a)


def _same(params: Mapping[str, Any], a: Range) -> Range:
    return a


def _finite(params: Mapping[str, Any], *operands: Range) -> Range:
    return unknown(*operands)


def _nothing(params: Mapping[str, Any], *operands: Range) -> Range:
    return ANYTHING if not operands else anything(*operands)


POINTWISE: dict[str, Pointwise] = {
    # arithmetic
    "add": lambda params, a, b: add(a, b),
    "add_any": lambda params, a, b: add(a, b),
    "sub": lambda params, a, b: add(a, negative(b)),
    "mul": lambda params, a, b: multiply(a, b),
    "div": lambda params, a, b: divide(a, b),
    "neg": lambda params, a: negative(a),
    "abs": _magnitude,
    "max": _extremum(max, -math.inf),
    "min": _extremum(min, math.inf),
    "sign": _increasing(np.sign),
    "floor": _rounded,
    "ceil": _rounded,
    "round": _rounded,
    "clamp": _clamp,
    "square": lambda params, a: _power(a, 2),
    "integer_pow": lambda params, a: _power(a, params["y"]),
    "pow": _pow,
    "sqrt": _above(np.sqrt, 0.0, strict=False),
    "rsqrt": _rsqrt,
    "cbrt": _increasing(np.cbrt),
    "exp": _increasing(np.exp),
    "exp2": _increasing(np.exp2),
    "expm1": _increasing(np.expm1),
    "log": _above(np.log, 0.0),
    "log1p": _above(np.log1p, -1.0),
    "logistic": _increasing(_logistic),
    "tanh": _increasing(np.tanh),
    "erf": _increasing(math.erf),
    "erfc": lambda params, a: negative(_ends(lambda x: -math.erfc(x), a)),
    "asinh": _increasing(np.arcsinh),
    "atan": _increasing(np.arctan),
    "sinh": _increasing(np.sinh),
    "cosh": _finite,
    "sin": lambda params, a: a if a.zero else span(-1.0, 1.0, a),
    "cos": lambda params, a: span(1.0, 1.0, a) if a.zero else span(-1.0, 1.0, a),
    "atan2": lambda params, a, b: span(-math.pi, math.pi, a, b),
    # comparison and choice
    "eq": _compare(_equal, _apart),
    "ne": _compare(_apart, _equal),
    "lt": _compare(_less, _flip(_less_equal)),
    "le": _compare(_less_equal, _flip(_less)),
    "gt": _compare(_flip(_less), _less_equal),
    "ge": _compare(_flip(_less_equal), _less),
    "is_finite": lambda params, a: exactly(1.0) if a.finite else Range(0.0, 1.0, leaves=a.leaves),
    "select_n": _select,
    # bits and booleans
    "and": _bits(lambda x, y: x & y),
    "or": _bits(lambda x, y: x | y),
    "xor": _bits(lambda x, y: x ^ y),
    "not": _not,
    "shift_left": _finite,
    "shift_right_logical": _finite,
    "shift_right_arithmetic": _finite,
    "population_count": _finite,
    "clz": _finite,
    # the same values in another form
    "convert_element_type": _convert,
    "reduce_precision": _same,
    "copy": _same,
    "copy_p": _same,
    "stop_gradient": _same,
    "name": _same,
    "real": _same,
    "optimization_barrier": _same,
    # no useful bounds
    **dict.fromkeys(
        (
            "rem", "nextafter", "tan", "asin", "acos", "acosh", "atanh", "erf_inv", "lgamma", "digamma",
            "bessel_i0e", "bessel_i1e", "igamma", "igammac", "polygamma", "zeta", "imag", "conj", "complex",
        ),
        _nothing,
    ),
}  # fmt: skip

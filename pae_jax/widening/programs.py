"""Programs: trace a function to a jaxpr; all undocumented JAX names that the engine needs are in this file.

The rest of the package uses jaxprs only through the small protocols of this file. If a later JAX version moves a name,
only this file must be changed, and `trace` raises an error that says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from pae_jax.errors import PaeError

try:
    from jax.core import Tracer
    from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
except ImportError as error:  # pragma: no cover
    raise ImportError(
        f"pae_jax.widening reads jaxprs through jax.core and jax.extend.core, which jax {jax.__version__} does not "
        "offer as 0.10 and 0.11 do; install one of these versions"
    ) from error


class Aval(Protocol):
    """Shape and dtype of a variable."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


class Equation(Protocol):
    """One operation of a program."""

    @property
    def primitive(self) -> Any: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def invars(self) -> list[Any]: ...
    @property
    def outvars(self) -> list[Any]: ...
    @property
    def source_info(self) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """A jaxpr with its constants: operations over variables, nothing else."""

    constvars: tuple[Any, ...]
    consts: tuple[Any, ...]
    invars: tuple[Any, ...]
    outvars: tuple[Any, ...]
    equations: tuple[Equation, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function of (variables, *sample).

    Attributes:
      body: its operations; inputs are the flattened arguments.
      outputs: pytree of `ShapeDtypeStruct`, as the function returns it.
    """

    body: Body
    outputs: Any


def trace(fn: Callable[..., Any], *args: Any) -> Program:
    """Trace `fn` on concrete or abstract arguments; nothing is computed or compiled."""
    closed, outputs = jax.make_jaxpr(fn, return_shape=True)(*args)
    if not isinstance(closed, ClosedJaxpr):  # pragma: no cover
        raise PaeError(f"jax.make_jaxpr of jax {jax.__version__} returned {type(closed)}; expected a ClosedJaxpr")
    return Program(body(closed), outputs)


def body(jaxpr: Any) -> Body:
    """The `Body` of a closed or open jaxpr."""
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    consts = tuple(jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else ()
    return Body(tuple(inner.constvars), consts, tuple(inner.invars), tuple(inner.outvars), tuple(inner.eqns))


def bodies(params: Mapping[str, Any]) -> Iterator[tuple[str, Body]]:
    """Every jaxpr among the parameters of an operation."""
    for name, value in params.items():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield name, body(item)


def tables(body: Body) -> set[tuple[int, ...]]:
    """Shapes of the arrays of which a program, or one inside it, reads entries by their number, as an embedding."""
    found = {tuple(e.invars[0].aval.shape) for e in body.equations if e.primitive.name == "gather"}
    return found.union(*(tables(inner) for e in body.equations for _, inner in bodies(e.params)))


def scan_counts(equation: Equation, inner: Body) -> tuple[int, int]:
    """How many operands of a scan are constants and how many are its carry; the others are scanned over.

    The parameters with these counts differ between JAX versions, so they are read from shapes: a scanned operand or
    stacked result has one axis more than the body's variable, a constant or a carry has the same number.
    """

    def same_rank(outer: Any, variable: Any) -> bool:
        return len(outer.aval.shape) == len(variable.aval.shape)

    whole = sum(map(same_rank, equation.invars, inner.invars))
    carry = sum(map(same_rank, equation.outvars, inner.outvars))
    return whole - carry, carry


def text(value: Any) -> str | None:
    """A jaxpr and its constants as text, for comparison; None for anything else."""
    if isinstance(value, ClosedJaxpr):
        return f"{value.jaxpr} {[np.asarray(const).tolist() for const in value.consts]}"
    return str(value) if isinstance(value, Jaxpr) else None


def bind(primitive: Any, params: Mapping[str, Any], operands: Sequence[Any]) -> list[Any]:
    """Apply a primitive to arrays; its results as a list."""
    found = primitive.get_bind_params(params)
    functions, rest = found if isinstance(found, tuple) else ((), found)  # JAX 0.10 returns parameters alone
    results = primitive.bind(*functions, *operands, **rest)
    return list(results) if primitive.multiple_results else [results]


def is_traced(value: Any) -> bool:
    """Whether a value is a tracer, such as inside `jax.jit`."""
    return isinstance(value, Tracer)


def literal(var: Any) -> np.ndarray | None:
    """The value of a literal operand; None for a variable."""
    return np.asarray(var.val) if isinstance(var, Literal) else None


def layer(equation: Equation) -> str:
    """Name scopes around an operation, "Block_0/Conv_1"; Flax sets one per module."""
    return str(getattr(equation.source_info, "name_stack", ""))


def source(equation: Equation) -> str:
    """The innermost call outside of JAX and Flax as "file.py:line", or "" if the trace does not contain it."""
    frames = getattr(getattr(equation.source_info, "traceback", None), "frames", ())
    for frame in frames:
        path = frame.file_name.replace("\\", "/")
        if not any(part in path for part in ("/jax/", "/flax/", "/pae_jax/widening/", "importlib", "<")):
            return f"{path.rsplit('/', 1)[-1]}:{frame.line_num}"
    return ""

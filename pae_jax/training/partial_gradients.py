"""Run a program in which only parts of some weights are trained, at the cost of the gradients of these parts.

The gradient of a whole kernel is the product of all inputs with the gradients of all outputs. Of a block it is the
product of the block's input channels with the gradients of its output channels. So the program is traced and its
operations are run one by one. Where a weight is the kernel of a matrix product or convolution, or the table of a
lookup, the operation gets a derivative of its own: that of the same operation with the part alone. Anything else sees
the whole weight, whose derivative JAX takes as ever; so the gradient is right for any program.

Single entries of a kernel have no cheaper gradient: the whole one is one fast product, from which they are taken.
Gathering their channels costs as much time and ten times the memory (0.5 % of 384 x 1536 weights, 1024 rows, CPU).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Literal
from jax.sharding import AxisType

from pae_jax.training.places import Path, Places
from pae_jax.trees import Tree

Bind = Callable[..., jax.Array]
"""An operation of the program as a function of its operands."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Partial:
    """A weight of which a part is trained.

    Attributes:
      whole: the whole weight, a differentiable function of the part.
      part: the trained parameter.
      places: where it lies.
    """

    whole: jax.Array
    part: jax.Array
    places: Places


def call(
    function: Callable[..., Tree], variables: Tree, parts: Mapping[Path, tuple[jax.Array, Places]], *rest: Tree
) -> Tree:
    """Return `function(variables, *rest)`, with cheap derivatives with respect to the parts.

    Args:
      function: any function of trees of arrays that JAX can trace.
      variables: nested dict; the leaves named in `parts` contain the part, as `Places.put` returns them.
      parts: `{path in variables: (parameter, places)}`.
      *rest: further trees of arrays.
    """
    leaves, tree = jax.tree.flatten((variables, rest))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]

    def flat(*given: Any) -> Tree:
        first, others = tree.unflatten(given)
        return function(first, *others)

    program, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    for position, path in enumerate(paths):
        name = tuple(getattr(key, "key", key) for key in path)
        if name in parts:
            leaves[position] = Partial(leaves[position], *parts[name])
    return jax.tree.unflatten(jax.tree.structure(shapes), _run(program.jaxpr, program.consts, leaves))


def _run(jaxpr: Any, consts: Any, operands: Any) -> list[Any]:
    """Run a program on arrays and partly trained weights; return arrays."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *operands), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else known[atom]  # noqa: E731
    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        known.update(zip(equation.outvars, _results(equation, values), strict=True))
    return [_whole(read(atom)) for atom in jaxpr.outvars]


def _whole(value: Any) -> Any:
    return value.whole if isinstance(value, Partial) else value


def _results(equation: Any, values: list[Any]) -> list[Any]:
    if any(isinstance(value, Partial) for value in values):
        rule = _RULES.get(equation.primitive.name)
        found = None if rule is None else rule(equation, values)
        if found is not None:
            return found
    result = _bind(equation)(*map(_whole, values))
    return list(result) if equation.primitive.multiple_results else [result]


def _bind(equation: Any) -> Bind:
    def bind(*operands: Any) -> Any:
        with equation.ctx.manager:
            return equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))

    return bind


def _inlined(equation: Any, values: list[Any]) -> list[Any]:
    program: ClosedJaxpr = equation.params["jaxpr"]
    return _run(program.jaxpr, program.consts, values)


def _recomputed(equation: Any, values: list[Any]) -> list[Any]:
    params = equation.params
    run = lambda *operands: _run(params["jaxpr"], (), operands)  # noqa: E731
    return jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])(*values)


def _converted(equation: Any, values: list[Any]) -> list[Any] | None:
    [weight], convert = values, _bind(equation)
    return [Partial(convert(weight.whole), convert(weight.part), weight.places)]


def _transposed(equation: Any, values: list[Any]) -> list[Any]:
    [weight], order = values, tuple(equation.params["permutation"])
    part = weight.part if weight.places.scattered else _bind(equation)(weight.part)
    return [Partial(_bind(equation)(weight.whole), part, weight.places.transposed(order))]


def _reshaped(equation: Any, values: list[Any]) -> list[Any] | None:
    """Merge or split axes before those of the block; None where an axis of the block takes part."""
    [weight], new = values, tuple(equation.params["new_sizes"])
    first, old = min(weight.places.axes), weight.whole.shape
    moved = len(new) - len(old)
    if weight.places.scattered or first + moved < 0 or new[first + moved :] != old[first:]:
        return None
    part = weight.part.reshape(*new[: first + moved], *weight.part.shape[first:])
    places = dataclasses.replace(weight.places, axes=tuple(axis + moved for axis in weight.places.axes))
    return [Partial(_bind(equation)(weight.whole), part, places)]


def _linear(bind: Bind, moved: Bind, x: jax.Array, weight: Partial) -> jax.Array:
    """Return `bind(x, whole)`, whose derivative with respect to the part is `moved(x, change of the part, places)`."""

    @jax.custom_jvp
    def run(x: jax.Array, whole: jax.Array, part: jax.Array, places: Places) -> jax.Array:
        del part, places
        return bind(x, whole)

    def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        x, whole, _, places = primals
        x_dot, _, part_dot, _ = tangents  # the change of the whole is that of the part
        y, terms = run(*primals), []
        if not isinstance(x_dot, SymbolicZero) and x_dot.dtype != jax.dtypes.float0:
            terms.append(bind(x_dot, whole))
        if not isinstance(part_dot, SymbolicZero):
            terms.append(moved(x, part_dot, places))
        return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)

    run.defjvp(derivative, symbolic_zeros=True)
    return run(x, weight.whole, weight.part, weight.places)


def _product(equation: Any, values: list[Any]) -> list[Any] | None:
    """Apply a matrix product to a partly trained weight; None if it is of a kind without a cheap derivative."""
    at = 1 if isinstance(values[1], Partial) else 0
    weight, x = values[at], _whole(values[1 - at])
    (contracted, batch) = equation.params["dimension_numbers"]
    if batch[0] or weight.places.scattered or _explicitly_sharded(weight.whole, x):
        return None
    inputs = dict(zip(contracted[at], contracted[1 - at], strict=True))
    free = [axis for axis in range(weight.whole.ndim) if axis not in inputs]
    rows = [axis for axis in range(x.ndim) if axis not in contracted[1 - at]]
    outputs = {axis: number + at * len(rows) for number, axis in enumerate(free)}
    run = _bind(equation)
    bind = run if at else lambda x, kernel: run(kernel, x)
    shape = equation.outvars[0].aval.shape
    return [_linear(bind, _block(bind, inputs, outputs, shape), x, weight)]


def _convolution(equation: Any, values: list[Any]) -> list[Any] | None:
    x, weight = values
    params, numbers = equation.params, equation.params["dimension_numbers"]
    groups = (params["feature_group_count"], params["batch_group_count"])
    kernel_out, kernel_in, *_ = numbers.rhs_spec
    if isinstance(x, Partial) or groups != (1, 1) or weight.places.scattered or _explicitly_sharded(x, weight.whole):
        return None
    if not set(weight.places.axes) <= {kernel_in, kernel_out}:
        return None
    inputs, outputs = {kernel_in: numbers.lhs_spec[1]}, {kernel_out: numbers.out_spec[1]}
    bind = _bind(equation)
    moved = _block(bind, inputs, outputs, equation.outvars[0].aval.shape)
    return [_linear(bind, moved, x, weight)]


def _block(bind: Bind, inputs: Mapping[int, int], outputs: Mapping[int, int], shape: tuple[int, ...]) -> Bind:
    """Return `(x, change of a block, places) -> change of the result`.

    Args:
      bind: `(x, kernel) -> y`.
      inputs: `{axis of the kernel: axis of x}`, the axes that are summed over.
      outputs: `{axis of the kernel: axis of y}`.
      shape: of y.
    """

    def moved(x: jax.Array, part: jax.Array, places: Places) -> jax.Array:
        index = dict(zip(places.axes, places.index, strict=True))
        for axis in index.keys() & inputs.keys():
            x = jnp.take(x, index[axis], axis=inputs[axis], mode="clip")
        y = bind(x, part)
        for axis in sorted(index.keys() & outputs.keys()):
            along = outputs[axis]
            whole = jnp.zeros((*y.shape[:along], shape[along], *y.shape[along + 1 :]), y.dtype)
            y = whole.at[(*[slice(None)] * along, index[axis])].add(y, unique_indices=True, mode="drop")
        return y

    return moved


def _lookup(equation: Any, values: list[Any]) -> list[Any] | None:
    """Apply a lookup of rows to a partly trained table; the gradient has a row for each lookup, not for each row."""
    if not isinstance(values[0], Partial) or isinstance(values[1], Partial):
        return None
    (weight, ids), params = values, equation.params
    numbers, sizes = params["dimension_numbers"], weight.whole.shape
    width, count = weight.whole.ndim - 1, math.prod(ids.shape[:-1])
    rows = (
        tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.offset_dims) == tuple(range(ids.ndim - 1, ids.ndim - 1 + width))
        and not numbers.operand_batching_dims
        and tuple(params["slice_sizes"]) == (1, *sizes[1:])
    )
    if not rows or count >= sizes[0] or _explicitly_sharded(weight.whole, ids):
        return None
    run = _bind(equation)

    def moved(ids: jax.Array, part: jax.Array, places: Places) -> jax.Array:
        ids = ids[..., 0].astype(jnp.int32)
        if params["mode"] == jax.lax.GatherScatterMode.CLIP:
            ids = jnp.clip(ids, 0, sizes[0] - 1)
        # Each row that is looked up gets a place in a small table: that of one of its lookups.
        flat = jnp.where((ids >= 0) & (ids < sizes[0]), ids, sizes[0]).reshape(-1)
        slots = jnp.full(sizes[0], count, jnp.int32).at[flat].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
        known = dict(zip(places.axes, places.index, strict=True))
        wanted = known.get(0, jnp.arange(sizes[0], dtype=jnp.int32))
        known[0] = slots.at[wanted].get(mode="fill", fill_value=count)
        axes = tuple(sorted(known))
        inside = Places(tuple(known[axis] for axis in axes), axes, places.scattered)
        table = inside.add(jnp.zeros((count, *sizes[1:]), part.dtype), part)
        slot = slots.at[flat].get(mode="fill", fill_value=count)
        return table.at[slot].get(mode="fill", fill_value=0).reshape(*ids.shape, *sizes[1:])

    return [_linear(lambda ids, whole: run(whole, ids), moved, ids, weight)]


def _explicitly_sharded(*arrays: Any) -> bool:
    """Return whether arrays are laid out on a mesh of explicit axes, where each gather needs a layout."""
    return any(AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types for array in arrays)


_RULES: dict[str, Callable[[Any, list[Any]], list[Any] | None]] = {
    "jit": _inlined,
    "pjit": _inlined,
    "remat2": _recomputed,
    "checkpoint": _recomputed,
    "convert_element_type": _converted,
    "transpose": _transposed,
    "reshape": _reshaped,
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "gather": _lookup,
}

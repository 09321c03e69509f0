"""`find_cuts`: which channels a function with given weights uses, and the same function on these channels alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pae_jax.errors import StructureError
from pae_jax.trees import Tree, abstract, describe, flatten, path_name
from pae_jax.widening.channels import reduced
from pae_jax.widening.channels.inlining import inlined
from pae_jax.widening.channels.known import find_known
from pae_jax.widening.channels.links import link
from pae_jax.widening.channels.reduced import Kept, Plan
from pae_jax.widening.channels.sets import Sets
from pae_jax.widening.channels.sizes import Signature, Varying, numbers_of, signature_of, variables_of, varying
from pae_jax.widening.programs import Body, literal, trace


@dataclasses.dataclass(frozen=True, eq=False)
class Cuts:
    """A function of `(variables, inputs)` without the channels that it does not use.

    Attributes:
      leaves: `{path of a leaf of the variables: per axis which coordinates are in use, None for all}`.
      outputs: the same of each output.
      function: the whole function.
      variables: its variables, abstract.
      plans: per signature of its program, a program of that signature and what is in use of it.
    """

    leaves: Mapping[str, Kept]
    outputs: Sequence[Kept]
    function: Callable[[Tree, Tree], Tree]
    variables: Tree
    plans: Mapping[Signature, Analysed]

    def take(self, variables: Tree) -> Tree:
        """Return variables cut to what is in use, or a part of them whose paths are whole."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: reduced.cut(leaf, self.leaves[path_name(path)]), variables
        )

    def apply(self, variables: Tree, inputs: Tree) -> Tree:
        """Run the function on cut variables; outputs are cut to what is in use of them."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
        program = trace(self.function, self.variables, shapes)
        body = inlined(program.body)
        operands = [*jax.tree.leaves(variables), *jax.tree.leaves(inputs)]
        return jax.tree.unflatten(
            jax.tree.structure(program.outputs), reduced.run(body, self._plan(body, shapes), operands)
        )

    def _plan(self, body: Body, inputs: Tree) -> Plan:
        analysed = self.plans.get(signature_of(body))
        if analysed is not None and analysed.covers(body):
            pairs = zip(variables_of(body), analysed.kept, strict=True)
            numbers: dict[Any, Kept] = dict.fromkeys(numbers_of(body), ())
            return Plan(numbers | {var: axes for var, axes in pairs if axes is not None})
        found = ", ".join(map(describe, jax.tree.leaves(inputs)))
        hint = "Its program differs there. Use the whole network, or slim with a net whose sample has this shape."
        if self._fixed(inputs):
            hint = "Its program differs there. Declare axes whose sizes change as free_axes."
        raise StructureError("input of a slimmed net", "", found, "shapes for which its program was analysed", hint)

    def _fixed(self, inputs: Tree) -> bool:
        """Return whether an axis, the batch axis not counted, that had one size whenever analysed has another."""
        for place, leaf in enumerate(reversed(jax.tree.leaves(inputs)), 1):
            known = [(analysed.body.invars[-place], analysed.varying.axes) for analysed in self.plans.values()]
            for axis, size in enumerate(leaf.shape[1:], 1):
                sizes = {var.aval.shape[axis] for var, _ in known}
                free = any(axis in axes.get(var, ()) for var, axes in known)
                if len(sizes) == 1 and not free and size not in sizes:
                    return True
        return False


@dataclasses.dataclass(frozen=True, eq=False)
class Analysed:
    """A program, and what is in use of it and of all programs that differ from it where it varies.

    Attributes:
      body: the program.
      varying: what was different in the other programs of its signature.
      kept: per variable, in the program's order, what is in use; None for a variable that is not.
    """

    body: Body
    varying: Varying
    kept: Sequence[Kept | None]

    def covers(self, body: Body) -> bool:
        """Return whether a program of the same signature differs only where others did."""
        found = varying(self.body, [body])
        axes = all(set(axes) <= set(self.varying.axes.get(var, ())) for var, axes in found.axes.items())
        return axes and found.constants <= self.varying.constants


def find_cuts(
    function: Callable[[Tree, Tree], Tree], variables: Tree, inputs: Sequence[Tree], needed: np.ndarray | None = None
) -> Cuts:
    """Find the channels that a function uses; the others are without effect on its outputs for every input.

    A channel, one coordinate of an axis together with those of other arrays that it is tied to, is cut if each sum over
    it multiplies it by weights that are 0, or adds a value of it that is 0 for every input. What an operation without
    a rule reads is in use whole.

    Args:
      function: pure function of `(variables, inputs)`.
      variables: its variables, concrete.
      inputs: abstract inputs of several sizes. An axis of an array whose size differs among them, or of which an
        operation reads another window, is never cut.
      needed: bool vector over the last axis of the one output: where its entries matter, unless they are always 0.
        None if all outputs matter.

    Returns:
      The cut function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pae_jax.widening import find_cuts
      >>> variables = {"a": jnp.ones((1, 3)), "b": jnp.asarray([[1.0], [0.0], [2.0]])}
      >>> apply = lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"]
      >>> cuts = find_cuts(apply, variables, [jnp.ones((2, 1)), jnp.ones((3, 1))])
      >>> small = cuts.take(variables)
      >>> jax.tree.map(jnp.shape, small)
      {'a': (1, 2), 'b': (2, 1)}
      >>> bool(jnp.allclose(cuts.apply(small, jnp.ones((5, 1))), apply(variables, jnp.ones((5, 1)))))
      True
    """
    shapes = abstract(variables)
    bodies = [inlined(trace(function, shapes, abstract(x)).body) for x in inputs]
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]
    groups: dict[Signature, list[Body]] = {}
    for body in bodies:
        groups.setdefault(signature_of(body), []).append(body)
    found = {body: varying(body, group) for group in groups.values() for body in group}
    values = [*arrays, *[None] * (len(bodies[0].invars) - len(arrays))]
    sets = {body: Sets(find_known(body, values, found[body]), found[body].axes) for body in bodies}
    _settle(groups.values(), sets, len(arrays), needed)
    first, *_ = bodies
    leaves = {path: _kept(sets[first], var) for path, var in zip(flatten(variables), first.invars, strict=False)}
    plans = {}
    for signature, (body, *_) in groups.items():
        kept = [_kept(sets[body], var) if var in sets[body] else None for var in variables_of(body)]
        plans[signature] = Analysed(body, found[body], kept)
    outputs = [() if literal(var) is not None else _kept(sets[first], var) for var in first.outvars]
    return Cuts(leaves, outputs, function, shapes, plans)


def _settle(
    groups: Iterable[Sequence[Body]], sets: Mapping[Body, Sets], leaves: int, needed: np.ndarray | None
) -> None:
    """Enlarge the sets of all programs until they fit together.

    All programs get the same set for an axis of a leaf, and those of one signature for an axis of any variable.
    """
    alike = [[(sets[body], variables_of(body)) for body in group] for group in groups]
    alike.append([(own, list(body.invars[:leaves])) for body, own in sets.items()])
    for body, own in sets.items():
        for var in body.outvars:
            if literal(var) is None:
                _need(own, var, needed)
        for var in body.invars[leaves:]:
            own.fill(var)
    while True:
        for body, own in sets.items():
            _close(body, own)
        for group in alike:
            for same in zip(*(variables for _, variables in group), strict=True):
                _share([(own, var) for (own, _), var in zip(group, same, strict=True)])
        if not any(own.grew for own in sets.values()):
            return


def _need(sets: Sets, var: Any, needed: np.ndarray | None) -> None:
    last = len(var.aval.shape) - 1
    sets.fill(var, range(last + 1 if needed is None else last))
    if needed is not None:
        sets.add(var, last, needed & sets.nonzero(var, last, []))
    sets.use(var)


def _close(body: Body, sets: Sets) -> None:
    order = list(body.equations)
    while True:
        sets.grew = False
        order.reverse()
        for equation in order:
            link(equation, sets)
        if not sets.grew:
            return


def _share(places: Sequence[tuple[Sets, Any]]) -> None:
    """Use of a variable in several programs the same coordinates, of axes that are of one size in all of them."""
    if any(var in sets for sets, var in places):
        for sets, var in places:
            sets.use(var)
    for axis, size in enumerate(places[0][1].aval.shape):
        if all(var.aval.shape[axis] == size for _, var in places):
            union = np.logical_or.reduce([sets.of(var)[axis] for sets, var in places])
            for sets, var in places:
                sets.add(var, axis, union)


def _kept(sets: Sets, var: Any) -> Kept:
    """Return what is kept of a variable: what is in use, and at least the first coordinate of an axis."""
    found = (used if used.any() else np.arange(used.size) == 0 for used in sets.of(var))
    return tuple(None if used.all() else used for used in found)

"""`Net`: a user's backbone as pure functions of plain trees, at any width."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pae_jax import trees
from pae_jax.caching import Cache
from pae_jax.checks import check_kind, check_width, is_traced, real_number
from pae_jax.errors import ArgumentError, StructureError, kind_of
from pae_jax.trees import PARAMS, Tree

Rngs = jax.Array | Mapping[str, jax.Array] | None
"""Randomness of one call: a key for all streams of a module, or `{stream: key}`; None where nothing is drawn."""

_PROGRAMS, _LAYOUTS, _INITS = Cache(32), Cache(32), Cache(4)


class Program(NamedTuple):
    """A module without its variables.

    Attributes:
      init: `(key, x) -> variables`, `{collection: nested dict}`.
      apply: `(variables, x, train, rngs) -> (output, updates)`; `updates` holds the collections other than `params`
        after a call in training, including sown values, and is empty when `train` is False.
      module: the module itself; for NNX an abstract one.
      call: `(module, x, train) -> output` if the user gave one; None otherwise.
    """

    init: Callable[[jax.Array, Tree], dict[str, Tree]]
    apply: Callable[[dict[str, Tree], Tree, bool, Rngs], tuple[Tree, dict[str, Tree]]]
    module: Any
    call: Callable[[Any, Tree, bool], Tree] | None = None


class Layout(NamedTuple):
    """Shapes and dtypes of a backbone's variables at one width; `print` it to see what is shared and what is local.

    Attributes:
      shared: nested dict of the shared weights, which are divided among all tasks.
      local: `{collection: nested dict}` of the local variables, of which every task has its own.
      features: the backbone's output for the sample.
    """

    shared: Tree
    local: Tree
    features: Tree

    def __str__(self) -> str:
        def part(title: str, tree: Tree) -> list[str]:
            leaves = trees.flatten(tree)
            numbers = sum(math.prod(leaf.shape) for leaf in leaves.values())
            lines = [f"  {path}  {trees.describe(leaf)}" for path, leaf in leaves.items()]
            return [f"{title}: {len(leaves)} {'leaf' if len(leaves) == 1 else 'leaves'}, {numbers:,} numbers", *lines]

        lines = part("shared", {PARAMS: self.shared}) + part("local, once per task", self.local)
        return "\n".join([*lines, f"features: {trees.sketch(self.features)}"])


_KERNELS = frozenset({"kernel", "kernels", "embedding", "embeddings", "table"})
_VECTORS = frozenset(
    ("bias", "biases", "scale", "scales", "offset", "shift", "gain", "alpha", "beta", "gamma", "slope", "slopes",
     "temperature")
)  # fmt: skip
_NORMS = frozenset({"bn", "ln", "gn", "rms"})


def kernels_and_embeddings(path: str, leaf: Any) -> bool:
    """Return whether a leaf of `params` is shared by default: kernels and embeddings, of two or more axes.

    Biases, scales, slopes and variables of norms are local, even if stacked layers or attention heads give them a
    second axis. A leaf named kernel, embedding or table counts as one.
    """
    *modules, name = path.lower().split("/")
    words = _words(name)
    if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    if words & _KERNELS:
        return True
    module = modules[-1] if modules else ""
    return not (words & _VECTORS or name == "b" or "norm" in module or _words(module) & _NORMS)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name))


@dataclass(frozen=True, eq=False)
class Net:
    """A backbone at every width; made by `pae.linen` or `pae.nnx`.

    Attributes:
      build: `width -> Program`, the same one at every call; called once per width, and once more for a trial.
      sample: abstract input batch.
      example: the input batch with its values, None if the sample had none.
      packable: `(path in params, leaf) -> bool`: which float leaves are shared weights.
      free_axes: `{path of an input: axes}` whose sizes may change from batch to batch, the batch axis not counted.
      source: name of the model in messages.
      kind: "linen" or "nnx".
      rngs: random streams that evaluation also draws from, with a fixed key.
      couples_examples: whether an output may depend on the other examples of the batch.
    """

    build: Callable[[float], Program]
    sample: Tree
    example: Tree
    packable: Callable[[str, Any], bool]
    free_axes: Mapping[str, tuple[int, ...]]
    source: str
    kind: str
    rngs: tuple[str, ...] = ()
    couples_examples: bool = False

    def __repr__(self) -> str:
        return f"Net({self.source}, {self.kind}, sample {trees.sketch(self.sample)})"

    def program(self, width: float) -> Program:
        """Return the backbone of a width."""
        return _PROGRAMS.get((self, width), lambda: self.build(width))

    def layout(self, width: float) -> Layout:
        """Return shapes and dtypes at a width, without computing anything."""
        return _LAYOUTS.get((self, width), lambda: self._layout(width))

    def initial(self, key: jax.Array, width: float) -> tuple[Tree, Tree]:
        """Draw `(shared, local)` with the model's own initialisers, which may look at the sample's values."""
        x = zeros(self.sample) if self.example is None else jax.tree.map(np.asarray, self.example)
        init = lambda: jax.jit(lambda key, x: self.split(self.program(width).init(key, x)))  # noqa: E731
        return _INITS.get((self, width), init)(key, x)

    def split(self, variables: dict[str, Tree]) -> tuple[Tree, Tree]:
        """Split the variables of a backbone into `(shared, local)`."""
        return trees.split(variables, lambda path, leaf: bool(self.packable(path, leaf)))

    def _layout(self, width: float) -> Layout:
        program = self.program(width)
        variables = _initial_shapes(program, self.sample)
        _require_supported(variables, self.source)
        _require_no_batch_axis(program, self.sample, variables, self.source)
        shared, local = self.split(variables)
        if not shared:
            wanted = "at least one float leaf of two or more axes in params"
            hint = "Pass packable= to name other leaves."
            raise StructureError(self.source, "", "no leaf that can be shared", wanted, hint)
        features, _ = jax.eval_shape(lambda v, x: program.apply(v, x, False, None), variables, self.sample)
        require_batch_axis(features, batch_size(self.sample), self.source, "features")
        return Layout(shared, local, features)


def check_net(net: Any) -> None:
    """Raise unless this is a `Net`."""
    check_kind("net", net, Net, "a network description from pae.linen(build, sample) or pae.nnx(build, sample)")


def layout(net: Net, width: float = 1.0) -> Layout:
    """Return which variables of a backbone are shared and which are local to each task; nothing is computed.

    Kernels and embeddings are shared: float leaves of `params` of two or more axes. All other variables are local:
    biases, norms, statistics. `packable=` of `pae.linen` and `pae.nnx` overrides this.

    Args:
      net: from `pae.linen` or `pae.nnx`.
      width: channel factor handed to `build`, positive.

    Returns:
      The layout; its text has one line per leaf.

    Raises:
      StructureError: the model has no shareable leaf, or a leaf that cannot be handled (named).
      ArgumentError: width is not positive and finite.

    Example:
      >>> import jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(lambda width: pae.models.MLP(width, (8,)), jnp.zeros((1, 4)))
      >>> print(pae.layout(net))
      shared: 1 leaf, 32 numbers
        params/Dense_0/kernel  float32[4,8]
      local, once per task: 1 leaf, 8 numbers
        params/Dense_0/bias  float32[8]
      features: float32[1,8]
    """
    check_net(net)
    return net.layout(check_width(width))


def batch_size(tree: Tree) -> int:
    """Return the length of the leading axis of a batch."""
    return jax.tree.leaves(tree)[0].shape[0]


def require_batch_axis(outputs: Tree, count: int, source: str, what: str) -> None:
    """Raise `StructureError` unless outputs are arrays that start with the batch axis."""
    found = trees.flatten(outputs)
    if not found:
        raise StructureError(source, "", f"no {what}", f"a tree of {what} (batch, ...)")
    for path, leaf in found.items():
        if not hasattr(leaf, "shape") or leaf.shape[:1] != (count,):
            name = f"{what} {path}".strip()
            raise StructureError(source, name, trees.describe(leaf), f"an array of {count} examples (batch, ...)")


def require_build(build: Any, own: type, other: type, wanted: str, hint: str) -> str:
    """Return the name of what builds a model, for messages; raise unless it can.

    Args:
      build: what the user passed.
      own: base class of the modules to be built.
      other: base class of the other kind of modules.
      wanted: what `build` makes, with an example.
      hint: what to do with modules of the other kind.
    """
    foreign = isinstance(build, other) or (isinstance(build, type) and issubclass(build, other))
    if foreign or isinstance(build, own) or not callable(build):
        raise ArgumentError(f"build must make {wanted}; found {kind_of(build)}{'. ' + hint if foreign else ''}")
    return getattr(build, "__name__", type(build).__name__)


def require_module(model: Any, kind: type, source: str, hint: str) -> Any:
    """Return the module that a builder made; raise `StructureError` if it is of another kind."""
    if not isinstance(model, kind):
        raise StructureError(source, "", type(model).__name__, f"a {kind.__module__}.{kind.__name__}", hint)
    return model


def zeros(sample: Tree) -> Tree:
    """Return a batch of zeros of the sample's shapes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sample)


def read_sample(sample: Tree) -> tuple[Tree, Tree]:
    """Return the shapes and dtypes of a sample batch, and the batch with its values, None if it has none."""
    arrays = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf), sample)
    shapes = [leaf.shape for leaf in jax.tree.leaves(arrays)]
    if not shapes or not all(shapes):
        raise StructureError("sample", "", shapes, "arrays with a leading batch axis")
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)), arrays
    )
    concrete = not is_traced(arrays) and all(map(_has_values, jax.tree.leaves(arrays)))
    return abstract, arrays if concrete else None


def _has_values(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) or (isinstance(leaf, jax.Array) and leaf.is_fully_addressable)


def read_free_axes(sample: Tree, axes: Any) -> dict[str, tuple[int, ...]]:
    """Return `{path of an input: axes}` from one tuple for all inputs, or from a mapping of their paths."""
    leaves = trees.flatten(sample)
    if not isinstance(axes, Mapping):
        axes = dict.fromkeys(leaves, axes) if axes else {}
    for path, chosen in axes.items():
        if path not in leaves:
            raise ArgumentError(f"free_axes names input {path!r}; the sample has: {', '.join(map(repr, leaves))}")
        rank = len(leaves[path].shape)
        if isinstance(chosen, (str, int)) or not all(isinstance(axis, int) and 0 < axis < rank for axis in chosen):
            found = f"{chosen!r} for an input of {rank} axes"
            raise ArgumentError(f"free_axes holds tuples of axes 1..{rank - 1}, the batch axis is 0; found {found}")
    return {path: tuple(chosen) for path, chosen in axes.items()}


def width_for(size_ratio: float) -> float:
    """Convert a size ratio into a width.

    `width = sqrt(size_ratio)`: a kernel has (channels in) x (channels out) weights, so r times the weights needs
    sqrt(r) times the channels.

    Args:
      size_ratio: wanted number of weights over the number at width 1, positive.

    Returns:
      The channel factor to hand to `build`, `init` or `expand`.

    Raises:
      ArgumentError: not a positive finite number.

    Example:
      >>> import pae_jax as pae
      >>> pae.width_for(2.25)
      1.5

    Source: Hung et al., "Packing and Expanding", ICMR 2019 (`filters_expand_ratio`).
    """
    ratio = real_number(size_ratio)
    if ratio is None or not (math.isfinite(ratio) and ratio > 0):
        raise ArgumentError(f"size_ratio must be positive and finite, found {size_ratio!r}")
    return math.sqrt(ratio)


def _initial_shapes(program: Program, sample: Tree) -> dict[str, Tree]:
    return jax.eval_shape(lambda: program.init(jax.random.key(0), zeros(sample)))


def _require_no_batch_axis(program: Program, sample: Tree, variables: dict[str, Tree], source: str) -> None:
    """Raise `StructureError` if a variable's shape depends on the batch size: no other batch could use it."""
    larger = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] + 1, *leaf.shape[1:]), leaf.dtype), sample)
    try:
        others = trees.flatten(_initial_shapes(program, larger))
    except Exception:  # a model for a single batch size; it raises its own error for another size
        return
    for path, leaf in trees.flatten(variables).items():
        if path in others and others[path].shape != leaf.shape:
            found = f"{trees.describe(leaf)} for one batch and {trees.describe(others[path])} for a larger one"
            hint = "Make it in the call, or reduce it over the batch: a variable outlives the batch it was made in."
            raise StructureError(source, path, found, "a variable without a batch axis", hint)


def _require_supported(variables: dict[str, Tree], source: str) -> None:
    entries: dict[tuple[str, ...], Any] = dict(traverse_util.flatten_dict(variables))
    for keys, leaf in entries.items():
        if not hasattr(leaf, "shape") or not math.prod(leaf.shape):
            hint = "Variables are nested dicts of arrays; containers such as tuples, and empty arrays, are not."
            raise StructureError(source, "/".join(keys), trees.describe(leaf), "one array with entries", hint)
    for path, leaf in trees.flatten(variables).items():
        numeric = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_
        trained = path.split("/", 1)[0] == PARAMS
        if not numeric or (trained and not jnp.issubdtype(leaf.dtype, jnp.floating)):
            expected = "a float array, because params are trained" if trained else "a numeric array"
            hint = "Keep such values out of the module's variables."
            if trained and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                hint = "Keep real and imaginary part as two float parameters, and join them by jax.lax.complex."
            elif trained:
                hint = 'Keep it in another collection, as self.variable("constants", ...) or a plain nnx.Variable do.'
            raise StructureError(source, path, trees.describe(leaf), expected, hint)

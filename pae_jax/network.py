"""`Net`: a user's backbone as pure functions of plain trees, at any width."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pae_jax import trees
from pae_jax.errors import ArgumentError, DataError, StructureError
from pae_jax.trees import PARAMS, Tree

T = TypeVar("T")


class Program(NamedTuple):
    """A module without its variables.

    Attributes:
      init: `(key, x) -> variables`, `{collection: nested dict}`.
      apply: `(variables, x, train, key) -> (output, updates)`; `updates` holds the collections other than `params`
        that training changes, and is empty when `train` is False.
    """

    init: Callable[[jax.Array, Tree], dict[str, Tree]]
    apply: Callable[[dict[str, Tree], Tree, bool, jax.Array | None], tuple[Tree, dict[str, Tree]]]


class Layout(NamedTuple):
    """Shapes and dtypes of a backbone at one width."""

    shared: Tree
    local: Tree
    features: Any


def kernels_and_embeddings(path: str, leaf: Any) -> bool:
    """Say which leaves of `params` are shared by default: those of two or more axes."""
    del path
    return len(leaf.shape) >= 2


@dataclass(frozen=True, eq=False)
class Net:
    """A backbone that exists at every width; made by `pae.linen` or `pae.nnx`.

    Attributes:
      build: `width -> Program`.
      sample: abstract input batch.
      packable: `(path in params, leaf) -> bool`: which float leaves are shared weights.
      source: what to call the model in messages.
    """

    build: Callable[[float], Program]
    sample: Tree
    packable: Callable[[str, Any], bool] = kernels_and_embeddings
    source: str = "model"
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what was made for a key, making it the first time; compiled functions live as long as the net."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def program(self, width: float) -> Program:
        """Return the backbone of a width."""
        return self.memo(("program", width), lambda: self.build(width))

    def layout(self, width: float) -> Layout:
        """Return shapes and dtypes at a width, without computing anything."""
        return self.memo(("layout", width), lambda: self._layout(width))

    def initial(self, key: jax.Array, width: float) -> tuple[Tree, Tree]:
        """Draw `(shared, local)` as the model initialises itself."""
        init = self.memo(("init", width), lambda: jax.jit(lambda key: self._initial(key, width)))
        return init(key)

    def initial_local(self, key: jax.Array, width: float) -> Tree:
        """Draw the local variables alone; the compiler drops the work of the rest."""
        init = self.memo(("init local", width), lambda: jax.jit(lambda key: self._initial(key, width)[1]))
        return init(key)

    def split(self, variables: dict[str, Tree]) -> tuple[Tree, Tree]:
        """Split the variables of a backbone into `(shared, local)`."""
        return trees.split(variables, lambda path, leaf: bool(self.packable(path, leaf)))

    def _initial(self, key: jax.Array, width: float) -> tuple[Tree, Tree]:
        return self.split(self.program(width).init(key, zeros(self.sample)))

    def _layout(self, width: float) -> Layout:
        program = self.program(width)
        variables = jax.eval_shape(lambda: program.init(jax.random.key(0), zeros(self.sample)))
        _require_supported(variables, self.source)
        shared, local = self.split(variables)
        if not shared:
            raise StructureError(
                self.source,
                "",
                "no leaf that can be shared",
                "at least one float leaf of two or more axes in params",
                "Pass packable= to name other leaves.",
            )
        features, _ = jax.eval_shape(lambda v, x: program.apply(v, x, False, None), variables, self.sample)
        if not hasattr(features, "shape") or not features.shape:
            raise StructureError(self.source, "", features, "one array of features (batch, ...)", "")
        return Layout(shared, local, features)


def require_module(model: Any, kind: type[T], source: str, hint: str) -> T:
    """Return what a builder made, or raise `StructureError` unless it is a module called with `train`."""
    if not isinstance(model, kind):
        raise StructureError(source, "", type(model).__name__, f"a {kind.__module__}.{kind.__name__}", hint)
    if not takes_train(model):
        raise StructureError(
            source,
            "",
            f"{type(model).__name__}.__call__ without a train argument",
            "module(x, train=bool)",
            "Add `train: bool` to __call__; BatchNorm and Dropout need it, others may ignore it.",
        )
    return model


def takes_train(model: Any) -> bool:
    """Say whether a module is called with `train`."""
    return "train" in inspect.signature(type(model).__call__).parameters


def as_key(key: Any) -> jax.Array:
    """Return a typed random key, or raise `ArgumentError`; raw uint32 keys are accepted."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return key
    if hasattr(key, "dtype") and key.dtype == jnp.uint32 and np.ndim(key) == 1:
        return jax.random.wrap_key_data(jnp.asarray(key))
    raise ArgumentError(f"key must be one random key such as jax.random.key(0), found {trees.describe(key)}")


def zeros(sample: Tree) -> Tree:
    """Return a batch of zeros of the sample's shapes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sample)


def abstract_sample(sample: Tree) -> Tree:
    """Return the shapes and dtypes of a sample batch, or raise `StructureError`.

    NumPy's float64 and int64 become what JAX would make of them.
    """
    arrays = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf), sample)
    shapes = [leaf.shape for leaf in jax.tree.leaves(arrays)]
    if not shapes or not all(shapes):
        raise StructureError("sample", "", shapes, "arrays with a leading batch axis")
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)), arrays
    )


def check_width(width: float) -> float:
    """Return a width as a float, or raise `ArgumentError` unless it is positive and finite."""
    try:
        value = float(width)
    except (TypeError, ValueError):
        raise ArgumentError(f"width is a positive channel factor, found {width!r}") from None
    if not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"width is a positive channel factor, found {width!r}; from a size ratio: pae.width_for")
    return value


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
    if not isinstance(size_ratio, (int, float, np.number)) or not (math.isfinite(size_ratio) and size_ratio > 0):
        raise ArgumentError(f"size_ratio must be positive and finite, found {size_ratio!r}")
    return math.sqrt(size_ratio)


def check_inputs(net: Net, x: Tree) -> None:
    """Raise unless inputs fit the sample: same tree, same shape after the batch axis, same kind of dtype.

    A narrower or wider dtype of the same kind (NumPy's float64 for float32) is converted; integers for floats are
    not, because an image of 0..255 instead of 0..1 would train without a word.
    """
    if jax.tree.structure(x) != jax.tree.structure(net.sample):
        raise StructureError("input", "", jax.tree.structure(x), jax.tree.structure(net.sample), "")
    for (path, leaf), wanted in zip(trees.flatten(x).items(), jax.tree.leaves(net.sample), strict=True):
        found, expected = trees.describe(leaf), trees.describe(wanted).replace(f"[{wanted.shape[0]}", "[batch", 1)
        if not hasattr(leaf, "shape") or leaf.shape[1:] != wanted.shape[1:] or not leaf.shape:
            raise StructureError("input", path, found, expected, "The batch axis comes first.")
        if not _same_kind(leaf.dtype, wanted.dtype):
            raise StructureError("input", path, found, expected, "Convert and scale the data as the model expects.")


def as_inputs(net: Net, x: Tree) -> Tree:
    """Convert checked inputs to the sample's dtypes."""
    return jax.tree.map(lambda leaf, wanted: jnp.asarray(leaf, wanted.dtype), x, net.sample)


def check_batch_size(batch_size: int) -> int:
    """Return a batch size, or raise `DataError` unless it is a positive integer."""
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise DataError(f"batch_size must be a positive integer, found {batch_size!r}")
    return int(batch_size)


def _same_kind(found: Any, expected: Any) -> bool:
    return any(
        jnp.issubdtype(found, kind) and jnp.issubdtype(expected, kind)
        for kind in (jnp.floating, jnp.integer, jnp.bool_, jnp.complexfloating)
    )


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
            raise StructureError(
                source, path, trees.describe(leaf), expected, "Keep such values out of the module's variables."
            )

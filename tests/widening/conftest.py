"""What the widening tests share: random variables, and the check that a widened network is the narrow one."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax.widening import WidenMaps, widen_maps

# Programs here are small and run once or twice: compiling them fast matters, running them fast does not.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Network:
    """A pure function of (variables, *inputs) and the shapes of its variables."""

    apply: Callable[..., Any]
    shapes: Any
    compiler_options = FAST_COMPILE

    @functools.cached_property
    def _compiled(self):
        return jax.jit(self.apply, compiler_options=self.compiler_options)

    def __call__(self, variables, *inputs):
        return self._compiled(variables, *inputs)


def _random(shapes, seed=0):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(seed), leaf.shape) if leaf.shape else jax.random.key(seed)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.integers(0, 3, leaf.shape), leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 4
        values = (rng.normal(size=leaf.shape) + 0.05) / np.sqrt(max(fan_in, 1))
        values += 1.0 * ("scale" in name)
        return jnp.asarray(np.abs(values) + 0.5 if "var" in name else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _fresh(maps: WidenMaps, shapes, seed=1):
    """A wide tree as a user may have it: new weights 0, new entries of other leaves any, unless they must be 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        local = (len(leaf.shape) < 2 or name.startswith("batch_stats")) and name not in maps.zero_leaves
        if not local or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(3 * rng.uniform(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _error(maps: WidenMaps, narrow_out, wide_out) -> float:
    """Largest difference at the mapped places, relative to the largest narrow output."""
    spots = jax.tree.leaves(maps.outputs, is_leaf=lambda x: hasattr(x, "axes"))
    errors = [0.0]
    for spot, n, w in zip(spots, jax.tree.leaves(narrow_out), jax.tree.leaves(wide_out), strict=True):
        n, w = np.asarray(n, np.float64), np.asarray(spot.take(w), np.float64)
        assert np.all(np.isfinite(n)), "the narrow network itself is not finite"
        if n.size:
            errors.append(float(np.max(np.abs(n - w)) / max(np.max(np.abs(n)), 1e-30)))
    return max(errors)


def _same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _check(networks: list[Network], *inputs, tolerance: float = 1e-5) -> list[WidenMaps]:
    """Widen along a chain of networks and check every law of the maps; returns the maps of each step."""
    first = _random(networks[0].shapes)
    steps, whole, variables = [], None, first
    for narrow, wide in itertools.pairwise(networks):
        maps = widen_maps(narrow.apply, narrow.shapes, wide.apply, wide.shapes, *inputs)
        assert maps.preserved, maps.report
        assert WidenMaps.from_json(json.loads(json.dumps(maps.to_json()))) == maps
        _same_bits(maps.take(maps.put(variables)), variables)
        variables = maps.put(variables)
        whole = maps if whole is None else whole.then(maps)
        steps.append(maps)
    _same_bits(whole.take(variables), first)
    _same_bits(whole.put(first), variables)
    answer = networks[0](first, *inputs)
    for name, wide_variables in {
        "zeros": variables,
        "fresh": whole.put(first, into=_fresh(whole, networks[-1].shapes)),
    }.items():
        error = _error(whole, answer, networks[-1](wide_variables, *inputs))
        assert error <= tolerance, f"{name} in the new area: error {error} > {tolerance}\n{whole.report}"
    return steps


@pytest.fixture
def network():
    """network(apply, shapes): a function with the shapes of its variables."""
    return Network


@pytest.fixture
def random_variables():
    """random_variables(shapes, seed=0): arrays for a tree of shapes."""
    return _random


@pytest.fixture
def check_preserved():
    """check_preserved([networks], *inputs): widens step by step and checks every law; returns the maps."""
    return _check


@pytest.fixture
def relative_error():
    """relative_error(maps, narrow_out, wide_out)."""
    return _error


@pytest.fixture
def assert_same_bits():
    """assert_same_bits(a, b): equal structure, dtypes, shapes and bits."""
    return _same_bits


@pytest.fixture
def linen():
    """linen(module, *inputs): a Linen module as a `Network`."""

    def make(module, *inputs):
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        return Network(module.apply, shapes)

    return make

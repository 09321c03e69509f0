"""`smallest` against a stable sort: every float dtype alone and mixed, every shape, ties, NaN, and no recompilation."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_jax.core.selection import smallest

ALONE = {"float32": [np.float32], "float16": [np.float16], "bfloat16": [ml_dtypes.bfloat16]}
MIXED = {
    "mixed halves": [np.float16, ml_dtypes.bfloat16],
    "mixed widths": [ml_dtypes.bfloat16, np.float32, np.float16],
    "eight bits": [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2],
    "negative zero as nan": [ml_dtypes.float8_e4m3fnuz],
}
SHAPES = [(7, 5), (3, 2, 2, 4), (1, 1), (11, 1), (13,), (0, 4), ()]
MAGNITUDES = [1.0, 1e-3, 1e-7, 1e-41, 1e4, 1e38]

jitted = jax.jit(smallest, static_argnames="scope")


def draw(rng, dtypes, levels, magnitude):
    """Leaves of every shape with `levels` values each, so with many ties or hardly any, NaN and infinity among them."""
    leaves, candidates = [], []
    for i, shape in enumerate(SHAPES):
        with np.errstate(over="ignore", under="ignore"):
            values = rng.normal(size=levels).astype(np.float32) * np.float32(magnitude)
            values[0] = rng.choice([0.0, -0.0, np.nan, np.inf, -np.inf])
            leaves.append(rng.choice(values, size=shape).astype(dtypes[i % len(dtypes)]))
        candidates.append(rng.random(shape) < rng.choice([0.2, 0.8, 1.0]))
    return leaves, candidates


def quotas(rng, candidates, scope):
    counts = [int(c.sum()) for c in candidates]
    if scope == "global":
        return np.full(len(counts), rng.integers(0, sum(counts) + 1), np.int32)
    return np.asarray([rng.integers(0, n + 1) for n in counts], np.int32)


def by_sorting(leaves, candidates, wanted, scope):
    """The specification: a stable sort by magnitude, NaN last, of each leaf or of all in a row."""
    sizes = [leaf.size for leaf in leaves]
    flat = np.concatenate([np.abs(leaf.astype(np.float64)).ravel() for leaf in leaves])
    allowed = np.concatenate([c.ravel() for c in candidates])
    marks = np.zeros(flat.size, bool)
    ends = np.cumsum(sizes)
    ranges = [(0, flat.size)] if scope == "global" else list(zip(ends - sizes, ends, strict=True))
    for (start, end), count in zip(ranges, wanted, strict=False):
        places = start + np.flatnonzero(allowed[start:end])
        marks[places[np.argsort(flat[places], kind="stable")][:count]] = True
    return [m.reshape(leaf.shape) for m, leaf in zip(np.split(marks, ends[:-1]), leaves, strict=True)]


def assert_selects_as_sorting_does(leaves, candidates, wanted, scope):
    found = jitted([*map(jnp.asarray, leaves)], [*map(jnp.asarray, candidates)], jnp.asarray(wanted), scope)
    for mark, expected in zip(found, by_sorting(leaves, candidates, wanted, scope), strict=True):
        assert mark.dtype == jnp.bool_
        np.testing.assert_array_equal(mark, expected)


@pytest.mark.parametrize("scope", ["leaf", "global"])
@pytest.mark.parametrize("dtypes", [*ALONE.values(), *MIXED.values()], ids=[*ALONE, *MIXED])
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5, 1000]), st.sampled_from(MAGNITUDES))
@settings(max_examples=40, deadline=None)
def test_smallest_marks_what_a_stable_sort_puts_first(scope, dtypes, seed, levels, magnitude):
    rng = np.random.default_rng(seed)
    leaves, candidates = draw(rng, dtypes, levels, magnitude)
    assert_selects_as_sorting_does(leaves, candidates, quotas(rng, candidates, scope), scope)


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_smallest_ranks_float64_by_all_its_bits_beside_narrower_leaves(scope):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for dtypes in ([np.float64], [np.float64, np.float32]):
            leaves, candidates = draw(rng, dtypes, 1000, 1.0)
            leaves[0] = 1.0 + np.arange(35.0).reshape(7, 5)[::-1] * 2.0**-52  # equal as float32
            assert_selects_as_sorting_does(leaves, candidates, quotas(rng, candidates, scope), scope)


@pytest.mark.parametrize("shape", [(300, 200), (60_000, 1), (1, 60_000), (60_000,), (2, 30_000), (3, 5, 40, 100)])
def test_smallest_breaks_ties_by_index_whatever_the_shape(shape):
    rng = np.random.default_rng(0)
    values = rng.choice(np.asarray([0.5, -0.5, 0.25, 0.75], np.float32), size=shape)
    candidates = rng.random(shape) < 0.9
    for count in (0, 1, 15_000, int(candidates.sum()) - 1, int(candidates.sum())):
        assert_selects_as_sorting_does([values], [candidates], np.asarray([count], np.int32), "leaf")


@pytest.mark.parametrize("bits", [np.uint16, np.uint32])
def test_smallest_tells_any_two_bit_patterns_apart(bits):
    """Each digit of a bit pattern matters: neighbours of every power of two, at every rank."""
    dtype = np.float16 if bits is np.uint16 else np.float32
    finite = np.frombuffer(np.asarray(np.inf, dtype).tobytes(), bits)[0]
    powers = [1 << i for i in range(8 * bits().itemsize)]
    patterns = np.asarray(sorted({p + d for p in powers for d in (-1, 0, 1) if p + d <= finite}), bits)
    leaf = np.random.default_rng(0).permutation(patterns).view(dtype)
    everywhere = np.ones(leaf.shape, bool)
    for count in range(leaf.size + 1):
        assert_selects_as_sorting_does([leaf], [everywhere], np.asarray([count], np.int32), "leaf")


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_smallest_compiles_once_for_all_targets_and_sorts_nothing(scope, compilations):
    leaf, everywhere = jnp.linspace(-1, 1, 20).reshape(4, 5), jnp.ones((4, 5), bool)
    targets = [jnp.asarray([n], jnp.int32) for n in range(4)]
    jitted([leaf], [everywhere], targets[0], scope)
    with compilations() as found:
        for target in targets[1:]:
            jitted([leaf], [everywhere], target, scope)
    assert found.count == 0
    assert "sort" not in jitted.lower([leaf], [everywhere], targets[0], scope).as_text()


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pae_jax.core.selection import smallest

rng = np.random.default_rng(0)
leaves = [jnp.asarray(rng.normal(size=s).round(1), jnp.float32) for s in ((8, 12), (3, 8, 16))]
everywhere = [jnp.asarray(rng.random(leaf.shape) < 0.9) for leaf in leaves]
specs = [(P("d"), P(None, None, "d")), (P(), P(None, "d"))]
select = jax.jit(smallest, static_argnames="scope")
for scope, wanted in (("leaf", [40, 100]), ("global", [200, 200])):
    alone = select(leaves, everywhere, jnp.asarray(wanted), scope)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
        for spec in specs:
            place = lambda arrays: [jax.device_put(a, NamedSharding(mesh, p)) for a, p in zip(arrays, spec)]
            spread = select(place(leaves), place(everywhere), jnp.asarray(wanted), scope)
            for one, many, p in zip(alone, spread, spec):
                np.testing.assert_array_equal(one, many)
                assert many.sharding.is_equivalent_to(NamedSharding(mesh, p), many.ndim), many.sharding
"""


def test_smallest_marks_the_same_entries_of_leaves_that_are_spread_over_devices(on_devices):
    assert on_devices(4, SHARDED) == []


MANUAL = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from pae_jax.core.selection import smallest

leaf = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)), jnp.float32)
select = lambda leaf: smallest([leaf], [leaf < 1], jnp.asarray([40], jnp.int32), "global")[0]
wanted = select(leaf)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    for checked in (True, False):
        mapped = jax.shard_map(select, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=checked)
        np.testing.assert_array_equal(jax.jit(mapped)(leaf), wanted)
"""


def test_smallest_marks_the_same_entries_inside_shard_map(on_devices):
    assert on_devices(2, MANUAL) == []

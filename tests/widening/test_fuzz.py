"""Random networks are preserved or refused, none silently wrong; benchmarks/widening_fuzz.py runs thousands."""

import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "widening_fuzz.py"
NETWORKS = 240


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("widening_fuzz", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_none_is_silently_wrong(fuzz):
    verdicts = {seed: fuzz.outcome(fuzz.draw(seed), seed) for seed in range(NETWORKS)}
    wrong = {seed: verdict for seed, verdict in verdicts.items() if verdict[0] == "wrong"}
    assert not wrong
    preserved = sum(verdict[0] == "preserved" for verdict in verdicts.values())
    assert preserved >= 0.8 * NETWORKS, f"only {preserved} of {NETWORKS} preserved"


def test_the_interpreter_computes_what_jax_computes(fuzz):
    for seed in range(6):
        network = fuzz.draw(seed)
        rng = np.random.default_rng(seed)
        values = fuzz.variables(network.shapes(0), rng)
        x = rng.normal(size=network.inputs.shape)
        ours = fuzz.evaluate(network.apply(0), network.shapes(0), network.inputs, values, x)
        single = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), values)
        theirs = jax.jit(network.apply(0))(single, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4 * np.abs(ours).max())


def test_the_check_notices_wrong_maps(fuzz):
    """With leading blocks everywhere, as the naive rule has it, most concatenating networks are wrong."""
    wrong = sum(fuzz.naive_error(fuzz.draw(seed), seed) > 1e-3 for seed in range(40))
    assert wrong >= 10

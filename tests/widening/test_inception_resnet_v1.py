"""The whole InceptionResnetV1: 133 kernels, grown by 20 % of its size."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.models.inception_resnet_v1 import InceptionResnetV1
from pae_jax.widening import widen_maps


def test_full_width_is_analysed_in_seconds_and_preserved(network, random_variables, relative_error):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 75, 75, 3)), jnp.float32)
    nets = []
    for width in (1.0, 1.2**0.5):
        module = InceptionResnetV1(width=width)
        shapes = jax.eval_shape(lambda key, module=module: module.init(key, x, False), jax.random.key(0))
        nets.append(network(lambda v, x, module=module: module.apply(v, x, False), shapes))
    narrow, wide = nets
    start = time.perf_counter()
    maps = widen_maps(narrow.apply, narrow.shapes, wide.apply, wide.shapes, x)
    seconds = time.perf_counter() - start
    assert seconds < 10, f"analysis took {seconds:.1f} s"
    assert maps.preserved, maps.report
    assert sum(path.endswith("kernel") for path, _ in maps.leaves) == 133
    assert maps.zero_leaves == ()
    variables = random_variables(narrow.shapes)
    assert relative_error(maps, narrow(variables, x), wide(maps.put(variables), x)) < 1e-5
    assert len(maps.to_json()["maps"]) == 12

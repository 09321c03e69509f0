"""Masks and owners: their maps are those of the weights, also inside of the traced function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.widening import widen_maps


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(self.width, (3, 3))(x)))
        x = jnp.concatenate([y, x], -1)
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def masked(width):
    """apply(variables with an owner per kernel, task id, x) and its shapes."""
    module = Net(width)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 4, 4, 2)))
    kernels = {name: {"kernel": leaves["kernel"]} for name, leaves in shapes["params"].items() if "kernel" in leaves}
    owners = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.int8), kernels)

    def apply(variables, task, x):
        params = dict(variables["params"])
        for name, owner in variables["owner"].items():
            o, w = owner["kernel"], params[name]["kernel"]
            visible = (o > 0) & (o <= task)
            params[name] = {**params[name], "kernel": jnp.where(visible, w, 0)}
        return module.apply({**variables["model"], "params": params}, x)

    return apply, {"params": shapes["params"], "model": {"batch_stats": shapes["batch_stats"]}, "owner": owners}


def test_masking_inside_the_function_is_analysed(network, check_preserved):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 2)), jnp.float32)
    nets = [network(*masked(width)) for width in (3, 5, 6)]
    for maps in check_preserved(nets, jnp.int8(1), x):
        for name in ("Conv_0", "Dense_0"):
            assert maps[f"owner/{name}/kernel"] == maps[f"params/{name}/kernel"]


def test_new_weights_of_later_owners_are_invisible_to_old_tasks(random_variables, relative_error):
    """What the new area holds does not matter while its owner is not visible."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 2)), jnp.float32)
    (narrow, narrow_shapes), (wide, wide_shapes) = masked(3), masked(5)
    maps = widen_maps(narrow, narrow_shapes, wide, wide_shapes, jnp.int8(1), x)
    old = random_variables(narrow_shapes)
    new = random_variables(wide_shapes, seed=1)
    new["owner"] = jax.tree.map(lambda owner: jnp.full_like(owner, 3), new["owner"])  # the third task's
    new["model"] = jax.tree.map(lambda leaf: jnp.ones_like(leaf) / 2, new["model"])
    new["params"] = jax.tree.map(lambda leaf: leaf if leaf.ndim > 1 else jnp.ones_like(leaf), new["params"])
    grown = maps.put(old, into=new)
    for task in (1, 2):
        task = jnp.int8(task)
        assert relative_error(maps, narrow(old, task, x), wide(grown, task, x)) < 1e-5
    assert relative_error(maps, narrow(old, jnp.int8(3), x), wide(grown, jnp.int8(3), x)) > 1e-3


def test_zero_leaves_are_named_where_fresh_vectors_would_do_harm():
    """A sum over channels needs new channels to be exactly 0, hence the bias and the scale that make them."""

    def apply(v, x):
        h = (x @ v["kernel"]) * v["scale"][None] + v["bias"][None]
        return h / jnp.sqrt(jnp.sum(h * h, -1, keepdims=True) + 1e-6) @ v["out"]

    def shapes(width):
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
        return {"kernel": shape(3, width), "scale": shape(width), "bias": shape(width), "out": shape(width, 2)}

    maps = widen_maps(apply, shapes(2), apply, shapes(4), jnp.ones((1, 3)))
    assert maps.preserved and maps.zero_leaves == ("bias",)
    assert "new entries must be 0: bias" in str(maps.report)

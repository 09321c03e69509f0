"""Single operations in all the ways a growing axis can meet them: the verdict is the expected one, and it is right."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pae_jax.widening import widen_maps

VECTOR, SEQUENCE, IMAGE = (2, 6), (2, 5, 6), (2, 8, 8, 3)
CASES = {}


def case(name, verdict, leaves, fn, inputs=VECTOR, widths=(3, 5)):
    """Register fn(width, variables, x), with leaves(width) giving the shapes of the variables."""
    CASES[name] = (verdict, leaves, fn, inputs, widths)


def preserved(name, *args, **kwargs):
    case(name, "preserved", *args, **kwargs)


def refused(name, *args, **kwargs):
    case(name, "refused", *args, **kwargs)


def up(w):
    return {"a": (6, w)}


def up_down(w):
    return {"a": (6, w), "c": (w, 2)}


def pair(w):
    return {"a": (6, w), "b": (6, w + 1), "c": (w * (w + 1), 2)}


def image(w):
    return {"a": (3, w), "c": (w, 2)}


def hidden(fn):
    """fn between a layer that grows and one that reads it."""
    return lambda w, v, x: fn(x @ v["a"]) @ v["c"]


def grouped(x, kernel, groups):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


@pytest.mark.parametrize("name", CASES)
def test_verdict(name, network, random_variables, relative_error):
    verdict, leaves, fn, inputs, widths = CASES[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=inputs), jnp.float32)
    narrow, wide = (
        network(
            lambda v, x, w=w: fn(w, v, x),
            {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in leaves(w).items()},
        )
        for w in widths
    )
    maps = widen_maps(narrow.apply, narrow.shapes, wide.apply, wide.shapes, x)
    assert ("preserved" if maps.preserved else "refused") == verdict, maps.report
    if maps.preserved:
        variables = random_variables(narrow.shapes)
        assert relative_error(maps, narrow(variables, x), wide(maps.put(variables), x)) < 1e-5


# Sums of products.
preserved("outer product, flattened", pair, lambda w, v, x: (
    jnp.einsum("bi,bj->bij", nn.sigmoid(x @ v["a"]), nn.sigmoid(x @ v["b"])).reshape(2, -1) @ v["c"]
))  # fmt: skip
refused("outer sum, reduced", lambda w: {"a": (6, w), "b": (6, 4)}, lambda w, v, x: (
    (x @ v["a"])[:, :, None] + (x @ v["b"])[:, None, :]
).sum(1))  # fmt: skip
preserved("Gram matrix", up, lambda w, v, x: jnp.einsum("bti,bsi->bts", x @ v["a"], x @ v["a"]), SEQUENCE)
refused("Gram matrix of sigmoids", up, lambda w, v, x: jnp.einsum(
    "bti,bsi->bts", nn.sigmoid(x @ v["a"]), nn.sigmoid(x @ v["a"])
), SEQUENCE)  # fmt: skip
preserved("covariance", up, lambda w, v, x: jnp.einsum("bti,btj->bij", x @ v["a"], nn.relu(x @ v["a"])), SEQUENCE)
preserved("kernel made by the network", lambda w: {"a": (6, w), "g": (6, w * w), "c": (w, 2)}, lambda w, v, x: (
    jnp.einsum("bc,bcd->bd", x @ v["a"], (x @ v["g"]).reshape(2, w, w)) @ v["c"]
))  # fmt: skip
preserved("weight norm with epsilon", up_down, lambda w, v, x: (
    nn.relu(x @ (v["a"] * lax.rsqrt((v["a"] ** 2).sum(0, keepdims=True) + 1e-6))) @ v["c"]
))  # fmt: skip
preserved("kernel divided by its largest entry", lambda w: {"a": (6, w), "c": (w, 2)}, lambda w, v, x: (
    nn.relu(x @ v["a"]) @ (v["c"] / jnp.abs(v["c"]).max())
))  # fmt: skip
refused("kernel divided by a growing scale", lambda w: {"a": (6, w), "c": (w, 2)}, lambda w, v, x: (
    nn.relu(x @ v["a"]) @ (v["c"] / jnp.abs(v["c"]).max(1, keepdims=True))
))  # fmt: skip
refused("weight norm without epsilon", up_down, lambda w, v, x: (
    nn.relu(x @ (v["a"] / jnp.linalg.norm(v["a"], axis=0, keepdims=True))) @ v["c"]
))  # fmt: skip
preserved("triangular kernel", lambda w: {"a": (6, w), "k": (w, w)}, lambda w, v, x: (x @ v["a"]) @ jnp.tril(v["k"]))
preserved("identity kernel", lambda w: {"a": (6, w), "k": (w, w)}, lambda w, v, x: (x @ v["a"]) @ (v["k"] + jnp.eye(w)))
refused("inverse kernel", lambda w: {"a": (6, w), "k": (w, w)}, lambda w, v, x: (
    (x @ v["a"]) @ jnp.linalg.inv(v["k"] + 2 * jnp.eye(w))
))  # fmt: skip
preserved("experts that grow, gated by sigmoids", lambda w: {"g": (6, w), "e": (w, 6, 2)}, lambda w, v, x: (
    jnp.einsum("be,beh->bh", nn.sigmoid(x @ v["g"]), jnp.einsum("bi,eih->beh", x, v["e"]))
))  # fmt: skip
refused("experts that grow, gated by softmax", lambda w: {"g": (6, w), "e": (w, 6, 2)}, lambda w, v, x: (
    jnp.einsum("be,beh->bh", nn.softmax(x @ v["g"]), jnp.einsum("bi,eih->beh", x, v["e"]))
))  # fmt: skip

# Elementwise: what new entries become.
preserved("softplus", up_down, hidden(nn.softplus))
preserved("log1p", up_down, hidden(lambda h: jnp.log1p(jnp.abs(h))))
preserved("square root", up_down, hidden(lambda h: jnp.sqrt(h * h)))
preserved("sign", up_down, hidden(jnp.sign))
preserved("rounding", up_down, hidden(jnp.round))
preserved("choice", up_down, hidden(lambda h: jnp.where(h >= 0, 1.0, h)))
refused("logarithm", up_down, hidden(lambda h: jnp.log(jnp.abs(h))))
refused("reciprocal", up_down, hidden(lambda h: 1 / h))
preserved("complex numbers", up_down, hidden(lambda h: jnp.abs(h.astype(jnp.complex64) * 1j)))
preserved("quantisation", up_down, hidden(
    lambda h: jnp.round(h / jnp.maximum(jnp.abs(h).max(-1, keepdims=True), 1e-6) * 127)
))  # fmt: skip

# Reductions: whether new entries take part.
preserved("how many are positive", up, lambda w, v, x: (x @ v["a"] > 0).sum(-1))
refused("how many are not negative", up, lambda w, v, x: (x @ v["a"] >= 0).sum(-1))
preserved("is any positive", up, lambda w, v, x: (x @ v["a"] > 0).any(-1).astype(jnp.float32))
preserved("largest after relu", up, lambda w, v, x: nn.relu(x @ v["a"]).max(-1))
preserved("product of exponentials", up, lambda w, v, x: jnp.exp(x @ v["a"]).prod(-1))
preserved("distances", up, lambda w, v, x: jnp.abs((x @ v["a"])[:, None] - (x @ v["a"])[None]).sum(-1))
preserved("logsumexp over time", up_down, hidden(lambda h: nn.logsumexp(h, axis=1)), SEQUENCE)
preserved("sort over time", up_down, hidden(lambda h: jnp.sort(h, 1)), SEQUENCE)
preserved("cumulative sum over time", up_down, hidden(lambda h: jnp.cumsum(nn.sigmoid(h), 1)), SEQUENCE)
preserved("associative scan over time", up_down, hidden(
    lambda h: lax.associative_scan(jnp.multiply, nn.sigmoid(h), axis=1)
), SEQUENCE)  # fmt: skip

# Cutting, indexing, ordering.
preserved("first channel", up, lambda w, v, x: (x @ v["a"])[:, 0])
preserved("last channel", up, lambda w, v, x: (x @ v["a"])[:, -1])
preserved("shifted channels multiplied", up, lambda w, v, x: (x @ v["a"])[:, 1:3] * (x @ v["a"])[:, :2])
preserved("rolled channels", up_down, hidden(lambda h: jnp.roll(h, 1, -1)))
preserved("halves swapped and added", lambda w: {"a": (6, 2 * w), "c": (2 * w, 2)}, lambda w, v, x: hidden(
    lambda h: h + jnp.concatenate([h[:, w:], h[:, :w]], -1)
)(w, v, x))  # fmt: skip
preserved("gather over time", up_down, hidden(lambda h: h[:, jnp.array([0, 2, 1])]), SEQUENCE)
preserved("gather along time by the input", up, lambda w, v, x: (
    jnp.take_along_axis(x @ v["a"], jnp.argsort(x[..., :1], 1), axis=1)
), SEQUENCE)  # fmt: skip
refused("gather along channels", up, lambda w, v, x: jnp.take(x @ v["a"], jnp.array([0, 2]), axis=-1))
preserved("scatter over time", up_down, hidden(lambda h: jnp.zeros_like(h).at[:, 1].set(h[:, 0])), SEQUENCE)
preserved("segments", up_down, hidden(
    lambda h: jax.ops.segment_sum(h.reshape(10, -1), jnp.array([0, 1, 0, 1, 2] * 2), 3)
), SEQUENCE)  # fmt: skip
preserved("segments of a batch of graphs", up_down, hidden(lambda h: jax.vmap(
    lambda h, r: jax.ops.segment_sum(h, r, 3)
)(h, jnp.array([[0, 1, 0, 1, 2], [2, 2, 1, 0, 0]]))), SEQUENCE)  # fmt: skip
preserved("largest of segments of a batch", up_down, hidden(lambda h: jax.vmap(
    lambda h, r: jnp.full((3, h.shape[-1]), -9.0).at[r].max(h)
)(h, jnp.array([[0, 1, 0, 1, 2], [2, 2, 1, 0, 0]]))), SEQUENCE)  # fmt: skip
refused("scatter into channels", up, lambda w, v, x: jnp.zeros((2, w + 1)).at[:, 1:].set(x @ v["a"]))
preserved("cache", up_down, hidden(lambda h: lax.dynamic_update_slice(jnp.zeros((2, 9, h.shape[-1])), h, (0, 2, 0))),
          SEQUENCE)  # fmt: skip
preserved("slice of time at a computed place", up_down, lambda w, v, x: (
    lax.dynamic_slice_in_dim(x @ v["a"], (x[0, 0, 0] > 0).astype(int), 3, 1) @ v["c"]
), SEQUENCE)  # fmt: skip
refused("slice of channels at a computed place", up, lambda w, v, x: (
    lax.dynamic_slice_in_dim(x @ v["a"], (x[0, 0] > 0).astype(int), 2, 1)
))  # fmt: skip
preserved("slice of channels at a known place", up, lambda w, v, x: (
    lax.dynamic_slice_in_dim(jnp.concatenate([x @ v["a"], x], -1), w, 6, 1)
))  # fmt: skip

# Constants and coordinates.
preserved("one-hot of more classes", lambda w: {"b": (6, w), "a": (2 * w, 3)}, lambda w, v, x: (
    jnp.concatenate([x @ v["b"], jax.nn.one_hot(jnp.argmax(x[:, :2], -1), w)], -1) @ v["a"]
))  # fmt: skip
preserved("constant ramp", up, lambda w, v, x: x @ v["a"] * np.arange(w, dtype=np.float32)[None])
refused("constant ramp from the end", up, lambda w, v, x: x @ v["a"] * np.arange(w, 0, -1, dtype=np.float32)[None])
preserved("positions of fixed wavelength", up, lambda w, v, x: (
    jnp.sin(jnp.arange(5.0)[:, None] * jnp.exp(-jnp.arange(w) / 8)[None])[None] + x @ v["a"]
), SEQUENCE)  # fmt: skip
refused("positions of growing wavelength", up, lambda w, v, x: (
    jnp.sin(jnp.arange(5.0)[:, None] * jnp.exp(-jnp.arange(w) / w)[None])[None] + x @ v["a"]
), SEQUENCE)  # fmt: skip

# Reshapes and attention layouts.
preserved("windows of an image", image, lambda w, v, x: (
    (x @ v["a"]).reshape(2, 2, 4, 2, 4, w).transpose(0, 1, 3, 2, 4, 5).reshape(8, 16, w).max(1) @ v["c"]
), IMAGE)  # fmt: skip
preserved("merged patches", lambda w: {"a": (3, w), "c": (3 * w, 2)}, lambda w, v, x: hidden(
    lambda h: jnp.concatenate([h[:, 0::2, 0::2], h[:, 1::2, 0::2], h[:, 0::2, 1::2]], -1)
)(w, v, x), IMAGE)  # fmt: skip
preserved("rotary halves", lambda w: {"a": (6, 4 * w), "c": (4 * w, 2)}, lambda w, v, x: hidden(
    lambda h: jnp.concatenate([h.reshape(2, 5, w, 4)[..., 2:], -h.reshape(2, 5, w, 4)[..., :2]], -1).reshape(2, 5, -1)
)(w, v, x), SEQUENCE)  # fmt: skip
preserved("grouped queries", lambda w: {"k": (6, 4 * w), "q": (6, 8 * w), "c": (8 * w, 2)}, lambda w, v, x: (
    jnp.repeat((x @ v["k"]).reshape(2, 5, w, 4), 2, axis=2).reshape(2, 5, -1) * (x @ v["q"])
) @ v["c"], SEQUENCE)  # fmt: skip
preserved("one channel becomes several", up_down, hidden(nn.relu), widths=(1, 6))
refused("one channel no longer broadcasts", lambda w: {"s": (w,)}, lambda w, v, x: x * v["s"][None], widths=(1, 6))
preserved("one group becomes several", lambda w: {"a": (3, 2 * w), "k": (3, 3, 2, w)}, lambda w, v, x: (
    grouped(x @ v["a"], v["k"], w)
), IMAGE, widths=(1, 3))  # fmt: skip
preserved("depthwise multiplier grows", lambda w: {"k": (3, 3, 1, 3 * w), "c": (3 * w, 2)}, lambda w, v, x: (
    grouped(x, v["k"], 3) @ v["c"]
), IMAGE)  # fmt: skip

# Masks of -inf in front of a softmax.
HEADS = lambda w: {"q": (6, 4 * w), "k": (6, 4 * w), "v": (6, 4 * w), "c": (4 * w, 2)}  # noqa: E731


def heads(masked):
    """Attention of w heads whose logits (batch, heads, time, time) go through `masked`."""

    def fn(w, v, x):
        q, k, u = ((x @ v[name]).reshape(2, 5, w, 4) for name in "qkv")
        weights = nn.softmax(masked(jnp.einsum("bqhd,bkhd->bhqk", q, k)))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, u).reshape(2, 5, -1) @ v["c"]

    return fn


CAUSAL = jnp.tril(jnp.ones((1, 1, 5, 5), bool))
preserved("causal mask of -inf", HEADS, heads(lambda h: jnp.where(CAUSAL, h, -jnp.inf)), SEQUENCE)
preserved("causal bias of -inf", HEADS, heads(lambda h: h + jnp.where(CAUSAL, 0.0, -jnp.inf)), SEQUENCE)
preserved("scaled after the mask", HEADS, heads(lambda h: jnp.where(CAUSAL, h, -jnp.inf) * 0.5), SEQUENCE)
preserved("two masks of -inf", HEADS, heads(
    lambda h: jnp.where(CAUSAL, jnp.where(jnp.arange(5)[None, None, None] < 4, h, -jnp.inf), -jnp.inf)
), SEQUENCE)  # fmt: skip
preserved("logsumexp normalisation by hand", HEADS, heads(
    lambda h: jnp.where(CAUSAL, h, -jnp.inf) - jax.lax.stop_gradient(h.max(-1, keepdims=True))
), SEQUENCE)  # fmt: skip
refused("mask of -inf by the head's own logits", HEADS, heads(lambda h: jnp.where(h >= h.max(), h, -jnp.inf)), SEQUENCE)
preserved("words masked by the length", lambda w: {"a": (6, w), "e": (w, 1), "c": (w, 2)}, lambda w, v, x: (
    jnp.einsum("bt,btd->bd", nn.softmax(jnp.where(
        jnp.arange(5)[None] < jnp.array([[2], [5]]), (jnp.tanh(x @ v["a"]) @ v["e"])[..., 0], -jnp.inf
    )), x @ v["a"]) @ v["c"]
), SEQUENCE)  # fmt: skip

# Loops and branches.
RECURRENT = lambda w: {"a": (6, w), "k": (w, w)}  # noqa: E731
preserved("counted loop", RECURRENT, lambda w, v, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ v["k"]), x @ v["a"]))
preserved("loop until small", RECURRENT, lambda w, v, x: (
    lax.while_loop(lambda h: jnp.sum(h**2) > 0.01, lambda h: jnp.tanh(h @ v["k"]) * 0.5, x @ v["a"])
))  # fmt: skip
refused("as many rounds as channels", RECURRENT, lambda w, v, x: (
    lax.while_loop(lambda c: c[0] < w, lambda c: (c[0] + 1, jnp.tanh(c[1] @ v["k"])), (0, x @ v["a"]))[1]
))  # fmt: skip
preserved("branch", up_down, lambda w, v, x: lax.cond(x[0, 0] > 0, jnp.tanh, jnp.zeros_like, x @ v["a"]) @ v["c"])
refused("branches of another order", lambda w: {"a": (6, w), "c": (w + 6, 2)}, lambda w, v, x: lax.cond(
    x[0, 0] > 0, lambda h: jnp.concatenate([x, h], -1), lambda h: jnp.concatenate([h, x], -1), x @ v["a"]
) @ v["c"])  # fmt: skip
preserved("carry that changes places", up_down, lambda w, v, x: lax.scan(
    lambda c, u: ((c[1], jnp.tanh(c[0] + u @ v["a"])), c[0]), (jnp.zeros((2, w)), jnp.ones((2, w))), x.swapaxes(0, 1)
)[1] @ v["c"], SEQUENCE)  # fmt: skip
preserved("carry whose halves rotate", lambda w: {"a": (6, w), "b": (6, w), "c": (2 * w, 2)}, lambda w, v, x: lax.scan(
    lambda c, _: (jnp.concatenate([c[:, w:], c[:, :w]], -1), c), jnp.concatenate([x @ v["a"], x @ v["b"]], -1), length=3
)[1] @ v["c"])  # fmt: skip
preserved("state space", lambda w: {"a": (6, w), "A": (w, 4), "B": (w, 4), "c": (w, 2)}, lambda w, v, x: lax.scan(
    lambda h, u: (h * jnp.exp(-jnp.exp(v["A"]))[None] + (u @ v["a"])[..., None] * v["B"][None], h.sum(-1)),
    jnp.zeros((2, w, 4)), x.swapaxes(0, 1),
)[1] @ v["c"], SEQUENCE)  # fmt: skip

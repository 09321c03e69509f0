"""What cannot be preserved is refused by name: layer, operation, reason and remedy; and it is indeed not preserved."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax.widening import widen_maps

CASES = {}


def refused(place, problem, shape=(2, 6), widths=(4, 6)):
    """Register a model whose refusal names `place` and says `problem`."""

    def register(model):
        CASES[model.__name__] = (model, place, problem, shape, widths)
        return model

    return register


@pytest.mark.parametrize("name", CASES)
def test_refusal_names_the_layer_the_reason_and_what_to_do(name, linen, random_variables, relative_error):
    model, place, problem, shape, widths = CASES[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    narrow, wide = (linen(model(width), x) for width in widths)
    maps = widen_maps(narrow.apply, narrow.shapes, wide.apply, wide.shapes, x)
    assert not maps.preserved
    text = "\n".join(map(str, maps.reasons))
    assert place in text and problem in text and "What to do: " in text, text
    assert "test_refusals.py:" in text, text
    assert maps.zero_leaves == ()
    # The maps are still whole: a user may accept the change.
    variables = random_variables(narrow.shapes)
    answer, got = narrow(variables, x), wide(maps.put(variables), x)
    assert relative_error(maps, answer, got) > 1e-4, "refused although it is preserved"


@refused("LayerNorm_0", "the constant 4.0 becomes 6.0")
class LayerNorm(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm()(nn.Dense(self.width)(x)))


@refused("RMSNorm_0", "the constant 4.0 becomes 6.0")
class RmsNorm(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RMSNorm()(nn.Dense(self.width)(x)))


@refused("GroupNorm_0", "becomes", shape=(2, 4, 4, 3))
class WiderGroups(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.GroupNorm(2)(nn.Conv(self.width, (3, 3))(x)).mean((1, 2)))


@refused("MultiHeadDotProductAttention_0", "becomes", shape=(2, 5, 6))
class WiderHeads(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, qkv_features=2 * self.width, out_features=6)(x)


@refused("SoftmaxOverChannels", "reduces over an axis growing 4 -> 6")
class SoftmaxOverChannels(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.softmax(nn.Dense(self.width)(x)))


@refused("ShuffleFixedGroups", "disagree", shape=(2, 4, 4, 3))
class ShuffleFixedGroups(nn.Module):
    """Groups of 3 and 2 cannot both keep the order that the shuffle between them makes."""

    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(3 * self.width, (1, 1))(x))
        y = nn.relu(nn.Conv(3 * self.width, (1, 1), feature_group_count=3)(y))
        z = y.reshape(*y.shape[:-1], 3, self.width).swapaxes(-1, -2).reshape(y.shape)
        return nn.Dense(3)((y + z).mean((1, 2)))


@refused("ChannelMean", "the constant 4.0 becomes 6.0")
class ChannelMean(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(3)(x - x.mean(-1, keepdims=True))


@refused("ChannelMaximum", "reduces over an axis growing 4 -> 6")
class ChannelMaximum(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x * (-jnp.square(nn.Dense(self.width)(x))).max(-1, keepdims=True))


@refused("ArgMax", "reduces over an axis growing")
class ArgMax(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = -jnp.square(nn.Dense(self.width)(x))
        return 1 + x.argmax(-1).astype(jnp.float32)


@refused("Sorted", "sorts along an axis growing 4 -> 6")
class Sorted(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jnp.sort(nn.Dense(self.width)(x)))


@refused("TopK", "picks the largest entries of an axis growing 4 -> 6")
class TopK(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return jax.lax.top_k(nn.Dense(self.width)(x) - 5, 2)[0]


@refused("Cumulative", "accumulates along an axis growing 10 -> 12")
class Cumulative(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = jnp.concatenate([nn.Dense(self.width)(x), x], -1)
        return nn.Dense(2)(jnp.cumsum(x + 0.1, -1) + x[:, ::-1])


@refused("PoolOverChannels", "its window covers an axis growing 4 -> 6", shape=(2, 4, 4, 3))
class PoolOverChannels(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (1, 1))(x)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 1, 3), (1, 1, 1, 1), "SAME")
        return nn.Dense(2)(x.mean((1, 2)))


@refused("Ramp", "disagree")
class Ramp(nn.Module):
    """Entries weighted by their coordinate stay where they are only at the head of the axis."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = jnp.concatenate([nn.Dense(self.width)(x), x], -1)
        return nn.Dense(2)(x * jnp.arange(1.0, x.shape[-1] + 1)[None])


@refused("SumOfFresh", "sums over new entries that need not be 0")
class SumOfFresh(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.sigmoid(nn.Dense(self.width)(x)) @ jnp.ones((self.width, 2))


@refused("CutElsewhere", "the cut does not separate old entries")
class CutElsewhere(nn.Module):
    """The wide network takes more of the second part, which does not grow."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = jnp.concatenate([nn.Dense(self.width)(x), x], -1)
        return nn.Dense(2)(x[:, : 5 if self.width == 4 else 9])


@refused("MixedReshape", "the reshape mixes a growing axis with others")
class MixedReshape(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = jnp.concatenate([nn.Dense(self.width)(x), nn.Dense(2)(x)], -1)
        return nn.Dense(2)(jnp.tanh(x.reshape(x.shape[0], 2, -1)).max(1))


def test_an_infinite_mask_of_what_grows_is_refused_with_a_remedy(linen):
    """The mask of a new head is not that of an old one, and may hide all that the head could see."""

    class InfiniteMask(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.DenseGeneral((self.width, 4))(x) for _ in range(3))
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
            logits = jnp.where(logits > 0, logits, -jnp.inf)
            return nn.DenseGeneral(3, axis=(-2, -1))(jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v))

    x = jnp.ones((2, 5, 6))
    narrow, wide = (linen(InfiniteMask(width), x) for width in (2, 3))
    maps = widen_maps(narrow.apply, narrow.shapes, wide.apply, wide.shapes, x)
    assert "instead of -inf" in str(maps.reasons[0])


def test_the_first_reason_is_the_cause_of_those_that_follow_from_it(linen):
    class Deep(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(self.width, name="z_first")(x)
            x = nn.LayerNorm(name="m_cause")(x)
            for name in "cba":
                x = nn.sigmoid(nn.Dense(self.width, name=f"{name}_later")(x) + x)
            return nn.LayerNorm(name="a_last")(x)

    x = jnp.ones((2, 3))
    narrow, wide = (linen(Deep(width), x) for width in (4, 6))
    maps = widen_maps(narrow.apply, narrow.shapes, wide.apply, wide.shapes, x)
    places = [reason.where for reason in maps.reasons]
    assert places[0].endswith("m_cause") and places[-1].endswith("a_last")
    assert str(maps.report).splitlines()[-len(places)].strip().startswith("not preserved: ")


def test_division_by_a_variance_without_epsilon_is_refused(linen, network):
    def apply(variables, x):
        h = x @ variables["kernel"]
        return h / jnp.sqrt(variables["var"][None]) @ variables["out"]

    def shapes(width):
        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
        return {"kernel": shape(3, width), "out": shape(width, 2), "var": shape(width)}

    maps = widen_maps(apply, shapes(2), apply, shapes(3), jnp.ones((1, 3)))
    (reason,) = maps.reasons
    assert "epsilon" in reason.remedy and reason.primitive == "dot_general"


def test_unknown_operation_is_refused_by_name_only_on_growing_operands():
    def apply(variables, x):
        return jnp.fft.fft(x).real @ variables["k"]

    def shapes(width):
        return {"k": jax.ShapeDtypeStruct((4, width), jnp.float32)}

    assert widen_maps(apply, shapes(2), apply, shapes(3), jnp.ones((1, 4))).preserved

    def growing(variables, x):
        return jnp.fft.fft(x @ variables["k"]).real

    (reason,) = widen_maps(growing, shapes(2), growing, shapes(3), jnp.ones((1, 4))).reasons
    assert reason.primitive == "fft" and "no rule for fft" in reason.problem and reason.leaf == "k"
    assert reason.source.startswith("test_refusals.py:")


def test_what_does_not_reach_the_output_is_not_refused():
    def apply(variables, x):
        h = x @ variables["k"]
        jnp.sort(h)
        return h

    def shapes(width):
        return {"k": jax.ShapeDtypeStruct((4, width), jnp.float32)}

    assert widen_maps(apply, shapes(2), apply, shapes(3), jnp.ones((1, 4))).preserved

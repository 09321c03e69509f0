"""`find_cuts`: which channels go with which, for each kind of operation; only shapes matter, nothing compiles."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pae_jax.errors import StructureError
from pae_jax.trees import flatten
from pae_jax.widening import find_cuts


def kernel(*shape, off=(), unread=()):
    """Ones; output channels `off` and input channels `unread` are 0."""
    weights = np.ones(shape, np.float32)
    weights[..., list(off)] = 0
    weights[..., list(unread), :] = 0
    return weights


def cut_shapes(apply, variables, shape, needed=None):
    inputs = [jax.ShapeDtypeStruct((rows, *shape), jnp.float32) for rows in (2, 3)]
    return {
        path: leaf.shape for path, leaf in flatten(find_cuts(apply, variables, inputs, needed).take(variables)).items()
    }


def convolve(x, weights, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, weights, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def relu(x):
    return jnp.maximum(x, 0)


def test_a_concatenation_passes_each_piece_its_own_channels():
    variables = {"a": kernel(2, 3), "b": kernel(2, 4), "out": kernel(7, 1, unread=(1, 3, 4))}
    found = cut_shapes(lambda v, x: jnp.concatenate([x @ v["a"], x @ v["b"]], -1) @ v["out"], variables, (2,))
    assert found == {"a": (2, 2), "b": (2, 2), "out": (4, 1)}


def test_a_piece_of_a_concatenation_that_nobody_reads_is_not_computed():
    variables = {"a": kernel(2, 3), "b": kernel(2, 4), "out": kernel(7, 1, unread=(0, 1, 2))}
    found = cut_shapes(lambda v, x: jnp.concatenate([x @ v["a"], x @ v["b"]], -1) @ v["out"], variables, (2,))
    assert found == {"a": (1, 1), "b": (2, 4), "out": (4, 1)}


def test_what_is_added_up_has_one_set_of_channels():
    variables = {"a": kernel(2, 4, off=(0, 1)), "b": kernel(2, 4, off=(1, 2)), "out": kernel(4, 1)}
    found = cut_shapes(lambda v, x: relu(x @ v["a"] + x @ v["b"]) @ v["out"], variables, (2,))
    assert found == {"a": (2, 3), "b": (2, 3), "out": (3, 1)}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_a_flatten_keeps_the_rows_of_the_channels_in_use_at_every_position(order):
    out = np.ones((2, 2, 3, 1), np.float32)
    out[:, :, 1] = 0
    rows = np.transpose(out, [i - 1 for i in order[1:]] + [3]).reshape(12, 1)
    variables = {"a": kernel(1, 1, 2, 3), "out": rows}
    apply = lambda v, x: jnp.transpose(convolve(x, v["a"]), order).reshape(x.shape[0], -1) @ v["out"]  # noqa: E731
    assert cut_shapes(apply, variables, (2, 2, 2)) == {"a": (1, 1, 2, 2), "out": (8, 1)}


def test_a_depthwise_convolution_keeps_a_filter_for_each_channel_and_multiple():
    variables = {"a": kernel(1, 1, 2, 3), "deep": kernel(3, 3, 1, 6), "out": kernel(1, 1, 6, 1, unread=(2, 3))}

    def apply(v, x):
        return convolve(convolve(convolve(x, v["a"]), v["deep"], 3), v["out"])

    assert cut_shapes(apply, variables, (4, 4, 2)) == {"a": (1, 1, 2, 2), "deep": (3, 3, 1, 4), "out": (1, 1, 4, 1)}


def test_groups_of_a_convolution_go_whole_or_not_at_all():
    grouped = kernel(1, 1, 2, 6)
    for unread, left in (((0, 1), 4), ((0, 2), 6)):
        variables = {"a": kernel(1, 1, 2, 6), "grouped": grouped, "out": kernel(1, 1, 6, 1, unread=unread)}

        def apply(v, x):
            return convolve(convolve(convolve(x, v["a"]), v["grouped"], 3), v["out"])

        found = cut_shapes(apply, variables, (4, 4, 2))
        assert found == {"a": (1, 1, 2, left), "grouped": (1, 1, 2, left), "out": (1, 1, left, 1)}


def test_a_gate_keeps_the_same_channels_of_both_halves():
    variables = {"a": kernel(2, 6), "out": kernel(3, 1, unread=(1,))}

    def apply(v, x):
        left, gate = jnp.split(x @ v["a"], 2, axis=-1)
        return (left * jax.nn.sigmoid(gate)) @ v["out"]

    assert cut_shapes(apply, variables, (2,)) == {"a": (2, 4), "out": (2, 1)}


def test_heads_of_an_attention_that_nobody_reads_are_cut():
    out = np.ones((3, 4, 2), np.float32)
    out[1] = 0
    variables = {name: np.ones((2, 3, 4), np.float32) for name in "qkv"} | {"out": out}

    def apply(v, x):
        q, k, values = (jnp.einsum("btc,chd->bthd", x, v[name]) for name in "qkv")
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0)
        return jnp.einsum("bhqk,bkhd,hdc->bqc", scores, values, v["out"])

    assert cut_shapes(apply, variables, (5, 2)) == {**dict.fromkeys("qkv", (2, 2, 4)), "out": (2, 4, 2)}


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(-1, keepdims=True),
        lambda x: x - x.max(-1, keepdims=True),
        lambda x: jax.nn.softmax(x),
        lambda x: jnp.sort(x, -1),
        lambda x: jnp.cumsum(x, -1),
        lambda x: jnp.abs(jnp.fft.fft(x)),
        lambda x: lax.fori_loop(0, 2, lambda i, y: jnp.tanh(y), x),
    ],
    ids=["mean", "maximum", "softmax", "sort", "cumulative sum", "no rule", "loop"],
)
def test_an_operation_that_reads_all_channels_keeps_them(mix):
    variables = {"a": kernel(2, 4, off=(1,)), "out": kernel(4, 1, unread=(3,))}
    assert cut_shapes(lambda v, x: mix(x @ v["a"]) @ v["out"], variables, (2,))["a"] == (2, 4)


def test_a_constant_that_is_zero_behind_a_norm_and_a_pooling_is_cut():
    variables = {
        "a": kernel(1, 1, 2, 4, off=(0, 1)),
        "mean": np.asarray([1, -1, 0, 0], np.float32),
        "var": np.ones(4, np.float32),
        "out": kernel(4, 1),
    }

    def apply(v, x):
        y = relu((convolve(x, v["a"]) - v["mean"].reshape(1, 1, 1, 4)) * lax.rsqrt(v["var"] + 1e-3).reshape(1, 1, 1, 4))
        return lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME").mean((1, 2)) @ v["out"]

    found = cut_shapes(apply, variables, (4, 4, 2))
    assert found == {"a": (1, 1, 2, 3), "mean": (3,), "var": (3,), "out": (3, 1)}  # -1 is 0 behind relu, 1 is not


def test_only_the_outputs_that_are_needed_are_computed():
    variables = {"a": kernel(2, 4)}
    needed = np.asarray([True, False, True, False])
    assert cut_shapes(lambda v, x: x @ v["a"], variables, (2,), needed) == {"a": (2, 2)}


def test_an_axis_that_changes_with_the_batch_is_not_cut():
    variables = {"a": kernel(2, 4), "out": kernel(4, 1, unread=(1,))}

    def apply(v, x):
        return ((x @ v["a"]).reshape(-1)[:, None] * jnp.ones((1, 1))).reshape(x.shape[0], 4) @ v["out"]

    assert cut_shapes(apply, variables, (2,)) == {"a": (2, 4), "out": (4, 1)}


def rows_of_a_table(v, x):
    return x + v["rows"][None, : x.shape[1]]


def last_rows_of_a_table(v, x):
    return x[:, -2:] + v["rows"][None, x.shape[1] - 2 : x.shape[1]]


def padded_to_a_fixed_length(v, x):
    return jnp.pad(x, ((0, 0), (0, 12 - x.shape[1]), (0, 0))).swapaxes(1, 2) @ v["rows"]


def joined_to_a_fixed_length(v, x):
    zeros = jnp.zeros((x.shape[0], 12 - x.shape[1], x.shape[2]))
    return jnp.concatenate([x, zeros], 1).swapaxes(1, 2) @ v["rows"]


def masked_beyond_the_length(v, x):
    return ((x.sum(1) @ v["rows"].T) * jnp.where(jnp.arange(12) < x.shape[1], 1.0, 0.0)[None]) @ jnp.ones((12, 2))


def masked_by_a_constant(v, x):
    mask = np.where(np.arange(12) < x.shape[1], np.float32(1), np.float32(0))
    return ((x.sum(1) @ v["rows"].T) * mask[None]) @ jnp.ones((12, 2))


def switched_on_by_the_length(v, x):
    return x.sum(1) @ v["rows"].T * jnp.floor(jnp.sqrt(jnp.float32(x.shape[1])) / 3)


@pytest.mark.parametrize(
    "apply",
    [
        switched_on_by_the_length,
        rows_of_a_table,
        last_rows_of_a_table,
        padded_to_a_fixed_length,
        joined_to_a_fixed_length,
        masked_beyond_the_length,
        masked_by_a_constant,
    ],
)
def test_what_only_longer_inputs_read_is_not_cut(apply):
    """Two analysed lengths, 3 and 5, read the first five of twelve rows; an input of nine reads more."""
    rows = np.arange(1, 37, dtype=np.float32).reshape(12, 3)
    inputs = [jax.ShapeDtypeStruct((2, length, 3), jnp.float32) for length in (3, 5)]
    cuts = find_cuts(apply, {"rows": rows}, inputs)
    small = cuts.take({"rows": rows})
    assert small["rows"].shape == (12, 3)
    x = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
    np.testing.assert_allclose(cuts.apply(small, x), apply({"rows": rows}, x), rtol=1e-6)


def test_channels_of_a_table_with_more_rows_than_the_inputs_are_cut():
    variables = {"rows": kernel(12, 4, off=(1,)), "a": kernel(2, 4, off=(1,)), "out": kernel(4, 1)}
    inputs = [jax.ShapeDtypeStruct((2, length, 2), jnp.float32) for length in (3, 5)]
    cuts = find_cuts(lambda v, x: relu(x @ v["a"] + v["rows"][None, : x.shape[1]]) @ v["out"], variables, inputs)
    assert jax.tree.map(jnp.shape, cuts.take(variables)) == {"rows": (12, 3), "a": (2, 3), "out": (3, 1)}


def test_sizes_that_were_not_analysed_are_refused_where_the_program_depends_on_them():
    rows = np.zeros((12, 3), np.float32)
    rows[:3] = 1
    cuts = find_cuts(rows_of_a_table, {"rows": rows}, [jax.ShapeDtypeStruct((2, 3, 3), jnp.float32)])
    with pytest.raises(StructureError, match=r"slimmed net.*Declare axes whose sizes change as free_axes"):
        jax.eval_shape(cuts.apply, cuts.take({"rows": rows}), jax.ShapeDtypeStruct((2, 9, 3), jnp.float32))


def test_sizes_that_are_symbols_run_with_the_plan_of_numbers():
    """With a symbol, the divisor of a mean and the square root are operations, with a number a literal."""
    variables = {"a": kernel(2, 4), "out": kernel(4, 1, unread=(1,))}
    apply = lambda v, x: relu(x @ v["a"]).mean(1) / jnp.sqrt(x.shape[1]) @ v["out"]  # noqa: E731
    cuts = find_cuts(apply, variables, [jax.ShapeDtypeStruct((n, n + 1, 2), jnp.float32) for n in (2, 4)])
    small = cuts.take(variables)
    assert small["a"].shape == (2, 3)
    shape = jax.export.symbolic_shape("batch, length, 2")
    program = jax.export.export(jax.jit(lambda x: cuts.apply(small, x)))(jax.ShapeDtypeStruct(shape, jnp.float32))
    x = np.random.default_rng(0).normal(size=(4, 7, 2)).astype(np.float32)
    np.testing.assert_allclose(program.call(x), apply(variables, x), rtol=1e-5)


def test_a_number_that_only_symbols_change_is_refused():
    variables = {"a": kernel(2, 4)}
    apply = lambda v, x: x.mean(1) @ v["a"]  # noqa: E731
    cuts = find_cuts(apply, variables, [jax.ShapeDtypeStruct((2, 3, 2), jnp.float32)])
    shape = jax.export.symbolic_shape("batch, length, 2")
    with pytest.raises(StructureError, match="slimmed net"):
        jax.eval_shape(cuts.apply, variables, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_a_program_of_another_structure_is_refused():
    variables = {"a": kernel(2, 4), "out": kernel(4, 1, unread=(1,))}
    apply = lambda v, x: (x @ v["a"] if x.shape[0] < 4 else jnp.tanh(x @ v["a"])) @ v["out"]  # noqa: E731
    cuts = find_cuts(apply, variables, [jax.ShapeDtypeStruct((2, 2), jnp.float32)])
    with pytest.raises(StructureError, match=r"slimmed net.*Use the whole network, or slim with a net whose sample"):
        jax.eval_shape(cuts.apply, cuts.take(variables), jax.ShapeDtypeStruct((5, 2), jnp.float32))

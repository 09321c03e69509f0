"""A server answers with the bits of `predict`, compiles nothing when tasks switch, and finds tasks by their scores."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import pae_jax as pae
from pae_jax import trees
from pae_jax.serving import all_tasks
from pae_jax.serving.server import Server

RESIDENT = ("weights", "masks")
SHARING = {
    "a": {"head": 2},
    "b": {"head": 3},
    "c": {"head": 2, "sharing": "first"},
    "d": {"head": 2, "sharing": "picked"},
    "e": {"head": 4, "sharing": "picked", "picking": pae.Picking(ternary=True)},
    "f": {"head": 3, "sharing": "first"},
}


def randomised(tree, draw):
    """Return float leaves drawn anew, positive for variances; as training would leave them, without training."""
    return jax.tree.map(lambda leaf: jnp.asarray(draw.uniform(0.5, 1.5, leaf.shape), leaf.dtype), tree)


@pytest.fixture(scope="module")
def grown(net, empty):
    """Tasks a, b at width 1 and c to f at width 1.5, with all sharing rules and heads of 2, 3 and 4 classes."""
    state = empty
    for name, options in SHARING.items():
        if name == "c":
            state = pae.expand(net, state, width=1.5, key=jax.random.key(9))
        state = pae.pack(net, state, name, key=jax.random.key(len(state.tasks)), **options)
        entry = state.tasks[name]
        draw = np.random.default_rng(entry.id)
        local = randomised(entry.local, draw)
        pick = jax.tree.map(lambda p: jnp.asarray(draw.normal(0, 0.01, p.shape), p.dtype), entry.pick)
        state = state.replace(tasks={**state.tasks, name: entry.replace(local=local, pick=pick)})
        state = pae.freeze(pae.prune(state, name, 0.4), name)
    picks = [jax.tree.leaves(state.tasks[name].pick) for name in "de"]
    assert all(
        len(np.unique(np.concatenate([leaf.ravel() for leaf in pick]))) == kinds
        for pick, kinds in zip(picks, (2, 3), strict=True)
    )
    return state


@pytest.fixture(scope="module", params=RESIDENT)
def server(request, net, grown):
    return Server(net, grown, resident=request.param)


def closely(found, expected):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, lambda x: np.asarray(x, np.float64)])
def test_a_server_gives_the_bits_of_predict_for_every_task_whatever_its_width_head_and_sharing(
    net, grown, server, data, assert_same, batch_size, kind
):
    x = kind(data[0])
    for name, entry in grown.tasks.items():
        expected = pae.predict(net, grown, name, x, batch_size=batch_size)
        assert_same(server.predict(name, x, batch_size=batch_size), expected)
        assert_same(server.predict(entry.id, x, batch_size=batch_size), expected)


@pytest.mark.parametrize("resident", RESIDENT)
def test_an_old_server_answers_with_the_same_bits_whatever_is_done_to_the_state_later(
    net, frozen, data, quick_fit, assert_same, resident
):
    server = Server(net, frozen, resident=resident)
    before = server.predict("a", data[0])
    state, _ = quick_fit(pae.pack(net, frozen, "b", head=2, key=jax.random.key(1)), "b")
    state = pae.freeze(pae.prune(state, "b", 0.5), "b")
    state = pae.expand(net, state, width=1.5, key=jax.random.key(2))
    assert_same(server.predict("a", data[0]), before)
    assert_same(Server(net, state, resident=resident).predict("a", data[0]), before)
    with pytest.raises(pae.UnknownTaskError, match="this server has: 'a'"):
        server.predict("b", data[0])


@pytest.mark.parametrize("resident", RESIDENT)
def test_switching_between_tasks_of_one_width_and_head_size_compiles_nothing(
    vector_module, quick_fit, data, compilations, resident
):
    net = pae.linen(vector_module, jnp.zeros((1, 4)))  # of its own, so that nothing is compiled yet
    state = pae.init(net, jax.random.key(0))
    for name in "abcd":
        state = pae.pack(net, state, name, head=2, key=jax.random.key(ord(name)))
        state = pae.freeze(pae.prune(state, name, 0.5), name)
    server = Server(net, state, resident=resident)
    with compilations() as first:
        server.predict("b", data[0])
    assert first.count > 0
    with compilations() as others:
        for name in "acdb":
            server.predict(name, data[0])
        server.predict_all(data[0])
        pae.predict(net, state, "c", data[0])
    assert others.count == 0


def test_resident_weights_take_one_copy_per_task_and_masks_one_per_width(net, third, grown):
    weights, owners = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (third.shared, third.owner))
    assert Server(net, third).nbytes == 2 * weights
    assert Server(net, third, resident="masks").nbytes == weights + owners
    assert Server(net, grown, resident="masks", tasks=["a", "b"]).nbytes == weights + owners


def test_inputs_of_several_parts_are_served_like_predict_does(assert_same):
    class Sum(nn.Module):
        width: float

        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(int(4 * self.width))(x["left"]) + nn.Dense(int(4 * self.width))(x["right"])

    net = pae.linen(Sum, {"left": jnp.zeros((1, 3)), "right": jnp.zeros((1, 2))})
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    server, state = Server(net, pae.freeze(state, "a")), pae.freeze(state, "a")
    draw = np.random.default_rng(0)
    x = {"left": draw.normal(size=(5, 3)).astype(np.float32), "right": draw.normal(size=(5, 2)).astype(np.float32)}
    for batch_size in (None, 2):
        expected = pae.predict(net, state, "a", x, batch_size=batch_size)
        assert_same(server.predict("a", x, batch_size=batch_size), expected)
    closely(server.predict_mixed(["a"] * 5, x), pae.predict(net, state, "a", x))
    with pytest.raises(pae.DataError, match="different numbers of examples"):
        server.predict("a", x | {"left": x["left"][:4]})


@pytest.mark.parametrize("batch_size", [None, 16])
def test_all_tasks_on_one_batch_come_in_order_of_learning_with_the_bits_of_predict(
    net, grown, server, data, assert_same, batch_size
):
    found = server.predict_all(data[0], batch_size=batch_size)
    assert list(found) == list("abcdef")
    for name, logits in found.items():
        assert_same(logits, pae.predict(net, grown, name, data[0], batch_size=batch_size))


@pytest.mark.parametrize("batch_size", [None, 16])
def test_all_tasks_in_one_program_agree_with_predict_up_to_summation_order(net, grown, server, data, batch_size):
    found = server.predict_all(data[0], together=True, batch_size=batch_size)
    assert list(found) == list("abcdef")
    for name, logits in found.items():
        closely(logits, pae.predict(net, grown, name, data[0], batch_size=batch_size))


def test_all_tasks_in_one_program_are_one_compilation_which_guessing_and_new_servers_share(
    net, grown, server, data, compilations
):
    x = data[0][:11]
    with compilations() as first:
        server.predict_all(x, together=True)
    with compilations() as again:
        server.infer_task(x)
        server.infer_task(x, by="entropy", per="batch")
        Server(net, grown, resident=server._resident).infer_task(x)
    assert first.count >= 1
    assert again.count == 0


@settings(max_examples=25, deadline=None)
@given(choice=st.lists(st.sampled_from("abcdef"), max_size=20), limit=st.sampled_from([None, 1, 3, 8]))
def test_every_example_of_a_mixed_batch_gets_the_logits_of_its_own_task_in_its_own_place(
    net, grown, server, data, choice, limit
):
    x = data[0][: len(choice)]
    found = server.predict_mixed(choice, x, batch_size=limit)
    assert [row.shape for row in found] == [(SHARING[name]["head"],) for name in choice]
    for row, name, one in zip(found, choice, x, strict=True):
        closely(row, pae.predict(net, grown, name, one[None])[0])


def test_a_mixed_batch_takes_names_or_ids(grown, server, data, assert_same):
    choice = list("baeddcab")
    ids = [grown.tasks[name].id for name in choice]
    expected = server.predict_mixed(choice, data[0][:8])
    for tasks in (np.asarray(choice), ids, np.asarray(ids), jnp.asarray(ids), tuple(choice)):
        assert_same(server.predict_mixed(tasks, data[0][:8]), expected)


class Two(nn.Module):
    """A head of two outputs, of which one is a number per example."""

    @nn.compact
    def __call__(self, features):
        return {"kind": nn.Dense(3)(features["deep"]), "size": nn.Dense(1)(features["deep"])[:, 0]}


class Parts(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"flat": x, "deep": nn.relu(nn.Dense(8)(x))}


@pytest.fixture(scope="module")
def of_trees():
    """Net, and two tasks, whose features and outputs are dicts."""
    net = pae.linen(lambda width: Parts(), jnp.zeros((1, 4)))
    state = pae.init(net, jax.random.key(0))
    for name in "ab":
        state = pae.pack(net, state, name, head=Two(), key=jax.random.key(len(state.tasks)), allow_empty=True)
        state = pae.freeze(pae.prune(state, name, 0.5), name)
    return net, state


@pytest.mark.parametrize("resident", RESIDENT)
def test_outputs_that_are_trees_are_served_together_and_in_mixed_batches(of_trees, data, resident):
    net, state = of_trees
    x, server = data[0][:3], Server(net, state, resident=resident)
    wanted = {name: pae.predict(net, state, name, x) for name in "ab"}
    jax.tree.map(closely, server.predict_all(x, together=True), wanted)
    mixed = server.predict_mixed(["a", "b", "a"], x)
    for row, name in enumerate("aba"):
        jax.tree.map(lambda found, whole, row=row: closely(found, whole[row]), mixed[row], wanted[name])


def test_neighbours_in_a_mixed_batch_have_no_influence_on_an_example(server, data, assert_same):
    choice, x = list("abacab"), data[0][:6]
    expected = server.predict_mixed(choice, x)
    spoilt = np.full_like(x, np.nan)
    spoilt[2] = x[2]
    assert_same(server.predict_mixed(choice, spoilt)[2], expected[2])
    order = [5, 4, 3, 2, 1, 0]
    turned = server.predict_mixed([choice[i] for i in order], x[order])
    assert_same([turned[order.index(i)] for i in range(6)], expected)


def test_mixed_batches_compile_for_powers_of_two_only(vector_module, data, compilations):
    net = pae.linen(vector_module, jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    server = Server(net, pae.freeze(state, "a"))
    for count in (1, 2, 4, 8):
        server.predict_mixed(["a"] * count, data[0][:count])
    with compilations() as found:
        for count in (3, 5, 6, 7):
            server.predict_mixed(["a"] * count, data[0][:count])
        server.predict_mixed(["a"] * 20, data[0][:20], batch_size=8)
    assert found.count == 0


class Coordinates(nn.Module):
    """One shared kernel, set to the identity by `known`, so that the features are the inputs."""

    width: float

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(int(4 * self.width), use_bias=False)(x)


def known(kernels, biases=None):
    """Return net and state of tasks "t0", "t1", ... that compute `x @ kernel + bias`."""
    net = pae.linen(Coordinates, jnp.zeros((1, 4)))
    state = pae.init(net, jax.random.key(0))
    for i, kernel in enumerate(kernels):
        name, kernel = f"t{i}", np.asarray(kernel, np.float32)
        state = pae.pack(net, state, name, head=kernel.shape[1], key=jax.random.key(i), allow_empty=True)
        bias = np.zeros(kernel.shape[1]) if biases is None else np.asarray(biases[i])
        head = {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias, jnp.float32)}}
        trees.require_match("head", head, state.tasks[name].head)
        entry = state.tasks[name].replace(head=head)
        shared = jax.tree.map(lambda w: jnp.eye(4), state.shared)
        state = pae.freeze(state.replace(shared=shared, tasks={**state.tasks, name: entry}), name)
    return net, state


FIRST_TWO = [[8, 0], [0, 8], [0, 0], [0, 0]]
LAST_TWO = [[0, 0], [0, 0], [8, 0], [0, 8]]


@pytest.mark.parametrize("resident", RESIDENT)
@pytest.mark.parametrize("by", ["confidence", "entropy"])
def test_the_task_whose_classes_an_input_shows_is_found(by, resident):
    net, state = known([FIRST_TWO, LAST_TWO])
    server = Server(net, state, resident=resident)
    found = server.infer_task(np.eye(4, dtype=np.float32)[[0, 2, 3, 1]], by=by)
    assert found.tasks == ["t0", "t1", "t1", "t0"]
    p = 1 / (1 + math.exp(-8))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    high, low = {"confidence": (p, 0.5), "entropy": (1 - entropy / math.log(2), 0.0)}[by]
    closely(found.scores, [[high, low], [low, high], [low, high], [high, low]])
    closely(found.logits["t1"], [[0, 0], [8, 0], [0, 8], [0, 0]])
    assert server.infer_task(np.zeros((0, 4), np.float32), by=by).tasks == []


@pytest.mark.parametrize("resident", RESIDENT)
def test_supsup_wortsman_et_al_2020_one_gradient_of_the_entropy_finds_the_task(resident):
    """-dH/da at equal shares, against differences; one example at a time and all together."""
    net, state = known([FIRST_TWO, LAST_TWO])
    server, x = Server(net, state, resident=resident), np.eye(4, dtype=np.float32)[[0, 2, 3, 1]]
    found = server.infer_task(x, by="gradient")
    assert (found.tasks, found.logits) == (["t0", "t1", "t1", "t0"], {})

    def entropy(shares):
        heads = [np.asarray(state.tasks[name].head["params"]["kernel"], np.float64) for name in ("t0", "t1")]
        logits = (sum(shares) * x) @ sum(a * head for a, head in zip(shares, heads, strict=True))
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return -(p * np.log(p)).sum(axis=1)

    steps = 1e-4 * np.eye(2)
    slopes = [(entropy(0.5 + step) - entropy(0.5 - step)) / 2e-4 for step in steps]
    np.testing.assert_allclose(found.scores, -np.stack(slopes, axis=1), rtol=1e-2, atol=1e-3)
    together = server.infer_task(x[:1], by="gradient", per="batch")
    np.testing.assert_allclose(together.scores, found.scores[:1], rtol=1e-4)
    assert server.task_inference_accuracy({"t0": x[[0, 3]], "t1": x[1:3]}, by="gradient")["accuracy"] == 1.0


def test_a_gradient_needs_tasks_of_one_kind_of_head():
    net, state = known([FIRST_TWO, [[0, 0, 1]] * 4])
    with pytest.raises(pae.ArgumentError, match=r"one kind of head; \['t1'\] differ from 't0'"):
        Server(net, state).infer_task(np.eye(4, dtype=np.float32), by="gradient")


class Scaled(nn.Module):
    """A Linen head with a setting that no array shows."""

    scale: float

    @nn.compact
    def __call__(self, x):
        return self.scale * nn.Dense(2)(x)


class NnxScaled(nnx.Module):
    """The same head in NNX."""

    def __init__(self, scale):
        self.scale, self.dense = scale, nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.scale * self.dense(x)


@pytest.mark.parametrize("kind", [Scaled, NnxScaled, nn.Dense])
def test_a_gradient_needs_heads_made_with_the_same_settings_not_of_the_same_class_alone(kind):
    net, state = known([FIRST_TWO])
    for name, setting in (("b", 3), ("c", 3), ("d", 4)):
        head = kind(setting)
        state = pae.pack(net, state, name, head=head, key=jax.random.key(1), allow_empty=True)
        state = pae.freeze(state, name)
    x = np.eye(4, dtype=np.float32)
    assert Server(net, state, tasks=list("bc")).infer_task(x, by="gradient").scores.shape == (4, 2)
    with pytest.raises(pae.ArgumentError, match=r"\['d'\] differ from 'b'"):
        Server(net, state, tasks=list("bcd")).infer_task(x, by="gradient")


def test_entropy_is_divided_by_the_log_of_the_number_of_classes_and_confidence_is_not():
    never = -np.inf
    net, state = known([np.zeros((4, 2)), np.zeros((4, 4))], [[0, 0], [0, 0, never, never]])
    server, x = Server(net, state), np.zeros((1, 4), np.float32)
    closely(server.infer_task(x, by="entropy").scores, [[0.0, 0.5]])
    closely(server.infer_task(x, by="confidence").scores, [[0.5, 0.5]])
    assert server.infer_task(x, by="entropy").tasks == ["t1"]
    assert server.infer_task(x, by="confidence").tasks == ["t0"]  # the first of equals


def test_a_batch_is_given_to_one_task_by_the_mean_of_the_scores():
    net, state = known([FIRST_TWO, LAST_TWO])
    server = Server(net, state)
    x = np.eye(4, dtype=np.float32)[[0, 2, 3]]
    for batch_size in (None, 2):  # filling up the last piece must not count
        found = server.infer_task(x, per="batch", batch_size=batch_size)
        assert found.tasks == ["t1"]
        closely(found.scores, server.infer_task(x).scores.mean(axis=0, keepdims=True))


def test_a_score_that_is_nan_is_never_the_largest():
    scores = np.asarray([[np.nan, 0.2, 0.1], [0.3, np.nan, 0.4]])
    assert all_tasks.surest(scores).tolist() == [1, 2]


def test_the_accuracy_of_guessing_tasks_is_the_share_of_right_decisions():
    net, state = known([FIRST_TWO, LAST_TWO])
    server = Server(net, state)
    eye = np.eye(4, dtype=np.float32)
    data = {"t0": eye[[0, 1, 2, 0]], "t1": eye[[2, 3, 2, 3, 2, 0]]}
    found = server.task_inference_accuracy(data)
    assert found["count"] == 10
    assert found["accuracy"] == pytest.approx(8 / 10)
    assert found["per_task"] == pytest.approx({"t0": 3 / 4, "t1": 5 / 6})
    groups = server.task_inference_accuracy(data, by="entropy", group=4, batch_size=3)
    assert groups["count"] == 3  # 4 of t0; 4 and 2 of t1, the last two of which are undecided and go to t0
    assert groups["per_task"] == pytest.approx({"t0": 1.0, "t1": 0.5})


def test_outputs_with_further_axes_are_scored_by_their_mean():
    class Steps(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6)(x).reshape(-1, 3, 2)

    net = pae.linen(Coordinates, jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=Steps(), key=jax.random.key(1))
    server, x = Server(net, pae.freeze(state, "a")), np.eye(4, dtype=np.float32)
    found = server.infer_task(x)
    expected = jax.nn.softmax(found.logits["a"], axis=-1).max(axis=-1).mean(axis=1)
    closely(found.scores[:, 0], expected)
    assert server.predict_mixed(["a"] * 4, x)[3].shape == (3, 2)


def test_a_task_that_is_not_frozen_is_refused(net, packed, third, data):
    for state, tasks in ((packed, None), (third, ["a", "c"])):
        with pytest.raises(pae.PhaseError, match=r"not frozen.*pae\.freeze"):
            Server(net, state, tasks=tasks)
    server = Server(net, third)
    assert server.tasks == ("a", "b")
    assert server.ids == (1, 2)
    for task in ("c", 3):
        with pytest.raises(pae.PhaseError, match="not frozen in the state this server was made from"):
            server.predict(task, data[0])
    with pytest.raises(pae.PhaseError):
        server.predict_mixed(["a", "c"], data[0][:2])
    with pytest.raises(pae.PhaseError):
        server.task_inference_accuracy({"c": data[0]})


def test_a_choice_of_tasks_is_served_and_the_others_are_unknown(net, third, data, assert_same):
    server = Server(net, third, tasks={"b"})
    assert server.tasks == ("b",)
    assert repr(server) == f"Server('b'; weights, {server.nbytes:,} bytes)"
    assert_same(server.predict("b", data[0]), pae.predict(net, third, "b", data[0]))
    for task in ("a", 1, 99, None, True, ["b"]):
        with pytest.raises(pae.UnknownTaskError, match="this server has: 'b'"):
            server.predict(task, data[0])


def test_what_cannot_be_served_says_why(net, empty, third, data, edit_leaf):
    server, x = Server(net, third), data[0]
    with pytest.raises(pae.ArgumentError, match="resident must be one of"):
        Server(net, third, resident="disk")
    with pytest.raises(pae.ArgumentError, match="at least one frozen task"):
        Server(net, empty)
    with pytest.raises(pae.ArgumentError, match="collection of names"):
        Server(net, third, tasks="a")
    with pytest.raises(pae.UnknownTaskError, match="'x'"):
        Server(net, third, tasks=["x"])
    with pytest.raises(pae.StructureError, match="Was the state made with this net"):
        Server(pae.linen(pae.models.MLP, jnp.zeros((1, 4))), third)
    with pytest.raises(pae.StructureError, match="owner"):
        Server(net, third.replace(owner=edit_leaf(third.owner, "Dense_0/kernel", lambda o: o + 7)))
    for call in (lambda x: server.predict("a", x), server.predict_all, server.infer_task):
        with pytest.raises(pae.StructureError, match="input"):
            call(x[:, :3])
        with pytest.raises(pae.StructureError, match="input"):
            call(x.astype(np.int32))
    with pytest.raises(pae.ArgumentError, match="batch_size must be an integer of at least 1, found 0"):
        server.predict("a", x, batch_size=0)
    with pytest.raises(pae.DataError, match="tasks names 2 tasks and x has 40 examples"):
        server.predict_mixed(["a", "b"], x)
    with pytest.raises(pae.ArgumentError, match="one name or id per example"):
        server.predict_mixed("a", x[:1])
    for wrong, found in ((None, "None"), ({"a", "b"}, "a value of type set"), ({"a": 0}, "a value of type dict")):
        with pytest.raises(pae.ArgumentError, match=f"one name or id per example, found {found}"):
            server.predict_mixed(wrong, x[: len(wrong or "1")])
    with pytest.raises(pae.ArgumentError, match="leave batch_size out inside jit"):
        jax.jit(lambda x: server.predict("a", x, batch_size=1))(x)
    assert len(server.predict_mixed((name for name in ["a"] * len(x)), x)) == len(x)


def test_a_guess_that_makes_no_sense_says_why(net, frozen, third, data):
    server, x = Server(net, third), data[0]
    with pytest.raises(pae.ArgumentError, match="by must be one of"):
        server.infer_task(x, by="luck")
    with pytest.raises(pae.ArgumentError, match="per must be one of"):
        server.infer_task(x, per="epoch")
    with pytest.raises(pae.DataError, match="no examples"):
        server.infer_task(x[:0], per="batch")
    with pytest.raises(pae.ArgumentError, match="group"):
        server.task_inference_accuracy({"a": x}, group=0)
    with pytest.raises(pae.DataError, match="at least 1 example"):
        server.task_inference_accuracy({"a": x, "b": x[:0]})
    with pytest.raises(pae.DataError, match="no task"):
        server.task_inference_accuracy({})
    state = pae.freeze(pae.pack(net, frozen, "size", head=1, key=jax.random.key(0)), "size")
    with pytest.raises(pae.ArgumentError, match=r"heads of \['size'\] have no array of 2 or more outputs"):
        Server(net, state).infer_task(x)
    assert Server(net, state, tasks=["a"]).infer_task(x[:1]).tasks == ["a"]

"""Data in every form a user may bring, and what is refused with a clear error before anything is trained."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn

import pae_jax as pae
from pae_jax.training.batches import feed, form, pad
from pae_jax.trees import flatten

SGD = optax.sgd(0.1)


def epoch_of(net, data, epoch=0, key=None, batch_size=8):
    return list(feed(data, form(net, 1.0, 2, True), batch_size).epoch(epoch, key))


def fresh(net, head=2):
    """One task, "a", packed and not trained."""
    return pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=head, key=jax.random.key(1))


def test_arrays_in_order_give_every_example_once_and_the_rest_as_a_smaller_batch(net, data):
    batches = epoch_of(net, data, batch_size=15)
    assert [len(y) for _, y in batches] == [15, 15, 10]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), data[0])
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), data[1])


def test_arrays_shuffled_give_full_batches_no_example_twice_and_another_order_every_epoch(net, data):
    numbered = (np.arange(160, dtype=np.float32).reshape(40, 4), data[1])
    orders = []
    for epoch in range(3):
        batches = epoch_of(net, numbered, epoch, jax.random.key(0), batch_size=15)
        assert [len(y) for _, y in batches] == [15, 15]
        rows = np.concatenate([x[:, 0] for x, _ in batches]) // 4
        assert len(set(rows)) == 30
        np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), data[1][rows.astype(int)])
        orders.append(tuple(rows))
    assert len(set(orders)) == 3
    again = epoch_of(net, numbered, 1, jax.random.key(0), batch_size=15)
    assert tuple(np.concatenate([x[:, 0] for x, _ in again]) // 4) == orders[1]
    other = epoch_of(net, numbered, 1, jax.random.key(1), batch_size=15)
    assert tuple(np.concatenate([x[:, 0] for x, _ in other]) // 4) != orders[1]


def test_over_the_epochs_every_example_is_seen_although_the_rest_of_an_epoch_is_left_out(net, data):
    numbered = (np.arange(160, dtype=np.float32).reshape(40, 4), data[1])
    seen = {
        row for epoch in range(8) for x, _ in epoch_of(net, numbered, epoch, jax.random.key(0), 15) for row in x[:, 0]
    }
    assert len(seen) == 40


def test_padding_repeats_the_first_example_with_weight_zero():
    x, y, weight = pad(({"a": np.arange(6).reshape(3, 2)}, np.array([5, 6, 7])), 5)
    np.testing.assert_array_equal(x["a"][:, 0], [0, 2, 4, 0, 0])
    np.testing.assert_array_equal(y, [5, 6, 7, 5, 5])
    np.testing.assert_array_equal(weight, [1, 1, 1, 0, 0])
    x, y, weight = pad((np.ones((4, 1)), np.zeros(4)), 3)
    assert len(x) == len(y) == len(weight) == 4
    assert weight.all()


class GrainLike:
    """What a Grain dataset is to us: sized, and a new iterator each time."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]

    def __iter__(self):
        return iter(self.batches)


def test_all_forms_of_the_same_batches_train_the_same_bits(packed, quick_fit, data, assert_same):
    x, y = data
    pairs = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]
    dicts = [{"image": a, "label": b, "name": ["unused"] * 8} for a, b in pairs]
    epochs = []

    def factory(epoch):
        epochs.append(epoch)
        return iter(pairs)

    wanted, _ = quick_fit(packed, "a", pairs)
    forms = {
        "list of dicts": dicts,
        "list of lists": [list(pair) for pair in pairs],
        "tuple": tuple(pairs),
        "Grain-like": GrainLike(dicts),
        "factory": factory,
        "factory that yields": lambda epoch: (pair for pair in pairs),
        "JAX arrays": [(jnp.asarray(a), jnp.asarray(b)) for a, b in pairs],
        "python lists as labels": [(a, b.tolist()) for a, b in pairs],
        "float64": [(a.astype(np.float64), b.astype(np.int64)) for a, b in pairs],
    }
    for brought in forms.values():
        found, _ = quick_fit(packed, "a", brought)
        assert_same(found.shared, wanted.shared)
    assert epochs == [0, 1]


def test_arrays_may_be_a_dict_or_jax_arrays(packed, quick_fit, data, assert_same):
    wanted, _ = quick_fit(packed, "a", data)
    for brought in (
        {"image": data[0], "label": data[1]},
        (jnp.asarray(data[0]), jnp.asarray(data[1])),
        (data[0], data[1].tolist()),
    ):
        found, _ = quick_fit(packed, "a", brought)
        assert_same(found.shared, wanted.shared)


def test_an_iterator_is_refused_because_it_can_be_read_only_once(net, packed, quick_fit, data):
    generator = (pair for pair in [data])
    with pytest.raises(pae.DataError, match=r"iterator, which can be read only once. Pass a factory"):
        quick_fit(packed, "a", generator)
    with pytest.raises(pae.DataError, match="iterator, which can be read only once"):
        pae.evaluate(net, packed, "a", iter([data]))
    assert next(generator) is data  # nothing was read


X, Y = np.ones((6, 4), np.float32), np.array([0, 1, 0, 1, 0, 1])


def spoiled(value, dtype=np.float32):
    x = X.astype(dtype)
    x[3, 2] = value
    return x


BAD_DATA = {
    "label too large": ((X, Y + 1), "data: labels lie in 1..2, but the head has 2 outputs, so 0..1 is valid"),
    "label negative": ((X, Y - 1), r"labels lie in -1..0, but the head has 2 outputs"),
    "labels of another rank": ((X, Y[:, None]), r"labels have shape \(6, 1\), expected \(batch,\)"),
    "one-hot labels": ((X, np.eye(2, dtype=int)[Y]), r"labels have shape \(6, 2\), expected \(batch,\)"),
    "float labels": (
        (X, Y.astype(np.float32)),
        "labels must be integers for the default loss, found float32; pass loss=",
    ),
    "text labels": ((X, np.array(list("ababab"))), "data: y is an array of dtype <U1; convert it to numbers"),
    "scalar label": ((X, np.int64(0)), "data: y must have a leading batch axis, found a scalar"),
    "empty": ((X[:0], Y[:0]), "data: no examples; at least 1 is needed"),
    "fewer labels": ((X, Y[:5]), "data: x has 6 examples and y has 5; they must be equal"),
    "more labels": ((X[:1], Y), "data: x has 1 examples and y has 6"),
    "NaN": ((spoiled(np.nan), Y), "data: x holds NaN or infinity, first in example 3; remove or repair"),
    "infinity": ((spoiled(-np.inf), Y), "data: x holds NaN or infinity, first in example 3"),
    "NaN in float64": ((spoiled(np.nan, np.float64), Y), "first in example 3"),
    "NaN in bfloat16": ((spoiled(np.nan, ml_dtypes.bfloat16), Y), "first in example 3"),
    "too large for float32": ((spoiled(1e300, np.float64), Y), r"has values in .*1e\+300, but float32 holds"),
    "NaN in a JAX array": ((jnp.asarray(spoiled(np.nan)), Y), "first in example 3"),
    "dict without label": ({"image": X}, r"a dict needs 'image' and 'label', found \['image'\]"),
    "dict of other names": ({"x": X, "y": Y}, r"a dict needs 'image' and 'label', found \['x', 'y'\]"),
    "no data": (None, r"data must be \(x, y\) arrays, a factory of batches or an iterable, found NoneType"),
    "a number": (3, "data must be .* found int"),
    "text": ("faces", "data must be .* found str"),
    "one array": (X, "batch 0 of epoch 0"),
    "no batches": ([], "data gave no batch in epoch 0"),
    "factory without batches": (lambda epoch: iter([]), "data gave no batch in epoch 0"),
    "batch of three": (
        [(X, Y, Y)],
        "batch 0 of epoch 0: the default loss takes one array of class numbers .*, found labels tuple of 2",
    ),
    "batch of four": (
        [(X, Y, Y, Y)],
        r"batch 0 of epoch 0: expected \(x, y\) or a dict with 'image' and 'label', found tuple of 4",
    ),
    "no labels": (
        (X, None),
        "data: the default loss takes one array of class numbers and one of logits, found labels None",
    ),
    "dict of labels": ((X, {"class": Y}), "data: the default loss takes one array of class numbers"),
    "dict with two labels": ({"image": X, "label": Y, "labels": Y}, "a dict needs 'image' and 'label', found"),
    "NaN in a later batch": (
        [(X, Y), (spoiled(np.nan), Y)],
        "batch 1 of epoch 0: x holds NaN or infinity, first in example 3",
    ),
    "label in a later batch": ([(X, Y), (X, Y), (X, Y * 3)], "batch 2 of epoch 0: labels lie in 0..3"),
    "weights": ({"image": X, "label": Y, "weight": Y}, r"data: 'weight' would not be used.*'label': \(y, weight\)"),
    "factory of nothing": (lambda epoch: None, "data gave None in epoch 0, expected an iterable of batches"),
    "empty batch": ([(X, Y), (X[:0], Y[:0])], "batch 1 of epoch 0: no examples"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_with_its_place_and_what_to_do(net, packed, quick_fit, name, state_facts):
    data, message = BAD_DATA[name]
    before = state_facts(packed)
    with pytest.raises(pae.DataError, match=message):
        quick_fit(packed, "a", data)
    with pytest.raises(pae.DataError, match=message):
        pae.evaluate(net, packed, "a", data)
    if data is not None:
        with pytest.raises(pae.DataError, match=message):
            quick_fit(packed, "a", (X, Y), val=data)
    assert state_facts(packed) == before


def test_bad_arrays_are_refused_before_the_first_step(packed, quick_fit, traces):
    x = np.ones((1000, 4), np.float32)
    x[-1, 0] = np.nan
    with pytest.raises(pae.DataError, match="first in example 999"):
        quick_fit(packed, "a", (x, np.zeros(1000, int)), loss=lambda logits, y: jnp.zeros(len(y)) * logits[:, 0])
    assert traces == []


def squared(logits, y):
    return (logits[:, 0] - y) ** 2


def masked(logits, y):
    """Cross-entropy where labels outside the classes are left out, as segmentation and language models have it."""
    known = (y >= 0) & (y < 2)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, y, 0))
    return losses * known


def test_targets_of_an_own_loss_must_be_finite_and_as_many_as_the_inputs_and_nothing_else(net, packed, quick_fit):
    with pytest.raises(pae.DataError, match="data: y holds NaN or infinity, first in example 2"):
        quick_fit(packed, "a", (X, np.array([0, 0, np.nan, 0, 0, 0], np.float32)), loss=squared)
    with pytest.raises(pae.DataError, match="data: x has 6 examples and y weight has 5; they must be equal"):
        quick_fit(packed, "a", (X, {"value": Y, "weight": Y[:5]}), loss=squared)
    with pytest.raises(pae.DataError, match="data: y weight holds NaN or infinity, first in example 3"):
        quick_fit(packed, "a", (X, {"value": Y, "weight": spoiled(np.inf)}), loss=squared)
    with pytest.raises(pae.DataError, match=r"labels lie in 0..5, but the head has 2 outputs"):
        quick_fit(packed, "a", (X, np.arange(6)))
    quick_fit(packed, "a", (X, np.arange(6)), loss=squared)
    for ignored, dtype in ((-100, np.int64), (255, np.uint8)):
        labels = np.where(Y == 1, ignored, 0).astype(dtype)
        found, history = quick_fit(packed, "a", (X, labels), val=(X, labels), loss=masked)
        assert "accuracy" not in history.rows[0] and "val_accuracy" not in history.rows[0]
        zeros = pae.evaluate(net, found, "a", (X[Y == 0], labels[Y == 0]), loss=masked)["loss"]
        assert history.rows[-1]["val_loss"] == pytest.approx(zeros / 2, rel=1e-5)


class EveryStep(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x, train):
        return nn.tanh(nn.Dense(5)(x))


def test_the_shape_expected_of_labels_is_written_as_a_shape(data):
    net = pae.linen(EveryStep, jnp.zeros((1, 7, 4)))
    x = np.zeros((40, 7, 4), np.float32)
    with pytest.raises(pae.DataError, match=r"labels have shape \(40,\), expected \(batch, 7\)"):
        feed((x, data[1]), form(net, 1.0, 3, True), 8)


def test_a_bad_batch_in_the_middle_of_training_leaves_the_callers_state_as_it_was(packed, quick_fit, state_facts):
    before = state_facts(packed)
    with pytest.raises(pae.DataError, match="batch 1 of epoch 0"):
        quick_fit(packed, "a", [(X, Y), (X, Y + 5)])
    assert state_facts(packed) == before
    assert not any(leaf.is_deleted() for leaf in flatten(packed.shared).values())


# x, y and outputs are any trees


def weighted(logits, y, weight):
    return weight * optax.softmax_cross_entropy_with_integer_labels(logits, y)


def test_a_third_part_goes_to_a_loss_of_three_arguments(net, packed, quick_fit, data, assert_same):
    x, y = data
    weight = np.linspace(0.0, 2.0, 40).astype(np.float32)

    def by_dict(logits, y):
        return weighted(logits, y["class"], y["weight"])

    def by_pair(logits, pair):
        return weighted(logits, *pair)

    wanted, history = quick_fit(packed, "a", (x, {"class": y, "weight": weight}), loss=by_dict)
    batches = [(x[i : i + 8], y[i : i + 8], weight[i : i + 8]) for i in range(0, 40, 8)]
    for train, loss in (((x, y, weight), weighted), ((x, (y, weight)), weighted), ((x, (y, weight)), by_pair)):
        found, other = quick_fit(packed, "a", train, loss=loss)
        assert_same(found.shared, wanted.shared)
        assert other.rows == history.rows
    streamed, _ = quick_fit(packed, "a", batches, loss=weighted, val=(x, y, weight))
    unweighted, _ = quick_fit(packed, "a", [batch[:2] for batch in batches])
    assert (np.asarray(jax.tree.leaves(streamed.shared)[0]) != np.asarray(jax.tree.leaves(unweighted.shared)[0])).any()
    scores = pae.evaluate(net, streamed, "a", (x, y, weight), loss=weighted)
    logits = pae.predict(net, streamed, "a", x)
    assert scores == {"loss": pytest.approx(float(weighted(logits, y, weight).mean()), rel=1e-5), "count": 40}


def test_a_dict_may_name_its_inputs_and_its_labels_otherwise(net, packed, quick_fit, data, assert_same):
    x, y = data
    wanted, history = quick_fit(packed, "a", (x, y))
    for train in ({"tokens": x, "labels": y}, {"features": x, "label": y}, {"image": x, "labels": y, "other": y}):
        found, other = quick_fit(packed, "a", train)
        assert_same(found.shared, wanted.shared)
        assert other.rows == history.rows
    assert pae.evaluate(net, wanted, "a", [{"tokens": x, "labels": y}]) == pae.evaluate(net, wanted, "a", data)


class Masked(nn.Module):
    """Mean of the embeddings of the tokens that a mask leaves; the length is free."""

    width: float

    @nn.compact
    def __call__(self, batch, train):
        x = nn.Embed(7, 6)(batch["ids"]) * batch["mask"][..., None]
        return nn.tanh(nn.Dense(5)(x.sum(1) / batch["mask"].sum(1)[:, None]))


def sentences(length, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 7, (8, length))
    mask = (np.arange(length)[None] < rng.integers(1, length + 1, (8, 1))).astype(np.float32)
    return {"ids": ids, "mask": mask}, ids[:, 0] % 2


def test_a_dict_of_the_samples_names_holds_the_inputs_and_what_else_it_holds_is_left_out(quick_fit, assert_same):
    x, y = sentences(4)
    net = pae.linen(Masked, x)
    state = fresh(net)
    wanted, _ = quick_fit(state, "a", (x, y), net=net)
    found, _ = quick_fit(state, "a", {**x, "labels": y, "text": ["unused"] * 8}, net=net)
    assert_same(found.shared, wanted.shared)
    with pytest.raises(pae.DataError, match=r"inputs by their names, found \['ids', 'labels', 'text'\]"):
        quick_fit(state, "a", {"ids": x["ids"], "text": ["unused"] * 8, "labels": y}, net=net)


def test_free_axes_may_vary_from_batch_to_batch_and_others_may_not(quick_fit):
    batches = [sentences(length, seed) for seed, length in enumerate((4, 6, 4, 6))]
    net = pae.linen(Masked, batches[0][0], free_axes=(1,))
    state, history = quick_fit(fresh(net), "a", batches, net=net, val=batches, epochs=1)
    assert pae.evaluate(net, state, "a", batches)["count"] == 32
    assert history.rows[0]["val_loss"] == pytest.approx(pae.evaluate(net, state, "a", batches)["loss"])
    assert pae.predict(net, state, "a", sentences(9)[0]).shape == (8, 2)
    with pytest.raises(pae.StructureError, match=r"leaf 'ids': found int64\[8,4,1\], expected int32\[batch,any\]"):
        quick_fit(state, "a", ({**batches[0][0], "ids": batches[0][0]["ids"][..., None]}, batches[0][1]), net=net)
    fixed = pae.linen(Masked, batches[0][0])
    with pytest.raises(pae.StructureError, match=r"leaf 'ids': found int64\[8,6\], expected int32\[batch,4\]"):
        quick_fit(fresh(fixed), "a", batches, net=fixed)


def test_an_own_loss_needs_no_labels(net, packed, quick_fit, data):
    def large(logits, y):
        assert y is None
        return -logits.sum(-1)

    state, history = quick_fit(packed, "a", (data[0], None), loss=large, val=(data[0], None))
    quick_fit(packed, "a", [(data[0], None)] * 2, loss=large)
    assert list(history.rows[0]) == ["epoch", "loss", "val_loss"]
    before, after = (float(pae.predict(net, s, "a", data[0]).sum()) for s in (packed, state))
    assert after > before
    assert pae.evaluate(net, state, "a", (data[0], None), loss=large) == {
        "loss": pytest.approx(-after / 40, rel=1e-5),
        "count": 40,
    }


class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, features):
        return {"class": nn.Dense(2)(features), "value": nn.Dense(1)(features)[:, 0]}


def test_outputs_and_labels_of_several_arrays(net, quick_fit, data):
    x, y = data
    target = {"class": y, "value": x[:, 0]}

    def loss(out, y):
        return optax.softmax_cross_entropy_with_integer_labels(out["class"], y["class"]) + optax.l2_loss(
            out["value"], y["value"]
        )

    metrics = {
        "right": lambda out, y: out["class"].argmax(-1) == y["class"],
        "off": lambda out, y: jnp.abs(out["value"] - y["value"]),
    }
    options = {"loss": loss, "metrics": metrics}
    state, history = quick_fit(fresh(net, TwoHeads()), "a", (x, target), val=(x, target), **options)
    names = ["epoch", "loss", "off", "right", "val_loss", "val_off", "val_right"]
    assert list(history.rows[0]) == names
    out = pae.predict(net, state, "a", x)
    assert {name: leaf.shape for name, leaf in out.items()} == {"class": (40, 2), "value": (40,)}
    scores = pae.evaluate(net, state, "a", (x, target), batch_size=7, **options)
    assert scores["right"] == pytest.approx(float((out["class"].argmax(-1) == y).mean()))
    assert scores["off"] == pytest.approx(float(jnp.abs(out["value"] - x[:, 0]).mean()), rel=1e-5)
    assert scores["loss"] == pytest.approx(float(loss(out, target).mean()), rel=1e-5)
    with pytest.raises(pae.DataError, match=r"found labels int32\[40\] and outputs \{class: .*\}; pass loss="):
        quick_fit(fresh(net, TwoHeads()), "a", data)


def test_lists_of_arrays_are_stacked(net, packed, second, quick_fit, data, assert_same):
    x, y = data
    wanted, _ = quick_fit(packed, "a", data)
    for train in ((list(x), list(y)), (x.tolist(), y.tolist()), {"image": list(x), "label": y.tolist()}):
        assert_same(quick_fit(packed, "a", train)[0].shared, wanted.shared)
    assert pae.evaluate(net, second, "b", (list(x), list(y))) == pae.evaluate(net, second, "b", data)


def test_an_error_is_one_short_line_however_much_data_there_is(net, packed, quick_fit):
    images = [np.zeros((3, 5), np.float32) for _ in range(400)]
    ragged = [np.zeros(4 + i % 2, np.float32) for i in range(400)]
    labels = np.zeros(400, int)
    for x in (images, ragged, tuple(images), {"left": images, "right": images}, [{"image": x} for x in images]):
        for call in (
            lambda: quick_fit(packed, "a", (x, labels)),
            lambda: quick_fit(packed, "a", [(x, labels)]),
            lambda: pae.evaluate(net, packed, "a", (x, labels)),
            lambda: pae.predict(net, packed, "a", x),
        ):
            with pytest.raises(pae.PaeError) as caught:
                call()
            assert len(str(caught.value)) < 600
            assert "\n" not in str(caught.value)


def test_a_ragged_list_of_labels_is_refused_too(packed, quick_fit):
    labels = [np.zeros(1 + i % 2, int) for i in range(6)]
    for train in ((X, labels), [(X, labels)], {"image": X, "label": labels}):
        with pytest.raises(pae.PaeError) as caught:
            quick_fit(packed, "a", train)
        assert len(str(caught.value)) < 600


def test_labels_of_foreign_byte_order_are_those_numbers(net, packed, second, quick_fit, data, assert_same):
    x, y = data
    foreign = (x.astype(">f4"), y.astype(">i4"))
    assert pae.evaluate(net, second, "b", foreign) == pae.evaluate(net, second, "b", data)
    found, history = quick_fit(packed, "a", foreign, val=foreign)
    wanted, other = quick_fit(packed, "a", data, val=data)
    assert_same(found.shared, wanted.shared)
    assert history.rows == other.rows


# an augmentation of inputs and labels


def mixed(key, x, y):
    """Mixup (Zhang et al., 2018): examples and their one-hot labels are averaged with those of others."""
    share, order = jax.random.beta(key, 0.4, 0.4), jax.random.permutation(key, len(x))
    one_hot = jax.nn.one_hot(y, 2)
    return share * x + (1 - share) * x[order], share * one_hot + (1 - share) * one_hot[order]


def test_an_augmentation_may_change_the_labels_too(net, packed, quick_fit, data, assert_same):
    x, y = data

    def flipped(key, x, y):
        return -x, 1 - y

    found, _ = quick_fit(packed, "a", data, augment=flipped)
    wanted, _ = quick_fit(packed, "a", (-x, 1 - y))
    for path, leaf in flatten(wanted.shared).items():  # two programs, so up to rounding
        np.testing.assert_allclose(flatten(found.shared)[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    one, history = quick_fit(packed, "a", data, augment=mixed, loss=optax.softmax_cross_entropy)
    two, _ = quick_fit(packed, "a", data, augment=mixed, loss=optax.softmax_cross_entropy)
    assert_same(one.shared, two.shared)
    assert list(history.rows[0]) == ["epoch", "loss"]


def test_an_augmentation_may_make_inputs_of_another_dtype_and_shape_but_they_must_fit_the_network(quick_fit, data):
    net = pae.linen(EveryStep, jnp.zeros((1, 2, 2)))
    x = np.random.default_rng(0).integers(0, 256, (24, 3, 2)).astype(np.uint8)
    y = np.zeros((24, 2), int)
    cropped = lambda key, x: x[:, :2].astype(jnp.float32) / 255  # noqa: E731
    quick_fit(fresh(net), "a", (x, y), net=net, augment=cropped)
    with pytest.raises(pae.StructureError, match=r"found uint8\[24,2,2\]"):
        quick_fit(fresh(net), "a", (x, y), net=net, augment=lambda key, x: x[:, :2])
    with pytest.raises(pae.StructureError, match=r"found float32\[24,3,2\], expected float32\[batch,2,2\]"):
        quick_fit(fresh(net), "a", (x, y), net=net, augment=lambda key, x: x.astype(jnp.float32))


def test_an_augmentation_returns_inputs_and_labels_and_draws_by_its_key(packed, quick_fit, data):
    with pytest.raises(pae.ArgumentError, match=r"augment \(key, x, y\) must return \(x, y\), found float32\[40,4\]"):
        quick_fit(packed, "a", data, augment=lambda key, x, y: x)
    for wrong in (lambda key, x: np.asarray(x) + 1.0, lambda key, x: x[:, :3] + x, lambda key, x: x[x[:, 0] > 0]):
        with pytest.raises(
            pae.DataError, match=r"^data: augment fails on x float32\[40,4\] and y int32\[40\]: .*numpy"
        ):
            quick_fit(packed, "a", data, augment=wrong)
    noise = np.random.default_rng(0)
    with pytest.raises(pae.ArgumentError, match="augment is another program each time it is traced"):
        quick_fit(packed, "a", data, augment=lambda key, x: x + noise.normal(size=x.shape).astype(np.float32))


def test_inputs_beyond_the_range_of_a_narrower_dtype_are_refused(data):
    net = pae.linen(pae.models.MLP, jnp.zeros((1, 4), jnp.float16))
    x, state = data[0], fresh(net)
    pae.predict(net, state, "a", np.full((2, 4), np.inf, np.float32))
    for given in (x * 1e5, jnp.asarray(x * 1e5)):
        with pytest.raises(pae.DataError, match=r"has values in .*, but float16 holds -65504\.0\.\.65504\.0"):
            pae.predict(net, state, "a", given)


@pytest.fixture(scope="module")
def wide_net():
    return pae.linen(lambda width: pae.models.MLP(width, (64,)), np.zeros((1, 256), np.float32))


@pytest.fixture(scope="module")
def wide_data():
    x = np.random.default_rng(0).normal(size=(6, 512, 256)).astype(np.float32)
    return x, (x[:, :, 0] > 0).astype(np.int32)


def aligned(shape):
    """A float32 array at an address that JAX takes without a copy."""
    memory = np.empty(4 * int(np.prod(shape)) + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + 4 * int(np.prod(shape))].view(np.float32).reshape(shape)


def test_a_source_may_write_each_batch_into_the_same_array(wide_net, wide_data, bits):
    state, buffer = fresh(wide_net), aligned((512, 256))

    def reused(epoch):
        for x, y in zip(*wide_data, strict=True):
            buffer[:] = x
            yield buffer, y

    def trained(data):
        return bits(pae.fit(wide_net, state, "a", data, optimizer=SGD, epochs=1, key=jax.random.key(2))[0])

    assert trained(reused) == trained(lambda epoch: zip(*wide_data, strict=True))


def test_inputs_may_be_overwritten_once_predict_has_returned(wide_net, wide_data, bits):
    state, buffer = fresh(wide_net), aligned((512, 256))
    wanted = bits(pae.predict(wide_net, state, "a", wide_data[0][0]))
    for _ in range(5):
        buffer[:] = wide_data[0][0]
        found = pae.predict(wide_net, state, "a", buffer)
        buffer[:] = wide_data[0][1]
        assert bits(found) == wanted


def test_a_loss_of_ones_own_gets_bool_labels_as_they_are(net, data):
    state, x = fresh(net, head=1), data[0]
    target, valid = x[:, 0], np.arange(len(x)) < 20
    masked = np.where(valid, target, 1000).astype(np.float32)

    def loss(out, y):
        return jnp.where(~y[1], 0.0, (out[:, 0] - y[0]) ** 2)

    out = np.asarray(pae.predict(net, state, "a", x))[:, 0]
    wanted = ((out - target)[valid] ** 2).sum() / len(x)
    found = pae.evaluate(net, state, "a", (x, (masked, valid)), loss=loss)
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)


def test_masked_arrays_and_labels_that_are_no_numbers_are_refused(net, data):
    state, (x, y) = fresh(net), data
    for batch in ((np.ma.masked_invalid(x), y), (x, np.ma.masked_equal(y, 1))):
        with pytest.raises(pae.DataError, match="masked array"):
            pae.evaluate(net, state, "a", batch)
    with pytest.raises(pae.DataError, match="masked array"):
        pae.predict(net, state, "a", np.ma.masked_invalid(x))
    for labels in (y.astype(str), y.astype(object)):
        with pytest.raises(pae.DataError, match="convert it to numbers"):
            pae.evaluate(net, state, "a", (x, labels), loss=lambda out, y: out[:, 0])


def test_integers_that_the_samples_dtype_does_not_hold_are_refused():
    net = pae.linen(lambda width: pae.models.MLP(width, (4,)), np.zeros((1, 4), np.uint8))
    state = fresh(net)
    small = pae.predict(net, state, "a", np.full((2, 4), 7, np.uint8))
    np.testing.assert_array_equal(pae.predict(net, state, "a", np.full((2, 4), 7, np.int64)), small)
    for wrong in (np.full((2, 4), 263, np.uint16), np.full((2, 4), -1)):
        with pytest.raises(pae.DataError, match=r"but uint8 holds 0\.\.255"):
            pae.predict(net, state, "a", wrong)
        with pytest.raises(pae.DataError, match=r"but uint8 holds 0\.\.255"):
            pae.evaluate(net, state, "a", (wrong, np.zeros(2, int)))


def test_inputs_may_be_a_list_if_the_sample_is_one():
    class Both(nn.Module):
        width: float

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(jnp.concatenate(x, axis=-1))

    net = pae.linen(Both, [np.zeros((1, 4), np.float32), np.zeros((1, 2), np.float32)])
    x = [np.ones((8, 4), np.float32), np.ones((8, 2), np.float32)]
    assert pae.evaluate(net, fresh(net), "a", (x, np.zeros(8, int)))["count"] == 8


def test_tensors_of_another_library_are_read_as_arrays(net, data):
    class Tensor:
        """As PyTorch's: its dtype means nothing to NumPy."""

        dtype = object()

        def __init__(self, values):
            self.values, self.shape = values, values.shape

        def __len__(self):
            return len(self.values)

        def __array__(self, dtype=None, copy=None):
            return self.values

    state, (x, y) = fresh(net), data
    np.testing.assert_array_equal(pae.predict(net, state, "a", Tensor(x)), pae.predict(net, state, "a", x))
    assert pae.evaluate(net, state, "a", [(Tensor(x), Tensor(y))]) == pae.evaluate(net, state, "a", [(x, y)])

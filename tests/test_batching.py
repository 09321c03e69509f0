"""Data in every form a user may bring, and what is refused with a clear error before anything is trained."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.batching import feed, pad
from pae_jax.trees import flatten

LOGITS = jax.ShapeDtypeStruct((1, 2), jnp.float32)


def epoch_of(net, data, epoch=0, key=None, batch_size=8):
    return list(feed(net, data, LOGITS, batch_size, True).epoch(epoch, key))


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
    for name, form in forms.items():
        found, _ = quick_fit(packed, "a", form)
        assert_same(found.shared, wanted.shared), name
    assert epochs == [0, 1]


def test_arrays_may_be_a_dict_or_jax_arrays(packed, quick_fit, data, assert_same):
    wanted, _ = quick_fit(packed, "a", data)
    for form in (
        {"image": data[0], "label": data[1]},
        (jnp.asarray(data[0]), jnp.asarray(data[1])),
        (data[0], data[1].tolist()),
    ):
        found, _ = quick_fit(packed, "a", form)
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
    "text labels": ((X, np.array(list("ababab"))), "labels must be integers"),
    "scalar label": ((X, np.int64(0)), r"expected \(x, y\) or a dict"),
    "empty": ((X[:0], Y[:0]), "data: no examples; at least 1 is needed"),
    "fewer labels": ((X, Y[:5]), "data: x has 6 examples and y has 5; they must be equal"),
    "more labels": ((X[:1], Y), "data: x has 1 examples and y has 6"),
    "NaN": ((spoiled(np.nan), Y), "data: x holds NaN or infinity, first in example 3; remove or repair"),
    "infinity": ((spoiled(-np.inf), Y), "data: x holds NaN or infinity, first in example 3"),
    "NaN in float64": ((spoiled(np.nan, np.float64), Y), "first in example 3"),
    "NaN in bfloat16": ((spoiled(np.nan, ml_dtypes.bfloat16), Y), "first in example 3"),
    "too large for float32": ((spoiled(1e300, np.float64), Y), "first in example 3"),
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
        r"batch 0 of epoch 0: expected \(x, y\) or a dict with 'image' and 'label', found tuple",
    ),
    "NaN in a later batch": (
        [(X, Y), (spoiled(np.nan), Y)],
        "batch 1 of epoch 0: x holds NaN or infinity, first in example 3",
    ),
    "label in a later batch": ([(X, Y), (X, Y), (X, Y * 3)], "batch 2 of epoch 0: labels lie in 0..3"),
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


def test_bad_targets_of_a_custom_loss_are_refused_too(net, packed, quick_fit):
    def loss(logits, y):
        return (logits[:, 0] - y) ** 2

    with pytest.raises(pae.DataError, match="data: y holds NaN or infinity, first in example 2"):
        quick_fit(packed, "a", (X, np.array([0, 0, np.nan, 0, 0, 0], np.float32)), loss=loss)
    with pytest.raises(pae.DataError, match=r"labels lie in 0..5"):
        quick_fit(packed, "a", (X, np.arange(6)), loss=loss)


def test_the_shape_expected_of_labels_is_written_as_a_shape(net, data):
    logits = jax.ShapeDtypeStruct((1, 7, 3), jnp.float32)
    with pytest.raises(pae.DataError, match=r"labels have shape \(40,\), expected \(batch, 7\)"):
        feed(net, data, logits, 8, True)


def test_a_bad_batch_in_the_middle_of_training_leaves_the_callers_state_as_it_was(packed, quick_fit, state_facts):
    before = state_facts(packed)
    with pytest.raises(pae.DataError, match="batch 1 of epoch 0"):
        quick_fit(packed, "a", [(X, Y), (X, Y + 5)])
    assert state_facts(packed) == before
    assert not any(leaf.is_deleted() for leaf in flatten(packed.shared).values())

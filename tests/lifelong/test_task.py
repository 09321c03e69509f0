"""Tasks and metrics: what is measured, and when a value is good enough."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pae_jax as pae
from pae_jax.lifelong.task import CheckedTask

LOWER = pae.Metric("error", lambda net, state, task, data: 0.25, higher_is_better=False)


@pytest.fixture
def checked(net):
    """Return a task "a" of two classes with the data given, checked."""

    def check(train=None, **options):
        return CheckedTask.of(net, pae.Task("a", 2, train, **options), 1.0, 8)

    return check


def distance(logits, y):
    return jnp.abs(logits[:, 0] - y)


@pytest.mark.parametrize("loss", [None, distance])
def test_without_a_measure_the_metric_is_the_accuracy_whatever_the_loss(net, frozen, data, checked, loss):
    x, y = data
    halves = (x[:13], y[:13]), (x[13:], y[13:])
    task = checked(data, val=halves[0], test=[halves[1]], loss=loss)
    for part, examples in (("train", data), ("val", halves[0]), ("test", halves[1])):
        assert task.measured(frozen, part) == pae.evaluate(net, frozen, "a", examples)["accuracy"]


def test_a_measure_gets_what_it_needs_and_its_value_becomes_a_float(net, frozen, data, checked):
    seen = []

    def measure(*arguments):
        seen.append(arguments)
        return np.float32(0.25)

    value = checked(val=data, metric=pae.Metric("mine", measure)).measured(frozen, "val")
    assert type(value) is float
    assert value == 0.25
    assert seen == [(net, frozen, "a", data)]
    assert seen[0][-1] is data


@pytest.mark.parametrize("value", [0.25, np.float32(0.25), np.array([0.25]), jnp.asarray(0.25), True, 1])
def test_a_measure_may_return_a_number_of_any_kind(frozen, data, checked, value):
    assert checked(val=data, metric=pae.Metric("mine", lambda *_: value)).measured(frozen, "val") == value


@pytest.mark.parametrize("value", [None, np.zeros(3), [0.1, 0.2], "0.5", {}, [[1], [2, 3]]])
def test_a_measure_that_returns_no_number_is_refused_by_the_name_of_its_task(frozen, data, checked, value):
    with pytest.raises(pae.ArgumentError, match="metric 'mine' of task 'a' must return one number, found "):
        checked(val=data, metric=pae.Metric("mine", lambda *_: value)).measured(frozen, "val")


def test_the_name_of_a_metric_is_no_metric():
    with pytest.raises(pae.ArgumentError, match="metric must be of type Metric for task 'a'"):
        pae.Task("a", 2, None, metric="f1")


def test_labels_without_an_accuracy_need_a_metric(frozen, data, checked):
    """Arrays are looked at before anything is learned, batches when they are measured."""
    ages = (data[0], data[1].astype(np.float32))
    task = checked(val=ages, loss=distance)
    with pytest.raises(pae.ArgumentError, match="'a' has labels without an accuracy"):
        task.check_accuracy(task.val, 1.0)
    for val in (ages, [ages], lambda epoch: iter([ages])):
        with pytest.raises(pae.DataError, match=r"metric 'accuracy' fails.*labels without an accuracy"):
            checked(val=val, loss=distance).measured(frozen, "val")
    own = pae.Metric("distance", pae.MeanOf(distance), higher_is_better=False)
    assert checked(val=[ages], loss=distance, metric=own).measured(frozen, "val") > 0


def test_data_is_checked_once_and_every_part_of_it(frozen, data, checked):
    x, y = data
    for part in ("train", "val", "test"):
        with pytest.raises(pae.DataError, match=r"labels lie in 0\.\.2"):
            checked(**{part: (x, y + (y == y.max()))})
    given = checked(data, val=data)
    assert given.test is None
    assert given.train.steps == 5
    assert given.val.arrays[0] is given.train.arrays[0] is x


def test_an_accuracy_of_which_less_is_better_is_refused():
    with pytest.raises(pae.ArgumentError, match="more is better"):
        pae.Metric(higher_is_better=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pae.Metric("m", lambda out, y: 1.0), r"\(net, state, task, data\) -> float.*goes into pae\.MeanOf"),
        (lambda: pae.Metric("m", 3), "found a value of type int"),
        (lambda: pae.Metric(None, lambda *_: 1.0), "name of a metric"),
        (lambda: pae.Metric("m", lambda *_: 1.0, higher_is_better=None), "higher_is_better must be True or False"),
        (lambda: pae.MeanOf(3), r"\(outputs, y\) -> array"),
        (lambda: pae.MeanOf(lambda net, state, task: 1.0), r"\(outputs, y\) -> array"),
    ],
)
def test_a_metric_that_cannot_be_called_is_refused_where_it_is_made(make, words):
    with pytest.raises(pae.ArgumentError, match=words):
        make()


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_the_tolerance_is_exact_to_rounding(numbers):
    """Of n examples, k below the goal reach it with a tolerance of k/n, and not with half an example less."""
    n, hits, k = numbers
    goal, value = min(hits + k, n) / n, (min(hits + k, n) - k) / n
    assert pae.Metric().reaches(value, goal, k / n)
    if k:
        assert not pae.Metric().reaches(value, goal, (k - 0.5) / n)
    assert LOWER.reaches(goal, value, k / n)
    assert LOWER.reaches(value, goal, 0.0)
    if k:
        assert not LOWER.reaches(goal, value, 0.0)


def test_nan_is_the_worst_value_whichever_way_is_better():
    for metric in (pae.Metric(), LOWER):
        assert metric.score(math.nan) == -math.inf
        assert not metric.reaches(math.nan, 0.0, 1e9)
    assert LOWER.score(0.5) == -0.5


# MeanOf


def by_hand(net, state, data):
    return float(np.mean(np.abs(np.asarray(pae.predict(net, state, "a", data[0]))[:, 0] - data[1])))


@pytest.mark.parametrize("form", ["arrays", "dict", "batches", "factory"])
def test_mean_of_is_the_mean_over_all_examples_of_data_in_any_form(net, frozen, data, form):
    x, y = data
    batches = [(x[:7], y[:7]), (x[7:33], y[7:33]), (x[33:], y[33:])]
    forms = {
        "arrays": data,
        "dict": {"image": x, "label": y},
        "batches": batches,
        "factory": lambda epoch: iter(batches),
    }
    found = pae.MeanOf(distance)(net, frozen, "a", forms[form])
    assert found == pytest.approx(by_hand(net, frozen, data), rel=1e-6)


def test_mean_of_takes_more_examples_than_a_batch_and_labels_that_are_no_classes(net, frozen):
    rng = np.random.default_rng(0)
    x, ages = rng.normal(size=(600, 4)).astype(np.float32), rng.uniform(0, 90, 600).astype(np.float32)
    found = pae.MeanOf(distance)(net, frozen, "a", (x, ages))
    assert found == pytest.approx(by_hand(net, frozen, (x, ages)), rel=1e-6)


@pytest.mark.parametrize("values", [lambda logits, y: (logits - y[:, None]) ** 2, lambda logits, y: jnp.mean(logits)])
def test_mean_of_refuses_values_that_are_not_one_per_example(net, frozen, data, values):
    with pytest.raises(pae.ArgumentError, match=r"shape \(40,\); found shape"):
        pae.MeanOf(values)(net, frozen, "a", data)


def test_mean_of_refuses_values_that_mix_examples_unless_the_loss_is_of_the_batch(net, frozen, data, checked):
    """The outputs minus the labels of all examples, averaged, are one number per example as well."""

    def mixed(logits, y):
        return jnp.abs(logits[:, :1] - y[None]).mean(axis=1)

    mean = pae.MeanOf(mixed)
    metric = pae.Metric("mixed", mean)
    for val in (data, [data]):
        task = checked(val=val, metric=metric)
        with pytest.raises(pae.DataError, match=r"mixes examples: .* for instance out\[:, 0\]"):
            task.check_objective(1.0, 8)
            task.measured(frozen, "val")
        with pytest.raises(pae.DataError, match=r"MeanOf\(values\) mixes examples"):
            mean(net, frozen, "a", val)
        task = checked(val=val, metric=metric, loss=lambda out, y: out[:, 0] - y, loss_per="batch")
        task.check_objective(1.0, 8)
        by_hand = np.abs(np.asarray(pae.predict(net, frozen, "a", data[0]))[:, :1] - data[1][None]).mean()
        assert task.measured(frozen, "val") == pytest.approx(by_hand, rel=1e-6)


# Task


def test_a_head_may_be_a_number_of_numpy_such_as_one_more_than_the_largest_label(net, data):
    checked = CheckedTask.of(net, pae.Task("a", data[1].max() + 1, data, data), 1.0, 8)
    assert (checked.task.head, type(checked.task.head)) == (2, int)
    checked.check_objective(1.0, 8)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_task_needs_a_name(name, data):
    with pytest.raises(pae.ArgumentError, match="non-empty string"):
        pae.Task(name, 2, data)


LABELS = {
    "classes": (np.zeros(4, np.int32), True),
    "bools": (np.zeros(4, bool), True),
    "a list": ([0, 1, 1, 0], True),
    "ages": (np.zeros(4, np.float32), False),
    "one per pixel": (np.zeros((4, 5), np.int32), False),
}


@pytest.mark.parametrize("labels", LABELS)
def test_whether_labels_have_an_accuracy_is_known_before_anything_is_learned(checked, labels):
    y, has = LABELS[labels]
    x = np.zeros((4, 4), np.float32)

    def flat(logits, y):
        return 0.0 * logits[:, 0]

    for data in ((x, y), {"image": x, "label": y}):
        task = checked(data, val=data, loss=flat)
        for part in (task.train, task.val):
            if has:
                task.check_accuracy(part, 1.0)
            else:
                with pytest.raises(pae.ArgumentError, match="labels without an accuracy"):
                    task.check_accuracy(part, 1.0)
                checked(data, loss=flat, metric=LOWER).check_accuracy(part, 1.0)
    batches = checked([(x, y)], loss=flat)
    batches.check_accuracy(batches.train, 1.0)  # batches are not looked into
    batches.check_accuracy(batches.val, 1.0)  # there is none


def test_an_accuracy_is_refused_where_labels_are_no_class_of_the_outputs(data, checked):
    """Such as -1 for examples that the loss leaves out, or a head of one output for two classes."""
    x, y = data
    for labels in (np.where(y == 1, -1, y), y + 1):
        task = checked(val=(x, labels), loss=distance)
        with pytest.raises(pae.ArgumentError, match=r"task 'a' has labels in .* and 2 outputs"):
            task.check_accuracy(task.val, 1.0)
        checked(val=(x, labels), loss=distance, metric=LOWER).check_accuracy(task.val, 1.0)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_loss_or_a_measure_that_does_not_fit_is_refused_by_task_and_part(data, checked, part):
    def mixes(logits, y):
        return (logits[:, :1] - y[None]) ** 2

    given = {"metric": LOWER, part: data}
    with pytest.raises(pae.DataError, match=f"^task 'a', {part}: the loss mixes examples"):
        checked(**given, loss=mixes).check_objective(1.0, 8)
    checked(**given, loss=distance).check_objective(1.0, 8)
    if part != "train":
        wrong = pae.Metric("m", pae.MeanOf(lambda logits, y: logits))
        with pytest.raises(pae.ArgumentError, match=r"shape \(40,\); found shape \(40, 2\)"):
            checked(**given | {"metric": wrong}).check_objective(1.0, 8)


def test_errors_of_data_name_task_and_part(data, checked):
    x, y = data
    with pytest.raises(pae.DataError, match=r"^task 'a', val: data: labels lie in"):
        checked(data, val=(x, y + 5))
    with pytest.raises(pae.StructureError, match=r"^task 'a', test: input: found") as error:
        checked(data, test=(x[:, :2], y))
    assert error.value.tree == "input"
    batches = checked([(x, y), (x, y + 5)])
    with pytest.raises(pae.DataError, match=r"^task 'a', train: batch 1 of epoch 0: labels lie in"):
        list(batches.train.epoch(0, None))


def test_what_a_loss_is_of_has_two_names(data):
    assert pae.Task("a", 2, data).loss_per == "example"
    with pytest.raises(pae.ArgumentError, match="loss_per must be one of 'example', 'batch'"):
        pae.Task("a", 2, data, loss_per="epoch")

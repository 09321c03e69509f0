"""AccuracyMatrix against cases computed by hand."""

import math

import numpy as np
import pytest

from pae_jax import ArgumentError, UnknownTaskError
from pae_jax.lifelong.metrics import AccuracyMatrix

NAN = math.nan
R = np.array([[0.90, 0.30, 0.20], [0.80, 0.70, 0.40], [0.95, 0.60, 0.50]])


def matrix(values=R):
    return AccuracyMatrix("abc"[: len(values)], values)


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert matrix().average_accuracy() == pytest.approx((0.95 + 0.60 + 0.50) / 3)


def test_learning_accuracy_is_the_mean_of_the_diagonal():
    assert matrix().learning_accuracy() == pytest.approx((0.90 + 0.70 + 0.50) / 3)


def test_backward_transfer_compares_the_last_row_with_the_diagonal_but_for_the_last_task():
    assert matrix().backward_transfer() == pytest.approx(((0.95 - 0.90) + (0.60 - 0.70)) / 2)


def test_forgetting_is_the_best_of_the_earlier_rows_minus_the_last_and_may_be_negative():
    """Task a improved in the last row (-0.05); the best before the last row counts, above the diagonal too."""
    assert matrix().forgetting() == pytest.approx(((0.90 - 0.95) + (0.70 - 0.60)) / 2)
    assert matrix([[0.5, 0.0], [0.8, 0.7]]).forgetting() == pytest.approx(-0.3)
    assert matrix([[0.5, 0.9, 0.1], [0.6, 0.7, 0.1], [0.6, 0.8, 0.9]]).forgetting() == pytest.approx((0.0 + 0.1) / 2)


def test_forgetting_takes_the_best_of_what_was_measured():
    lower = np.array([[0.9, NAN, NAN], [NAN, 0.7, NAN], [0.8, 0.75, 0.5]])
    assert matrix(lower).forgetting() == pytest.approx((0.1 - 0.05) / 2)


def test_forward_transfer_needs_accuracies_before_learning_and_at_random():
    random = {"a": 0.1, "b": 0.1, "c": 0.2}
    assert matrix().forward_transfer(random) == pytest.approx(((0.30 - 0.1) + (0.40 - 0.2)) / 2)
    assert math.isnan(matrix().forward_transfer())
    isolated = np.where(np.tri(3, dtype=bool), R, NAN)
    assert math.isnan(matrix(isolated).forward_transfer(random))


def test_forward_transfer_and_intransigence_name_a_task_that_is_missing():
    with pytest.raises(ArgumentError, match=r"random_init lacks \['c'\]"):
        matrix().forward_transfer({"b": 0.1})
    with pytest.raises(ArgumentError, match=r"single_task lacks \['b', 'c'\]"):
        matrix().intransigence({"a": 0.9})


def test_forward_transfer_does_not_need_the_first_task():
    assert matrix().forward_transfer({"b": 0.1, "c": 0.2}) == pytest.approx(0.2)


def test_intransigence_is_the_gap_to_the_tasks_own_networks():
    assert matrix().intransigence({"a": 1.0, "b": 0.9, "c": 0.5}) == pytest.approx((0.1 + 0.2 + 0.0) / 3)
    assert matrix().intransigence({"a": 0.8, "b": 0.7, "c": 0.5}) == pytest.approx(-0.1 / 3)


def test_accuracies_to_compare_with_lie_in_zero_to_one_too():
    """90 for 0.90 is the common mistake."""
    with pytest.raises(ArgumentError, match=r"\[0, 1\], found 90"):
        matrix().intransigence({"a": 90, "b": 0.9, "c": 0.5})
    with pytest.raises(ArgumentError, match=r"\[0, 1\], found 10"):
        matrix().forward_transfer({"a": 0.1, "b": 10, "c": 0.5})


def test_metrics_of_one_task_are_its_accuracy_or_undefined():
    one = AccuracyMatrix(["a"], [[0.75]])
    assert one.average_accuracy() == one.learning_accuracy() == 0.75
    assert all(math.isnan(v) for v in (one.backward_transfer(), one.forgetting(), one.forward_transfer({"a": 0.5})))


def test_what_was_not_measured_is_nan_and_makes_the_metric_nan_never_zero():
    empty = AccuracyMatrix(["a", "b"])
    assert np.isnan(empty.values).all()
    metrics = (empty.average_accuracy(), empty.learning_accuracy(), empty.backward_transfer(), empty.forgetting())
    assert all(math.isnan(v) for v in metrics)
    empty.record(after="b", on="b", accuracy=0.5)
    assert math.isnan(empty.average_accuracy())


def test_record_enters_row_after_and_column_on():
    m = AccuracyMatrix(["a", "b"])
    m.record(after="b", on="a", accuracy=0.25)
    m.record("a", "a", np.float32(1.0))
    np.testing.assert_array_equal(m.values, [[1.0, NAN], [0.25, NAN]])


def test_nothing_given_to_the_matrix_or_taken_from_it_is_shared_with_it():
    """Mammoth's forgetting overwrites the caller's lists."""
    values, names = R.copy(), ["a", "b", "c"]
    m = AccuracyMatrix(names, values)
    for _ in range(2):
        results = (
            m.average_accuracy(),
            m.backward_transfer(),
            m.forgetting(),
            m.forward_transfer({"b": 0, "c": 0}),
            str(m),
        )
    assert results == (
        m.average_accuracy(),
        m.backward_transfer(),
        m.forgetting(),
        m.forward_transfer({"b": 0, "c": 0}),
        str(m),
    )
    m.record(after="a", on="a", accuracy=0.0)
    m.values[1, 1] = 0.0
    names.append("d")
    np.testing.assert_array_equal(values, R)
    assert m.values[1, 1] == 0.70
    assert m.tasks == ("a", "b", "c")


@pytest.mark.parametrize("accuracy", [-0.01, 1.01, 97, math.inf])
def test_an_accuracy_outside_zero_to_one_is_refused_and_nothing_is_entered(accuracy):
    m = AccuracyMatrix(["a"])
    with pytest.raises(ArgumentError, match=r"accuracies lie in \[0, 1\], found"):
        m.record(after="a", on="a", accuracy=accuracy)
    assert np.isnan(m.values).all()
    with pytest.raises(ArgumentError, match=r"accuracies lie in \[0, 1\], found"):
        AccuracyMatrix(["a"], [[accuracy]])


def test_what_is_no_number_or_no_dict_of_them_is_refused():
    m = AccuracyMatrix(["a", "b"])
    for wrong in ("high", [0.5, [0.5]], [0.5, 0.6], {}):
        with pytest.raises(ArgumentError, match=r"accuracy must (be numbers of|have) shape \(\), found"):
            m.record(after="a", on="a", accuracy=wrong)
    assert np.isnan(m.values).all()
    with pytest.raises(ArgumentError, match=r"values must be numbers of shape \(2, 2\), found a value of type list"):
        AccuracyMatrix(["a", "b"], [["x", 0.0], [0.0, 0.0]])
    for call in (m.intransigence, m.forward_transfer):
        with pytest.raises(ArgumentError, match=r"must be a dict {task: accuracy}, found a value of type float"):
            call(0.5)


def test_names_that_are_none_twice_or_unknown_are_refused():
    for names in ([], ["a", "a"]):
        with pytest.raises(ArgumentError, match="tasks must be distinct names, at least one"):
            AccuracyMatrix(names)
    with pytest.raises(UnknownTaskError, match="unknown task 'z'"):
        matrix().record(after="a", on="z", accuracy=0.5)
    with pytest.raises(ArgumentError, match=r"values must have shape \(2, 2\), found \(3, 3\)"):
        AccuracyMatrix(["a", "b"], R)


def test_the_text_and_the_picture_show_every_measured_cell():
    m = matrix(np.where(np.tri(3, dtype=bool), R, NAN))
    text = str(m)
    assert len(text.splitlines()) == 4
    assert all(f"{v:.3f}" in text for v in R[np.tri(3, dtype=bool)])
    assert text.count(" .") == 3
    figure = m.plot()
    shown = {t.get_text() for t in figure.axes[0].texts}
    assert shown == {f"{v:.2f}" for v in R[np.tri(3, dtype=bool)]}

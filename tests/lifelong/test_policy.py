"""The decisions of the lifelong loop, as functions of numbers."""

import dataclasses
import itertools
import json
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pae_jax as pae
from pae_jax.lifelong import policy
from pae_jax.lifelong.policy import Goal, StageRecord, Status
from pae_jax.lifelong.recipes import Expansion, Ladder, Phase, Rate

PHASE = Phase(2, Rate(0.01))
TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CPG = (*TENTHS, 0.95)
ACCURACY = pae.Metric()
ERROR = pae.Metric("error", lambda net, state, task, data: 0.0, higher_is_better=False)


def ladder(rungs=TENTHS, **options):
    return Ladder(rungs, PHASE, **options)


def records(*values):
    return [StageRecord("a", f"stage {i}", 1.0, i / 10, v, None, i, i, 10, 0) for i, v in enumerate(values)]


def climb(width, expansion):
    """All widths that a task which always misses its goal goes through."""
    widths = [width]
    while (following := policy.wider(widths[-1], expansion)) is not None:
        widths.append(following)
        assert len(widths) < 5000
    return widths


def ratios(widths):
    return [width**2 for width in widths]


# Growth


@pytest.mark.parametrize(
    ("step", "maximum", "expected"),
    [
        (0.2, 1.2, [1, 1.2]),
        (0.5, 1.5, [1, 1.5]),
        (0.5, 2.0, [1, 1.5, 2.0]),
        (0.1, 1.3, [1, 1.1, 1.2, 1.3]),
        (0.2, 1.6, [1, 1.2, 1.4, 1.6]),
        (0.5, 1.7, [1, 1.5, 1.7]),
        (3.0, 1.7, [1, 1.7]),
        (0.5, 1.0, [1]),
    ],
)
def test_the_size_ratio_grows_by_the_step_up_to_the_maximum(step, maximum, expected):
    assert ratios(climb(1.0, Expansion(step, maximum))) == pytest.approx(expected, rel=1e-12)


@given(start=st.floats(0.3, 4), step=st.floats(1e-2, 3), maximum=st.floats(1, 9))
def test_the_maximum_is_reached_and_never_exceeded_and_the_growth_ends(start, step, maximum):
    found = ratios(climb(start, Expansion(step, maximum)))
    assert all(a < b for a, b in itertools.pairwise(found))
    assert all(b - a <= step + 1e-8 for a, b in itertools.pairwise(found))
    assert all(ratio <= maximum * (1 + 1e-12) for ratio in found[1:])
    if found[0] < maximum * (1 - 1e-9):
        assert found[-1] >= maximum * (1 - 1e-9)
    assert len(found) <= math.ceil(max(0.0, maximum - start**2) / step) + 2


def test_a_width_from_elsewhere_is_never_made_smaller():
    assert climb(2.0, Expansion(0.5, 1.5)) == [2.0]
    assert policy.wider(1.0, None) is None


def test_a_step_that_changes_no_layer_is_taken_again_up_to_the_maximum():
    """8 units: 8.39 and 8.76 round down to 8, 9.12 to 9; of up to 1.2 times the weights there is no larger layer."""
    net = pae.linen(lambda width: pae.models.MLP(width, (8,)), jnp.zeros((1, 4)))
    assert policy.next_width(net, 1.0, Expansion(0.1, 2.0)) ** 2 == pytest.approx(1.3)
    assert policy.next_width(net, 1.0, Expansion(0.1, 1.2)) is None
    assert policy.next_width(net, 1.0, None) is None


def test_a_task_starts_wider_only_where_no_weight_is_free(net, frozen, third):
    growing = pae.Recipe("r", PHASE, goal=0.5, expansion=Expansion(0.5, 2.0))
    full = pae.freeze(third, "c")
    assert policy.starting_width(net, frozen, growing) == frozen.width
    assert policy.starting_width(net, full, growing) ** 2 == pytest.approx(1.5)
    assert policy.starting_width(net, full, pae.Recipe("r", PHASE)) is None
    assert policy.starting_width(net, full, pae.Recipe("r", PHASE, allow_empty=True)) == full.width
    bounded = dataclasses.replace(growing, expansion=Expansion(0.5, 1.0))
    assert policy.starting_width(net, full, bounded) is None


# Rungs


def must_prune(remaining):
    """The reference's rule."""
    return 1 - round(1.0 / (remaining + 1), 1)


def test_a_task_that_meets_its_goal_climbs_all_rungs():
    for upcoming in (None, 0, 1, 19):
        assert policy.rungs(ladder(CPG), True, upcoming) == CPG


@pytest.mark.parametrize(
    ("upcoming", "top"),
    [(0, None), (1, 0.5), (2, 0.7), (3, 0.8), (5, 0.8), (6, 0.9), (18, 0.9), (20, 0.95), (99, 0.95)],
)
def test_a_task_that_misses_its_goal_at_the_largest_width_climbs_to_must_prune_only(upcoming, top):
    found = policy.rungs(ladder(CPG), False, upcoming)
    assert found == (() if top is None else CPG[: CPG.index(top) + 1])


@given(
    st.lists(st.integers(1, 999), min_size=1, max_size=12, unique=True).map(
        lambda x: tuple(i / 1000 for i in sorted(x))
    ),
    st.integers(0, 60),
)
def test_must_prune_takes_the_first_rung_that_leaves_enough_room_and_none_after_it(rungs, upcoming):
    found = policy.rungs(ladder(rungs), False, upcoming)
    needed = must_prune(upcoming)
    assert found == rungs[: len(found)]
    assert all(rung < needed for rung in found[:-1])
    if needed == 0:
        assert found == ()
    else:
        assert found[-1] >= needed or found == rungs


def test_unknown_upcoming_tasks_count_as_one():
    assert policy.rungs(ladder(CPG), False, None) == policy.rungs(ladder(CPG), False, 1)
    assert policy.rungs(ladder((), equal_share=True), True, None) == (0.5,)


@given(st.integers(1, 127))
def test_equal_shares_leave_each_of_t_tasks_the_same_part(tasks):
    room, shares = Fraction(1), []
    for number in range(tasks):
        steps = policy.rungs(ladder((), equal_share=True), True, tasks - number - 1)
        freed = Fraction(steps[0]) if steps else Fraction(0)
        shares.append(room * (1 - freed))
        room *= freed
    assert len(steps) == 0
    assert [float(share) for share in shares] == pytest.approx([1 / tasks] * tasks, rel=1e-9)


@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_equal_shares_hold_in_a_network_to_the_rounding_of_each_leaf(tasks):
    net = pae.linen(lambda width: pae.models.MLP(width, (30, 20)), jnp.zeros((1, 4)))
    state = pae.init(net, jax.random.key(0))
    for number in range(tasks):
        name = f"task {number}"
        state = pae.pack(net, state, name, head=2, key=jax.random.key(number))
        for rung in policy.rungs(ladder((), equal_share=True), False, tasks - number - 1):
            state = pae.prune(state, name, rung)
        state = pae.freeze(state, name)
    for leaf in jax.tree.leaves(state.owner):
        counts = np.bincount(np.asarray(leaf).ravel(), minlength=tasks + 1)
        assert counts[0] == 0
        assert np.abs(counts[1:] - leaf.size / tasks).max() <= 1.5


# The end of the ladder


@pytest.mark.parametrize(
    ("misses", "values", "ends"),
    [
        (None, (0.1, 0.1, 0.1), False),
        (1, (0.9,), False),
        (1, (0.9, 0.7), True),
        (2, (0.7,), False),
        (2, (0.7, 0.9), False),
        (2, (0.9, 0.7, 0.7), True),
        (2, (0.7, 0.9, 0.7), False),
        (2, (0.7, 0.8, 0.7), False),
        (3, (0.7, 0.7), False),
        (3, (0.7, 0.7, math.nan), True),
        (1, (), False),
    ],
)
def test_so_many_misses_in_a_row_end_the_ladder(misses, values, ends):
    steps = ladder(misses=misses)
    assert policy.ends(steps, records(*values), Goal(ACCURACY, 0.8)) is ends
    assert policy.ends(steps, records(*values), Goal(ACCURACY)) is False
    mirrored = records(*[1 - v for v in values])
    assert policy.ends(steps, mirrored, Goal(ERROR, 0.2, 1e-9)) is ends


def test_a_value_within_the_tolerance_is_no_miss():
    assert policy.ends(ladder(misses=1), records(0.79), Goal(ACCURACY, 0.8))
    assert not policy.ends(ladder(misses=1), records(0.79), Goal(ACCURACY, 0.8, 0.01))


# The choice


def choose(values, goal=0.8, metric=ACCURACY, met=True, tolerance=0.0, room_needed=False, **options):
    return policy.choose(records(*values), ladder(**options), Goal(metric, goal, tolerance), met, room_needed)


def test_the_largest_fraction_that_meets_the_goal_is_chosen():
    assert choose((0.9, 0.85, 0.8, 0.7)) == 2
    assert choose((0.9, 0.7, 0.8, 0.7)) == 2
    assert choose((0.9, 0.7, 0.6)) == 0
    assert choose((0.9,)) == 0
    assert choose((0.9, 0.79, 0.77), tolerance=0.01) == 1


def test_the_best_accuracy_is_chosen_and_the_first_on_ties():
    assert choose((0.9, 0.95, 0.95, 0.7), choose="best_accuracy") == 1
    assert choose((0.9, 0.9, 0.9), choose="best_accuracy") == 0
    assert choose((0.5, 0.6, 0.7), choose="best_accuracy", goal=None) == 2
    assert choose((math.nan, 0.2, math.nan), choose="best_accuracy") == 1


def test_of_rungs_that_all_miss_the_goal_the_best_is_chosen_where_room_is_needed():
    """The first task does not keep the whole network by missing every rung by a hair."""
    assert choose((0.8, 0.799, 0.7999, 0.5), room_needed=True) == 2
    assert choose((0.8, 0.799, 0.7999, 0.5)) == 0


def test_where_room_is_needed_the_unpruned_stage_is_never_chosen_if_a_rung_was_climbed():
    assert choose((0.9, 0.7, 0.6), room_needed=True) == 1
    assert choose((0.9, 0.7, 0.8), room_needed=True) == 2
    assert choose((0.9, 0.5, 0.6), choose="best_accuracy", room_needed=True) == 2
    assert choose((0.9, 0.6, 0.6), choose="best_accuracy", room_needed=True) == 1
    assert choose((0.9,), room_needed=True) == 0


def test_the_last_rung_is_chosen_where_the_recipe_says_so():
    assert choose((0.9, 0.2, 0.1), choose="last") == 2
    assert choose((0.7, 0.9, 0.1), met=False, choose="last") == 2


def test_a_task_that_misses_its_goal_unpruned_keeps_the_best_of_what_was_tried():
    """The largest fraction that reaches the goal after all, else the best metric."""
    assert choose((0.7, 0.9, 0.85, 0.1), met=False) == 2
    assert choose((0.7, 0.75, 0.79, 0.1), met=False) == 2
    assert choose((0.7, 0.6, 0.1), met=False) == 0
    assert choose((0.7, 0.6, 0.65), met=False, room_needed=True) == 2
    assert choose((0.7, 0.9, 0.1), met=False, choose="best_accuracy") == 1
    assert choose((0.7,), met=False) == 0


def test_cpg_hung_et_al_2019_at_the_largest_width_takes_the_largest_ratio_of_a_task_that_missed_its_goal():
    """The rule of its tool that chooses the ratio, after the goal was missed unpruned."""
    assert choose((0.7, 0.9, 0.1), met=False, missed="largest") == 2
    assert choose((0.9, 0.85, 0.7), missed="largest") == 1


# The search


def searched(ladder, passes, met=True):
    """The rungs that a search tries, in order, and the largest that passes."""
    tried = []
    while (rung := policy.next_rung(ladder, TENTHS, tried, [t for t in tried if passes(t)], met)) is not None:
        tried.append(rung)
        assert len(tried) <= len(TENTHS)
    return tried, max((t for t in tried if passes(t)), default=None)


def test_a_climb_tries_every_rung_in_order():
    assert searched(ladder(), lambda rung: rung < 0.4) == (list(TENTHS), 0.3)


@pytest.mark.parametrize("top", [0.0, *TENTHS])
def test_bisection_finds_the_rung_of_a_climb_in_at_most_4_of_9(top):
    passes = lambda rung: rung <= top  # noqa: E731
    tried, found = searched(ladder(search="bisect"), passes)
    assert found == searched(ladder(), passes)[1]
    assert len(tried) <= 4
    assert tried[0] == 0.5


def test_a_task_that_misses_its_goal_unpruned_climbs_whatever_the_search():
    assert searched(ladder(search="bisect"), lambda rung: False, met=False)[0] == list(TENTHS)


@pytest.mark.parametrize("options", [{"misses": 1}, {"floor": 0.9}, {"choose": "last"}, {"of": "own", "ramp": 0.0}])
def test_bisection_goes_with_nothing_that_ends_or_orders_a_climb(options):
    with pytest.raises(pae.ArgumentError, match="search='bisect' needs"):
        ladder(search="bisect", **options)


def test_packnet_mallya_and_lazebnik_2018_does_not_prune_the_last_data_set():
    steps = ladder((0.75,), prune_last=False)
    assert policy.rungs(steps, True, 0) == ()
    assert policy.rungs(steps, True, 1) == policy.rungs(steps, True, None) == (0.75,)


def test_of_an_error_less_is_better():
    assert choose((5.0, 4.0, 6.0, 4.5), goal=5.0, metric=ERROR) == 3
    assert choose((5.0, 4.0, 4.0, 6.0), goal=5.0, metric=ERROR, choose="best_accuracy") == 1
    assert choose((5.0, 5.5, 6.0), goal=5.0, metric=ERROR, tolerance=0.5) == 1


accuracies = st.lists(st.one_of(st.integers(0, 20).map(lambda n: n / 20), st.just(math.nan)), min_size=1, max_size=11)


@given(accuracies, st.sampled_from(["largest_meeting_goal", "best_accuracy", "last"]), st.booleans(), st.booleans())
def test_what_is_chosen_is_what_was_chosen_one_rung_before_or_the_newest(values, way, met, room_needed):
    """So only two networks need to be kept while the ladder is climbed."""
    options = {"choose": way, "met": met, "room_needed": room_needed}
    now, before = choose(values, **options), choose(values[:-1] or values, **options)
    assert now in (before, len(values) - 1)


@given(accuracies)
def test_nothing_larger_than_the_choice_meets_the_goal(values):
    values = [0.8, *values]
    chosen = choose(values)
    assert values[chosen] >= 0.8
    assert not any(value >= 0.8 for value in values[chosen + 1 :])


# Records


def test_only_no_capacity_and_divergence_leave_the_network_without_the_task():
    assert {status for status in Status if not status.added} == {Status.NO_CAPACITY, Status.DIVERGED}
    assert [status.value for status in Status] == ["learned", "goal met", "goal missed", "no capacity", "diverged"]


numbers = st.floats(allow_nan=True, allow_infinity=True)


def same(one, other):
    return one == other or (one is not None and other is not None and math.isnan(one) and math.isnan(other))


@given(numbers, st.none() | numbers, st.dictionaries(st.sampled_from(["loss", "val_loss"]), numbers))
def test_a_record_comes_back_from_strict_json(value, train_value, row):
    record = StageRecord("a", "s", 1.5, 0.25, value, train_value, 3, 2, 5, 7, history=(row,), metric="error")
    text = json.dumps(record.to_json(), allow_nan=False)
    found = StageRecord.from_json(json.loads(text))
    assert same(value, found.value) and same(train_value, found.train_value)
    assert all(same(row[name], found.history[0][name]) for name in row)
    kept = dataclasses.replace(record, value=0.0, train_value=None, history=())
    assert dataclasses.replace(found, value=0.0, train_value=None, history=()) == kept


def test_null_in_a_record_of_an_earlier_version_is_read_as_nan():
    fields = records(0.5)[0].to_json() | {"value": None, "history": [{"loss": None}]}
    found = StageRecord.from_json(fields)
    assert math.isnan(found.value) and math.isnan(found.history[0]["loss"]) and found.train_value is None


def test_a_record_of_before_the_metric_had_a_name_is_an_accuracy():
    fields = records(0.5)[0].to_json()
    del fields["metric"]
    assert StageRecord.from_json(fields).metric == "accuracy"


def test_an_outcome_says_what_was_tried(frozen):
    tried = (*records(0.9), dataclasses.replace(records(0.8)[0], stage="0-pruned-0.500", diverged=True))
    outcome = pae.Outcome(Status.GOAL_MET, frozen, "a", 0.9, 0.85, None, 0.25, 1.0, tried)
    assert str(outcome).splitlines() == [
        "a: goal met, validation 0.9000, goal 0.8500, 25.0% pruned",
        "  stage 0            size ratio 1, pruned 0.000: validation 0.9000",
        "  0-pruned-0.500     size ratio 1, pruned 0.000: diverged",
    ]


# Rungs without hope


def rows(*values, name="val_accuracy"):
    return [{"epoch": number, name: value} for number, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.5,), False),  # 3 epochs left: 0.5 + 0.3 reaches 0.8
        ((0.49,), True),
        ((0.7, 0.6), False),  # the best epoch counts, not the last
        ((0.5, 0.59), True),
        ((0.5, 0.6, 0.69), True),
        ((0.5, 0.6, 0.7), False),
        ((0.1, 0.2, 0.3, 0.9), False),
        ((0.1, 0.2, 0.3, 0.79), True),
    ],
)
def test_a_rung_is_hopeless_once_its_goal_is_further_away_than_the_epochs_left_times_the_gain(values, expected):
    steps = Ladder(TENTHS, Phase(4, Rate(0.1)), ramp=0.0, gain=0.1)
    goal = policy.Goal(pae.Metric(), 0.8)
    assert policy.hopeless(steps, goal, rows(*values)) == expected
    assert policy.hopeless(steps, goal, rows(*values, name="score")) == expected
    assert not policy.hopeless(dataclasses.replace(steps, gain=None), goal, rows(*values))
    assert not policy.hopeless(steps, policy.Goal(pae.Metric()), rows(*values))
    assert not policy.hopeless(steps, policy.Goal(pae.Metric(), 0.8, tolerance=0.4), rows(*values))
    errors = rows(*(1 - value for value in values))  # of an error the goal is 0.2, and its score is negative
    scores = [{"epoch": row["epoch"], "score": -row["val_accuracy"]} for row in errors]
    assert policy.hopeless(steps, policy.Goal(ERROR, 0.2), scores) == expected


def test_the_accuracy_of_epochs_says_nothing_of_the_goal_of_another_metric():
    steps = Ladder(TENTHS, Phase(4, Rate(0.1)), ramp=0.0, gain=0.1)
    assert not policy.hopeless(steps, policy.Goal(pae.Metric("per cent", lambda *_: 90.0), 80.0), rows(0.9))


def test_epochs_before_the_whole_fraction_is_freed_say_nothing_about_hope():
    steps = Ladder(TENTHS, Phase(4, Rate(0.1)), ramp=2.0, gain=0.1)
    goal = policy.Goal(pae.Metric(), 0.8)
    assert not policy.hopeless(steps, goal, rows(0.0))
    assert policy.hopeless(steps, goal, rows(0.9, 0.5))  # the first epoch had more weights than the rung
    assert not policy.hopeless(steps, goal, rows(0.0, 0.6))

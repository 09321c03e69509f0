"""learn, learn_all and baseline: how a task can end, what decides it, and what it equals when composed by hand."""

import dataclasses
import functools
import gc
import math
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.errors import JaxRuntimeError

import pae_jax as pae
from pae_jax.lifelong import stage_maker, task_folder
from pae_jax.lifelong.recipes import Adam, Expansion, Ladder, Phase, Rate, Recipe
from pae_jax.lifelong.session import stage_key
from pae_jax.training.losses import softmax_cross_entropy

same_numbers = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)  # two different programs
KEY = jax.random.key(7)


def same_network(found, expected):
    """The same network to rounding: the loop compiles another train step than the same calls by hand."""
    assert pae.report(found).rows == pae.report(expected).rows
    assert found.width == expected.width and len(found.growth) == len(expected.growth)
    chex.assert_trees_all_equal(found.owner, expected.owner)
    same_numbers(found.shared, expected.shared)
    for name, entry in expected.tasks.items():
        same_numbers((found.tasks[name].local, found.tasks[name].head), (entry.local, entry.head))


QUICK = Phase(2, Rate(0.03))
NONE = Phase(0, Rate(0.03))  # no training at all, for tests of decisions
PLAIN = Recipe("plain", QUICK, batch_size=8)
STEPS = Ladder((0.3, 0.6), QUICK, ramp=1.0, every=2)
IDLE = Recipe("idle", NONE, goal=0.5)
DIVERGING = Phase(1, Rate(1e30))


def make_task(name="a", seed=0, **options):
    """60 examples of two classes: training, validation and test data that differ."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    y = (x[:, seed % 4] + 0.3 * x[:, 3] > 0).astype(np.int32)
    parts = {"train": (x[:32], y[:32]), "val": (x[32:46], y[32:46]), "test": (x[46:], y[46:])}
    return pae.Task(name, **({"head": 2} | parts | options))


def measured_by(value, name="made up", **options):
    """A metric that is a function of the state, so that a test decides what the loop decides by."""
    return pae.Metric(name, lambda net, state, task, data: value(state), **options)


@pytest.fixture
def learn(net):
    def call(state, task, recipe, *, net=net, key=KEY, **options):
        return pae.learn(net, state, task, recipe, key=key, progress=False, **options)

    return call


@pytest.fixture
def learn_all(net, empty):
    def call(tasks, recipe, *, state=empty, net=net, **options):
        return pae.learn_all(net, state, tasks, recipe, key=KEY, progress=False, **options)

    return call


@pytest.fixture
def no_training(monkeypatch):
    def trained(*arguments, **options):
        pytest.fail("something was trained")

    monkeypatch.setattr(stage_maker, "trained", trained)


def steps_of(outcome):
    return [record.stage for record in outcome.records]


def files_below(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


# How a task ends


def test_without_a_goal_a_task_is_learned(learn, empty):
    outcome = learn(empty, make_task(), PLAIN)
    assert outcome.status is pae.Status.LEARNED
    assert outcome.goal is None
    assert outcome.state.tasks["a"].frozen
    assert steps_of(outcome) == ["0-trained"]
    pae.verify(outcome.state)


def test_a_goal_that_is_reached_is_met_after_pruning_too(learn, empty):
    """Accuracy stands for the weights that are left: 0.7 and 0.4 of them after the rungs."""
    metric = measured_by(lambda state: 1 - pae.free_fraction(state))
    recipe = dataclasses.replace(PLAIN, ladder=STEPS, goal=0.65)
    outcome = learn(empty, make_task(metric=metric), recipe)
    assert outcome.status is pae.Status.GOAL_MET
    assert steps_of(outcome) == ["0-trained", "0-pruned-0.300", "0-pruned-0.600"]
    assert outcome.pruned == pytest.approx(0.3, abs=0.02)
    assert outcome.value == pytest.approx(0.7, abs=0.02)
    assert outcome.value >= outcome.goal
    assert pae.free_fraction(outcome.state) == pytest.approx(outcome.pruned)


def test_a_goal_out_of_reach_is_missed_and_the_task_kept_with_room_for_the_next(learn, empty):
    recipe = dataclasses.replace(PLAIN, ladder=dataclasses.replace(STEPS, rungs=(0.3, 0.5, 0.6)), goal=1.0)
    outcome = learn(empty, make_task(), recipe, upcoming=1)
    assert outcome.status is pae.Status.GOAL_MISSED
    assert outcome.state.tasks["a"].frozen
    assert steps_of(outcome) == ["0-trained", "0-pruned-0.300", "0-pruned-0.500"]
    best = max(outcome.records[1:], key=lambda record: record.value)  # the first of equal ones
    assert (outcome.pruned, outcome.value) == (best.pruned, best.value)
    largest = dataclasses.replace(recipe, ladder=dataclasses.replace(recipe.ladder, missed="largest"))
    assert learn(empty, make_task(), largest, upcoming=1).pruned == pytest.approx(0.5, abs=0.02)
    last = learn(empty, make_task(), recipe, upcoming=0)
    assert (last.status, steps_of(last), last.pruned) == (pae.Status.GOAL_MISSED, ["0-trained"], 0.0)


def test_a_goal_that_no_rung_keeps_costs_the_lowest_rung_while_tasks_are_to_come_and_the_network_is_full(learn, empty):
    task = make_task(metric=measured_by(lambda state: 1 - pae.free_fraction(state)))
    recipe = dataclasses.replace(PLAIN, ladder=STEPS, goal=0.9)
    outcome = learn(empty, task, recipe, upcoming=1)
    assert (outcome.status, steps_of(outcome)[1:]) == (pae.Status.GOAL_MISSED, ["0-pruned-0.300", "0-pruned-0.600"])
    assert outcome.pruned == pytest.approx(0.3, abs=0.02)
    for options in ({"upcoming": 0}, {}):
        last = learn(empty, task, recipe, **options)
        assert (last.status, last.pruned) == (pae.Status.GOAL_MET, 0.0)
    grows = dataclasses.replace(recipe, expansion=Expansion(0.5, 2.0))
    assert learn(empty, task, grows, upcoming=1).pruned == pytest.approx(0.3, abs=0.02)


@pytest.fixture(scope="module")
def full(third):
    """Three frozen tasks and no free weight."""
    return pae.freeze(third, "c")


def test_without_a_free_weight_a_task_is_not_added_and_nothing_is_trained(
    learn, full, state_facts, no_training, tmp_path
):
    before = state_facts(full)
    for expansion in (None, Expansion(0.5, 1.0)):
        recipe = dataclasses.replace(PLAIN, goal="baseline", expansion=expansion)
        run = pae.Run(tmp_path / str(expansion is None))
        outcome = learn(full, make_task("d"), recipe, run=run)
        assert outcome.status is pae.Status.NO_CAPACITY
        assert outcome.state is full
        assert outcome.records == ()
        assert math.isnan(outcome.value)
        assert [folder.name for folder in run.path.iterdir() if folder.is_dir()] == ["04-d"]
    assert state_facts(full) == before


def test_without_a_free_weight_the_network_grows_first_where_it_may(learn, full):
    recipe = dataclasses.replace(IDLE, expansion=Expansion(0.5, 1.5), goal=0.0)
    outcome = learn(full, make_task("d"), recipe)
    assert outcome.status is pae.Status.GOAL_MET
    assert outcome.width**2 == pytest.approx(1.5)
    assert steps_of(outcome) == ["0-trained"]


def test_a_network_without_room_takes_a_task_where_the_recipe_allows_it(learn, full):
    outcome = learn(full, make_task("d"), dataclasses.replace(PLAIN, ladder=STEPS, goal=0.0, allow_empty=True))
    assert outcome.status is pae.Status.GOAL_MET
    assert steps_of(outcome) == ["0-trained"]  # what owns nothing climbs no ladder
    assert outcome.records[0].weights == 0


def nan_loss(logits, y):
    losses = softmax_cross_entropy(logits, y)
    return jnp.where(jnp.max(jnp.abs(logits)) > 0, jnp.nan, losses)


@pytest.mark.parametrize("way", ["rate", "loss", "first the head"])
def test_training_that_meets_nan_does_not_add_the_task(learn, frozen, state_facts, way, tmp_path):
    before = state_facts(frozen)
    recipes = {
        "rate": (dataclasses.replace(PLAIN, train=DIVERGING), {}),
        "loss": (PLAIN, {"loss": nan_loss}),
        "first the head": (dataclasses.replace(PLAIN, head_first=DIVERGING), {}),
    }
    recipe, options = recipes[way]
    run = pae.Run(tmp_path)
    outcome = learn(frozen, make_task("b", **options), recipe, run=run)
    assert outcome.status is pae.Status.DIVERGED
    assert outcome.state is frozen
    assert state_facts(frozen) == before
    assert [(record.stage, record.diverged) for record in outcome.records] == [("0-trained", True)]
    assert "diverged" in str(outcome)
    assert run.rows[0]["Acc"] == "nan"


def test_a_divergence_is_remembered(learn, frozen, tmp_path, monkeypatch):
    recipe = dataclasses.replace(PLAIN, train=DIVERGING)
    outcome = learn(frozen, make_task("b"), recipe, run=pae.Run(tmp_path))
    monkeypatch.setattr(stage_maker, "trained", None)
    again = learn(frozen, make_task("b"), recipe, run=pae.Run(tmp_path))
    assert again.status is pae.Status.DIVERGED
    assert len(again.records) == len(outcome.records) == 1


def test_a_rung_or_a_retraining_that_diverges_leaves_what_was_there(learn, frozen, assert_same):
    recipe = dataclasses.replace(PLAIN, goal=0.0)
    unpruned = learn(frozen, make_task("b"), recipe)
    ladder = Ladder((0.3, 0.6), DIVERGING, ramp=0.0)
    for more in ({"ladder": ladder}, {"retrain": DIVERGING}):
        outcome = learn(frozen, make_task("b"), dataclasses.replace(recipe, **more))
        assert outcome.status is pae.Status.GOAL_MET
        assert outcome.records[-1].diverged
        assert len(outcome.records) == 2
        assert_same(outcome.state.shared, unpruned.state.shared)
        assert outcome.pruned == 0.0


# Growth


@pytest.mark.parametrize(
    ("goal", "ratios", "status"),
    [
        (0.9, [1.0], pae.Status.GOAL_MET),
        (1.4, [1.0, 1.5], pae.Status.GOAL_MET),
        (1.6, [1.0, 1.5, 2.0], pae.Status.GOAL_MET),
        (2.1, [1.0, 1.5, 2.0, 2.3], pae.Status.GOAL_MET),
        (2.5, [1.0, 1.5, 2.0, 2.3], pae.Status.GOAL_MISSED),
    ],
)
def test_the_network_grows_exactly_while_the_goal_is_missed_and_never_past_the_maximum(
    learn, frozen, goal, ratios, status
):
    """A task as good as the network is large."""
    task = make_task("b", metric=measured_by(lambda state: state.width**2))
    outcome = learn(frozen, task, dataclasses.replace(IDLE, goal=goal, expansion=Expansion(0.5, 2.3)), upcoming=0)
    assert outcome.status is status
    assert [record.width**2 for record in outcome.records] == pytest.approx(ratios)
    assert steps_of(outcome) == [f"{i}-trained" for i in range(len(ratios))]
    assert len(outcome.state.growth) == (len(ratios) > 1)  # each time it grows from where it was before the task
    assert outcome.state.width == outcome.width == outcome.records[-1].width


def test_only_the_last_width_is_pruned(learn, frozen):
    task = make_task("b", metric=measured_by(lambda state: state.width**2))
    ladder = Ladder((0.3,), NONE, ramp=0.0)
    outcome = learn(frozen, task, dataclasses.replace(IDLE, goal=1.4, expansion=Expansion(0.5, 1.5), ladder=ladder))
    assert steps_of(outcome) == ["0-trained", "1-trained", "1-pruned-0.300"]


def test_a_tolerance_spares_an_expansion(learn, frozen):
    task = make_task("b", metric=measured_by(lambda state: 0.06 if state.width == 1.0 else 1.0))
    recipe = dataclasses.replace(IDLE, goal=0.07, expansion=Expansion(0.5, 1.5))
    assert len(learn(frozen, task, recipe).records) == 2
    assert len(learn(frozen, task, dataclasses.replace(recipe, tolerance=0.01)).records) == 1


def test_the_metric_may_be_an_error(learn, frozen):
    task = make_task("b", metric=measured_by(lambda state: 3 - state.width**2, "error", higher_is_better=False))
    recipe = dataclasses.replace(IDLE, goal=1.6, expansion=Expansion(0.5, 3.0))
    outcome = learn(frozen, task, recipe)
    assert outcome.status is pae.Status.GOAL_MET
    assert [record.value for record in outcome.records] == pytest.approx([2.0, 1.5])
    assert outcome.records[0].metric == "error"


# The ladder


def test_the_ladder_ends_at_a_rung_that_is_not_above_the_floor_on_training_data(learn, empty):
    """Value and floor are of the weights left; a rung at the floor is not kept."""
    left = measured_by(lambda state: 1 - pae.free_fraction(state))
    gone = measured_by(pae.free_fraction, "gone", higher_is_better=False)
    ladder = Ladder((0.25, 0.5, 0.75), NONE, ramp=0.0, choose="last")
    recipe = Recipe("floor", NONE)
    for metric, floor in ((left, 0.5), (gone, 0.5)):
        outcome = learn(
            empty,
            make_task(metric=metric),
            dataclasses.replace(recipe, ladder=dataclasses.replace(ladder, floor=floor)),
        )
        assert steps_of(outcome)[1:] == ["0-pruned-0.250", "0-pruned-0.500"]
        assert outcome.pruned == pytest.approx(0.25)
    for floor, count in ((0.0, 3), (None, 3), (0.9, 1)):
        some = dataclasses.replace(recipe, ladder=dataclasses.replace(ladder, floor=floor))
        outcome = learn(empty, make_task(metric=left), some)
        assert len(outcome.records) == 1 + count
        assert [record.train_value is None for record in outcome.records[1:]] == [floor is None] * count


def test_a_floor_takes_training_data_that_fit_the_network_without_their_augmentation(learn, empty, no_training):
    """Bytes that the augmentation scales would be measured as numbers up to 255; a measure of one's own reads them."""
    x, y = make_task().train
    scaled = {"train": ((x * 30 + 128).astype(np.uint8), y), "augment": lambda key, x: x.astype(jnp.float32) / 255}
    ladder = dataclasses.replace(STEPS, floor=0.5, choose="last")
    accuracy = pae.Metric("accuracy of mine", pae.MeanOf(lambda logits, y: logits.argmax(-1) == y))
    for recipe in (
        dataclasses.replace(PLAIN, ladder=ladder),
        dataclasses.replace(PLAIN, goal=0.5, expansion=Expansion(0.5, 1.5, floor=0.5)),
    ):
        for options in ({}, {"metric": accuracy}):
            with pytest.raises(pae.StructureError, match=r"'a', train without its augmentation.*floor.*found uint8"):
                learn(empty, make_task(**scaled, **options), recipe)


def test_a_floor_measures_training_data_without_their_augmentation(net, learn, empty):
    ladder = dataclasses.replace(STEPS, floor=0.0, choose="last")
    task = make_task(augment=lambda key, x: x + jax.random.normal(key, x.shape))
    outcome = learn(empty, task, dataclasses.replace(PLAIN, ladder=ladder))
    assert outcome.records[-1].train_value == pae.evaluate(net, outcome.state, "a", task.train)["accuracy"]


def test_misses_in_a_row_end_the_ladder_and_the_best_rung_before_them_is_kept(learn, empty):
    left = measured_by(lambda state: 1 - pae.free_fraction(state))
    ladder = Ladder((0.1, 0.3, 0.5, 0.7, 0.9), NONE, ramp=0.0, misses=2)
    outcome = learn(empty, make_task(metric=left), dataclasses.replace(IDLE, goal=0.69, ladder=ladder))
    assert steps_of(outcome)[-1] == "0-pruned-0.700"
    assert outcome.pruned == pytest.approx(0.3, abs=0.02)


def test_a_hopeless_rung_ends_early_and_counts_as_a_miss(learn, empty):
    """The metric is the share of weights in use, so no epoch changes it; at 0.3 freed the goal of 0.75 is lost."""
    left = measured_by(lambda state: 1 - pae.free_fraction(state))
    ladder = Ladder((0.2, 0.3, 0.4), Phase(3, Rate(0.0)), ramp=1.0, gain=0.02, misses=2)
    recipe = dataclasses.replace(IDLE, goal=0.75, ladder=ladder, batch_size=8)
    outcome = learn(empty, make_task(metric=left), recipe)
    assert [len(record.history) for record in outcome.records] == [0, 3, 1, 1]
    assert outcome.pruned == pytest.approx(0.2, abs=0.02)
    whole = learn(
        empty, make_task(metric=left), dataclasses.replace(recipe, ladder=dataclasses.replace(ladder, gain=None))
    )
    assert [len(record.history) for record in whole.records] == [0, 3, 3, 3]
    assert whole.pruned == outcome.pruned
    missed = learn(empty, make_task(metric=left), dataclasses.replace(recipe, goal=1.5), upcoming=1)
    assert all(len(record.history) == 3 for record in missed.records[1:])  # the best rung is wanted, goal or not


def test_a_gain_of_a_metric_that_no_epoch_has_is_refused_before_anything_is_trained(learn, empty, no_training):
    ladder = Ladder((0.2,), Phase(3, Rate(0.0), keep="last"), gain=0.02)
    task = make_task(metric=measured_by(lambda state: 0.5))
    with pytest.raises(pae.ArgumentError, match=r"task 'a', but 'made up' is not measured .*use keep='best'"):
        learn(empty, task, dataclasses.replace(IDLE, goal="baseline", ladder=ladder))


class LayerNormed(nn.Module):
    """A network that cannot be expanded: the norm of a wider one divides by more channels."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(nn.Dense(int(4 * self.width))(x))


@pytest.mark.parametrize("options", [{"goal": "baseline"}, {"goal": None, "expansion": Expansion(1.0, 2.0, floor=0.9)}])
def test_a_recipe_that_may_have_to_expand_a_network_that_cannot_be_is_refused_before_anything_is_trained(
    learn, no_training, options
):
    recipe = dataclasses.replace(IDLE, **({"expansion": Expansion(0.5, 2.0)} | options))
    net = pae.linen(LayerNormed, jnp.zeros((1, 4)))
    with pytest.raises(pae.NotPreservableError, match=r"LayerNorm_0.*(?s:.*)expansion=None\) of recipe 'idle'"):
        learn(pae.init(net, jax.random.key(0)), make_task(), recipe, net=net)


def test_a_network_that_cannot_be_expanded_is_learned_where_the_recipe_never_has_to(learn):
    net = pae.linen(LayerNormed, jnp.zeros((1, 4)))
    recipe = dataclasses.replace(PLAIN, expansion=Expansion(0.5, 2.0))
    assert learn(pae.init(net, jax.random.key(0)), make_task(), recipe, net=net).status.added


@pytest.fixture
def from_bundle(net, frozen, tmp_path):
    """A network as a bundle gives it, without the backbone's local variables."""
    pae.write_bundle(tmp_path / "bundle", net, frozen)
    return pae.read_bundle(net, tmp_path / "bundle")


def test_a_network_of_a_bundle_without_local_variables_is_refused_before_anything_is_trained(
    learn, learn_all, from_bundle, tmp_path, no_training
):
    recipe, run = dataclasses.replace(IDLE, goal="baseline"), pae.Run(tmp_path / "run")
    for call in (
        lambda: learn(from_bundle, make_task("b"), recipe, run=run),
        lambda: learn_all([make_task("b")], recipe, state=from_bundle, run=run),
    ):
        with pytest.raises(
            pae.ArgumentError, match=r"starts task 'b' from .*local_init=\) 'fresh', 'newest' or 'nearest'"
        ):
            call()
    assert files_below(run.path) == {}


@pytest.mark.parametrize("source", ["fresh", "newest", "nearest"])
def test_a_network_of_a_bundle_learns_on_from_other_local_variables(learn, from_bundle, source):
    rng = np.random.default_rng(0)
    noise = (np.zeros((32, 4), np.float32), rng.integers(0, 2, 32))  # no older task is near
    outcome = learn(from_bundle, make_task("b", train=noise), dataclasses.replace(PLAIN, local_init=source))
    assert outcome.state.tasks["b"].frozen


def test_a_rung_starts_from_the_rung_below_it_and_not_from_the_one_that_is_best(learn, empty):
    """Own weights fall from rung to rung although the first rung is the best."""
    ladder = Ladder((0.2, 0.4, 0.6), NONE, ramp=0.0, choose="best_accuracy")
    outcome = learn(empty, make_task(metric=measured_by(lambda state: 0.5)), Recipe("ties", NONE, ladder=ladder))
    assert [record.pruned for record in outcome.records] == pytest.approx([0.0, 0.2, 0.4, 0.6], abs=0.01)
    assert outcome.pruned == 0.0


def test_two_networks_are_kept_while_the_ladder_is_climbed(vector_module, empty):
    """However many rungs there are; counted as kernels of a shape that nothing else has."""
    net = pae.linen(lambda width: pae.models.MLP(width, (37,)), jnp.zeros((1, 4)))
    counts = []

    def value(state):
        gc.collect()
        counts.append(sum(array.shape == (4, 37) and array.dtype == jnp.float32 for array in jax.live_arrays()))
        return 0.5

    ladder = Ladder((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), NONE, ramp=0.0)
    recipe = dataclasses.replace(IDLE, ladder=ladder)
    state = pae.init(net, jax.random.key(0))
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again
    try:
        pae.learn(net, state, make_task(metric=measured_by(value)), recipe, key=KEY, progress=False)
    finally:
        gc.unfreeze()
    assert len(counts) == 8  # 7 validations, one test
    assert max(counts) - counts[2] <= 1


def test_bisection_prunes_as_far_as_a_climb_with_fewer_rungs(learn, empty):
    """The metric is the share of weights left, so 0.45 of them can go."""
    left = make_task(metric=measured_by(lambda state: 1 - pae.free_fraction(state)))
    steps = Ladder(tuple(n / 10 for n in range(1, 10)), NONE, ramp=0.0)
    climbed = learn(empty, left, dataclasses.replace(IDLE, goal=0.55, ladder=steps))
    halved = dataclasses.replace(steps, search="bisect")
    found = learn(empty, left, dataclasses.replace(IDLE, goal=0.55, ladder=halved))
    assert found.pruned == climbed.pruned == pytest.approx(0.4, abs=0.02)
    assert steps_of(found)[1:] == ["0-pruned-0.500", "0-pruned-0.300", "0-pruned-0.400"]
    assert len(climbed.records) == 10


def test_bisection_may_end_without_a_rung_and_still_leaves_room_where_it_is_needed(learn, empty):
    left = make_task(metric=measured_by(lambda state: 1 - pae.free_fraction(state)))
    steps = Ladder((0.2, 0.4, 0.6), NONE, ramp=0.0, search="bisect")
    recipe = dataclasses.replace(IDLE, goal=0.99, ladder=steps)
    assert learn(empty, left, recipe).pruned == 0.0
    assert learn(empty, left, recipe, upcoming=1).pruned == pytest.approx(0.2, abs=0.02)


def test_cpg_hung_et_al_2019_grows_where_the_training_accuracy_is_not_above_its_floor(learn, frozen):
    """The goal is met, the training metric, the size ratio here, is not above 1 at first."""
    task = make_task("b", metric=measured_by(lambda state: state.width**2))
    recipe = dataclasses.replace(IDLE, expansion=Expansion(0.5, 2.0, floor=1.0))
    outcome = learn(frozen, task, recipe)
    assert [record.train_value for record in outcome.records] == pytest.approx([1.0, 1.5])
    assert outcome.status is pae.Status.GOAL_MET


def test_cpg_hung_et_al_2019_learns_picks_alone_where_no_weight_is_free_and_skips_pruning_and_retraining(learn, full):
    """Exit code 5 of its scripts; the rate of the picks then stays where it would fall to 0."""
    task = make_task("d", metric=measured_by(lambda state: 1.0))
    train = Phase(2, Rate(0.0), pick_rate=Rate(0.0), lone_pick_rate=Rate(0.05))
    recipe = dataclasses.replace(
        pae.recipes.cpg(), train=train, retrain=QUICK, goal=0.5, batch_size=8, expansion=Expansion(0.5, 1.5, floor=0.9)
    )
    outcome = learn(full, task, recipe)
    assert (outcome.status, outcome.width) == (pae.Status.GOAL_MET, 1.0)
    assert steps_of(outcome) == ["0-trained"]
    assert outcome.records[0].weights == 0
    assert not all(np.asarray(pick)[np.asarray(owner) > 0].all() for pick, owner in zip(
        *map(jax.tree.leaves, (outcome.state.tasks["d"].pick, full.owner)), strict=True))  # fmt: skip


def test_the_share_of_weights_that_training_left_as_they_were_is_recorded(learn, frozen):
    idle = learn(frozen, make_task("b"), dataclasses.replace(PLAIN, train=Phase(1, Rate(0.0))))
    assert idle.records[0].dead == 1.0
    assert learn(frozen, make_task("b"), PLAIN).records[0].dead < 0.2


# What decides


def test_test_data_decides_nothing(learn_all, assert_same):
    """Poisoned test labels change the reported test numbers and not one bit of anything else."""
    recipe = Recipe("pae", QUICK, 8, ladder=STEPS, retrain=QUICK, goal=0.6, expansion=Expansion(0.5, 1.5))
    honest = [make_task("a", 0), make_task("b", 1)]
    poisoned = [dataclasses.replace(task, test=(task.test[0], 1 - task.test[1])) for task in honest]
    without = [dataclasses.replace(task, test=None) for task in honest]
    streams = [learn_all(tasks, recipe) for tasks in (honest, poisoned, without)]
    reference = streams[0]
    for stream in streams[1:]:
        assert_same(stream.state, reference.state)
        for one, other in zip(stream.outcomes, reference.outcomes, strict=True):
            assert one.records == other.records
            assert (one.status, one.value, one.pruned) == (other.status, other.value, other.pruned)
    tests = [[outcome.test for outcome in stream.outcomes] for stream in streams]
    assert tests[1] == pytest.approx([1 - value for value in tests[0]])
    assert tests[2] == [None, None]
    assert streams[2].matrix is None


def test_validation_data_decides(net, learn, empty):
    recipe = dataclasses.replace(PLAIN, train=Phase(20, Rate(0.1)), ladder=STEPS, goal=0.6)
    task = make_task()
    met = learn(empty, task, recipe)
    wrong = dataclasses.replace(task, val=(task.val[0], 1 - task.val[1]))
    missed = learn(empty, wrong, recipe)
    assert (met.status, missed.status) == (pae.Status.GOAL_MET, pae.Status.GOAL_MISSED)
    assert met.value == pae.evaluate(net, met.state, "a", task.val)["accuracy"]


def test_test_data_is_measured_once_for_the_newest_task_and_once_per_older_one(learn_all):
    seen = []

    def measure(net, state, task, data):
        seen.append((task, "test" if len(data[0]) == 14 and data[0] is tests[task] else "val"))
        return 0.5

    tasks = [make_task(name, i, metric=pae.Metric("made up", measure)) for i, name in enumerate("abc")]
    tests = {task.name: task.test[0] for task in tasks}
    learn_all(tasks, Recipe("idle", NONE, ladder=Ladder((0.5,), NONE, ramp=0.0, choose="last")))
    counts = {name: sum(one == (name, "test") for one in seen) for name in "abc"}
    assert counts == {"a": 3, "b": 2, "c": 1}


def test_retraining_is_kept_only_where_it_is_better(learn, frozen, assert_same):
    """With the loss as metric; at a rate of 0 nothing gets better, with a rate of its own it does."""
    metric = pae.Metric("loss", lambda net, s, t, d: pae.evaluate(net, s, t, d)["loss"], higher_is_better=False)
    task = make_task("b", metric=metric, val=make_task("b").train)
    alone = learn(frozen, task, PLAIN)
    idle = learn(frozen, task, dataclasses.replace(PLAIN, retrain=NONE))
    assert_same(idle.state, alone.state)
    better = learn(frozen, task, dataclasses.replace(PLAIN, retrain=QUICK))
    assert better.value == better.records[-1].value < better.records[0].value == alone.value
    worse = learn(frozen, task, dataclasses.replace(PLAIN, retrain=Phase(1, Rate(3.0))))
    assert not worse.records[-1].value <= alone.value  # NaN is not better either
    assert_same(worse.state, alone.state)
    assert steps_of(worse) == ["0-trained", "0-retrained"]
    tied = dataclasses.replace(task, metric=measured_by(lambda state: 0.5))
    once, again = learn(frozen, tied, PLAIN), learn(frozen, tied, dataclasses.replace(PLAIN, retrain=QUICK))
    assert_same(again.state, once.state)


@pytest.mark.parametrize(
    ("values", "kept", "status"),
    [
        ((0.4, 0.4), 0.4, pae.Status.GOAL_MISSED),
        ((0.4, 0.8), 0.8, pae.Status.GOAL_MET),
        ((0.8, 0.4), 0.8, pae.Status.GOAL_MET),
        ((0.4, math.nan), 0.4, pae.Status.GOAL_MISSED),
    ],
)
def test_the_status_is_that_of_what_was_kept_after_retraining(learn, frozen, values, kept, status):
    """The metric is measured once after training and once after retraining."""
    measured = iter(values)
    task = make_task("b", metric=measured_by(lambda state: next(measured)), test=None)
    outcome = learn(frozen, task, dataclasses.replace(IDLE, goal=0.7, retrain=NONE))
    assert len(outcome.records) == 2
    assert (outcome.value, outcome.status) == (kept, status)


def test_the_first_task_is_not_retrained(learn, empty):
    assert steps_of(learn(empty, make_task(), dataclasses.replace(PLAIN, retrain=QUICK))) == ["0-trained"]


# Equal to what is composed by hand


def by_hand(net, state, task, recipe, *, key=KEY, fraction=None):
    """pack, fit, prune, fit, freeze with the keys of the stages; sharing and local variables as the recipe says."""
    newest = max(state.tasks, key=lambda name: state.tasks[name].id, default="backbone")
    keys = jax.random.split(stage_key(key, task.name, "0-trained"), 4)
    state = pae.pack(
        net,
        state,
        task.name,
        head=task.head,
        key=keys[1],
        sharing=recipe.sharing,
        local_init=newest if recipe.local_init == "newest" else recipe.local_init,
        allow_empty=recipe.allow_empty,
    )

    def fit(state, phase, key):
        steps = len(task.train[1]) // recipe.batch_size
        rate = phase.rate.schedule(phase.epochs, steps)
        rates = jnp.asarray([rate(step) for step in range(phase.epochs * steps)], jnp.float32)
        tx = optax.chain(phase.optimizer.transformation(), optax.scale_by_schedule(lambda count: rates[count]))
        options = {"batch_size": recipe.batch_size, "key": key, "keep": "best", "val": task.val}
        return pae.fit(net, state, task.name, task.train, optimizer=tx, epochs=phase.epochs, **options)[0]

    state = fit(state, recipe.train, keys[3])
    if fraction is not None:
        state = pae.prune(state, task.name, fraction)
        state = fit(state, recipe.ladder.phase, stage_key(key, task.name, f"0-pruned-{fraction:.3f}"))
    return pae.freeze(state, task.name)


ONE_SHOT = Recipe(
    "one shot",
    Phase(2, Rate(0.05, ((1, 0.1),))),
    8,
    ladder=Ladder((0.6,), Phase(2, Rate(0.005)), ramp=0.0, choose="last"),
    local_init="newest",
)


def test_a_one_shot_recipe_is_pack_fit_prune_fit(net, empty, learn_all):
    tasks = [make_task("a", 0), make_task("b", 1)]
    state = empty
    for task in tasks:
        state = by_hand(net, state, task, ONE_SHOT, fraction=0.6)
    same_network(learn_all(tasks, ONE_SHOT).state, state)


def test_without_a_ladder_or_with_a_ratio_of_0_the_first_task_is_plain_training(net, empty, learn):
    task = make_task()
    plain = by_hand(net, empty, task, PLAIN)
    same_network(learn(empty, task, PLAIN).state, plain)
    nothing = Ladder((0.0,), NONE, ramp=0.0, choose="last")
    same_network(learn(empty, task, dataclasses.replace(PLAIN, ladder=nothing)).state, plain)


def own_network(net, task, recipe, path, **options):
    """The own network of a task, as a run keeps it, and its value."""
    value = pae.baseline(net, task, recipe, key=KEY, run=pae.Run(path), **options)
    return pae.load(net, path / f"baseline-{task.name}" / "frozen"), value


def test_the_own_network_of_a_task_is_plain_training_from_its_own_start(net, tmp_path):
    task, recipe = make_task(), dataclasses.replace(PLAIN, ladder=STEPS, goal="baseline", retrain=QUICK)
    start = pae.init(net, stage_key(KEY, "a", "init"))
    own, value = own_network(net, task, recipe, tmp_path)
    same_network(own, by_hand(net, start, task, PLAIN))
    assert pae.baseline(net, task, recipe, key=KEY, progress=False) == value


def test_an_own_network_drawn_anew_trains_as_a_whole_and_a_given_one_the_parts_of_the_recipe(
    net, vector_module, bits, state_facts, tmp_path
):
    train = dataclasses.replace(QUICK, parts=("shared", "head"))
    task, recipe = make_task(), dataclasses.replace(PLAIN, train=train, local_init="newest")
    started = pae.from_variables(net, vector_module().init(KEY, jnp.zeros((1, 4)), train=False))
    given, _ = own_network(net, task, recipe, tmp_path / "given", start=started)
    assert bits(given.tasks["a"].local) == bits(started.local)
    assert bits(given.shared) != bits(started.shared)
    drawn, _ = own_network(net, task, recipe, tmp_path / "drawn")
    whole, _ = own_network(net, task, dataclasses.replace(recipe, train=QUICK), tmp_path / "whole")
    assert state_facts(drawn) == state_facts(whole)


def test_packnet_is_cpg_with_all_picks_on(net, learn_all, assert_same):
    """Sharing "picked" with scores that are never trained sees all older weights, as sharing "all" does."""
    tasks = [make_task("a", 0), make_task("b", 1), make_task("c", 2)]
    recipe = dataclasses.replace(ONE_SHOT, allow_empty=True)
    packnet = learn_all(tasks, recipe).state
    cpg = learn_all(tasks, dataclasses.replace(recipe, sharing="picked")).state
    assert_same(cpg.owner, packnet.owner)
    same_numbers(cpg.shared, packnet.shared)
    for task in tasks:
        one, other = cpg.tasks[task.name], packnet.tasks[task.name]
        same_numbers((one.local, one.head), (other.local, other.head))
        x = task.test[0]
        same_numbers(pae.predict(net, cpg, task.name, x), pae.predict(net, packnet, task.name, x))
        assert_same(pae.masks(cpg, task.name), pae.masks(packnet, task.name))


def test_piggyback_leaves_the_first_backbone_as_it_is_and_stores_picks(learn_all, assert_same, bits):
    picks = Rate(0.02)
    recipe = Recipe(
        "piggyback",
        Phase(4, picks, Adam(), pick_rate=picks, parts=("head",)),
        8,
        sharing="picked",
        local_init="newest",
        allow_empty=True,
        first=PLAIN,
    )
    state = learn_all([make_task("a", 0), make_task("b", 1), make_task("c", 2)], recipe).state
    assert all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(state.owner))
    for name in "bc":
        assert_same(state.tasks[name].local, state.tasks["a"].local)
        assert state.tasks[name].sharing == "picked"
    assert state.tasks["a"].pick is None
    assert bits(state.tasks["b"].pick) != bits(state.tasks["c"].pick)
    assert not all(np.asarray(leaf).all() for leaf in jax.tree.leaves(state.tasks["c"].pick))


def test_supsup_wortsman_et_al_2020_learns_masks_of_random_weights_that_never_change(net, learn, learn_all, empty):
    """Every task uses the stated share of every leaf; the network without random weights of its own is refused."""
    recipe = pae.recipes.supsup(0.5)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, epochs=3), batch_size=8)
    with pytest.raises(pae.ArgumentError, match="picks among older weights, and the network has none"):
        learn(empty, make_task(), recipe)
    random = pae.freeze(pae.pack(net, empty, "random", head=None, key=KEY), "random")
    state = learn_all([make_task("a", 0), make_task("b", 1)], recipe, state=random).state
    for name in ("a", "b"):
        for pick in jax.tree.leaves(state.tasks[name].pick):
            assert int(np.asarray(pick).sum()) == pick.size // 2
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(
        *(jax.tree.leaves(state.tasks[name].pick) for name in ("a", "b")), strict=True))  # fmt: skip
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(
        *map(jax.tree.leaves, (state.shared, empty.shared)), strict=True))  # fmt: skip
    pae.verify(state)


@pytest.mark.parametrize("reuse", [False, True])
def test_small_tasks_grow_a_pretrained_network_and_change_nothing_of_it(net, learn_all, empty, reuse):
    """Each task finds no free weight, so the network grows; the task takes what is new, and its own norms."""
    recipe = pae.recipes.pretrained(step=0.6, reuse=reuse)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, epochs=2), batch_size=8)
    start = pae.freeze(pae.pack(net, empty, "pretrained", head=None, key=KEY), "pretrained")
    tasks = [make_task("a", 0), make_task("b", 1)]
    before = np.asarray(pae.predict(net, start, "pretrained", tasks[0].val[0]))
    result = learn_all(tasks, recipe, state=start)
    state = result.state
    assert [outcome.status for outcome in result.outcomes] == [pae.Status.LEARNED] * 2
    widths = [state.tasks[name].width for name in ("pretrained", "a", "b")]
    assert widths == sorted(set(widths))
    assert {state.tasks[name].sharing for name in "ab"} == {"all" if reuse else "first"}
    assert all((np.asarray(leaf) > 0).all() for leaf in jax.tree.leaves(state.owner))
    assert np.asarray(pae.predict(net, state, "pretrained", tasks[0].val[0])).tobytes() == before.tobytes()
    pae.verify(state)


def subnetworks(recipe, epochs=3):
    """A published recipe of subnetworks, short and fast enough for a few examples."""

    def short(phase):
        picks = None if phase.pick_rate is None else Rate(0.03)
        return dataclasses.replace(phase, epochs=epochs, rate=Rate(0.03), pick_rate=picks)

    first = None if recipe.head_first is None else short(recipe.head_first)
    return dataclasses.replace(recipe, train=short(recipe.train), head_first=first, batch_size=8)


def uses(state, task):
    """Return per leaf which weights a task sees, and the owners, on the host."""
    pairs = zip(jax.tree.leaves(pae.masks(state, task)), jax.tree.leaves(state.owner), strict=True)
    return [(np.asarray(seen), np.asarray(owner)) for seen, owner in pairs]


@pytest.mark.parametrize("make", [pae.recipes.wsn, pae.recipes.exssnet], ids=["wsn", "exssnet"])
def test_wsn_kang_et_al_2022_and_exssnet_yadav_bansal_2023_use_the_top_share_of_each_leaf_and_own_its_unused_part(
    net, learn_all, make, bits
):
    """Older weights are used again and never changed, so no task forgets; free is what no task uses."""
    tasks = [make_task(name, seed) for seed, name in enumerate("abc")]
    stream = learn_all(tasks, subnetworks(make(0.4)))
    state, used = stream.state, None
    for task in "abc":
        masks = uses(state, task)
        used = [np.zeros_like(seen) for seen, _ in masks] if used is None else used
        number = state.tasks[task].id
        for position, (seen, owner) in enumerate(masks):
            assert int(seen.sum()) == round(0.4 * seen.size)
            np.testing.assert_array_equal(owner == number, seen & ~used[position])
            used[position] = used[position] | seen
    for position, (_, owner) in enumerate(uses(state, "c")):
        np.testing.assert_array_equal(owner > 0, used[position])
    reused = sum(int((seen & (owner < 3)).sum()) for seen, owner in uses(state, "c"))
    assert reused > 0 and pae.free_fraction(state) > 0
    assert stream.matrix.forgetting() == 0.0
    first = learn_all(tasks[:1], subnetworks(make(0.4))).state
    assert bits(pae.predict(net, first, "a", tasks[0].test[0])) == bits(pae.predict(net, state, "a", tasks[0].test[0]))
    pae.verify(state)
    pae.check(state, net)


def test_exssnet_yadav_bansal_2023_finds_the_mask_on_random_weights_and_then_trains_those_of_no_older_task(
    net, learn_all, learn
):
    recipe = subnetworks(pae.recipes.exssnet(0.4))
    first = learn_all([make_task("a", 0)], recipe).state
    mask_only = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, epochs=0))
    masked, trained = (learn(first, make_task("b", 1), one).state for one in (mask_only, recipe))
    packed = pae.pack(net, first, "b", head=2, key=KEY, weight_init="fresh")
    drawn = {float(w) for leaf in jax.tree.leaves(first.shared) for w in np.asarray(leaf).ravel()}
    moved = 0
    for (seen, owner), (again, _), before, after in zip(
        uses(masked, "b"), uses(trained, "b"), *(jax.tree.leaves(s.shared) for s in (masked, trained)), strict=True
    ):
        np.testing.assert_array_equal(seen, again)  # the second phase does not train the scores
        before, after = np.asarray(before), np.asarray(after)
        np.testing.assert_array_equal(before[owner != 2], after[owner != 2])
        moved += int((before != after)[owner == 2].sum())
    assert moved > 10
    assert pae.free_fraction(packed) == 0.0 and len(drawn) > 10


def test_wsn_goes_on_with_older_weights_alone_where_no_weight_is_free(learn, full):
    outcome = learn(full, make_task("d"), subnetworks(pae.recipes.wsn(0.4)))
    assert (outcome.status, outcome.records[0].weights) == (pae.Status.LEARNED, 0)
    assert all(int(seen.sum()) == round(0.4 * seen.size) for seen, _ in uses(outcome.state, "d"))


def test_a_run_of_subnetworks_is_resumed_with_the_same_bits(net, learn_all, state_facts, tmp_path):
    tasks, recipe = [make_task("a", 0), make_task("b", 1)], subnetworks(pae.recipes.exssnet(0.4), 1)
    whole = learn_all(tasks, recipe, run=pae.Run(tmp_path / "run")).state
    again = learn_all(tasks, recipe, run=pae.Run(tmp_path / "run")).state
    assert state_facts(again) == state_facts(whole)
    assert pae.free_fraction(whole) > 0
    alone = pae.baseline(net, tasks[0], recipe, key=KEY)  # an own network has no picks to train first
    assert 0.0 <= alone <= 1.0


@pytest.mark.parametrize("by", ["gradient", "key"])
def test_with_a_budget_a_task_owns_its_share_and_learns(net, learn, frozen, by):
    recipe = dataclasses.replace(PLAIN, budget=0.1, budget_by=by)
    state = learn(frozen, make_task("b"), recipe).state
    assert sum(int((owner == 2).sum()) for _, owner in uses(state, "b")) == 8
    trials = {
        way: learn(frozen, make_task("b"), dataclasses.replace(recipe, budget_by=way)) for way in ("gradient", "key")
    }
    owners = [np.concatenate([owner.ravel() for _, owner in uses(one.state, "b")]) for one in trials.values()]
    assert (owners[0] != owners[1]).any()


def test_the_rungs_of_a_ladder_of_own_weights_are_shares_of_what_the_task_owned_at_first(learn, frozen):
    ladder = Ladder((0.5, 0.75), PLAIN.train, ramp=0.0, of="own", choose="last")
    state = learn(frozen, make_task("b"), dataclasses.replace(PLAIN, budget=0.4, ladder=ladder)).state
    assert sum(int((owner == 2).sum()) for _, owner in uses(state, "b")) == 8


def test_the_gradient_of_a_budget_is_that_of_the_tasks_own_first_batches(net, learn, frozen, monkeypatch):
    found = []
    scores_of = stage_maker.scores_of
    monkeypatch.setattr(stage_maker, "scores_of", lambda *a: found.append(scores_of(*a)) or found[-1])
    state = learn(frozen, make_task("b"), dataclasses.replace(PLAIN, budget=0.1)).state
    claimed = [
        np.asarray(s)[owner == 2] for s, (_, owner) in zip(jax.tree.leaves(found[0]), uses(state, "b"), strict=True)
    ]
    left = [
        np.asarray(s)[owner == 0] for s, (_, owner) in zip(jax.tree.leaves(found[0]), uses(state, "b"), strict=True)
    ]
    assert np.concatenate(claimed).min() >= np.concatenate(left).max()


def test_a_run_in_memory_and_a_run_in_a_folder_are_the_same(learn_all, state_facts, tmp_path):
    tasks = [make_task("a", 0), make_task("b", 1)]
    recipe = Recipe("pae", QUICK, 8, QUICK, STEPS, QUICK, goal="baseline", expansion=Expansion(0.5, 1.5))
    memory = learn_all(tasks, recipe)
    folder = learn_all(tasks, recipe, run=pae.Run(tmp_path))
    assert state_facts(folder.state) == state_facts(memory.state)
    for one, other in zip(folder.outcomes, memory.outcomes, strict=True):
        assert dataclasses.replace(one, state=None) == dataclasses.replace(other, state=None)
    np.testing.assert_array_equal(folder.matrix.values, memory.matrix.values)


def contrast(features, y):
    """The mean distance of pairs: a function of the whole batch."""
    pairs = jnp.abs(features[:, None, 0] - features[None, :, 0])
    return jnp.where(y[:, None] == y[None, :], pairs, -0.1 * pairs).mean()


def test_an_own_loss_of_examples_or_of_the_batch_trains_and_the_accuracy_is_measured_all_the_same(learn, net, empty):
    def hinge(logits, y):
        return jax.nn.relu(1.0 - (2.0 * y - 1.0) * (logits[:, 1] - logits[:, 0]))

    for loss, per in ((hinge, "example"), (contrast, "batch")):
        task = make_task(loss=loss, loss_per=per)
        outcome = learn(empty, task, dataclasses.replace(PLAIN, goal=0.0, ladder=STEPS))
        assert outcome.status is pae.Status.GOAL_MET
        assert outcome.value == pae.evaluate(net, outcome.state, "a", task.val)["accuracy"]
        rows = [row for record in outcome.records for row in record.history]
        assert all({"loss", "accuracy", "val_loss", "val_accuracy"} <= row.keys() for row in rows)
        assert rows[-1]["loss"] < rows[0]["loss"]
    with pytest.raises(pae.DataError, match="loss_per='batch'"):
        learn(empty, make_task(loss=contrast), PLAIN)


@pytest.mark.parametrize("local_init", ["backbone", "fresh", "newest"])
def test_local_variables_start_as_the_recipe_says_and_those_of_the_first_task_as_the_backbones(
    learn_all, empty, bits, local_init
):
    pretrained = empty.replace(local=jax.tree.map(lambda leaf: leaf + 0.5, empty.local))
    idle = Recipe("idle", NONE, local_init=local_init, allow_empty=True)
    recipe = dataclasses.replace(idle, first=dataclasses.replace(idle, train=QUICK))
    state = learn_all([make_task("a", 0), make_task("b", 1)], recipe, state=pretrained).state
    # Drawn anew, biases and norms start at constants, as those of the empty network did.
    trees = {"backbone": pretrained.local, "fresh": empty.local, "newest": state.tasks["a"].local}
    assert len({str(bits(tree)) for tree in trees.values()}) == 3
    assert bits(state.tasks["b"].local) == bits(trees[local_init])
    assert bits(state.local) == bits(pretrained.local)
    alone = learn_all([make_task("a", 0)], idle, state=pretrained).state
    assert bits(alone.tasks["a"].local) == bits(pretrained.local)


# Goals


def test_the_goal_baseline_is_the_validation_metric_of_the_own_network(net, learn, empty):
    recipe = dataclasses.replace(PLAIN, goal="baseline")
    outcome = learn(empty, make_task(), recipe)
    assert outcome.goal == pae.baseline(net, make_task(), recipe, key=KEY, progress=False)


def test_cpg_hung_et_al_2019_goals_may_be_those_of_own_networks_started_from_earlier_tasks(
    net, learn, second, state_facts
):
    """Mean and maximum over the earlier tasks; each own network starts from what an earlier task computes with."""
    state, task = pae.freeze(second, "b"), make_task("c", 2)
    finetune = Phase(1, Rate(0.02))
    starts = [
        pae.from_variables(net, pae.task_variables(net, state, name)["backbone"], state.width) for name in ("a", "b")
    ]
    alone = dataclasses.replace(PLAIN, train=finetune)
    values = [pae.baseline(net, task, alone, key=KEY, start=start) for start in starts]
    for goal, expected in (("finetune_average", np.mean(values)), ("finetune_best", max(values))):
        recipe = dataclasses.replace(PLAIN, goal=goal, finetune=finetune, allow_empty=True, expansion=None)
        assert learn(state, task, recipe).goal == pytest.approx(expected)


def test_a_goal_that_is_given_is_taken_and_no_own_network_trained(learn_all, tmp_path):
    recipe = dataclasses.replace(PLAIN, goal="baseline")
    stream = learn_all([make_task("a"), make_task("b", 1)], recipe, goals={"b": 0.25}, run=pae.Run(tmp_path))
    assert stream.outcomes[1].goal == 0.25
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["01-a", "02-b", "baseline-a"]


def test_the_own_network_is_trained_once_and_then_only_its_record_is_read(net, tmp_path, monkeypatch):
    task, recipe, run = make_task(), dataclasses.replace(PLAIN, goal="baseline"), pae.Run(tmp_path)
    value = pae.baseline(net, task, recipe, key=KEY, run=run, progress=False)
    monkeypatch.setattr(stage_maker, "trained", None)
    monkeypatch.setattr(task_folder, "load", None)
    assert pae.baseline(net, task, recipe, key=KEY, run=pae.Run(tmp_path), progress=False) == value


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a run"])
def test_an_own_network_whose_metric_is_not_finite_is_no_goal(learn, empty, tmp_path, value, kept):
    recipe, task = dataclasses.replace(IDLE, goal="baseline"), make_task(metric=measured_by(lambda state: value, "auc"))
    with pytest.raises(pae.ArgumentError, match=f"goal of task 'a' is its own network's 'auc', which is {value}"):
        learn(empty, task, recipe, run=pae.Run(tmp_path) if kept else None)


def test_an_own_network_does_not_start_from_one_with_tasks(net, frozen, no_training):
    with pytest.raises(pae.ArgumentError, match="start has the tasks a, and a task's own network has none: pass "):
        pae.baseline(net, make_task("b"), PLAIN, key=KEY, start=frozen)
    start = pae.from_variables(net, pae.task_variables(net, frozen, "a")["backbone"], frozen.tasks["a"].width)
    assert not start.tasks


def test_an_own_network_that_diverges_is_an_error(net):
    recipe = dataclasses.replace(PLAIN, train=DIVERGING)
    with pytest.raises(pae.ArgumentError, match="own network of task 'a' diverged"):
        pae.baseline(net, make_task(), recipe, key=KEY, progress=False)


def test_the_first_task_may_have_a_recipe_of_its_own(learn_all):
    other = dataclasses.replace(PLAIN, name="first", ladder=Ladder((0.5,), NONE, ramp=0.0, choose="last"))
    stream = learn_all([make_task("a"), make_task("b", 1)], dataclasses.replace(PLAIN, first=other))
    assert [steps_of(outcome) for outcome in stream.outcomes] == [["0-trained", "0-pruned-0.500"], ["0-trained"]]


# Streams


def test_the_matrix_holds_the_test_metric_of_every_task_after_each_one(net, learn_all):
    tasks = [make_task(name, i) for i, name in enumerate("abc")]
    stream = learn_all(tasks, ONE_SHOT)
    assert stream.matrix.tasks == ("a", "b", "c")
    expected = [pae.evaluate(net, stream.state, task.name, task.test)["accuracy"] for task in tasks]
    for i in range(3):
        np.testing.assert_array_equal(stream.matrix.values[i, : i + 1], expected[: i + 1])
        assert np.isnan(stream.matrix.values[i, i + 1 :]).all()
    assert stream.matrix.forgetting() == 0.0
    assert [outcome.test for outcome in stream.outcomes] == expected


def test_the_matrix_leaves_out_tasks_without_test_data_or_whose_metric_is_no_accuracy(learn_all):
    error = measured_by(lambda state: 0.5, "error", higher_is_better=False)
    score = measured_by(lambda state: 17.0, "decibel")
    tasks = [
        make_task("a", 0),
        make_task("b", 1, test=None),
        make_task("c", 2, metric=error),
        make_task("d", 3, metric=score),
        make_task("e", 0),
    ]
    stream = learn_all(tasks, dataclasses.replace(ONE_SHOT, allow_empty=True))
    assert stream.matrix.tasks == ("a", "e")
    assert [outcome.test is None for outcome in stream.outcomes] == [False, True, False, False, False]
    assert stream.outcomes[3].test == 17.0
    assert stream.matrix.forgetting() == 0.0


def test_a_stream_ends_at_a_task_that_cannot_be_added(learn_all):
    stream = learn_all([make_task("a"), make_task("b", 1), make_task("c", 2)], PLAIN)
    assert [outcome.status for outcome in stream.outcomes] == [pae.Status.LEARNED, pae.Status.NO_CAPACITY]
    assert list(stream.state.tasks) == ["a"]
    assert stream.matrix.tasks == ("a",)


def test_a_stream_of_no_tasks_is_no_change(learn_all, empty):
    stream = learn_all([], PLAIN)
    assert stream.state is empty
    assert (stream.outcomes, stream.matrix) == ((), None)


def test_each_task_knows_how_many_are_still_to_come(learn_all):
    shares = Recipe("equal", NONE, ladder=Ladder((), NONE, ramp=0.0, equal_share=True, choose="last"))
    stream = learn_all([make_task(name, i) for i, name in enumerate("abcd")], shares)
    assert [outcome.pruned for outcome in stream.outcomes] == pytest.approx([3 / 4, 2 / 3, 1 / 2, 0.0], abs=0.03)
    sizes = [row["weights"] for row in pae.report(stream.state).rows]
    assert sizes == pytest.approx([20] * 4 + [0], abs=2)


class Lazy:
    """Tasks that are made when they are asked for; counts whose training data is still in memory by then."""

    def __init__(self, count):
        self.count, self.made, self.alive = count, [], []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        gc.collect()
        self.alive.append(sum(one() is not None for one in self.made))
        if index >= self.count:
            raise IndexError(index)
        task = make_task(f"task {index}", index)
        x = np.array(task.train[0])
        self.made.append(weakref.ref(x))
        return dataclasses.replace(task, train=(x, task.train[1]))


def test_a_stream_may_be_made_task_by_task_and_keeps_no_older_training_data(learn_all):
    tasks = Lazy(4)
    stream = learn_all(tasks, dataclasses.replace(ONE_SHOT, allow_empty=True))
    assert len(stream.outcomes) == 4
    assert max(tasks.alive) <= 1  # that of the task before


def test_a_goal_for_no_task_of_a_stream_made_task_by_task_is_refused_before_training(learn_all, no_training):
    with pytest.raises(pae.ArgumentError, match="goals has 'Task 0', 'task 3', but 1 tasks are to come"):
        learn_all(Lazy(2), ONE_SHOT, goals={"Task 0": 0.5, "task 3": 0.5})


def test_a_network_whose_last_step_spoilt_it_has_diverged(learn, empty):
    recipe = Recipe("r", Phase(1, Rate(1e38), pae.recipes.Sgd(momentum=0.0, weight_decay=0.0), keep="last"), 1000)
    outcome = learn(empty, make_task(), recipe)
    assert outcome.status.name == "DIVERGED"
    assert "a" not in outcome.state.tasks


def test_the_order_of_a_stream_is_given_by_names_or_drawn_by_a_key_and_recorded(learn_all, state_facts, tmp_path):
    tasks = [make_task(name, seed) for seed, name in enumerate("abcd")]
    idle = Recipe("idle", NONE, allow_empty=True)
    run = pae.Run(tmp_path / "run")
    stream = learn_all(tasks, idle, order=["c", "a", "d", "b"], run=run)
    assert [one.task for one in stream.outcomes] == ["c", "a", "d", "b"]
    by_hand = learn_all([tasks[2], tasks[0], tasks[3], tasks[1]], idle)
    assert state_facts(by_hand.state) == state_facts(stream.state)
    learn_all(tasks, idle, order=["c", "a", "d", "b"], run=run)
    for other in (None, ["a", "b", "c", "d"], jax.random.key(0)):
        with pytest.raises(pae.CheckpointError, match=r"the order of tasks was \[2, 0, 3, 1\] .* and is now"):
            learn_all(tasks, idle, order=other, run=run)
    orders = [
        [one.task for one in learn_all(tasks, idle, order=jax.random.key(seed)).outcomes] for seed in (0, 0, 1, 2)
    ]
    plain = pae.Run(tmp_path / "plain")
    learn_all(tasks, idle, run=plain)
    learn_all(tasks, idle, run=plain, order=["a", "b", "c", "d"])
    with pytest.raises(
        pae.CheckpointError, match=r"the order of tasks was \[0, 1, 2, 3\] .* and is now \[3, 2, 1, 0\]"
    ):
        learn_all(tasks, idle, run=plain, order=["d", "c", "b", "a"])
    assert orders[0] == orders[1] and len({*map(tuple, orders)}) > 1
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)


def test_tasks_that_are_made_on_access_are_drawn_in_the_order_of_a_list(learn_all):
    tasks = [make_task(name, seed) for seed, name in enumerate("abcd")]

    class Made:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return tasks[index]

    idle, key = Recipe("idle", NONE, allow_empty=True), jax.random.key(2)
    found = [[one.task for one in learn_all(of, idle, order=key).outcomes] for of in (tasks, Made())]
    assert found[0] == found[1] != ["a", "b", "c", "d"]
    with pytest.raises(pae.ArgumentError, match="order by name needs a list of tasks"):
        learn_all(Made(), idle, order=["a", "b", "c", "d"])


@pytest.mark.parametrize("order", [["a"], ["a", "b", "b"], ["a", "c"], "ab", 3, [1, 0], ["a", "b", "c"]], ids=str)
def test_an_order_that_is_none_of_the_tasks_is_refused_before_anything_is_written(learn_all, order, tmp_path):
    with pytest.raises(pae.ArgumentError, match=r"^order must"):
        learn_all([make_task("a"), make_task("b", 1)], PLAIN, order=order, run=pae.Run(tmp_path / "run"))
    assert list((tmp_path / "run").iterdir()) == []


def test_a_stream_keeps_one_network(learn_all):
    stream = learn_all([make_task("a"), make_task("b", 1)], ONE_SHOT)
    assert all(outcome.state is stream.state for outcome in stream.outcomes)


# Heads


class Hidden(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(nn.relu(nn.Dense(5)(x)))


def nnx_head():
    return nnx.Linear(6, 2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_head_may_be_a_module(learn_all, net, kind, tmp_path, state_facts):
    head = Hidden(2) if kind == "linen" else nnx_head()
    tasks = [make_task("a", 0, head=head), make_task("b", 1)]
    recipe = dataclasses.replace(ONE_SHOT, train=QUICK)
    stream = learn_all(tasks, recipe, run=pae.Run(tmp_path))
    again = learn_all(tasks, recipe, run=pae.Run(tmp_path))
    facts, repeated = state_facts(stream.state), state_facts(again.state)
    assert [facts[0], facts[1], facts[3:]] == [repeated[0], repeated[1], repeated[3:]]
    for task in tasks:
        one, other = (pae.predict(net, s, task.name, task.test[0]) for s in (stream.state, again.state))
        np.testing.assert_array_equal(one, other)


# What goes wrong


@pytest.mark.parametrize("error", [JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_an_error_stays_an_error_and_the_folder_can_be_resumed(
    learn_all, tmp_path, monkeypatch, state_facts, error, number
):
    """Out of memory does not mean that the network is too small."""
    tasks = [make_task("a", 0), make_task("b", 1)]
    calls, trained = [], stage_maker.trained

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise error
        return trained(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stage_maker, "trained", failing)
        with pytest.raises(type(error)):
            learn_all(tasks, ONE_SHOT, run=pae.Run(tmp_path))
    resumed = learn_all(tasks, ONE_SHOT, run=pae.Run(tmp_path))
    assert state_facts(resumed.state) == state_facts(learn_all(tasks, ONE_SHOT).state)


def ages(part):
    return part[0], part[1].astype(np.float32)


def squared(logits, y):
    return (logits[:, 0] - y) ** 2


REGRESSION = {name: ages(getattr(make_task(), name)) for name in ("train", "val", "test")}
CHOOSES = dataclasses.replace(PLAIN, ladder=STEPS, goal=0.5)
WAITS = dataclasses.replace(PLAIN, train=Phase(2, Rate(0.1), plateau=pae.Plateau()))
BATCHES = [(make_task().train[0][:8], make_task().train[1][:8])]
BAD_CALLS = {
    "nearest neighbours of labels that are no classes": (
        pae.ArgumentError,
        {
            "task": make_task(
                "b", train=(np.zeros((8, 4), np.float32), np.zeros(8, np.float32)), loss=lambda o, y: o[:, 0] - y
            ),
            "recipe": Recipe("near", QUICK, 8, sharing="picked", picks_from="nearest"),
        },
    ),
    "no validation data for a goal": (pae.ArgumentError, {"task": make_task("b", val=None), "recipe": CHOOSES}),
    "no validation data for a given goal": (pae.ArgumentError, {"task": make_task("b", val=None), "goal": 0.5}),
    "no validation data for a plateau": (pae.ArgumentError, {"task": make_task("b", val=None), "recipe": WAITS}),
    "no validation data for retraining": (
        pae.ArgumentError,
        {"task": make_task("b", val=None), "recipe": dataclasses.replace(PLAIN, retrain=QUICK)},
    ),
    "a goal NaN": (pae.ArgumentError, {"goal": math.nan}),
    "a goal in words": (pae.ArgumentError, {"goal": "best"}),
    "fewer than no tasks to come": (pae.ArgumentError, {"upcoming": -1}),
    "a name that is taken": (pae.ArgumentError, {"task": make_task("a")}),
    "no classes": (pae.ArgumentError, {"task": make_task("b", head=0)}),
    "a head that is no head": (pae.ArgumentError, {"task": make_task("b", head="two")}),
    "labels outside the head": (pae.DataError, {"task": make_task("b", head=1)}),
    "test data of another shape": (
        pae.StructureError,
        {"task": make_task("b", test=(np.zeros((3, 5), np.float32), np.zeros(3, int)))},
    ),
    "no training data": (pae.ArgumentError, {"task": make_task("b", train=None)}),
    "labels without an accuracy": (
        pae.ArgumentError,
        {"task": make_task("b", head=1, loss=squared, **REGRESSION)},
    ),
    "a ramp over data of unknown length": (
        pae.ArgumentError,
        {"task": make_task("b", train=lambda epoch: iter(BATCHES)), "recipe": CHOOSES},
    ),
    "a rate that falls over data of unknown length": (
        pae.ArgumentError,
        {"task": make_task("b", train=lambda epoch: iter(BATCHES)), "recipe": ONE_SHOT},
    ),
    "no key": (pae.ArgumentError, {"key": 3}),
    "a task in training": (pae.PhaseError, {"state": "packed"}),
    "a network of another model": (pae.StructureError, {"state": "other"}),
    "an empty network of another model": (pae.StructureError, {"state": "other empty"}),
}


@pytest.fixture(scope="module")
def states(frozen, packed):
    other = pae.linen(lambda width: pae.models.MLP(width, (5,)), jnp.zeros((1, 4)))
    start = pae.init(other, KEY)
    full = pae.freeze(pae.pack(other, start, "a", head=2, key=KEY), "a")
    return {"frozen": frozen, "packed": packed, "other": full, "other empty": start}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_input_raises_before_anything_is_trained_or_written(learn, states, what, tmp_path, no_training):
    kind, call = BAD_CALLS[what]
    call = {"state": "frozen", "task": make_task("b"), "recipe": PLAIN} | call
    run = pae.Run(tmp_path)
    with pytest.raises(kind):
        learn(states[call.pop("state")], call.pop("task"), call.pop("recipe"), run=run, **call)
    assert list(tmp_path.iterdir()) == []


def test_the_128th_task_is_refused_before_anything_is_written(learn, frozen, tmp_path, monkeypatch):
    monkeypatch.setattr("pae_jax.lifelong.preconditions.MAX_TASKS", 1)
    with pytest.raises(pae.CapacityError, match="at most 1 tasks"):
        learn(frozen, make_task("b"), PLAIN, run=pae.Run(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_more_tasks_than_a_network_holds_are_refused_before_the_first(learn_all, frozen, monkeypatch, no_training):
    monkeypatch.setattr("pae_jax.lifelong.preconditions.MAX_TASKS", 2)
    with pytest.raises(pae.CapacityError, match="at most 2 tasks; it has 1 and 2 are to come"):
        learn_all([make_task("b"), make_task("c")], PLAIN, state=frozen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": [make_task("a"), make_task("a")]}, "'a' twice"),
        ({"tasks": [make_task("a"), make_task("b", val=None)]}, "'b' has no validation data"),
        ({"goals": {"a": 0.5, "bb": 0.5}}, "goals has 'bb'"),
        ({"goals": {"b": math.nan}}, "goal must be a finite number"),
        (
            {"tasks": [make_task("a"), make_task("b", loss=lambda out, y: out @ y)]},
            "'b', val: the loss fails",
        ),
        ({"tasks": iter([make_task("a")])}, "must be a sequence"),
    ],
)
def test_a_stream_that_would_stop_at_a_later_task_does_not_begin(learn_all, change, message, tmp_path, no_training):
    call = {"tasks": [make_task("a"), make_task("b", 1)]} | change
    with pytest.raises((pae.ArgumentError, pae.DataError), match=message):
        learn_all(call.pop("tasks"), CHOOSES, run=pae.Run(tmp_path), **call)
    assert list(tmp_path.iterdir()) == []


def test_an_own_network_needs_validation_data(net, tmp_path):
    with pytest.raises(pae.ArgumentError, match="no validation data"):
        pae.baseline(net, make_task(val=None), PLAIN, key=KEY, run=pae.Run(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_callers_network_is_left_as_it_is(learn, frozen, state_facts):
    before = state_facts(frozen)
    learn(frozen, make_task("b"), dataclasses.replace(PLAIN, expansion=Expansion(0.5, 1.5), goal=1.0))
    assert state_facts(frozen) == before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


@pytest.mark.parametrize(("fields", "words"), [({"goal": 90}, "goal is 90"), ({"tolerance": 1.0}, "tolerance is 1")])
def test_per_cent_for_a_fraction_is_refused_where_the_metric_is_an_accuracy(fields, words, learn, empty):
    recipe = dataclasses.replace(PLAIN, **{"goal": 0.9, **fields})
    with pytest.raises(pae.ArgumentError, match=words):
        learn(empty, make_task("a"), recipe)


def test_an_outcome_and_a_stream_show_themselves_as_tables(learn_all, tmp_path):
    task, run = make_task("a<b>"), pae.Run(tmp_path)
    stream = learn_all([task], ONE_SHOT, run=run)
    assert repr(stream) == "Stream('a<b>' learned)"
    assert repr(stream.outcomes[0]).startswith("Outcome(a<b>: learned, validation 0.")
    assert repr(task) == "Task('a<b>', head 2, train, val, test data, metric 'accuracy')"
    assert repr(run) == f"Run({str(tmp_path)!r}, keep='frozen')"
    outcome = stream.outcomes[0]._repr_html_()
    assert "a&lt;b&gt;: learned" in outcome and outcome.count("<tr>") == 1 + len(stream.outcomes[0].records)
    whole = stream._repr_html_()
    assert "<script" not in whole and "a&lt;b&gt;" in whole and "Dense_0/kernel" in whole

"""Recipes: every published setting, field by field, and what settings are refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pae_jax as pae
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.recipe import plain
from pae_jax.lifelong.recipes import Adam, Expansion, Ladder, Phase, Rate, Recipe, Sgd

TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EVERYTHING = ("shared", "local", "head")
TORCH_ADAM = Adam(
    b1=0.9, b2=0.999, epsilon=1e-8, epsilon_hat=False, start=0, weight_decay=0.0, decayed=("shared",), decoupled=False
)
NESTEROV = Sgd(momentum=0.9, nesterov=True, weight_decay=4e-5, decayed=("shared",))
CIFAR = Rate(1e-2, drops=((50, 0.1), (80, 0.1)), cosine=False, warmup=0.0)


def phase(epochs, rate, optimizer, plateau=None, keep="best", pick_rate=None, parts=EVERYTHING, lone_pick_rate=None):
    """A phase with every field given, so that a default that changes is noticed."""
    return Phase(epochs, rate, optimizer, plateau, keep, pick_rate, TORCH_ADAM, parts, lone_pick_rate)


def ladder(rungs, phase, ramp, choose, floor=None, of="available", missed="best", prune_last=True):
    return Ladder(rungs, phase, ramp, 10, choose, None, floor, False, of, "leaf", "climb", missed, prune_last, None)


def recipe(name, train, batch_size, **fields):
    """A recipe whose fields are those named here and, for the rest, nothing special."""
    plain_fields = {
        "head_first": None,
        "ladder": None,
        "retrain": None,
        "goal": None,
        "finetune": None,
        "budget": None,
        "budget_by": "gradient",
        "tolerance": 0.0,
        "expansion": None,
        "sharing": "all",
        "picking": None,
        "picks_from": "own",
        "local_init": "backbone",
        "weight_init": "preserve",
        "allow_empty": False,
        "first": None,
    }
    assert fields.keys() <= plain_fields.keys()
    return Recipe(name, train, batch_size, **(plain_fields | fields))


def test_the_fields_of_the_settings_are_those_that_the_tests_below_give():
    """A new field has no published value yet; add it to the functions above and to each recipe."""
    fields = {kind: len(dataclasses.fields(kind)) for kind in (Recipe, Phase, Ladder, Rate, Expansion, Sgd, Adam)}
    assert fields == {Recipe: 19, Phase: 9, Ladder: 14, Rate: 4, Expansion: 3, Sgd: 5, Adam: 9}


def test_pae_has_the_settings_of_the_authors_scripts():
    """Scripts of experiment 1; the growth is that of experiment 2."""
    adam = Adam(b1=0.9, b2=0.999, epsilon=0.1, epsilon_hat=True, start=0, weight_decay=5e-4, decayed=("shared", "head"))
    going_on = dataclasses.replace(adam, start=10_000)
    assert pae.recipes.pae() == recipe(
        "pae",
        phase(500, Rate(0.01), adam, pae.Plateau(patience=15, factor=0.1, stop=2)),
        90,
        ladder=ladder(TENTHS, phase(4, Rate(5e-4), going_on), 1.0, "largest_meeting_goal"),
        goal="baseline",
        expansion=Expansion(step=0.2, maximum=1.2, floor=None),
        local_init="fresh",
        weight_init="zeros",
    )


def test_pae_by_experiment_takes_the_best_of_all_rungs_without_a_goal_and_grows_by_hand():
    """Scripts of both experiments, and of the task that is added to an expanded network."""
    described, first, second = (pae.recipes.pae(experiment=number) for number in (None, 1, 2))
    ladder = dataclasses.replace(described.ladder, choose="best_accuracy")
    assert first == dataclasses.replace(described, goal=None, expansion=None, ladder=ladder)
    longer = dataclasses.replace(ladder, phase=dataclasses.replace(ladder.phase, epochs=5))
    assert second == dataclasses.replace(first, ladder=longer)
    expanded = pae.recipes.pae(experiment=2, expanded=True)
    slower = dataclasses.replace(longer, phase=dataclasses.replace(longer.phase, rate=Rate(2e-4)))
    train = dataclasses.replace(second.train, rate=Rate(0.03))
    assert expanded == dataclasses.replace(second, sharing="first", ladder=slower, train=train)


@pytest.mark.parametrize("options", [{"experiment": 3}, {"experiment": True}, {"expanded": True}])
def test_pae_refuses_another_experiment(options):
    with pytest.raises(ArgumentError, match="experiment"):
        pae.recipes.pae(**options)


def test_packnet_has_the_settings_of_the_cifar_runs():
    assert pae.recipes.packnet() == recipe(
        "packnet",
        phase(100, CIFAR, NESTEROV),
        32,
        ladder=ladder((0.6,), phase(30, Rate(1e-3, ((25, 0.1),)), NESTEROV), 0.0, "last"),
        local_init="newest",
        weight_init="zeros",
        allow_empty=True,
    )


def test_packnet_finegrained_has_the_settings_of_its_authors_scripts():
    """From ImageNet to fine-grained data sets: their scripts for pruning it and for the sequence after it."""
    sgd = Sgd(momentum=0.9, nesterov=False, weight_decay=0.0, decayed=("shared",))
    own = {"of": "own", "prune_last": False}
    halve = ladder((0.5,), phase(10, Rate(1e-4, ((5, 0.1),)), sgd), 0.0, "last", **own)
    kept = ("shared", "head")
    found = pae.recipes.packnet_finegrained()
    assert found == recipe(
        "packnet_finegrained",
        phase(20, Rate(1e-3, ((10, 0.1),)), sgd, parts=kept),
        32,
        ladder=ladder((0.75,), phase(10, Rate(1e-4), sgd, parts=kept), 0.0, "last", **own),
        local_init="newest",
        weight_init="zeros",
        allow_empty=True,
        first=recipe("packnet_finegrained", phase(0, Rate(1e-3), sgd), 32, ladder=halve),
    )
    assert pae.recipes.packnet_finegrained(found.first).first is found.first


def test_cpg_has_the_settings_of_the_cifar_runs():
    assert pae.recipes.cpg() == recipe(
        "cpg",
        phase(
            100,
            CIFAR,
            NESTEROV,
            pick_rate=Rate(5e-4, ((50, 0.2), (70, 0.0))),
            lone_pick_rate=Rate(5e-4, ((50, 0.2),)),
        ),
        32,
        ladder=ladder(
            (*TENTHS, 0.95), phase(20, Rate(1e-3), NESTEROV), 4.0, "largest_meeting_goal", floor=0.95, missed="largest"
        ),
        retrain=phase(30, Rate(1e-3), NESTEROV, pae.Plateau(patience=5, factor=0.1, stop=1), pick_rate=Rate(1e-4)),
        goal="baseline",
        finetune=phase(100, Rate(5e-3, ((50, 0.1), (80, 0.1))), NESTEROV),
        expansion=Expansion(step=0.5, maximum=1.5, floor=0.95),
        sharing="picked",
        local_init="newest",
        weight_init="zeros",
        allow_empty=True,
    )
    assert pae.Picking() == pae.Picking(threshold=0.005, initial=0.01, ternary=False)  # what picking=None takes


@pytest.mark.parametrize("ternary", [False, True])
def test_piggyback_has_the_settings_of_its_authors_scripts(ternary):
    rate = Rate(1e-4, ((15, 0.1),))
    assert pae.recipes.piggyback(ternary=ternary) == recipe(
        "piggyback",
        phase(30, rate, TORCH_ADAM, pick_rate=rate, parts=("head",)),
        32,
        sharing="picked",
        picking=pae.Picking(threshold=0.005, initial=0.01, ternary=ternary),
        local_init="newest",
        allow_empty=True,
        first=pae.recipes.finetune(),
    )
    own = pae.recipes.finetune(3)
    assert pae.recipes.piggyback(own).first is own


def test_the_rate_warms_up_linearly_and_then_follows_the_cosine():
    rate = Rate(0.1, warmup=0.5).schedule(epochs=2, steps=4)
    np.testing.assert_allclose([rate(step) for step in range(4)], [0.1 / 3, 0.2 / 3, 0.1, 0.1])
    cosine = Rate(0.1, cosine=True).schedule(epochs=2, steps=4)
    both = Rate(0.1, cosine=True, warmup=0.5).schedule(epochs=2, steps=4)
    np.testing.assert_allclose([both(step) for step in range(2, 8)], [cosine(step) for step in range(2, 8)])
    assert not Rate(0.1, warmup=0.5).constant


def test_decoupled_decay_is_that_of_adamw():
    params = {"shared": jnp.asarray([[1.0, -2.0]]), "local": jnp.asarray([3.0])}
    grads = {"shared": jnp.asarray([[0.3, 0.1]]), "local": jnp.asarray([-1.0])}
    own = Adam(0.01, weight_decay=0.1, decayed=("shared",), decoupled=True).transformation()
    mask = {"shared": True, "local": False}
    plain = optax.adamw(0.01, weight_decay=0.1, mask=mask)
    found, wanted = (tx.update(grads, tx.init(params), params)[0] for tx in (own, plain))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_supsup_has_the_settings_of_its_authors_scripts():
    """GG on 20 tasks of CIFAR-100; the share is one of those that they tried."""
    rate = Rate(1e-3, drops=(), cosine=True)
    scores = dataclasses.replace(TORCH_ADAM, weight_decay=1e-4, decayed=("pick",))
    train = dataclasses.replace(
        phase(250, rate, TORCH_ADAM, pick_rate=rate, parts=("local", "head")), pick_optimizer=scores
    )
    assert pae.recipes.supsup() == recipe(
        "supsup", train, 128, sharing="picked", picking=pae.Picking(top=0.16), allow_empty=True
    )


def test_wsn_has_the_settings_of_its_authors_scripts():
    """CIFAR-100 in 10 tasks; the share is one of those that they tried; 1e-3 halved ten times falls below 1e-6."""
    rate = Rate(1e-3, drops=(), cosine=False)
    plateau = pae.Plateau(patience=6, factor=0.5, stop=10, pick_factor=None)
    picking = pae.Picking(threshold=0.005, initial=0.01, ternary=False, top=0.5, own=True)
    assert pae.recipes.wsn() == recipe(
        "wsn",
        phase(200, rate, TORCH_ADAM, plateau, pick_rate=rate),
        64,
        sharing="picked",
        picking=picking,
        weight_init="fresh",
        allow_empty=True,
    )
    assert 1e-3 * plateau.factor**plateau.stop < 1e-6 < 1e-3 * plateau.factor ** (plateau.stop - 1)


def test_exssnet_has_the_settings_of_its_authors_code():
    rate = Rate(1e-3, drops=(), cosine=True)
    assert pae.recipes.exssnet() == recipe(
        "exssnet",
        phase(50, rate, TORCH_ADAM),
        64,
        head_first=phase(50, rate, TORCH_ADAM, pick_rate=rate, parts=("local", "head")),
        sharing="picked",
        picking=pae.Picking(threshold=0.005, initial=0.01, ternary=False, top=0.1, own=True),
        picks_from="nearest",
        weight_init="fresh",
        allow_empty=True,
    )


def test_finetune_has_the_settings_of_the_baselines():
    assert pae.recipes.finetune() == recipe("finetune", phase(100, CIFAR, NESTEROV), 32)
    head = phase(3, Rate(1e-2), NESTEROV, keep="last", parts=("head",))
    assert pae.recipes.finetune(head_epochs=3) == recipe("finetune", phase(100, CIFAR, NESTEROV), 32, head_first=head)


def test_the_rates_of_cpg_fall_after_50_70_and_80_epochs():
    train = pae.recipes.cpg().train
    weights, picks = train.rate.schedule(100, 79), train.pick_rate.schedule(100, 79)
    at = [0, 50 * 79 - 1, 50 * 79, 70 * 79 - 1, 70 * 79, 80 * 79 - 1, 80 * 79]
    assert [weights(step) for step in at] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-3, 1e-3, 1e-4])
    assert [picks(step) for step in at] == pytest.approx([5e-4, 5e-4, 1e-4, 1e-4, 0.0, 0.0, 0.0])


def test_a_cosine_rate_falls_to_0_at_the_end_of_the_phase():
    rate = Rate(0.2, cosine=True).schedule(epochs=4, steps=25)
    assert rate(0) == 0.2
    assert rate(50) == pytest.approx(0.1)
    assert rate(100) == pytest.approx(0.0)
    assert not Rate(0.2, cosine=True).constant
    assert Rate(0.2).constant


def test_after_training_every_task_could_be_pruned_packnet_counts_own_and_available_weights_alike(packed):
    one, other = (pae.prune(packed, "a", 0.6, of=of) for of in ("available", "own"))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one.owner, other.owner)))


@pytest.mark.parametrize("epsilon_hat", [False, True])
def test_the_pruning_of_pae_takes_steps_without_the_slow_start_of_its_adam(epsilon_hat):
    """After 10000 steps the bias correction is 1, and the first step is b1's share of the gradient over epsilon."""
    gradient = {"shared": {"w": jnp.full((2, 2), 1e-3)}}
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    steps = {}
    for start in (0, 10_000):
        tx = Adam(epsilon=0.1, epsilon_hat=epsilon_hat, start=start).transformation()
        updates, _ = tx.update(gradient, tx.init(zeros), zeros)
        steps[start] = -float(updates["shared"]["w"][0, 0])
    root = math.sqrt(0.001) * 1e-3  # of the mean square after one step
    assert steps[10_000] == pytest.approx(0.1 * 1e-3 / (root + 0.1), rel=1e-3)
    # At step 1 the first form has no slow start; the second takes sqrt(1 - b2) of the step.
    first = 1e-3 / (1e-3 + 0.1) if not epsilon_hat else math.sqrt(0.001) * 1e-3 / (root + 0.1)
    assert steps[0] == pytest.approx(first, rel=1e-3)


REFUSED = {
    "negative epochs": lambda: Phase(-1, Rate(0.1)),
    "half epochs": lambda: Phase(1.5, Rate(0.1)),
    "a rate that is a number": lambda: Phase(1, 0.1),
    "a pick rate that is a number": lambda: Phase(1, Rate(0.1), pick_rate=0.1),
    "an optax chain for an optimizer": lambda: Phase(1, Rate(0.1), optimizer=optax.sgd(0.1)),
    "unknown parts": lambda: Phase(1, Rate(0.1), parts=("norms",)),
    "nothing to train": lambda: Phase(1, Rate(0.1), parts=()),
    "keep of no kind": lambda: Phase(1, Rate(0.1), keep="first"),
    "a plateau without the best epoch": lambda: Phase(1, Rate(0.1), plateau=pae.Plateau(), keep="last"),
    "negative rate": lambda: Rate(-0.1),
    "rate NaN": lambda: Rate(math.nan),
    "a cosine that is a text": lambda: Rate(0.1, cosine="false"),
    "nesterov that is a text": lambda: Sgd(nesterov="false"),
    "epsilon-hat that is a text": lambda: Adam(epsilon_hat="false"),
    "decoupled decay that is a text": lambda: Adam(decoupled="false"),
    "equal shares that are a text": lambda: Ladder((0.5,), Phase(1, Rate(0.1)), equal_share="false"),
    "a text for whether to prune the last task": lambda: Ladder((0.5,), Phase(1, Rate(0.1)), prune_last="false"),
    "a text for whether a task may be empty": lambda: Recipe("r", Phase(1, Rate(0.1)), allow_empty="false"),
    "ternary picks that are a text": lambda: pae.Picking(ternary="false"),
    "an expanded network that is a text": lambda: pae.recipes.pae(2, expanded="false"),
    "the reuse of tasks that is a text": lambda: pae.recipes.pretrained(reuse="false"),
    "negative factor": lambda: Rate(0.1, ((5, -0.1),)),
    "drops that are one pair": lambda: Rate(0.1, drops=(50, 0.1)),
    "a drop without a factor": lambda: Rate(0.1, drops=((50,),)),
    "parts of no kind": lambda: Phase(1, Rate(0.1), parts=None),
    "a plateau that is a number": lambda: Phase(1, Rate(0.1), plateau=5),
    "an optimizer class": lambda: Phase(1, Rate(0.1), optimizer=Adam),
    "a rate in the optimizer": lambda: Phase(1, Rate(0.1), optimizer=Adam(learning_rate=0.1)),
    "a rate in the optimizer of picks": lambda: Phase(1, Rate(0.1), pick_optimizer=Sgd(learning_rate=0.1)),
    "decay of no kind": lambda: Sgd(decayed=None),
    "no rung": lambda: Ladder((), QUICK),
    "falling rungs": lambda: Ladder((0.5, 0.3), QUICK),
    "a rung twice": lambda: Ladder((0.5, 0.5), QUICK),
    "rungs of one name": lambda: Ladder((0.3331, 0.3332), QUICK),
    "a rung above 1": lambda: Ladder((0.5, 1.5), QUICK),
    "a ramp longer than its phase": lambda: Ladder((0.5,), QUICK, ramp=2.5),
    "a ramp NaN": lambda: Ladder((0.5,), QUICK, ramp=math.nan),
    "a ramp of own weights": lambda: Ladder((0.5,), QUICK, of="own"),
    "a way to choose of no kind": lambda: Ladder((0.5,), QUICK, choose="worst"),
    "no miss at all": lambda: Ladder((0.5,), QUICK, misses=0),
    "a negative gain": lambda: Ladder((0.5,), QUICK, gain=-0.1),
    "a gain without a goal": lambda: Ladder((0.5,), QUICK, choose="last", gain=0.1),
    "releases every 0 steps": lambda: Ladder((0.5,), QUICK, every=0),
    "a scope of no kind": lambda: Ladder((0.5,), QUICK, scope="layer"),
    "no step": lambda: Expansion(0.0, 2.0),
    "a step NaN": lambda: Expansion(math.nan, 2.0),
    "a step that rounding swallows": lambda: Expansion(1e-12, 2.0),
    "a maximum below 1": lambda: Expansion(0.5, 0.9),
    "no maximum": lambda: Expansion(0.5, math.inf),
    "an unknown goal": lambda: Recipe("r", QUICK, goal="best"),
    "a goal NaN": lambda: Recipe("r", QUICK, goal=math.nan),
    "a goal that is a bool": lambda: Recipe("r", QUICK, goal=True),
    "negative tolerance": lambda: Recipe("r", QUICK, tolerance=-0.1),
    "no examples per batch": lambda: Recipe("r", QUICK, batch_size=0),
    "sharing of no kind": lambda: Recipe("r", QUICK, sharing="some"),
    "local variables of no kind": lambda: Recipe("r", QUICK, local_init="oldest"),
    "a budget of nothing": lambda: Recipe("r", QUICK, budget=0.0),
    "a budget by no kind": lambda: Recipe("r", QUICK, budget=0.1, budget_by="magnitude"),
    "picks from no kind": lambda: Recipe("r", QUICK, sharing="picked", picks_from="best"),
    "picks from a task without picks": lambda: Recipe("r", QUICK, picks_from="nearest"),
    "picks' settings without picks": lambda: Recipe("r", QUICK, picking=pae.Picking()),
    "reclaimed weights of no kind": lambda: Recipe("r", QUICK, weight_init="ones"),
    "a ladder that chooses by no goal": lambda: Recipe("r", QUICK, ladder=Ladder((0.5,), QUICK)),
    "a first recipe of a first recipe": lambda: Recipe("r", QUICK, first=Recipe("f", QUICK, first=Recipe("g", QUICK))),
}
QUICK = Phase(2, Rate(0.1))


@pytest.mark.parametrize("what", REFUSED)
def test_bad_settings_are_refused_where_they_are_made(what):
    with pytest.raises(pae.ArgumentError):
        REFUSED[what]()


def test_the_bounds_themselves_are_accepted():
    Phase(0, Rate(0.0))
    Ladder((0.0, 1.0), QUICK, ramp=2.0)
    Ladder((), QUICK, equal_share=True, misses=1)
    Expansion(1e-6, 1.0)
    Recipe("r", QUICK, goal=0, tolerance=0)


# As JSON


@pytest.mark.parametrize(
    "name", ["pae", "packnet", "cpg", "piggyback", "supsup", "wsn", "exssnet", "pretrained", "finetune"]
)
def test_a_recipe_as_json_is_strict_json_and_says_every_field(name):
    found = getattr(pae.recipes, name)().to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.keys() - {"kind"} == {field.name for field in dataclasses.fields(Recipe)}
    assert found["train"].keys() - {"kind"} == {field.name for field in dataclasses.fields(Phase)}


def test_recipes_that_differ_in_any_number_have_other_json():
    base = pae.recipes.cpg()
    steeper = dataclasses.replace(base.train, rate=Rate(1e-2, ((50, 0.1), (80, 0.2))))
    decayed = dataclasses.replace(base.train, optimizer=dataclasses.replace(NESTEROV, weight_decay=5e-5))
    others = [
        dataclasses.replace(base, train=steeper),
        dataclasses.replace(base, train=decayed),
        dataclasses.replace(base, goal=0.5),
        dataclasses.replace(base, goal=0.6),
        dataclasses.replace(base, ladder=dataclasses.replace(base.ladder, rungs=(*TENTHS, 0.96))),
    ]
    texts = {json.dumps(one.to_json()) for one in [base, *others]}
    assert len(texts) == 6


@given(st.floats(0, 10, width=32))
def test_numbers_of_numpy_stand_in_json_as_numbers(value):
    assert plain(Rate(np.float32(value))) == plain(Rate(value))
    assert plain({"a": np.int64(3), "b": (np.float64(0.5), None)}) == {"a": 3, "b": [0.5, None]}


def test_functions_and_unknown_objects_are_named():
    assert plain(optax.huber_loss) == "huber_loss"
    assert plain(pae.MeanOf(optax.huber_loss)) == {"kind": "MeanOf", "values": "huber_loss"}
    assert plain(object()) == "object"


def test_the_phases_of_a_recipe_are_listed_in_order():
    cpg = pae.recipes.cpg()
    assert cpg.phases == (cpg.train, cpg.ladder.phase, cpg.retrain)
    assert len(pae.recipes.finetune(3).phases) == 2
    assert cpg.train.needs_steps
    assert not cpg.ladder.phase.needs_steps
    assert Phase(1, Rate(0.1), pick_rate=Rate(0.1, cosine=True)).needs_steps

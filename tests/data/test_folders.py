"""Class folders of the user's images: every image once, in a fixed order, and trouble named before anything is kept."""

import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pae_jax.data import image_folder
from pae_jax.errors import ArgumentError, DataError

builders = pytest.importorskip("pae_jax.data.builders", reason="tensorflow-datasets is in the extra data")

CLASSES = ("ann", "ben 2", "cléo")
FILES = ("1.png", "10.png", "2.png", "b.jpg")


def pixels(split, name, file):
    return np.random.default_rng([*f"{split}/{name}/{file}".encode()]).integers(0, 256, (9, 7, 3), np.uint8)


@pytest.fixture
def root(tmp_path):
    """Two splits of three classes of four images; hidden files lie about."""
    for split in ("train", "val"):
        for name in CLASSES:
            folder = tmp_path / "faces" / split / name
            folder.mkdir(parents=True)
            for file in FILES:
                Image.fromarray(pixels(split, name, file)).save(folder / file)
            (folder / ".hidden").write_text("clutter")
        (tmp_path / "faces" / split / ".cache").mkdir()
    return tmp_path / "faces"


@pytest.fixture
def load(root, tmp_path):
    return lambda splits=("train", "val"): image_folder(root, cache_dir=tmp_path / "cache", splits=splits)


def kept(tmp_path):
    """All files below the cache, but for the folder of downloads, which tensorflow-datasets makes in any case."""
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_every_image_comes_once_in_the_order_of_classes_and_names(load):
    folders = load()
    assert folders.classes == CLASSES and list(folders) == ["train", "val"] and len(folders) == 2
    for split, source in folders.items():
        assert len(source) == 12 and source.classes == CLASSES and source.split == split
        assert [item["file"] for item in source] == [f"{name}/{file}" for name in CLASSES for file in FILES]
        for item in source:
            name, file = item["file"].split("/")
            assert item["label"] == CLASSES.index(name) and type(item["label"]) is int
            assert item["image"].dtype == np.uint8 and item["image"].shape == (9, 7, 3)
            if file.endswith("png"):
                assert np.array_equal(item["image"], pixels(split, name, file))


def test_access_is_random(load):
    source = load()["train"]
    assert source[-1]["file"] == source[np.int64(11)]["file"] == "cléo/b.jpg"
    assert [item["file"] for item in source[3:5]] == ["ann/b.jpg", "ben 2/1.png"]
    for index in (12, -13):
        with pytest.raises(IndexError, match="train has 12 images"):
            source[index]
    again = pickle.loads(pickle.dumps(source))  # as it travels to the workers of a loader
    assert [item["image"].tobytes() for item in again] == [item["image"].tobytes() for item in source]


def test_tensorflow_is_not_needed(load):
    load()
    assert "tensorflow" not in sys.modules


def test_what_is_stored_is_used_until_a_file_changes(root, load, tmp_path, monkeypatch):
    load()
    before = kept(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(builders.ImageFolder, "_generate_examples", lambda *_: pytest.fail("stored again"))
        assert len(load()["train"]) == 12
    assert kept(tmp_path) == before
    path = root / "train" / "ann" / "1.png"
    size, other = path.stat().st_size, pixels("train", "ben 2", "1.png")
    Image.fromarray(other).save(path)
    os.truncate(path, max(size, path.stat().st_size))
    assert np.array_equal(load()["train"][0]["image"], other)
    (root / "val" / "ann" / "2.png").unlink()
    assert len(load()["val"]) == 11


def test_any_kind_of_image_becomes_rgb(root, load):
    folder = root / "train" / "ann"
    image = Image.fromarray(pixels("train", "ann", "1.png"))
    image.convert("L").save(folder / "1.png")
    image.convert("CMYK").save(folder / "b.jpg")
    clear = image.copy()
    clear.putalpha(90)
    clear.save(folder / "2.png")
    images = {item["file"]: item["image"] for item in load()["train"]}
    assert np.array_equal(images["ann/1.png"], np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2))
    assert images["ann/b.jpg"].shape == (9, 7, 3)
    assert np.array_equal(images["ann/2.png"], np.asarray(image))


def test_unreadable_images_are_all_named_and_nothing_is_kept(root, load, tmp_path):
    bad = [root / "train" / "ann" / "2.png", root / "train" / "cléo" / "1.png"]
    bad[0].write_text("no image")
    bad[1].write_bytes(bad[1].read_bytes()[:60])
    with pytest.raises(DataError, match="2 images are not readable") as caught:
        load()
    for path in bad:
        assert f"{path}: cannot be decoded" in str(caught.value)
    assert "nothing was stored" in str(caught.value) and kept(tmp_path) == []
    for path in bad:
        Image.fromarray(pixels("a", "b", "c")).save(path)
    assert len(load()["train"]) == 12


def test_many_bad_images_are_counted(root, load):
    for name in CLASSES:
        for file in FILES:
            (root / "train" / name / file).write_text("no image")
    with pytest.raises(DataError, match=r"(?s)12 images are not readable.*and 2 more"):
        load()


def test_images_of_zero_bytes_are_named_before_any_is_read(root, load, tmp_path):
    (root / "val" / "ann" / "1.png").write_bytes(b"")
    (root / "train" / "ben 2" / "b.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 images are empty \(0 bytes\)") as caught:
        load()
    assert str(root / "val" / "ann" / "1.png") in str(caught.value)
    assert str(root / "train" / "ben 2" / "b.jpg") in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_class_that_a_split_lacks_is_named(root, load):
    (root / "train" / "dan").mkdir()
    (root / "val" / "cléo").rename(root / "val" / "eve")
    with pytest.raises(DataError, match=r"train lacks \['eve'\]; val lacks \['cléo', 'dan'\]"):
        load()


TROUBLE = {
    "split missing": (lambda root: None, ("train", "test"), r"test: no such folder; .* holds \['train', 'val'\]"),
    "class empty": (lambda root: [f.unlink() for f in (root / "val" / "ann").iterdir()], None, "ann: found no images"),
    "file among classes": (lambda root: (root / "val" / "list.txt").touch(), None, "list.txt: found a file, expected"),
    "folder in a class": (lambda root: (root / "val" / "ann" / "old").mkdir(), None, "old: found a folder inside"),
    "link to nothing": (lambda root: (root / "val" / "ann" / "x.png").symlink_to("no"), None, "x.png: cannot be read"),
    "text": (lambda root: (root / "val" / "ann" / "notes.txt").write_text("a"), None, "notes.txt: cannot be decoded"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_an_entry_that_is_not_what_its_place_says_is_named(root, load, name):
    spoil, splits, message = TROUBLE[name]
    spoil(root)
    with pytest.raises(DataError, match=message):
        load(splits or ("train", "val"))


def test_an_empty_split_or_a_missing_root_is_named(root, load, tmp_path):
    (root / "test").mkdir()
    with pytest.raises(DataError, match="test: found no class folder"):
        load(("test",))
    with pytest.raises(DataError, match="nowhere holds no such folder"):
        image_folder(tmp_path / "nowhere", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("splits", [(), ("train", "train"), ("../up",), ("",), ("a b",)])
def test_splits_that_are_no_names_are_refused(load, splits):
    with pytest.raises(ArgumentError, match="splits"):
        load(splits)


def test_a_whole_image_that_goes_bad_in_the_cache_is_refused_by_name(load, monkeypatch):
    source = load()["train"]
    records = [{"image": b"", "label": 0, "file": b"ann/1.png"}]
    object.__setattr__(source, "_records", records)
    with pytest.raises(DataError, match=r"ann/1\.png: found 0 bytes"):
        source[0]


def test_a_link_may_lead_out_of_the_folder_only_if_asked(root, load, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.fromarray(pixels("a", "b", "c")).save(outside / "secret.png")
    link = root / "train" / "ann" / "1.png"
    link.unlink()
    link.symlink_to(outside / "secret.png")
    with pytest.raises(DataError, match=rf"1\.png: is a link to {outside}/secret\.png, outside of .*follow_links"):
        load()
    folders = image_folder(root, cache_dir=tmp_path / "cache", splits=("train", "val"), follow_links=True)
    assert np.array_equal(folders["train"][0]["image"], pixels("a", "b", "c"))
    link.unlink()
    link.symlink_to("2.png")
    assert np.array_equal(load()["train"][0]["image"], pixels("train", "ann", "2.png"))
    (root / "val" / "ann").rename(outside / "ann")
    (root / "val" / "ann").symlink_to(outside / "ann")
    with pytest.raises(DataError, match=r"val/ann: is a link to"):
        load()
    (root / "val").rename(outside / "val")
    (root / "val").symlink_to(outside / "val")
    with pytest.raises(DataError, match=r"val: is a link to"):
        load()


def test_a_fifo_among_the_images_is_named_and_not_waited_for(root, load):
    os.mkfifo(root / "train" / "ann" / "z.png")
    with pytest.raises(DataError, match=r"z\.png: found a FIFO, socket or device, expected images only"):
        load()


def test_a_file_that_becomes_a_fifo_before_it_is_read_is_refused(root, load, monkeypatch, tmp_path):
    place = root / "train" / "ann" / "1.png"
    records = builders.folder_records

    def late(*arguments):
        place.unlink()
        os.mkfifo(place)
        return records(*arguments)

    monkeypatch.setattr(builders, "folder_records", late)
    with pytest.raises(DataError, match=r"1\.png: found a FIFO, expected an image"):
        load()
    assert kept(tmp_path) == []


def test_a_name_that_is_not_utf8_is_named(root, load):
    os.rename(root / "train" / "ann" / "1.png", os.fsencode(root / "train" / "ann") + b"/caf\xe9.png")
    with pytest.raises(DataError, match=r"train/ann: the name 'caf.udce9\.png' is not UTF-8.*Rename the file"):
        load()


def test_a_program_that_starts_programs_is_no_image(root, load, tmp_path, monkeypatch):
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Image.fromarray(pixels("a", "b", "c")).save(root / "train" / "ann" / "1.png", "eps")
    with pytest.raises(DataError, match=r"1\.png: cannot be decoded as an image; expected one of JPEG"):
        load()
    assert not (tmp_path / "started").exists()


def test_two_jobs_may_store_one_folder_at_the_same_time(root, tmp_path):
    start = threading.Barrier(3)

    def job(_):
        start.wait()
        source = image_folder(root, cache_dir=tmp_path / "cache", splits=("train", "val"))["train"]
        return [item["image"].tobytes() for item in source]

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(job, range(3))
    assert len(first) == 12 and all(other == first for other in others)


def test_folders_of_equal_names_sizes_and_times_have_their_own_images_in_one_cache(tmp_path):
    found = {}
    for root, shade in (("dark", 10), ("light", 200)):
        file = tmp_path / root / "train" / "ann" / "1.bmp"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (8, 6), (shade,) * 3).save(file)
        os.utime(file, (0, 0))
        source = image_folder(tmp_path / root, cache_dir=tmp_path / "cache", splits=("train",))["train"]
        found[root] = source[0]["image"].max()
    assert found == {"dark": 10, "light": 200}

"""Builders for tensorflow-datasets that work without TensorFlow; the only file that imports tensorflow-datasets.

They store the encoded images in ArrayRecord files and read them back encoded, with random access. So they need none of
TensorFlow's encoders, records or file system.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import cifar

from pae_jax.data.decoding import decode_rgb
from pae_jax.data.files import LARGEST_IMAGE, read_file
from pae_jax.errors import DataError

FORMAT = "array_record"
READ_AHEAD = 256


class File(NamedTuple):
    """An image file: its path, its label and its name in the records."""

    path: Path
    label: int
    name: str


class ImageFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Image files of known labels, stored in the order of the listing."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, listing: dict[str, list[File]], classes: tuple[str, ...], data_dir: Path):
        self.listing, self.classes = listing, classes
        self.problems: list[str] = []
        super().__init__(data_dir=str(data_dir), file_format=FORMAT)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=self.classes),
            "file": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(files) for split, files in self.listing.items()}

    def _generate_examples(self, files: list[File]) -> Iterator[tuple[int, dict[str, Any]]]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(files), READ_AHEAD):
                part = files[start : start + READ_AHEAD]
                for offset, (file, content) in enumerate(zip(part, pool.map(_checked_content, part), strict=True)):
                    if isinstance(content, DataError):
                        self.problems.append(str(content))
                    else:
                        yield start + offset, {"image": io.BytesIO(content), "label": file.label, "file": file.name}
        if self.problems:
            raise RuntimeError("unreadable images")  # stops the build; partial files are removed


class Cifar100(cifar.Cifar100, skip_registration=True):
    """CIFAR-100 as tensorflow-datasets downloads and checks it, unpacked and encoded without TensorFlow."""

    name = "cifar100_array_record"
    url_infos = cifar.Cifar100.url_infos

    def _split_generators(self, dl_manager: Any) -> Any:
        source = self._cifar_info
        features: Any = self.info.features
        with tarfile.open(dl_manager.download(source.url)) as archive:

            def read(name: str) -> bytes:
                member = archive.extractfile(source.prefix + name)
                assert member is not None  # the checksum of the archive was right
                return member.read()

            for key, name in zip(source.label_keys, source.label_files, strict=True):
                features[key].names = read(name).decode().split()
            train, test = read(source.train_files[0]), read(source.test_files[0])
        return {"train": _cifar_examples("train_", train), "test": _cifar_examples("test_", test)}


def folder_records(
    listing: dict[str, list[File]], classes: tuple[str, ...], data_dir: Path, summary: Callable[[list[str]], str]
) -> dict[str, Any]:
    """Return per split the stored records of encoded image files; store them first if needed.

    Args:
      listing: the files of each split.
      classes: the name of each label.
      data_dir: folder of this listing's records.
      summary: combines the error texts of single images into one message.

    Returns:
      Per split a random-access sequence of dicts with `image` (bytes), `label` (int) and `file` (bytes).

    Raises:
      DataError: some image cannot be decoded; nothing is stored.
    """
    builder = ImageFolder(listing, classes, data_dir)
    try:
        _prepare(builder)
    except RuntimeError as error:
        if builder.problems:
            raise DataError(summary(builder.problems)) from error
        raise
    # Reading needs no listing: the stored records are self-describing and cheap to send to the workers of a loader.
    return _encoded_records(tfds.builder_from_directory(builder.data_dir), tuple(listing))


def cifar100_records(data_dir: str | None = None) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the stored records of CIFAR-100, with encoded images; download and store them first if needed.

    Args:
      data_dir: folder of the data; None takes the default of tensorflow-datasets.

    Returns:
      Per split ("train", "test") a random-access sequence of dicts with `image` (bytes), `label`, `coarse_label` and
      `id` (bytes); the names of the fine labels; the names of the coarse labels.

    Raises:
      DataError: the download failed, or is not the published file.
    """
    builder = Cifar100(data_dir=data_dir, file_format=FORMAT)
    try:
        _prepare(builder)
    except (OSError, tfds.download.DownloadError, tarfile.TarError) as error:
        raise DataError(
            f"CIFAR-100 could not be downloaded ({type(error).__name__}: {error}). Try again where there is internet, "
            "or give a pack file: load_cifar100(pack)."
        ) from error
    features: Any = builder.info.features
    return _encoded_records(builder, ("train", "test")), features["label"].names, features["coarse_label"].names


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Store a data set unless it exists; another job may store the same one at the same time."""
    try:
        builder.download_and_prepare()
    except FileExistsError:  # tensorflow-datasets renames its finished folder; another job finished first
        builder.download_and_prepare()  # finds the stored data


def _encoded_records(builder: Any, splits: tuple[str, ...]) -> dict[str, Any]:
    decoders = {"image": tfds.decode.SkipDecoding()}
    return {split: builder.as_data_source(split, decoders=decoders) for split in splits}


def _checked_content(file: File) -> bytes | DataError:
    try:
        content = read_file(file.path, "an image", LARGEST_IMAGE)
        decode_rgb(content, str(file.path))
    except DataError as error:
        return error
    return content


def _cifar_examples(prefix: str, records: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    # A record is a coarse label, a fine label, and 32 x 32 pixels in planes of red, green and blue.
    for index, record in enumerate(np.frombuffer(records, np.uint8).reshape(-1, 2 + 3 * 32 * 32)):
        pixels = np.ascontiguousarray(record[2:].reshape(3, 32, 32).transpose(1, 2, 0))
        image = io.BytesIO()
        Image.fromarray(pixels).save(image, "png")
        image.seek(0)
        labels = {"coarse_label": int(record[0]), "label": int(record[1])}
        yield index, {"id": f"{prefix}{index:05d}", "image": image, **labels}

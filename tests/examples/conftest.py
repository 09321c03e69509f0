"""The programs of examples/ as modules, and synthetic faces."""

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("Ann", "Bob", "Cy", "Di")
PAIRS = "2\t2\nAnn\t1\t2\nBob\t1\t2\nAnn\t1\tBob\t2\nAnn\t2\tBob\t1\nCy\t1\t2\nDi\t1\t2\nCy\t1\tDi\t2\nCy\t2\tDi\t1\n"


@pytest.fixture(scope="module")
def program():
    """Return a program by its path in examples/; its modules are found as when it is run, and gone afterwards."""
    modules, paths = set(sys.modules), list(sys.path)

    def load(path):
        file = EXAMPLES / path
        sys.path.insert(0, str(file.parent))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path[:] = paths
    for name in set(sys.modules) - modules:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_pack(path, images, **arrays):
    found = [encoded(image) for image in images]
    np.savez(path, bytes=np.frombuffer(b"".join(found), np.uint8), offsets=np.cumsum([0, *map(len, found)]), **arrays)


@pytest.fixture(scope="session")
def write_people():
    """Return what writes ten pictures of each of 40 people into a folder, as the ORL faces come."""

    def write(folder, rng):
        for person in range(1, 41):
            (folder / f"s{person}").mkdir(parents=True)
            own = rng.integers(0, 200, (14, 23)).repeat(8, 0).repeat(4, 1)
            for shot in range(1, 11):
                pixels = (own + rng.integers(0, 40, own.shape)).astype(np.uint8)
                (folder / f"s{person}" / f"{shot}.pgm").write_bytes(b"P5\n92 112\n255\n" + pixels.tobytes())

    return write


@pytest.fixture(scope="session")
def face_files(tmp_path_factory, write_people):
    """Packs of faces, of expressions and of LFW, a pairs file, and 40 people, all synthetic."""
    root, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(1)
    split = np.arange(96) % 3
    faces = rng.integers(0, 256, (96, 40, 40, 3), dtype=np.uint8)
    write_pack(root / "faces.npz", faces, age=rng.integers(1, 90, 96), gender=rng.integers(0, 2, 96), split=split)
    label = np.arange(96) // 3 % 7
    names = np.array(["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"])
    write_pack(root / "expressions.npz", faces[:, :, :, 0], label=label, label_names=names, split=split)
    known = np.array([f"{name}_{shot:04d}" for name in NAMES for shot in (1, 2)])
    write_pack(root / "lfw.npz", rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), names=known)
    (root / "pairs.txt").write_text(PAIRS)
    write_people(root / "orl", rng)
    return root

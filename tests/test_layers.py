"""The layout: folders import downwards only, each through a door of its own, on nine floors at most."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "pae_jax"
FLOORS = (
    ("errors", "arrays", "caching", "comparing", "html", "large_arrays", "progress", "version"),
    ("trees", "processes", "files"),
    ("checks",),
    ("widening", "data", "models"),
    ("nets",),
    ("core",),
    ("training",),
    ("storage", "serving", "reports"),
    ("lifelong", "faces", "cli"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ENTRIES = {"__init__", "__main__"}
SIDEWAYS = {("reports", "storage")}  # sizes measure stages


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@functools.cache
def imports_of(path):
    """Return `(module imported, names)` of every import of ours in a file, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pae_jax":
            found.append((node.module, [alias.name for alias in node.names]))
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names if alias.name.split(".")[0] == "pae_jax"]
    return found


def arrows():
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if here in ENTRIES:
            continue
        for module, names in imports_of(path):
            for there in [room(module)] if room(module) else names:
                if there != here:
                    yield path.relative_to(ROOT), here, there


def test_every_file_has_a_floor():
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")} - ENTRIES
    assert rooms == set(FLOOR)
    assert len(FLOORS) <= 9


def test_imports_point_down():
    wrong = [
        f"{path}: {here} imports {there}"
        for path, here, there in arrows()
        if FLOOR[there] >= FLOOR[here] and (here, there) not in SIDEWAYS
    ]
    assert not wrong


FOLDERS = sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.rglob("*/__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_has_one_door(folder):
    """Whoever stands outside imports from the folder itself, never from a file in it; folders in folders as well."""
    outside = [path for path in ROOT.rglob("*.py") if ROOT / folder not in path.parents]
    past = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in outside
        for module, _ in imports_of(path)
        if module.startswith(f"pae_jax.{folder.replace('/', '.')}.")
    ]
    assert not past


@pytest.mark.parametrize("core", ["widening", "nets", "core", "training"])
def test_the_core_knows_neither_faces_nor_data_nor_models(core):
    assert not [f"{path}" for path, here, there in arrows() if here == core and there in ("faces", "data", "models")]


def test_only_the_storage_folder_imports_orbax_and_in_one_file():
    files = [path for path in ROOT.rglob("*.py") if "orbax" in path.read_text().replace("orbax-checkpoint", "")]
    importing = [
        path
        for path in files
        if any(line.strip().startswith(("import orbax", "from orbax")) for line in path.read_text().splitlines())
    ]
    assert [path.name for path in importing] == ["orbax_arrays.py"]


def test_no_folder_holds_a_file_named_like_a_public_function():
    import pae_jax as pae

    functions = {name for name in pae.__all__ if callable(getattr(pae, name)) and name[0].islower()}
    top = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not functions & top

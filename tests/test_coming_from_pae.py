"""What the page for users of the authors' code names exists: functions with their arguments, and commands."""

import argparse
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

import pae_jax as pae
from pae_jax.faces import images, losses, pairs, verification

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "coming_from_pae.md").read_text()
# Two columns: theirs on the left is not ours.
OURS = [code for row in re.findall(r"^\|[^|]*\|(.*)\|$", PAGE, re.MULTILINE) for code in re.findall(r"`([^`]+)`", row)]
NAMES = {"recipes": pae.recipes, "sizes": pae.sizes, "pae": pae, "losses": losses}
PLACES = (pae, pae.recipes, pae.recipes.__dict__["Recipe"], losses, images, pairs, verification, pae.sizes)


def found(name):
    """The object of a name on the page: in full, or of one of the modules that the page speaks of."""
    first, *rest = name.split(".")
    value = NAMES.get(first)
    if value is None:
        value = next((getattr(place, first) for place in PLACES if hasattr(place, first)), None)
    for part in rest:
        value = getattr(value, part, None)
    return value


CALLS = sorted(
    {call for code in OURS for call in re.findall(r"([A-Za-z_][\w.]*)\(([^()]*(?:\([^()]*\))?[^()]*)\)", code)}
)
COMMANDS = sorted({code for code in OURS if code.startswith("examples/")})


@pytest.mark.parametrize("name", sorted({n for code in OURS for n in re.findall(r"\bpae\.[A-Za-z_][\w.]*\w", code)}))
def test_every_name_of_the_library_on_the_page_exists(name):
    assert found(name) is not None


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_every_argument_that_the_page_names_exists(name, arguments):
    called = found(name)
    if called is None:  # a function of JAX, or a method of what was just named
        assert name.startswith(("jax.", "print", "round"))
        return
    parameters = inspect.signature(called).parameters
    assert set(re.findall(r"(\w+)=", arguments)) <= parameters.keys()


class Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_is_understood_by_its_script(command, monkeypatch):
    script, *words = shlex.split(command)
    parse, before = argparse.ArgumentParser.parse_args, set(sys.modules)

    def stop(self, arguments=None, namespace=None):
        parse(self, arguments, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    try:
        with pytest.raises(Parsed):
            importlib.import_module(Path(script).stem).main(words)
    finally:
        for name in set(sys.modules) - before:
            if str(ROOT / "examples") in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def test_the_page_names_commands_for_the_scripts_of_the_authors():
    assert {Path(shlex.split(command)[0]).name for command in COMMANDS} == {
        "facial_modules.py",
        "inference.py",
        "align_faces.py",
        "lfw.py",
    }
    assert len(CALLS) > 20

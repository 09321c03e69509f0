"""A short part of `make torture`: nothing is lost, silently wrong, untyped or blocked."""

import gc
import importlib.util
import logging
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "torture.py"
TRIALS = {
    "damaged stage": 60,
    "damaged run": 8,
    "hostile metadata": 40,
    "failing call: save": 20,
    "failing call: load": 20,
    "failing call: run": 3,
    "snapshot: save": 12,
    "snapshot: run": 2,
    "interrupt: save": 8,
    "interrupt: load": 8,
    "interrupt: learn": 2,
    "two writers: save": 5,
    "two writers: learn": 1,
}


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("torture", BENCHMARK)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def torture(module, tmp_path_factory):
    return module.Torture(tmp_path_factory.mktemp("torture"))


@pytest.fixture
def quiet():
    """Orbax writes about damaged files, and abandons coroutines, which are collected here and not in a later test."""
    logging.disable(logging.CRITICAL)
    yield
    gc.collect()
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    "ignore:coroutine:RuntimeWarning",
)
@pytest.mark.parametrize("kind", TRIALS)
def test_every_trial_ends_in_the_right_bits_or_in_a_typed_error(module, torture, kind):
    found = {number: module.trial(torture, kind, number) for number in range(TRIALS[kind])}
    assert not {number: end for number, end in found.items() if end[0] not in module.GOOD}


def test_the_long_run_has_the_same_kinds(module):
    assert TRIALS.keys() == module.TRIALS.keys() == module.KINDS.keys()
    assert sum(module.TRIALS.values()) >= 10_000


def test_a_trial_that_loses_a_stage_would_be_seen(module, torture, monkeypatch):
    """A save that writes nothing, one that fails in its own way, and a load that returns another network."""
    pae = module.pae
    monkeypatch.setattr(pae, "save", lambda *arguments, **options: None)
    assert module.trial(torture, "failing call: save", 0)[0] == "lost"
    monkeypatch.setattr(pae, "save", lambda *arguments, **options: 1 / 0)
    assert module.trial(torture, "snapshot: save", 0)[0] == "untyped"
    monkeypatch.setattr(pae, "load", lambda *arguments, **options: torture.other)
    assert module.trial(torture, "damaged stage", 0)[0] == "silent"

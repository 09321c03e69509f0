"""Errors have types of ours and of Python's, and texts that say what to do."""

import copy
import pickle

import pytest

import pae_jax as pae
from pae_jax import errors

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.PaeError)]
EXAMPLES = [
    pae.PaeError("a text"),
    pae.ArgumentError("a text"),
    pae.UnknownTaskError("z", ["a", "b"]),
    pae.PhaseError("fit", "a", "frozen", "predict"),
    pae.CapacityError("a text"),
    pae.StructureError("owner", "w", "nothing", "int8", "Do this."),
    pae.DataError("a text"),
    pae.DivergedError("a", 3, None, None),
    pae.ForgettingError("a text"),
    pae.NotPreservableError("a text", ("one", "two")),
    pae.ProcessError("a text"),
    pae.CheckpointError("a text"),
]


def test_every_error_is_a_pae_error_and_public():
    for kind in ALL:
        assert issubclass(kind, pae.PaeError)
        assert getattr(pae, kind.__name__) is kind
    assert {type(error) for error in EXAMPLES} == set(ALL)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (pae.ArgumentError, ValueError),
        (pae.UnknownTaskError, KeyError),
        (pae.PhaseError, RuntimeError),
        (pae.CapacityError, RuntimeError),
        (pae.StructureError, ValueError),
        (pae.DataError, ValueError),
        (pae.DivergedError, ArithmeticError),
        (pae.ForgettingError, RuntimeError),
        (pae.NotPreservableError, ValueError),
        (pae.ProcessError, RuntimeError),
        (pae.CheckpointError, OSError),
    ],
)
def test_an_error_is_also_what_python_would_raise(kind, builtin):
    assert issubclass(kind, builtin)


def test_texts_are_sentences_not_reprs():
    assert str(EXAMPLES[2]) == "unknown task 'z'; the state has: 'a', 'b'. Add it with pae.pack(net, state, 'z', ...)."
    assert str(pae.UnknownTaskError("z", [])).startswith("unknown task 'z'; the state has: none yet.")
    assert str(EXAMPLES[3]) == "fit cannot be called now: task 'a' is frozen. Valid calls: predict."
    assert str(EXAMPLES[5]) == "owner, leaf 'w': found nothing, expected int8. Do this."
    assert str(pae.StructureError("owner", "", 1, 2)) == "owner: found 1, expected 2."
    assert "at step 3" in str(EXAMPLES[7])
    assert EXAMPLES[5].path == "w"
    assert EXAMPLES[7].step == 3
    assert EXAMPLES[9].reasons == ("one", "two")
    assert str(pae.PaeError()) == ""


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way_between_processes(error):
    """A worker's error that cannot be unpickled hangs or hides the pool that waits for it."""
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)

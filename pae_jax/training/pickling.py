"""Placeholders for functions of a train state that cannot be pickled."""

from __future__ import annotations

import pickle
from typing import Any

from pae_jax.errors import ArgumentError


class LeftOut:
    """Placeholder for a function that cannot be pickled; set the function again by `replace`."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise ArgumentError(
            f"this TrainState was unpickled without its {self.name}, which pickle cannot keep: put it back by "
            f"ts.replace({self.name}=...)"
        )


def picklable(value: Any, name: str) -> Any:
    try:
        pickle.dumps(value)
    except Exception:  # pickle raises many types
        return LeftOut(name)
    return value

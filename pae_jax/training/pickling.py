"""What pickle cannot keep of a train state, and what stands in its place."""

from __future__ import annotations

import pickle
from typing import Any

from pae_jax.errors import ArgumentError


class LeftOut:
    """Stands where pickle could not keep a function; `replace` puts it back."""

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

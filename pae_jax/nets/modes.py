"""How a module is called: its training-mode arguments, by the names common in Flax models, and its mapped axes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax

TRAIN = ("train", "training", "is_training")
EVALUATE = ("deterministic", "use_running_average")


def mode_arguments(model: Any, train: bool) -> tuple[tuple[bool, ...], dict[str, bool]]:
    """Return the arguments of a call after x, by position and by name, that select the mode of a module.

    A module may have several. Those that come right after x are given by position, which `nn.remat` with static
    arguments needs.
    """
    parameters = list(inspect.signature(type(model).__call__).parameters.values())[1:]
    after: list[bool] = []
    named: dict[str, bool] = {}
    for index, parameter in enumerate(parameters):
        if parameter.name in TRAIN + EVALUATE:
            value = train if parameter.name in TRAIN else not train
            if index == len(after) + 1 and parameter.kind is not parameter.KEYWORD_ONLY:
                after.append(value)
            else:
                named[parameter.name] = value
    return tuple(after), named


def called(module: Any, call: Callable[[Any, Any, bool], Any] | None, x: Any, train: bool) -> Any:
    """Call a module in a mode, by `call(module, x, train)` if that is given."""
    if call is not None:
        return call(module, x, train)
    after, named = mode_arguments(module, train)
    return module(x, *after, **named)


def bound(call: Callable[[], Any], axes: list[str]) -> Any:
    """Call a module; mapped axes that it uses by name, as in `BatchNorm(axis_name=)`, are bound to size 1.

    An axis that the caller maps over is left as it is. The names are recorded in `axes`, so that later calls bind them
    directly.
    """
    while True:
        mapped = call
        for name in axes:
            if not _is_mapped(name):
                mapped = lambda inner=mapped, name=name: _of_size_one(inner, name)  # noqa: E731
        try:
            return mapped()
        except NameError as error:
            asked = re.search(r"unbound axis name: (\w+)", str(error))
            if asked is None or asked[1] in axes:
                raise
            axes.append(asked[1])


def _is_mapped(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _of_size_one(call: Callable[[], Any], name: str) -> Any:
    return jax.vmap(lambda _: call(), in_axes=None, out_axes=None, axis_name=name, axis_size=1)(0)

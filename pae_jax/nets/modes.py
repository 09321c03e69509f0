"""How a module is called: its training-mode arguments, by the names common in Flax models, and its mapped axes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax

from pae_jax.errors import StructureError
from pae_jax.trees import Tree

TRAIN = (
    "train", "training", "is_training", "is_train", "train_mode", "training_mode", "enable_dropout", "use_dropout",
    "update_stats", "update_batch_stats",
)  # fmt: skip
EVALUATE = (
    "deterministic", "use_running_average", "use_running_stats", "inference", "is_inference", "inference_mode", "eval",
    "is_eval", "eval_mode", "evaluation", "test", "is_test", "test_mode", "testing",
)  # fmt: skip
_STATISTICS = "batch_stats"


def mode_arguments(model: Any, train: bool) -> tuple[tuple[bool, ...], dict[str, bool]]:
    """Return the arguments of a call after x, by position and by name, that select the mode of a module.

    A module may have several. Those that come right after x are given by position, which `nn.remat` with static
    arguments needs.
    """
    after: list[bool] = []
    named: dict[str, bool] = {}
    for index, parameter in enumerate(_parameters(model)):
        if _is_mode(parameter):
            value = train if parameter.name in TRAIN else not train
            if index == len(after) + 1 and parameter.kind is not parameter.KEYWORD_ONLY:
                after.append(value)
            else:
                named[parameter.name] = value
    return tuple(after), named


def _parameters(model: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(type(model).__call__).parameters.values())[1:]


def _is_mode(parameter: inspect.Parameter) -> bool:
    default = parameter.default
    return parameter.name in TRAIN + EVALUATE and (
        default is parameter.empty or default is None or isinstance(default, (bool, int))
    )


def require_one_input(model: Any, sample: Tree) -> None:
    """Raise `StructureError` if a call needs more than x and its mode."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in _parameters(model)[1:] if p.default is p.empty and p.kind not in several and not _is_mode(p)]
    if not needed:
        return
    names = ", ".join(p.name for p in needed)
    parts = "*x" if isinstance(sample, (tuple, list)) else "**x" if isinstance(sample, dict) else f"x, {names}"
    mode = next((f", {p.name}={'' if p.name in TRAIN else 'not '}train" for p in _parameters(model) if _is_mode(p)), "")
    hint = f"Say how it is called, for instance call=lambda module, x, train: module({parts}{mode})."
    raise StructureError(type(model).__name__, "", f"a call that also needs {names}", "a call with x alone", hint)


def require_moved(model: Any, before: dict[str, Tree], after: dict[str, Tree]) -> None:
    """Raise `StructureError` if training left statistics alone and an unknown flag of the call may be its mode."""
    old, new = (jax.tree.leaves(tree.get(_STATISTICS)) for tree in (before, after))
    if not old or len(old) != len(new) or any(a is not b for a, b in zip(old, new, strict=True)):
        return
    flags = [p.name for p in _parameters(model)[1:] if isinstance(p.default, bool) and not _is_mode(p)]
    if flags:
        found = f"{_STATISTICS} that training does not change, and the argument {flags[0]!r}, which is not set"
        hint = (
            f"If it is the mode, pass call=lambda module, x, train: module(x, {flags[0]}=train), or `not train`; if "
            "the statistics are to stay, pass call=lambda module, x, train: module(x)."
        )
        wanted = f"running statistics that move, or a mode by a common name, such as {TRAIN[0]!r} or {EVALUATE[0]!r}"
        raise StructureError(type(model).__name__, "", found, wanted, hint)


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

"""`expand`: a wider backbone under the same tasks, on top of the widening engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.checks import check_key, check_width
from pae_jax.core import ownership, placement
from pae_jax.core.state import Growth, State, check_values, layout_of, newest
from pae_jax.errors import ArgumentError, NotPreservableError, PhaseError
from pae_jax.nets import (
    Net,
    apply_backbone,
    as_complex,
    batch_size,
    check_net,
    features_function,
    full_precision,
    largest,
    relative_limit,
    trial_batch,
    trial_inputs,
)
from pae_jax.trees import PARAMS, Tree, flatten, merge
from pae_jax.widening import WidenMaps, widen_maps

_ROWS = 32
"""Trial examples where the features are 0 for as many as the sample has: all rectifiers may be off for a few."""


def expand(
    net: Net,
    state: State,
    *,
    width: float,
    key: jax.Array,
    overrides: Mapping[str, Mapping[int, Sequence[int]]] | None = None,
    accept_changes: bool = False,
) -> State:
    """Widen the backbone; the outputs of every task, at its own width, stay bit-identical.

    The narrow and the wide program are compared operation by operation to find the position of each old weight. New
    weights are free and have the model's initial values. The next task claims them; the wide network computes the old
    function on the old weights.

    Args:
      net: the network description the state was made with.
      state: the network; its newest task, if any, is frozen.
      width: new channel factor, larger than `state.width`; `pae.width_for` converts a size ratio.
      key: random key; draws the new weights.
      overrides: explicit index maps of single axes, `{"params/Conv_0/kernel": {axis: positions}}`.
      accept_changes: expand although the wide network does not compute the old function on the old weights. Old tasks
        are not affected, since they run at their own width, but the next task gets altered features from older weights.

    Returns:
      A new state, with one more record in `state.growth`.

    Raises:
      ArgumentError: a width that is not larger, or one that changes no layer; or the devices on which a weight is
        spread do not divide the wider one.
      PhaseError: the newest task is not frozen.
      NotPreservableError: the wide network does not compute the old function; names each layer, the reason and what to
        do.
      StructureError: the two widths are not builds of one architecture, or something shrinks.

    Example:
      >>> import jax, jax.numpy as jnp, pae_jax as pae
      >>> net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
      >>> state = pae.pack(net, pae.init(net, jax.random.key(0)), "a", head=2, key=jax.random.key(1))
      >>> state = pae.freeze(state, "a")
      >>> before = pae.predict(net, state, "a", jnp.ones((2, 4)))
      >>> state = pae.expand(net, state, width=1.5, key=jax.random.key(2))
      >>> bool((pae.predict(net, state, "a", jnp.ones((2, 4))) == before).all()), state.width
      (True, 1.5)

    Source: Hung et al., "Packing and Expanding", ICMR 2019, widths by the square root of the size ratio.
    """
    check_net(net)
    check_values("expand", state)
    width = _check_call(state, width)
    maps = _analyse(net, state.width, width, overrides)
    if not accept_changes:
        _require_preserved(
            maps,
            state.width,
            width,
            "pass accept_changes=True: old tasks stay bit-identical at their own width, but the next task finds older "
            "knowledge altered",
        )
    weights_key, local_key = jax.random.split(check_key(key))
    drawn, drawn_local = placement.drawn_wider(net, weights_key, width, state)
    shared = placement.widened(maps, {PARAMS: state.shared}, {PARAMS: drawn})[PARAMS]
    wide = state.replace(
        shared=shared,
        owner=placement.widened(maps, {PARAMS: state.owner})[PARAMS],
        local=None if state.local is None else placement.local_widened(maps, state.local, drawn_local),
        width=width,
        growth=(*state.growth, Growth(state.width, width, maps)),
        layout=layout_of(shared=shared, local=drawn_local),
    )
    if maps.preserved:
        _check_function(net, state, wide, drawn_local, local_key)
    return wide


def require_expandable(net: Net, narrow: float, wide: float, otherwise: str) -> None:
    """Raise `NotPreservableError`, which says what to do otherwise, if `expand` would refuse these widths."""
    _require_preserved(_analyse(net, narrow, wide, None), narrow, wide, otherwise)


def _check_call(state: State, width: float) -> float:
    last = newest(state)
    width = check_width(width)
    if last is not None and not state.tasks[last].frozen:
        raise PhaseError("expand", last, "packed but not frozen", "fit, prune, freeze or drop of that task")
    if width <= state.width:
        raise ArgumentError(f"width must be larger than the present {state.width}, found {width}; networks only grow")
    return width


def _analyse(net: Net, narrow: float, wide: float, overrides: Any) -> WidenMaps:
    layouts = net.layout(narrow), net.layout(wide)
    variables = [merge(layout.shared, layout.local) for layout in layouts]
    programs = [features_function(net, width) for width in (narrow, wide)]
    maps = widen_maps(programs[0], variables[0], programs[1], variables[1], net.sample, overrides=overrides)
    if maps.is_identity:
        raise ArgumentError(
            f"width {wide} changes no layer of {net.source} compared with {narrow}; take a larger one. "
            "Channel counts are often rounded down, and `build` must use its width."
        )
    return maps


def _require_preserved(maps: WidenMaps, narrow: float, wide: float, otherwise: str) -> None:
    if maps.preserved:
        return
    reasons = tuple(str(reason) for reason in maps.reasons)
    more = len(reasons) - 1
    others = f" ({more} more {'place' if more == 1 else 'places'} in this error's `.reasons`)" if more else ""
    raise NotPreservableError(
        f"from width {narrow} to {wide} the network would not compute the old function on the old weights: "
        f"{reasons[0]}{others}\nChange the model there, or {otherwise}.",
        reasons,
    )


def _check_function(net: Net, old: State, new: State, fresh: Tree, key: jax.Array) -> None:
    """Compare the old features with those of the wide network that holds only old weights, on the sample's shape."""
    maps, old = new.growth[-1].maps, placement.automatic(old)
    last = newest(old)
    held = old.shared
    local = net.initial(key, old.width)[1] if old.local is None else old.local
    if last is not None:
        entry = old.tasks[last]
        everything = jax.tree.map(lambda owner: owner > ownership.FREE, old.owner)
        held = ownership.select(everything, old.shared)
        local = ownership.local_at_width(old, entry, local)
    wide_held = placement.widened(maps, {PARAMS: held})[PARAMS]
    wide_local = placement.local_widened(maps, local, fresh)

    def features(x: Tree) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        with full_precision():  # sums of different order are compared
            narrow = apply_backbone(net, old.width)(held, local, x)
            wide = apply_backbone(net, new.width)(wide_held, wide_local, x)
        leaves = zip(flatten(narrow).items(), maps.output_maps, jax.tree.leaves(wide), strict=True)
        return {path: (np.asarray(old), np.asarray(places.take(new))) for (path, old), places, new in leaves}

    found = features(trial_inputs(net, batch_size(net.sample)))
    if not any(old.any() for old, _ in found.values() if jnp.issubdtype(old.dtype, jnp.inexact)):
        found = features(trial_batch(net, old.width, _ROWS))
    _compare(found)


def _compare(features: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Raise `NotPreservableError` unless both networks compute the same; `features` are pairs of old and new leaves."""
    hint = "give the net a sample of values that suit the model, such as real token ids and a mask with some ones"
    scales = {path: largest(old) for path, (old, _) in features.items() if jnp.issubdtype(old.dtype, jnp.inexact)}
    if not np.isfinite([*scales.values()]).all():
        raise NotPreservableError(
            "the network's own features are not finite on its sample's values, so nothing can be compared. The state "
            f"is unchanged; {hint}."
        )
    if scales and not any(scales.values()):
        raise NotPreservableError(
            "all of the network's features are 0 on its sample's values, so nothing can be compared. The state is "
            f"unchanged; {hint}."
        )
    for path, (old, new) in features.items():
        if path in scales:
            # A leaf that is 0 has no scale of its own.
            scale, worst = scales[path] or max(scales.values()), largest(as_complex(new) - as_complex(old))
            limit = relative_limit(old.dtype, 1e-5) * scale
            if worst <= limit:  # false for NaN
                continue
            found = f"largest difference {worst:.3g} at a largest feature of {scale:.3g}, {limit:.3g} is allowed"
        elif np.array_equal(old, new):
            continue
        else:
            found = f"{np.sum(old != new)} of {old.size} {old.dtype} entries differ"
        raise NotPreservableError(
            f"the widened network computes other features on the old weights{f' at {path}' if path else ''}: {found}. "
            "The state is unchanged. Please report the model; accept_changes does not skip this check."
        )

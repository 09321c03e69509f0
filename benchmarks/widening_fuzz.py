"""Random architectures through the widening engine: each must be preserved or refused, none silently wrong.

Command:   python benchmarks/widening_fuzz.py --networks 3000
Writes:    benchmarks/results/widening_fuzz.json (counts, largest error, time, this command)
Time:      about 30 ms per network on one quiet CPU core; no accelerator, no download.

A network is a random program of convolutions, concatenations, residual sums, slices, splits, grouped and depthwise
convolutions, squeeze-and-excite, norms, attention, reshapes and a flattening or pooling end, with channel counts that
grow by different factors. Its narrow and its wide version are evaluated in float64 by the small NumPy interpreter
below, so nothing is compiled and errors are not hidden by rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pae_jax.widening import WidenMaps, widen_maps

TOLERANCE = 1e-9  # float64; a wrong map errs by 1e-3 and more
Sizes = tuple[int, ...]  # one channel count per version of the network: narrow, wide, wider


@dataclasses.dataclass
class Draft:
    """A network being drawn: its operations so far, for all versions at once."""

    rng: np.random.Generator
    steps: list[Callable[[dict[str, Any], list[Any], int], Any]] = dataclasses.field(default_factory=list)
    leaves: dict[str, list[tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    channels: list[Sizes] = dataclasses.field(default_factory=list)
    kinds: list[str] = dataclasses.field(default_factory=list)

    def grown(self, least: int = 1, most: int = 5) -> Sizes:
        """A channel count per version; sometimes it does not grow."""
        sizes = [int(self.rng.integers(least, most + 1))]
        for _ in range(2):
            sizes.append(sizes[-1] + int(self.rng.choice([0, 1, 1, 2, 3])))
        return tuple(sizes)

    def leaf(self, *shape: int | Sizes) -> str:
        """A new parameter; entries of the shape that are tuples differ between the versions."""
        name = f"p{len(self.leaves):02d}"
        versions = range(3)
        self.leaves[name] = [tuple(n if isinstance(n, int) else n[v] for n in shape) for v in versions]
        return name

    def add(self, kind: str, channels: Sizes, step: Callable[[dict[str, Any], list[Any], int], Any]) -> int:
        self.kinds.append(kind)
        self.channels.append(channels)
        self.steps.append(step)
        return len(self.steps) - 1

    def pick(self) -> int:
        """A tensor to continue from, usually the last."""
        last = len(self.steps) - 1
        return last if self.rng.random() < 0.6 else int(self.rng.integers(0, last + 1))


def convolve(x: Any, kernel: Any, groups: int = 1) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def _conv(d: Draft, i: int) -> None:
    out, size = d.grown(), int(d.rng.choice([1, 3]))
    w = d.leaf(size, size, d.channels[i], out)
    d.add("conv", out, lambda p, t, v: convolve(t[i], p[w]))


def _dense_bias(d: Draft, i: int) -> None:
    out = d.grown()
    w, b = d.leaf(d.channels[i], out), d.leaf(out)
    d.add("dense", out, lambda p, t, v: t[i] @ p[w] + p[b].reshape(1, 1, 1, -1))


def _tied(d: Draft, i: int) -> None:
    c = d.channels[i]
    w = d.leaf(c, c)
    d.add("tied", c, lambda p, t, v: jnp.tanh(t[i] @ p[w]) @ p[w] + t[i] @ p[w].T)


def _activate(d: Draft, i: int) -> None:
    fn = [jax.nn.relu, jnp.tanh, jax.nn.sigmoid, jax.nn.gelu, jax.nn.silu, jnp.exp, jnp.cos][int(d.rng.integers(0, 7))]
    d.add("activation", d.channels[i], lambda p, t, v: fn(0.3 * t[i]))


def _norm(d: Draft, i: int) -> None:
    c = d.channels[i]
    scale, bias, mean, var = d.leaf(c), d.leaf(c), d.leaf(c), d.leaf(c)

    def step(p: dict[str, Any], t: list[Any], v: int) -> Any:
        row = lambda name: p[name].reshape(1, 1, 1, -1)  # noqa: E731
        return (t[i] - row(mean)) * lax.rsqrt(jnp.square(row(var)) + 1e-3) * row(scale) + row(bias)

    d.add("batch norm", c, step)


def _concat(d: Draft, i: int) -> None:
    others = [d.pick() for _ in range(int(d.rng.integers(1, 3)))]
    chosen = [i, *others]
    d.rng.shuffle(chosen)
    channels = tuple(sum(d.channels[k][v] for k in chosen) for v in range(3))
    if channels[2] <= 24:
        d.add("concat", channels, lambda p, t, v: jnp.concatenate([t[k] for k in chosen], -1))


def _residual(d: Draft, i: int) -> None:
    j = d.pick()
    if d.channels[i] == d.channels[j]:
        d.add("sum", d.channels[i], lambda p, t, v: t[i] + t[j])
    else:
        w = d.leaf(d.channels[i], d.channels[j])
        d.add("residual", d.channels[j], lambda p, t, v: t[j] + 0.3 * (t[i] @ p[w]))


def _product(d: Draft, i: int) -> None:
    same = [j for j, c in enumerate(d.channels) if c == d.channels[i]]
    j = int(d.rng.choice(same))
    d.add("product", d.channels[i], lambda p, t, v: t[i] * t[j])


def _cut(d: Draft, i: int) -> Sizes | None:
    """Where to cut, for each version; growth is divided between the two sides at random."""
    c = d.channels[i]
    if c[0] < 2:
        return None
    at = [int(d.rng.integers(1, c[0]))]
    for before, after in itertools.pairwise(c):
        at.append(at[-1] + int(d.rng.integers(0, after - before + 1)))
    return tuple(at)


def _slice(d: Draft, i: int) -> None:
    if (at := _cut(d, i)) is None:
        return
    rest = tuple(c - a for c, a in zip(d.channels[i], at, strict=True))
    if d.rng.random() < 0.5:
        d.add("head slice", at, lambda p, t, v: t[i][..., : at[v]])
    else:
        d.add("tail slice", rest, lambda p, t, v: t[i][..., at[v] :])


def _split(d: Draft, i: int) -> None:
    if (at := _cut(d, i)) is None:
        return
    rest = tuple(c - a for c, a in zip(d.channels[i], at, strict=True))
    swap = [*rest], [*at]
    channels = tuple(a + b for a, b in zip(*swap, strict=True))
    d.add("swap", channels, lambda p, t, v: jnp.concatenate(jnp.split(t[i], [at[v]], -1)[::-1], -1))


def _glu(d: Draft, i: int) -> None:
    half = d.grown()
    w = d.leaf(d.channels[i], tuple(2 * c for c in half))

    def step(p: dict[str, Any], t: list[Any], v: int) -> Any:
        a, b = jnp.split(t[i] @ p[w], 2, -1)
        return a * jax.nn.sigmoid(b)

    d.add("glu", half, step)


def _depthwise(d: Draft, i: int) -> None:
    c, times = d.channels[i], int(d.rng.integers(1, 3))
    out = tuple(times * n for n in c)
    if out[2] <= 24:
        w = d.leaf(3, 3, 1, out)
        d.add("depthwise", out, lambda p, t, v: convolve(t[i], p[w], c[v]))


def _grouped(d: Draft, i: int) -> None:
    """A 1x1 convolution to groups, then a grouped one; groups, their size, or both grow."""
    groups, inner, outer = d.grown(most=3), d.grown(most=2), d.grown(most=2)
    middle = tuple(g * k for g, k in zip(groups, inner, strict=True))
    out = tuple(g * k for g, k in zip(groups, outer, strict=True))
    if out[2] > 24:
        return
    w, k = d.leaf(d.channels[i], middle), d.leaf(1, 1, inner, out)
    d.add("grouped", out, lambda p, t, v: convolve(jax.nn.relu(t[i] @ p[w]), p[k], groups[v]))


def _group_in_place(d: Draft, i: int) -> None:
    """A grouped convolution of the present channels, if the groups divide them."""
    c = d.channels[i]
    options = [g for g in (2, 3) if all(n % g == 0 for n in c)]
    if options:
        g, out = options[0], tuple(options[0] * n for n in d.grown(most=2))
        k = d.leaf(1, 1, tuple(n // g for n in c), out)
        d.add("grouped in place", out, lambda p, t, v: convolve(t[i], p[k], g))


def _squeeze_excite(d: Draft, i: int) -> None:
    c, hidden = d.channels[i], d.grown()
    a, b = d.leaf(c, hidden), d.leaf(hidden, c)

    def step(p: dict[str, Any], t: list[Any], v: int) -> Any:
        s = jax.nn.relu(t[i].mean((1, 2)) @ p[a]) @ p[b]
        return t[i] * jax.nn.sigmoid(s)[:, None, None, :]

    d.add("squeeze-excite", c, step)


def _group_norm(d: Draft, i: int) -> None:
    c = d.channels[i]
    size = int(d.rng.choice([1, 2]))
    fixed = d.rng.random() < 0.8 and all(n % size == 0 for n in c)

    def step(p: dict[str, Any], t: list[Any], v: int) -> Any:
        x = t[i].reshape(*t[i].shape[:-1], -1, size if fixed else c[v])
        x = x - x.mean((1, 2, 4), keepdims=True)
        x = x * lax.rsqrt((x * x).mean((1, 2, 4), keepdims=True) + 1e-3)
        return x.reshape(t[i].shape)

    d.add("group norm" if fixed else "layer norm", c, step)


def _shuffle(d: Draft, i: int) -> None:
    c = d.channels[i]
    if all(n % 2 == 0 for n in c):
        first = bool(d.rng.random() < 0.5)

        def step(p: dict[str, Any], t: list[Any], v: int) -> Any:
            x = t[i].reshape(*t[i].shape[:-1], *((2, -1) if first else (-1, 2)))
            return x.swapaxes(-1, -2).reshape(t[i].shape)

        d.add("shuffle", c, step)


def _attention(d: Draft, i: int) -> None:
    heads, size = d.grown(most=2), int(d.rng.integers(1, 3))
    inner = tuple(3 * h * size for h in heads)
    w, o = d.leaf(d.channels[i], inner), d.leaf(tuple(h * size for h in heads), d.channels[i])
    masked, major = bool(d.rng.random() < 0.5), bool(d.rng.random() < 0.5)

    def step(p: dict[str, Any], t: list[Any], v: int) -> Any:
        b, n = t[i].shape[0], t[i].shape[1] * t[i].shape[2]
        qkv = (t[i] @ p[w]).reshape(b, n, *((3, heads[v], size) if major else (heads[v], 3, size)))
        q, k, u = (qkv[:, :, m] if major else qkv[:, :, :, m] for m in range(3))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
        if masked:
            logits = jnp.where(jnp.tril(jnp.ones((1, 1, n, n), bool)), logits, -1e30)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), u).reshape(b, n, -1)
        return t[i] + (y @ p[o]).reshape(t[i].shape)

    d.add("attention", d.channels[i], step)


def _pad(d: Draft, i: int) -> None:
    lo, hi = d.grown(0, 2), d.grown(0, 2)
    channels = tuple(a + b + c for a, b, c in zip(lo, hi, d.channels[i], strict=True))
    value = float(d.rng.choice([0.0, 1.0]))

    def step(p: dict[str, Any], t: list[Any], v: int) -> Any:
        return lax.pad(t[i], jnp.asarray(value, t[i].dtype), [(0, 0, 0)] * 3 + [(lo[v], hi[v], 0)])

    d.add("pad", channels, step)


def _repeat(d: Draft, i: int) -> None:
    c, inner = d.channels[i], bool(d.rng.random() < 0.5)
    out = tuple(2 * n for n in c)
    if out[2] <= 24:
        d.add(
            "repeat", out,
            lambda p, t, v: jnp.repeat(t[i], 2, axis=-1) if inner else jnp.tile(t[i], (1, 1, 1, 2)),
        )  # fmt: skip


def _maxout(d: Draft, i: int) -> None:
    c = d.channels[i]
    if all(n % 2 == 0 for n in c):
        d.add("maxout", tuple(n // 2 for n in c), lambda p, t, v: t[i].reshape(*t[i].shape[:-1], -1, 2).max(-1))


def _pool(d: Draft, i: int) -> None:
    d.add(
        "pool", d.channels[i],
        lambda p, t, v: lax.reduce_window(t[i], -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME"),
    )  # fmt: skip


def _normalise(d: Draft, i: int) -> None:
    def step(p: dict[str, Any], t: list[Any], v: int) -> Any:
        return t[i] / jnp.sqrt(jnp.sum(t[i] * t[i], -1, keepdims=True) + 0.1)

    d.add("L2 normalise", d.channels[i], step)


def _over_channels(d: Draft, i: int) -> None:
    """Operations over channels, valid only for some inputs."""
    options: dict[str, Callable[[Any], Any]] = {
        "softmax": lambda x: jax.nn.softmax(x),
        "reverse": lambda x: x[..., ::-1],
        "cumulative": lambda x: jnp.cumsum(x, -1),
        "sort": lambda x: jnp.sort(x, -1),
        "minus mean": lambda x: x - x.mean(-1, keepdims=True),
        "minus maximum": lambda x: x - x.max(-1, keepdims=True),
        "times sum": lambda x: x * x.sum(-1, keepdims=True),
        "ramp": lambda x: x * jnp.arange(x.shape[-1], dtype=x.dtype).reshape(1, 1, 1, -1),
        "mixing reshape": lambda x: x.reshape(x.shape[0], -1)[:, : x.size // x.shape[0]].reshape(
            x.shape[0], x.shape[3], x.shape[1], x.shape[2]
        ).transpose(0, 2, 3, 1),
    }  # fmt: skip
    name = str(d.rng.choice(list(options)))
    d.add(name, d.channels[i], lambda p, t, v: options[name](t[i]))


LAYERS: tuple[tuple[Callable[[Draft, int], None], float], ...] = (
    (_conv, 3), (_dense_bias, 2), (_tied, 1), (_activate, 3), (_norm, 2), (_concat, 4), (_residual, 3), (_product, 1),
    (_slice, 2), (_split, 2), (_glu, 1.5), (_depthwise, 1.5), (_grouped, 1.5), (_group_in_place, 1.5),
    (_squeeze_excite, 1), (_group_norm, 1), (_shuffle, 1), (_attention, 1), (_pad, 0.7), (_repeat, 0.7), (_maxout, 0.7),
    (_pool, 0.7), (_normalise, 0.4), (_over_channels, 0.4),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Network:
    """A drawn network; version 0 is narrow, 1 wide, 2 wider."""

    draft: Draft
    ending: Callable[[dict[str, Any], list[Any], int], Any]
    inputs: jax.ShapeDtypeStruct

    def apply(self, version: int) -> Callable[[dict[str, Any], Any], Any]:
        def run(p: dict[str, Any], x: Any) -> Any:
            tensors: list[Any] = []
            for step in self.draft.steps:
                tensors.append(step(p, [*tensors, x], version))
            return self.ending(p, tensors, version)

        return run

    def shapes(self, version: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {k: jax.ShapeDtypeStruct(s[version], jnp.float32) for k, s in self.draft.leaves.items()}


def draw(seed: int) -> Network:
    """The network of this seed."""
    rng = np.random.default_rng(seed)
    d = Draft(rng)
    d.add("input", (3, 3, 3), lambda p, t, v: t[-1])
    layers, odds = zip(*LAYERS, strict=True)
    for _ in range(int(rng.integers(3, 11))):
        layers[rng.choice(len(layers), p=np.array(odds) / sum(odds))](d, d.pick())
    i = len(d.steps) - 1
    c, how = d.channels[i], int(rng.integers(0, 4))
    w = d.leaf(tuple(n * (4 if how < 2 else 1) for n in c), 3)
    endings: list[Callable[[dict[str, Any], list[Any], int], Any]] = [
        lambda p, t, v: t[i].reshape(t[i].shape[0], -1) @ p[w],
        lambda p, t, v: t[i].transpose(0, 3, 1, 2).reshape(t[i].shape[0], -1) @ p[w],
        lambda p, t, v: t[i].mean((1, 2)) @ p[w],
        lambda p, t, v: t[i],
    ]
    return Network(d, endings[how], jax.ShapeDtypeStruct((2, 2, 2, 3), jnp.float32))


def variables(shapes: dict[str, jax.ShapeDtypeStruct], rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {k: rng.normal(size=s.shape) / math.sqrt(max(1, math.prod(s.shape[:-1]))) + 0.1 for k, s in shapes.items()}


def fresh(maps: WidenMaps, shapes: dict[str, jax.ShapeDtypeStruct], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Any new entries that the maps allow."""
    local = {k: len(s.shape) < 2 and k not in maps.zero_leaves for k, s in shapes.items()}
    return {k: 3 * rng.uniform(size=s.shape) if local[k] else np.zeros(s.shape) for k, s in shapes.items()}


def outcome(network: Network, seed: int) -> tuple[str, float, tuple[str, ...]]:
    """("preserved" | "refused" | "wrong", largest relative error, what was refused)."""
    rng = np.random.default_rng(seed)
    steps = [
        widen_maps(network.apply(v), network.shapes(v), network.apply(v + 1), network.shapes(v + 1), network.inputs)
        for v in (0, 1)
    ]
    refused = tuple(reason.primitive for maps in steps for reason in maps.reasons)
    narrow = variables(network.shapes(0), rng)
    x = rng.normal(size=network.inputs.shape)
    answer = evaluate(network.apply(0), network.shapes(0), network.inputs, narrow, x)
    error = 0.0
    for version, maps in ((1, steps[0]), (2, steps[0].then(steps[1]))):
        if not maps.preserved:
            continue
        spot = maps.outputs
        for into in (None, fresh(maps, network.shapes(version), rng)):
            wide = maps.put(narrow, into=into)
            assert all(np.array_equal(a, narrow[k]) for k, a in maps.take(wide).items())
            got = spot.take(evaluate(network.apply(version), network.shapes(version), network.inputs, wide, x))
            gap = float(np.max(np.abs(got - answer)) / max(float(np.max(np.abs(answer))), 1e-3))
            error = max(error, gap if math.isfinite(gap) else math.inf)
    if error > TOLERANCE and np.all(np.isfinite(answer)):
        return "wrong", error, refused
    return ("refused" if refused else "preserved"), error, refused


def naive_error(network: Network, seed: int) -> float:
    """Relative error of the rule "old block at the leading indices of every axis"; for comparison."""
    rng = np.random.default_rng(seed)
    narrow, x = variables(network.shapes(0), rng), rng.normal(size=network.inputs.shape)
    answer = evaluate(network.apply(0), network.shapes(0), network.inputs, narrow, x)
    wide = {k: np.zeros(s.shape) for k, s in network.shapes(1).items()}
    for k, values in narrow.items():
        wide[k][tuple(slice(n) for n in values.shape)] = values
    got = evaluate(network.apply(1), network.shapes(1), network.inputs, wide, x)
    gap = np.abs(got[tuple(slice(n) for n in answer.shape)] - answer)
    error = float(np.max(gap) / max(float(np.max(np.abs(answer))), 1e-3))
    return error if math.isfinite(error) else math.inf


def evaluate(
    fn: Callable[..., Any], shapes: Any, inputs: Any, values: dict[str, np.ndarray], x: np.ndarray
) -> np.ndarray:
    """fn(values, x) in float64 by NumPy."""
    closed = jax.make_jaxpr(fn)(shapes, inputs)
    arguments = [*jax.tree.leaves(values), x]
    with np.errstate(all="ignore"):
        (out,) = run(closed.jaxpr, closed.consts, arguments)
    return out


def run(jaxpr: Any, consts: Any, arguments: Any) -> list[np.ndarray]:
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    for eqn in jaxpr.eqns:
        operands = [wide_float(v.val if hasattr(v, "val") else known[v]) for v in eqn.invars]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if inner is not None:
            results = run(inner.jaxpr, inner.consts, operands)
        else:
            shapes = [v.aval.shape for v in eqn.outvars]
            results = NUMPY[eqn.primitive.name](eqn.params, shapes, *operands)
            results = results if isinstance(results, list) else [results]
        for var, result in zip(eqn.outvars, results, strict=True):
            assert np.shape(result) == var.aval.shape, (eqn, np.shape(result))
            known[var] = result
    return [wide_float(v.val if hasattr(v, "val") else known[v]) for v in jaxpr.outvars]


def wide_float(value: Any) -> np.ndarray:
    value = np.asarray(value)
    return value.astype(np.float64) if value.dtype.kind == "f" else value


def _np_conv(p: Any, shapes: Any, x: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Stride 1, NHWC x HWIO."""
    groups = p["feature_group_count"]
    x = np.pad(x, [(0, 0), *p["padding"], (0, 0)])
    n, h, w, _ = shapes[0]
    out = 0.0
    k = k.reshape(*k.shape[:3], groups, -1)
    for i in range(k.shape[0]):
        for j in range(k.shape[1]):
            part = x[:, i : i + h, j : j + w].reshape(n, h, w, groups, -1)
            out = out + np.einsum("nhwgc,cgo->nhwgo", part, k[i, j])
    return np.asarray(out).reshape(shapes[0])


def _np_dot(p: Any, shapes: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    (cx, cy), (bx, by) = p["dimension_numbers"]
    left, right = list(range(x.ndim)), list(range(x.ndim, x.ndim + y.ndim))
    for a, b in zip([*cx, *bx], [*cy, *by], strict=True):
        right[b] = left[a]
    free = [left[i] for i in range(x.ndim) if i not in (*cx, *bx)]
    free += [right[i] for i in range(y.ndim) if i not in (*cy, *by)]
    return np.einsum(x, left, y, right, [*(left[i] for i in bx), *free])


def _np_windows(p: Any, shapes: Any, x: np.ndarray) -> np.ndarray:
    x = np.pad(x, p["padding"], constant_values=-np.inf)
    view = np.lib.stride_tricks.sliding_window_view(x, p["window_dimensions"])
    return view.max(tuple(range(x.ndim, 2 * x.ndim)))


def _np_broadcast(p: Any, shapes: Any, x: np.ndarray, *_: Any) -> np.ndarray:
    dims = p["broadcast_dimensions"]
    return np.broadcast_to(
        x.reshape([x.shape[dims.index(i)] if i in dims else 1 for i in range(len(shapes[0]))]), shapes[0]
    )


def _np_pad(p: Any, shapes: Any, x: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.pad(x, [(lo, hi) for lo, hi, _ in p["padding_config"]], constant_values=float(value))


def _np_slice(p: Any, shapes: Any, x: np.ndarray) -> np.ndarray:
    steps = p["strides"] or (1,) * x.ndim
    return x[tuple(slice(*s) for s in zip(p["start_indices"], p["limit_indices"], steps, strict=True))]


def _np_iota(p: Any, shapes: Any) -> np.ndarray:
    shape = shapes[0]
    row = np.arange(shape[p["dimension"]]).reshape([-1 if i == p["dimension"] else 1 for i in range(len(shape))])
    return np.broadcast_to(row, shape).astype(p["dtype"])


def _np_convert(p: Any, shapes: Any, x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64 if np.dtype(p["new_dtype"]).kind == "f" else p["new_dtype"])


_erf = np.vectorize(math.erf, otypes=[float])
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "neg": np.negative,
    "tanh": np.tanh, "exp": np.exp, "cos": np.cos, "sqrt": np.sqrt, "square": np.square, "erf": _erf,
    "logistic": lambda x: 1 / (1 + np.exp(-x)), "rsqrt": lambda x: 1 / np.sqrt(x), "copy": np.asarray,
    "stop_gradient": np.asarray, "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal, "lt": np.less,
    "select_n": lambda which, no, yes: np.where(which, yes, no),
}  # fmt: skip
NUMPY: dict[str, Callable[..., Any]] = {
    **{name: lambda p, shapes, *xs, fn=fn: fn(*xs) for name, fn in _ELEMENTWISE.items()},
    "integer_pow": lambda p, shapes, x: x ** p["y"],
    "convert_element_type": _np_convert,
    "concatenate": lambda p, shapes, *xs: np.concatenate(xs, p["dimension"]),
    "reshape": lambda p, shapes, x: x.reshape(shapes[0]),
    "squeeze": lambda p, shapes, x: x.reshape(shapes[0]),
    "transpose": lambda p, shapes, x: x.transpose(p["permutation"]),
    "broadcast_in_dim": _np_broadcast,
    "tile": lambda p, shapes, x: np.tile(x, p["reps"]),
    "rev": lambda p, shapes, x: np.flip(x, p["dimensions"]),
    "sort": lambda p, shapes, x: np.sort(x, p["dimension"]),
    "cumsum": lambda p, shapes, x: np.cumsum(x, p["axis"]),
    "reduce_sum": lambda p, shapes, x: x.sum(tuple(p["axes"])),
    "reduce_max": lambda p, shapes, x: x.max(tuple(p["axes"])),
    "split": lambda p, shapes, x: np.split(x, np.cumsum(p["sizes"])[:-1], p["axis"]),
    "slice": _np_slice,
    "pad": _np_pad,
    "iota": _np_iota,
    "conv_general_dilated": _np_conv,
    "dot_general": _np_dot,
    "reduce_window_max": _np_windows,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", type=int, default=3000)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    counts: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    wrong: list[int] = []
    largest = 0.0
    naive = 0
    for seed in range(args.first_seed, args.first_seed + args.networks):
        verdict, error, refused = outcome(draw(seed), seed)
        counts[verdict] += 1
        refusals.update(set(refused))
        largest = max(largest, error)
        naive += verdict == "preserved" and naive_error(draw(seed), seed) > 1e-3
        if verdict == "wrong":
            wrong.append(seed)
    result = {
        "command": f"python benchmarks/widening_fuzz.py --networks {args.networks} --first-seed {args.first_seed}",
        "jax": jax.__version__,
        "networks": args.networks,
        "preserved": counts["preserved"],
        "refused": counts["refused"],
        "silently_wrong": counts["wrong"],
        "wrong_seeds": wrong,
        "preserved_here_but_wrong_by_leading_blocks": naive,
        "largest_relative_error_float64": largest,
        "refusing_primitives": dict(refusals.most_common()),
        "seconds": round(time.perf_counter() - start, 1),
    }
    path = pathlib.Path(__file__).parent / "results" / "widening_fuzz.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""Ways of changing a pretrained encoder by few numbers, in plain JAX and Flax."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pretrained_encoder import Encoder, Inputs, flat, nested

Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A way of changing the encoder.

    Attributes:
      kind: of training: "probe", "bitfit", "lora", "shira" or "full".
      fixed: arrays of the pretrained encoder, by name.
      start: `key -> trained arrays, by name`.
      features: `(fixed arrays, trained arrays, inputs) -> (n, size)`.
      extra_bytes: bytes to deliver besides the trained arrays, such as positions.
    """

    kind: str
    fixed: Flat
    start: Callable[[jax.Array], Flat]
    features: Callable[[Flat, Flat, Inputs], jax.Array]
    extra_bytes: int = 0


@functools.cache
def adapter(way: str, encoder: Encoder, seed: int) -> Adapter:
    """Return the adapter of a way."""
    kind, _, number = way.partition("-")
    base: Flat = flat(encoder.variables["params"])
    apply = _caller(encoder, encoder.build(1.0))
    if kind == "lora" and encoder.lora.endswith("/kernel"):
        return _lora_of_kernels(encoder, base, apply, int(number))
    if kind == "lora":
        return _lora(encoder, base, int(number))
    if kind == "shira":
        return _shira(encoder, base, apply, float(number), seed)
    chosen = {
        "probe": {},
        "bitfit": {path: leaf for path, leaf in base.items() if leaf.ndim == 1 or path.endswith("bias")},
        "full": base,
    }[kind]
    return Adapter(kind, base, lambda key: chosen, apply)


def _caller(encoder: Encoder, module: Any) -> Callable[[Flat, Flat, Inputs], jax.Array]:
    """Return the features as a function of parameters; running statistics, if there are any, stay the pretrained."""
    others = {name: tree for name, tree in encoder.variables.items() if name != "params"}

    def apply(fixed: Flat, changed: Flat, x: Inputs) -> jax.Array:
        return module.apply({**others, "params": nested({**fixed, **changed})}, x, train=False)

    return apply


def _lora(encoder: Encoder, base: Flat, rank: int) -> Adapter:
    import qwix

    rule = qwix.LoraRule(module_path=encoder.lora, rank=rank, alpha=float(rank))
    module: Any = qwix.apply_lora_to_model(encoder.build(1.0), qwix.LoraProvider([rule]))

    def start(key: jax.Array) -> Flat:
        params = flat(module.init(key, encoder.sample, train=False)["params"])
        return {path: leaf for path, leaf in params.items() if path not in base}

    return Adapter("lora", base, start, _caller(encoder, module))


def _lora_of_kernels(encoder: Encoder, base: Flat, apply: Callable[..., jax.Array], rank: int) -> Adapter:
    """Return adapters of kernels that qwix does not see, since they are reshaped before they are used."""
    paths = [path for path in base if re.fullmatch(encoder.lora, path)]

    def start(key: jax.Array) -> Flat:
        found = {}
        for path, key_of in zip(paths, jax.random.split(key, len(paths)), strict=True):
            *_, inputs, outputs = base[path].shape
            found[f"{path}_lora_a"] = jax.nn.initializers.he_uniform()(key_of, (inputs, rank))
            found[f"{path}_lora_b"] = jnp.zeros((rank, outputs))
        return found

    def features(fixed: Flat, changed: Flat, x: Inputs) -> jax.Array:
        products = {path: changed[f"{path}_lora_a"] @ changed[f"{path}_lora_b"] for path in paths}
        return apply(fixed, {path: fixed[path] + products[path][None, None] for path in paths}, x)

    return Adapter("lora", base, start, features)


def _shira(encoder: Encoder, base: Flat, apply: Callable[..., jax.Array], share: float, seed: int) -> Adapter:
    rng, places = np.random.default_rng(seed), {}
    for path, leaf in base.items():
        if encoder.is_kernel(path):
            places[path] = np.sort(rng.choice(leaf.size, round(share * leaf.size), replace=False)).astype(np.int32)

    def features(fixed: Flat, changed: Flat, x: Inputs) -> jax.Array:
        put = lambda path, v: fixed[path].ravel().at[places[path]].add(v).reshape(fixed[path].shape)  # noqa: E731
        return apply(fixed, {path: put(path, values) for path, values in changed.items()}, x)

    start = lambda key: {path: jnp.zeros(len(found)) for path, found in places.items()}  # noqa: E731
    return Adapter("shira", base, start, features, extra_bytes=sum(found.nbytes for found in places.values()))

"""Time of the widening analysis of the shipped backbones, and how exactly their functions are preserved.

Command:   python benchmarks/widening_models.py
Expected:  every model preserved to <= 1e-5 relative in float32; InceptionResnetV1 (133 kernels) analysed in < 10 s
Writes:    benchmarks/results/widening_models.json; about 3 minutes on 2 CPU cores, nearly all of it compilation

Each model is expanded from width 1 to sqrt(1.2), the size ratio 1.2 of the paper. The narrow network has random
weights. They are placed into a wide network of zeros, and its features on random images are compared with the narrow
ones at the positions given by the maps.
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pae_jax as pae

CASES = {
    "MLP": (pae.models.MLP, (2, 32)),
    "SmallCNN": (pae.models.SmallCNN, (2, 112, 92, 1)),
    "VGG16": (pae.models.VGG16, (2, 32, 32, 3)),
    "ResNet-18": (pae.models.ResNet, (2, 64, 64, 3)),
    "InceptionResnetV1": (pae.models.InceptionResnetV1, (2, 160, 160, 3)),
}


def measure(model: Any, shape: tuple[int, ...], wide_width: float) -> dict[str, Any]:
    """Return analysis time, map counts and the preservation error of a model."""
    net = pae.linen(model, jnp.zeros(shape))
    narrow, wide = net.program(1.0), net.program(wide_width)
    x = jax.random.normal(jax.random.key(1), shape)

    def variables_of(program):
        return jax.eval_shape(lambda: program.init(jax.random.key(0), x))

    def features_of(program):
        return lambda variables, x: program.apply(variables, x, False, None)[0]

    shapes = variables_of(narrow), variables_of(wide)
    start = time.perf_counter()
    maps = pae.widen_maps(features_of(narrow), shapes[0], features_of(wide), shapes[1], x)
    seconds = time.perf_counter() - start
    variables = jax.jit(lambda key: narrow.init(key, x))(jax.random.key(0))
    old = jax.jit(features_of(narrow))(variables, x)
    new = maps.outputs.take(jax.jit(features_of(wide))(maps.put(variables), x))
    axes = {axis for _, leaf in maps.leaves for axis in leaf.axes if not axis.is_identity}
    return {
        "kernels": sum(len(leaf.narrow) >= 2 for _, leaf in maps.leaves),
        "distinct_maps": len(axes),
        "preserved": maps.preserved,
        "analysis_seconds": round(seconds, 2),
        "relative_error": float(jnp.abs(new - old).max() / jnp.abs(old).max()),
    }


def main() -> None:
    """Measure all models and write the result file."""
    result: dict[str, Any] = {
        "command": "python benchmarks/widening_models.py",
        "hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "flax")},
        "size_ratio": 1.2,
        "cases": {},
    }
    for name, (model, shape) in CASES.items():
        result["cases"][name] = measure(model, shape, pae.width_for(1.2))
        print(f"{name}: {result['cases'][name]}", flush=True)
    out = Path(__file__).parent / "results" / "widening_models.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Cost of a train step of a task that owns 0.2 or 0.5 % of a pretrained network, beside a step of LoRA.

Command:   python benchmarks/small_task.py               (--only units for one case; needs qwix: pip install qwix)
Expected:  new units / LoRA <= 1.1 in time and in memory; optimizer state below 1 MB; single weights / LoRA about 1.5 in
           time (the gradient of single weights of a kernel costs what the whole one costs) and 1.2 in memory; 6 minutes
           on 2 CPU cores
Writes:    benchmarks/results/small_task.json

The network is an encoder of the size of all-MiniLM-L6-v2 (22.7 million weights, drawn), a batch 32 sequences of 32
tokens, the optimizer AdamW, and the head has two classes. "LoRA" trains matrices of rank 8 on query and value of every
layer, by qwix. "new units" is the second task of a network that was widened by 10 hidden units a layer: it owns their
weights, and trains its own biases and norms. "single weights" owns the smallest 0.5 % of every weight matrix. "whole
leaves" is the task of the new units with every leaf in which it owns a weight differentiated whole. All steps run in
turn in one process, with donated arrays. Memory is what the compiled program needs: arguments, results, temporaries.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import steps
from flax import traverse_util

import pae_jax as pae
from pae_jax.training import places

UNITS, WIDTH, LENGTH, BATCH = 1536, 1546 / 1536, 32, 32
SAMPLE = {"ids": jnp.ones((1, LENGTH), jnp.int32), "mask": jnp.ones((1, LENGTH), jnp.int32)}
CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels


def encoder(width: float) -> pae.models.Bert:
    """Return the encoder; the width is a factor of the hidden units alone."""
    return pae.models.Bert(hidden=round(UNITS * width), dropout=0.0)


def random_batch() -> tuple[Any, jax.Array]:
    """Return token ids, and labels of two classes."""
    ids = np.random.default_rng(0).integers(1000, 20000, (BATCH, LENGTH))
    return {"ids": jnp.asarray(ids, jnp.int32), "mask": jnp.ones((BATCH, LENGTH), jnp.int32)}, jnp.arange(BATCH) % 2


def lora_step(tx: optax.GradientTransformation) -> tuple[steps.Stepper, int]:
    """Return the step of LoRA and the bytes of its optimizer state."""
    rule = qwix.LoraRule(module_path=".*attention/(query|value)", rank=8, alpha=8.0)
    model: Any = qwix.apply_lora_to_model(encoder(1.0), qwix.LoraProvider([rule]))
    flat = traverse_util.flatten_dict(model.init(jax.random.key(0), SAMPLE, train=False)["params"])
    added = {path: leaf for path, leaf in flat.items() if "lora" in path[-1]}
    base = {path: leaf for path, leaf in flat.items() if path not in added}
    params = {"lora": added, "head": jnp.zeros((384, 2))}

    def step(moving: Any, x: Any, y: jax.Array) -> Any:
        params, base, opt_state, _ = moving

        def loss(params: Any) -> jax.Array:
            variables = {"params": traverse_util.unflatten_dict({**base, **params["lora"]})}
            return CROSS_ENTROPY(model.apply(variables, x, train=True) @ params["head"], y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        changes, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), base, opt_state, value

    moving = (params, base, tx.init(params), jnp.zeros(()))
    return steps.Stepper(jax.jit(step, donate_argnums=0), moving, *random_batch()), harness.array_bytes(moving[2])


def our_step(
    tx: optax.GradientTransformation, net: pae.Net, state: pae.State, whole: bool = False
) -> tuple[steps.Stepper, int]:
    """Return the step of the newest task and the bytes of its optimizer state; `whole` trains whole leaves."""
    with mock.patch.object(places, "find", lambda owner, task_id: None) if whole else mock.MagicMock():
        step = steps.user_step(net, state, tx, random_batch())
    return step, harness.array_bytes(step.moving[0].opt_state)


def new_units(net: pae.Net) -> pae.State:
    """Return a frozen network, widened by 10 units a layer, and a task that owns these."""
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "pretrained", head=None, key=jax.random.key(1))
    state = pae.expand(net, pae.freeze(state, "pretrained"), width=WIDTH, key=jax.random.key(2))
    return pae.pack(net, state, "newest", head=2, key=jax.random.key(3), sharing="first")


def single_weights(net: pae.Net) -> pae.State:
    """Return a frozen network without the smallest 0.5 % of its weights, and a task that owns these."""
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "pretrained", head=None, key=jax.random.key(1))
    state = pae.freeze(pae.prune(state, "pretrained", 0.005), "pretrained")
    options: Any = {"sharing": "first", "weight_init": "fresh"}
    return pae.pack(net, state, "newest", head=2, key=jax.random.key(3), **options)


def measure(case: str, repeats: int) -> dict[str, Any]:
    """Return times, memory, and optimizer state of the steps, and the share of weights that our task owns."""
    net, tx = pae.linen(encoder, SAMPLE), optax.adamw(2e-3)
    state = new_units(net) if case == "new units" else single_weights(net)
    made = {"LoRA": lora_step(tx), case: our_step(tx, net, state)}
    if case == "new units":
        made["whole leaves"] = our_step(tx, net, state, whole=True)
    ways = {name: step for name, (step, _) in made.items()}
    memory = {name: harness.program_bytes(step.compiled) for name, step in ways.items()}
    totals = {name: sum(parts.values()) for name, parts in memory.items()}
    ratios = {f"{name} / LoRA": round(totals[name] / totals["LoRA"], 3) for name in totals if name != "LoRA"}
    own, weights = 0, 0
    for mask in jax.tree.leaves(pae.trainable(state, "newest")):
        own, weights = own + int(mask.sum()), weights + mask.size
    return {
        **harness.compare(harness.in_turn(ways, repeats), "LoRA"),
        "weights": weights,
        "owned": own,
        "bytes": memory,
        "bytes_ratios": ratios,
        "optimizer_bytes": {name: size for name, (_, size) in made.items()},
    }


def main() -> None:
    """Measure the cases and write the result file."""
    settings = harness.options(__doc__, 12)
    cases = ("new units", "single weights")
    harness.publish(settings, {case: functools.partial(measure, case, settings.repeats) for case in cases})


if __name__ == "__main__":
    main()

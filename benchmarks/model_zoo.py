"""Models that were not written for packing: what each needs to be packed, and whether every operation works on it.

Command:   python benchmarks/model_zoo.py [name ...]
Expected:  30 of 34 or more with no wrapper or only `call=` or `rngs=`; every refusal justified in the table
Writes:    benchmarks/results/model_zoo.json; about 10 minutes on 2 CPU cores, nearly all of it compilation

The builders of `zoo_linen.py` and `zoo_nnx.py` imitate public models: how they are called, which variables they keep,
what they return and which operations they use. Each is packed, trained, pruned and frozen with two tasks, verified,
saved, loaded, widened, served and exported; the first task's outputs must stay bit-identical.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import zoo_linen as zl
import zoo_nnx as zn

import pae_jax as pae

ROWS = 8
DRAW = np.random.default_rng(0)
IMAGES = DRAW.uniform(size=(ROWS, 8, 8, 3)).astype(np.float32)
VECTORS = DRAW.normal(size=(ROWS, 6)).astype(np.float32)
TOKENS = DRAW.integers(1, 11, (ROWS, 6)).astype(np.int32)
LENGTHS = DRAW.integers(2, 7, ROWS).astype(np.int32)
GRAPHS = {
    "nodes": DRAW.normal(size=(ROWS, 4, 5)).astype(np.float32),
    "senders": DRAW.integers(0, 4, (ROWS, 5)).astype(np.int32),
    "receivers": DRAW.integers(0, 4, (ROWS, 5)).astype(np.int32),
}
WIDTHS = (1.0, 1.5)


class Pool(nn.Module):
    """A head for features of any shape: the mean of each over all axes but the first and last."""

    @nn.compact
    def __call__(self, features: Any) -> jax.Array:
        """Return logits of 3 classes."""
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(features)]
        pooled = [leaf.mean(axis=tuple(range(1, leaf.ndim - 1))) if leaf.ndim > 1 else leaf[:, None] for leaf in leaves]
        return nn.Dense(3)(jnp.concatenate(pooled, axis=-1))


class Entry(NamedTuple):
    """One model of the zoo.

    Attributes:
      like: the public models that it imitates.
      make: builds the network; the arguments besides `build` and the sample are the wrapper.
      inputs: a batch.
      refusal: why refusing the model is justified; empty if it must be accepted.
    """

    like: str
    make: Callable[[], pae.Net]
    inputs: Any
    refusal: str = ""


def configured(width: float) -> nn.Module:
    """Return a model whose sizes come from a configuration object."""
    return zl.ConfiguredLm(zl.Config(hidden=int(16 * width), heads=int(2 * width)))


TEXT = {"tokens": TOKENS, "lengths": LENGTHS}
BERT = {"input_ids": TOKENS, "attention_mask": (np.arange(6)[None] < LENGTHS[:, None]).astype(np.int32)}
PAIR = {"image": IMAGES, "text": TOKENS}
TIMED = {"x": IMAGES, "t": DRAW.uniform(size=ROWS).astype(np.float32)}

ZOO: dict[str, Entry] = {
    "cnn": Entry("flax mnist", lambda: pae.linen(zl.PlainCnn, IMAGES), IMAGES),
    "batch norm over a mapped axis": Entry("flax imagenet", lambda: pae.linen(zl.MappedBatchNorm, IMAGES), IMAGES),
    "vae": Entry("flax vae", lambda: pae.linen(zl.Vae, VECTORS, call=lambda m, x, train: m.encode(x)), VECTORS),
    "sampling decoder": Entry(
        "flax seq2seq",
        lambda: pae.linen(zl.SamplingDecoder, TOKENS, rngs=("lstm",), couples_examples=True),
        TOKENS,
    ),
    "text classifier": Entry(
        "flax sst2",
        lambda: pae.linen(
            zl.TextClassifier,
            TEXT,
            call=lambda m, x, train: m(x["tokens"], x["lengths"], deterministic=not train),
        ),
        TEXT,
    ),
    "configured language model": Entry("flax lm1b, wmt", lambda: pae.linen(configured, TOKENS), TOKENS),
    "keyword-only tagger": Entry(
        "flax nlp_seq",
        lambda: pae.linen(zl.KeywordTagger, TOKENS, call=lambda m, x, train: m(inputs=x, train=train)),
        TOKENS,
    ),
    "actor and critic": Entry("flax ppo", lambda: pae.linen(zl.ActorCritic, IMAGES), IMAGES),
    "graph network": Entry("jraph, flax ogbg_molpcba", lambda: pae.linen(zl.GraphNet, GRAPHS), GRAPHS),
    "ViT with intermediates": Entry(
        "big_vision ViT",
        lambda: pae.linen(zl.BigVisionViT, IMAGES, call=lambda m, x, train: m(x, train=train)[0]),
        IMAGES,
    ),
    "mixer": Entry("MLP-Mixer", lambda: pae.linen(zl.Mixer, IMAGES), IMAGES),
    "two towers": Entry(
        "CLIP, SigLIP",
        lambda: pae.linen(zl.TwoTower, PAIR, call=lambda m, x, train: m(x["image"], x["text"])[:2]),
        PAIR,
    ),
    "partitioned encoder": Entry(
        "T5X", lambda: pae.linen(zl.Partitioned, TOKENS, call=lambda m, x, train: m(x, enable_dropout=train)), TOKENS
    ),
    "BERT in setup": Entry(
        "Hugging Face FlaxBert",
        lambda: pae.linen(
            zl.SetupBert,
            BERT,
            call=lambda m, x, train: m(x["input_ids"], x["attention_mask"], deterministic=not train),
        ),
        BERT,
    ),
    "stochastic depth": Entry("EfficientNet, ConvNeXt", lambda: pae.linen(zl.DroppedPaths, IMAGES), IMAGES),
    "U-Net": Entry(
        "diffusion models",
        lambda: pae.linen(zl.UNet, TIMED, call=lambda m, x, train: m(x["x"], x["t"], train)),
        TIMED,
    ),
    "spectral norm": Entry("GAN critics", lambda: pae.linen(zl.SpectralCritic, VECTORS), VECTORS),
    "weight norm": Entry("WeightNorm", lambda: pae.linen(zl.WeightNormed, VECTORS), VECTORS),
    "state space": Entry(
        "S5, LRU",
        lambda: pae.linen(zl.StateSpace, TOKENS),
        TOKENS,
        "complex parameters: the gradients of JAX are conjugated, and optimizers would follow them the wrong way",
    ),
    "radiance field": Entry("NeRF", lambda: pae.linen(zl.RadianceField, VECTORS), VECTORS),
    "experts": Entry("Switch, Mixtral", lambda: pae.linen(zl.Experts, VECTORS), VECTORS),
    "recurrent": Entry("speech encoders", lambda: pae.linen(zl.Recurrent, TOKENS), TOKENS),
    "statistics of other kinds": Entry("AQT", lambda: pae.linen(zl.QuantizedStatistics, VECTORS), VECTORS),
    "auxiliary output": Entry("GoogLeNet", lambda: pae.linen(zl.AuxiliaryInTraining, VECTORS), VECTORS),
    "rotary decoder": Entry("Llama in Flax", lambda: pae.linen(zl.Decoder, TOKENS), TOKENS),
    "nnx modes": Entry("NNX tutorials", lambda: pae.nnx(zn.Modes, IMAGES), IMAGES),
    "nnx decoder": Entry("Gemma in NNX", lambda: pae.nnx(zn.Gemma, TOKENS), TOKENS),
    "nnx ViT": Entry("NNX ViT tutorial", lambda: pae.nnx(zn.VisionTransformer, IMAGES), IMAGES),
    "nnx scan over layers": Entry("NNX toy examples", lambda: pae.nnx(zn.ScanOverLayers, VECTORS), VECTORS),
    "nnx adapters": Entry("NNX LoRA", lambda: pae.nnx(zn.LowRank, VECTORS), VECTORS),
    "nnx vae": Entry("NNX VAE", lambda: pae.nnx(zn.Vae, VECTORS), VECTORS),
    "nnx rnn": Entry("NNX RNN", lambda: pae.nnx(zn.Rnn, TOKENS), TOKENS),
    "nnx constants": Entry("ported models", lambda: pae.nnx(zn.Buffers, VECTORS), VECTORS),
    "plain layers": Entry(
        "nn.Sequential", lambda: pae.linen(lambda w: nn.Sequential([nn.Dense(int(8 * w)), nn.relu]), VECTORS), VECTORS
    ),
}


def live(net: pae.Net, x: Any, folder: Path, passed: list[str]) -> None:
    """Run every operation on a network; append the name of each passed step to `passed`."""
    y, tx = np.arange(ROWS) % 3, optax.adamw(1e-2)
    options = {"optimizer": tx, "epochs": 1, "batch_size": 4, "key": jax.random.key(2), "progress": False}

    def same(state: Any) -> None:
        for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(pae.predict(net, state, "a", x)), strict=True):
            if np.asarray(one).tobytes() != np.asarray(other).tobytes():
                raise AssertionError("the first task's answers have changed")

    state = pae.init(net, jax.random.key(0))
    passed.append("init")
    state = pae.pack(net, state, "a", head=Pool(), key=jax.random.key(1))
    passed.append("pack")
    state, history = pae.fit(net, state, "a", (x, y), **options)
    if not np.isfinite(history.rows[-1]["loss"]):
        raise AssertionError("the loss is not finite")
    passed.append("fit")
    state = pae.freeze(pae.prune(state, "a", 0.5), "a")
    before = pae.predict(net, state, "a", x)
    state = pae.pack(net, state, "b", head=Pool(), key=jax.random.key(3))
    state, _ = pae.fit(net, state, "b", (x, 2 - y), **options)
    state = pae.freeze(pae.prune(state, "b", 0.5), "b")
    pae.verify(state)
    same(state)
    passed.append("second task")
    pae.save(folder / "stage", state)
    state = pae.load(net, folder / "stage", heads={"a": Pool(), "b": Pool()})
    same(state)
    passed.append("save, load")
    state = pae.expand(net, state, width=WIDTHS[1], key=jax.random.key(4))
    same(state)
    pae.verify(state)
    passed.append("expand")
    state = pae.freeze(pae.pack(net, state, "c", head=Pool(), key=jax.random.key(5)), "c")
    served = pae.Server(net, state).predict("a", x)
    if np.asarray(served).tobytes() != np.asarray(before).tobytes():
        raise AssertionError("the server answers otherwise")
    same(state)
    passed.append("serve")
    try:
        program = pae.export(net, state, "a")
        passed.append("export")
    except pae.StructureError:  # models that compute with the number of examples
        program = pae.export(net, state, "a", batch_size=ROWS)
        passed.append("export at one batch size")
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(program.call(x)), strict=True):
        if np.asarray(one).tobytes() != np.asarray(other).tobytes():
            raise AssertionError("the exported program answers otherwise")


def wrapper(net: pae.Net) -> str:
    """Return which arguments besides `build` and the sample a model needed."""
    needed = {"call=": net.program(WIDTHS[0]).call, "rngs=": net.rngs, "couples_examples=": net.couples_examples}
    return ", ".join(name for name, given in needed.items() if given) or "none"


def main() -> None:
    """Run the models named on the command line, or all of them."""
    path, rows, whole = Path(__file__).parent / "results" / "model_zoo.json", [], 0
    for name in sys.argv[1:] or ZOO:
        entry, passed, start, error = ZOO[name], [], time.perf_counter(), ""
        net = entry.make()
        with tempfile.TemporaryDirectory() as folder:
            try:
                live(net, entry.inputs, Path(folder), passed)
            except Exception as found:  # any error of a model or the library becomes a row of the table
                error = f"{type(found).__name__}: {found}"
        row = {"name": name, "like": entry.like, "wrapper": wrapper(net), "passed": passed, "refused": error}
        row |= {"why": entry.refusal if error else "", "seconds": round(time.perf_counter() - start, 1)}
        rows.append(row)
        print(f"{name:32} {row['wrapper']:24} {len(passed)} of 8  {row['seconds']:5.1f} s  {error[:300]}", flush=True)
        whole = sum(not row["refused"] for row in rows)
        if not sys.argv[1:]:
            facts = {
                "command": "python benchmarks/model_zoo.py",
                "models": len(rows),
                "whole_life": whole,
                "rows": rows,
            }
            path.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")
    print(f"{whole} of {len(rows)} through a whole life")


if __name__ == "__main__":
    main()

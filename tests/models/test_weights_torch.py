"""The shipped backbones with weights of torchvision, timm and transformers compute what those packages compute.

The classes are built small and at random; the weights that are published for them have the same names.
"""

import warnings

import jax
import numpy as np
import pytest

from pae_jax import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of how those packages import each other
    torch = pytest.importorskip("torch", reason="the classes to compare with are PyTorch's")


def package(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def randomised(model):
    """Give norms scales, offsets and statistics that are not 0 and 1."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def torchvision_resnet(name):
    model = randomised(getattr(package("torchvision").models, name)())
    model.fc = torch.nn.Identity()
    return model, getattr(models, name)(), 65


def torchvision_vit():
    kind = package("torchvision").models.vision_transformer.VisionTransformer
    model = randomised(kind(32, 8, 2, 4, 64, 128))
    model.heads = torch.nn.Identity()
    return model, models.ViT(size=64, depth=2, heads=4, patch=8, hidden=128), 32


def timm_vit():
    kind = package("timm").models.vision_transformer.VisionTransformer
    model = randomised(kind(32, 8, embed_dim=64, depth=2, num_heads=4, num_classes=0))
    return model, models.ViT(size=64, depth=2, heads=4, patch=8), 32


def timm_efficientnet(name, **options):
    model = randomised(package("timm").create_model(name, num_classes=0))
    return model, models.EfficientNetLite(**options), 65


CASES = {
    "resnet18": lambda: torchvision_resnet("resnet18"),
    "resnet50": lambda: torchvision_resnet("resnet50"),
    "ViT of torchvision": torchvision_vit,
    "ViT of timm": timm_vit,
    "EfficientNet-Lite0 of TensorFlow": lambda: timm_efficientnet("tf_efficientnet_lite0"),
    "EfficientNet-Lite0 of PyTorch": lambda: timm_efficientnet("efficientnet_lite0", padding="even", epsilon=1e-5),
}


def assert_close(found, expected):
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_features_equal_those_of_the_torch_class(name, tmp_path):
    model, ours, side = CASES[name]()
    images = np.random.default_rng(0).standard_normal((2, side, side, 3), np.float32)
    with torch.no_grad():
        expected = model(torch.as_tensor(images.transpose(0, 3, 1, 2).copy())).numpy()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    weights = models.load_weights(ours, tmp_path / "weights.pth", images)
    assert_close(jax.jit(lambda v, x: ours.apply(v, x, train=False))(weights.variables, images), expected)


def test_sentence_features_equal_those_of_the_torch_class(tmp_path):
    transformers = package("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = randomised(transformers.BertModel(config))
    batch = {"ids": np.random.default_rng(0).integers(0, 50, (2, 7)).astype(np.int32)}
    batch["mask"] = np.array([[1] * 7, [1] * 4 + [0] * 3], np.int32)
    with torch.no_grad():
        tokens = model(*(torch.as_tensor(batch[name]).long() for name in ("ids", "mask"))).last_hidden_state.numpy()
    expected = (tokens * batch["mask"][..., None]).sum(1) / batch["mask"].sum(1, keepdims=True)
    ours = models.Bert(vocabulary=50, size=32, depth=2, heads=4, hidden=64)
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    weights = models.load_weights(ours, tmp_path / "weights.bin", batch)
    assert_close(jax.jit(lambda v, x: ours.apply(v, x, train=False))(weights.variables, batch), expected)

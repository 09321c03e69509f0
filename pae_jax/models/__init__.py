"""Backbones: plain Flax Linen modules of features, with a channel factor `width`."""

from pae_jax.models.inception_resnet_v1 import InceptionResnetV1 as InceptionResnetV1
from pae_jax.models.mlp import MLP as MLP
from pae_jax.models.resnet import ResNet as ResNet
from pae_jax.models.resnet import resnet18 as resnet18
from pae_jax.models.resnet import resnet34 as resnet34
from pae_jax.models.small_cnn import SmallCNN as SmallCNN
from pae_jax.models.vgg import VGG16 as VGG16

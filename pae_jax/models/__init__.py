"""Backbones: Flax Linen modules that return features, with a channel factor `width`; and published weights."""

from pae_jax.models.bert import Bert as Bert
from pae_jax.models.efficientnet import EfficientNetLite as EfficientNetLite
from pae_jax.models.efficientnet import fold_norms as fold_norms
from pae_jax.models.inception_resnet_v1 import InceptionResnetV1 as InceptionResnetV1
from pae_jax.models.mlp import MLP as MLP
from pae_jax.models.resnet import ResNet as ResNet
from pae_jax.models.resnet import resnet18 as resnet18
from pae_jax.models.resnet import resnet34 as resnet34
from pae_jax.models.resnet import resnet50 as resnet50
from pae_jax.models.small_cnn import SmallCNN as SmallCNN
from pae_jax.models.spherenet import SphereNet20 as SphereNet20
from pae_jax.models.vgg import VGG16 as VGG16
from pae_jax.models.vit import ViT as ViT
from pae_jax.models.weight_files import read_nested as read_nested
from pae_jax.models.weight_files import read_weights as read_weights
from pae_jax.models.weights import Weights as Weights
from pae_jax.models.weights import load_weights as load_weights

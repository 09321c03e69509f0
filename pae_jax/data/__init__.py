"""Real and synthetic data sets that need no download."""

from pae_jax.data.augmentation import augmented as augmented
from pae_jax.data.orl import FaceGroup as FaceGroup
from pae_jax.data.orl import OrlFaces as OrlFaces
from pae_jax.data.orl import groups as groups
from pae_jax.data.orl import load_orl as load_orl

"""Faces: pretrained FaceNet, verification, images and alignment, and the losses of face tasks."""

from pae_jax.faces import alignment as alignment
from pae_jax.faces import images as images
from pae_jax.faces import losses as losses
from pae_jax.faces import packs as packs
from pae_jax.faces import pairs as pairs
from pae_jax.faces import verification as verification
from pae_jax.faces.cpg_checkpoint import load_cpg_checkpoint as load_cpg_checkpoint
from pae_jax.faces.facenet import embed as embed
from pae_jax.faces.facenet import load_facenet as load_facenet
from pae_jax.faces.pae_checkpoint import load_pae_checkpoint as load_pae_checkpoint
from pae_jax.faces.statistics import recover_means as recover_means

"""A-softmax: a softmax loss with an angular margin, and the head that it needs; for learning face embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.checks import check_count
from pae_jax.errors import ArgumentError, StructureError
from pae_jax.training import softmax_cross_entropy as softmax

LARGEST_MARGIN, UNKNOWN = 5, -1
_SMALLEST = 1e-12  # of a squared length


class AngularHead(nn.Module):
    """An embedding layer, and the cosines between embeddings and one direction per identity, for `ASoftmax`.

    The output is [logits, embedding, lambda]: logits |e| cos(theta_j), embedding e, and the present lambda of the loss,
    max(lowest, highest / (1 + 0.1 t)) after t training steps. The step count is a variable of the head, so a resumed
    run goes on with its lambda. `embedding` cuts embeddings out of predictions.

    Args:
      identities: number of classes, 2 or more.
      features: length of the embedding.
      highest: lambda at the start.
      lowest: smallest lambda.

    Example:
      >>> head = AngularHead(10, features=4)
      >>> variables = head.init(jax.random.key(0), jnp.ones((2, 8)), train=False)
      >>> out = head.apply(variables, jnp.ones((2, 8)), train=False)
      >>> out.shape, head.embedding(out).shape, float(out[0, -1])
      ((2, 15), (2, 4), 1500.0)

    Source: Liu et al., CVPR 2017 (SphereFace); lambda as in the code of CPG (Hung et al., NeurIPS 2019), which starts
    again from the highest one in every stage.
    """

    identities: int
    features: int = 512
    highest: float = 1500.0
    lowest: float = 5.0

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        """Return logits, embedding and lambda of each example, (batch, identities + features + 1)."""
        init = nn.initializers.normal(0.01)
        embedding = nn.Dense(self.features, kernel_init=init, name="embedding")(inputs).astype(jnp.float32)
        directions = self.param("directions", init, (self.features, self.identities), jnp.float32)
        steps = self.variable("schedule", "steps", lambda: jnp.zeros((), jnp.float32))
        strength = jnp.maximum(self.lowest, self.highest / (1 + 0.1 * steps.value))
        if train and not self.is_initializing():
            steps.value += 1
        logits = embedding @ (directions / _length(directions, axis=0))
        return jnp.concatenate([logits, embedding, jnp.full((len(logits), 1), strength)], axis=-1)

    def embedding(self, out: jax.Array) -> jax.Array:
        """Return the embeddings in the head's outputs, (batch, features)."""
        return out[..., self.identities : self.identities + self.features]


@dataclass(frozen=True)
class ASoftmax:
    """Softmax cross-entropy after the angle to the true identity was multiplied by a margin; needs `AngularHead`.

    The logit of the true identity becomes |e| (lambda cos(theta) + psi(theta)) / (1 + lambda), with
    psi(theta) = (-1)^k cos(m theta) - 2 k and k = floor(m theta / pi), which falls monotonically from 1 to 1 - 2 m.

    Attributes:
      classes: identities of the head, 2 or more.
      margin: m, 1 to 5; 1 is the plain softmax of these logits.

    Raises:
      ArgumentError: a value outside its range.
      StructureError: outputs of another head.

    Example:
      >>> out = jnp.array([[0.0, 2.0, 2.0, 0.0, 0.0]])  # cosines 0 and 1 of an embedding of length 2; lambda 0
      >>> [round(float(ASoftmax(2)(out, jnp.array([label]))[0]), 3) for label in (0, 1)]
      [8.0, 0.127]

    Source: Liu et al., CVPR 2017 (SphereFace), equations 7 and 8; used by CPG (Hung et al., NeurIPS 2019).
    """

    classes: int
    margin: int = 4

    def __post_init__(self) -> None:
        check_count("classes", self.classes, 2)
        if check_count("margin", self.margin, 1) > LARGEST_MARGIN:
            raise ArgumentError(f"margin must be 1 to {LARGEST_MARGIN}, found {self.margin}")

    def __call__(self, out: jax.Array, y: jax.Array) -> jax.Array:
        """Return the loss of each example, float32 (batch,), for class numbers y; 0 for -1, an unknown identity."""
        if out.shape[-1] < self.classes + 2:
            expected = f"{self.classes} logits, an embedding and lambda, as of AngularHead({self.classes})"
            raise StructureError("ASoftmax", "", f"{out.shape[-1]} outputs of the head", expected)
        logits, embedding, strength = out[:, : self.classes], out[:, self.classes : -1], out[:, -1]
        y = y.astype(jnp.int32)
        true = jax.nn.one_hot(y, self.classes, dtype=bool)
        length = _length(embedding, axis=-1)[:, 0]
        cosine = jnp.clip(jnp.where(true, logits, 0.0).sum(axis=-1) / length, -1.0, 1.0)
        target = length * (strength * cosine + self.angular(cosine)) / (1 + strength)
        losses = softmax(jnp.where(true, target[:, None], logits), jnp.where(y == UNKNOWN, 0, y))
        within = (y >= 0) & (y < self.classes)
        return jnp.where(within, losses, jnp.where(y == UNKNOWN, 0.0, jnp.nan))

    def angular(self, cosine: jax.Array) -> jax.Array:
        """Return psi(theta) for cos(theta)."""
        angle = jnp.arccos(jax.lax.stop_gradient(cosine))
        k = jnp.minimum(jnp.floor(self.margin * angle / np.pi), self.margin - 1)
        before, multiple = jnp.ones_like(cosine), cosine  # cos((n + 1) a) = 2 cos(a) cos(n a) - cos((n - 1) a)
        for _ in range(self.margin - 1):
            before, multiple = multiple, 2 * cosine * multiple - before
        return jnp.where(k % 2 == 0, multiple, -multiple) - 2 * k


def _length(vectors: jax.Array, axis: int) -> jax.Array:
    return jnp.sqrt(jnp.maximum(jnp.square(vectors).sum(axis, keepdims=True), _SMALLEST))

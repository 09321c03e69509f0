"""Training of the newest task: the train state, the steps, the loop, evaluation."""

from pae_jax.training.batches import Augment as Augment
from pae_jax.training.batches import Feed as Feed
from pae_jax.training.batches import Form as Form
from pae_jax.training.batches import feed as feed
from pae_jax.training.batches import form as form
from pae_jax.training.choice import Best as Best
from pae_jax.training.choice import Plateau as Plateau
from pae_jax.training.evaluation import EVAL_BATCH as EVAL_BATCH
from pae_jax.training.evaluation import evaluate as evaluate
from pae_jax.training.evaluation import evaluate_state as evaluate_state
from pae_jax.training.evaluation import features as features
from pae_jax.training.evaluation import predict as predict
from pae_jax.training.fitting import fit as fit
from pae_jax.training.fitting import trained as trained
from pae_jax.training.loop import History as History
from pae_jax.training.loop import Training as Training
from pae_jax.training.losses import Loss as Loss
from pae_jax.training.losses import LossPer as LossPer
from pae_jax.training.losses import Objective as Objective
from pae_jax.training.losses import accuracy as accuracy
from pae_jax.training.losses import objective as objective
from pae_jax.training.losses import softmax_cross_entropy as softmax_cross_entropy
from pae_jax.training.sharding import Devices as Devices
from pae_jax.training.sharding import devices_of as devices_of
from pae_jax.training.train_state import TrainState as TrainState

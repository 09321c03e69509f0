"""The lifelong driver: tasks, recipes and the loop that learns one task after the other."""

from pae_jax.lifelong.learning import Stream as Stream
from pae_jax.lifelong.learning import learn as learn
from pae_jax.lifelong.learning import learn_all as learn_all
from pae_jax.lifelong.own_network import baseline as baseline
from pae_jax.lifelong.policy import Outcome as Outcome
from pae_jax.lifelong.policy import Status as Status
from pae_jax.lifelong.recipes import Recipe as Recipe
from pae_jax.lifelong.run_folder import Run as Run
from pae_jax.lifelong.task import MeanOf as MeanOf
from pae_jax.lifelong.task import Metric as Metric
from pae_jax.lifelong.task import Task as Task

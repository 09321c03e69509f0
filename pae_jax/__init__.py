"""pae_jax: one compact network that keeps learning new tasks and never forgets one bit of the old ones.

The loop of Packing and Expanding (Hung et al., ICMR 2019): train a task, prune it while it keeps its accuracy, freeze
it, give the freed weights to the next task, which may use all older weights but change none.
"""

from pae_jax import data as data
from pae_jax import faces as faces
from pae_jax import metrics as metrics
from pae_jax import models as models
from pae_jax import recipes as recipes
from pae_jax import sizes as sizes
from pae_jax.adapters.linen import linen as linen
from pae_jax.adapters.nnx import nnx as nnx
from pae_jax.checkpoint import load as load
from pae_jax.checkpoint import read_metadata as read_metadata
from pae_jax.checkpoint import save as save
from pae_jax.controller import Status as Status
from pae_jax.errors import ArgumentError as ArgumentError
from pae_jax.errors import CapacityError as CapacityError
from pae_jax.errors import CheckpointError as CheckpointError
from pae_jax.errors import DataError as DataError
from pae_jax.errors import DivergedError as DivergedError
from pae_jax.errors import ForgettingError as ForgettingError
from pae_jax.errors import NotPreservableError as NotPreservableError
from pae_jax.errors import PaeError as PaeError
from pae_jax.errors import PhaseError as PhaseError
from pae_jax.errors import StructureError as StructureError
from pae_jax.errors import UnknownTaskError as UnknownTaskError
from pae_jax.evaluation import evaluate as evaluate
from pae_jax.evaluation import features as features
from pae_jax.evaluation import predict as predict
from pae_jax.expansion import expand as expand
from pae_jax.fitting import fit as fit
from pae_jax.judging import Plateau as Plateau
from pae_jax.learner import Outcome as Outcome
from pae_jax.lifecycle import drop as drop
from pae_jax.lifecycle import freeze as freeze
from pae_jax.lifecycle import from_variables as from_variables
from pae_jax.lifecycle import init as init
from pae_jax.lifecycle import pack as pack
from pae_jax.lifelong import Stream as Stream
from pae_jax.lifelong import baseline as baseline
from pae_jax.lifelong import learn as learn
from pae_jax.lifelong import learn_all as learn_all
from pae_jax.looping import History as History
from pae_jax.network import Net as Net
from pae_jax.network import width_for as width_for
from pae_jax.ownership import free_fraction as free_fraction
from pae_jax.ownership import masks as masks
from pae_jax.ownership import trainable as trainable
from pae_jax.picking import Picking as Picking
from pae_jax.pruning import CubicSchedule as CubicSchedule
from pae_jax.pruning import prune as prune
from pae_jax.recipes import Recipe as Recipe
from pae_jax.reporting import report as report
from pae_jax.runs import Run as Run
from pae_jax.serving import Inference as Inference
from pae_jax.serving import Server as Server
from pae_jax.state import Growth as Growth
from pae_jax.state import State as State
from pae_jax.state import TaskState as TaskState
from pae_jax.tasks import MeanOf as MeanOf
from pae_jax.tasks import Metric as Metric
from pae_jax.tasks import Task as Task
from pae_jax.verification import check as check
from pae_jax.verification import verify as verify
from pae_jax.widening import WidenMaps as WidenMaps
from pae_jax.widening import widen_maps as widen_maps

__version__ = "0.1.0"

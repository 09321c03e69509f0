"""pae_jax: one compact network that keeps learning new tasks and never forgets one bit of the old ones.

The loop of Packing and Expanding (Hung et al., ICMR 2019): train a task, prune it while it keeps its accuracy, freeze
it, give the freed weights to the next task, which may use all older weights but change none.
"""

from pae_jax import data, faces, models
from pae_jax.caching import clear_caches
from pae_jax.core.expansion import expand
from pae_jax.core.flax import as_flax, commit, gate, task_variables
from pae_jax.core.integrity import check, verify
from pae_jax.core.ownership import free_fraction, masks, trainable
from pae_jax.core.packing import drop, freeze, from_variables, init, pack
from pae_jax.core.picking import Picking
from pae_jax.core.pruning import CubicSchedule, prune
from pae_jax.core.state import Growth, State, TaskState
from pae_jax.errors import (
    ArgumentError,
    CapacityError,
    CheckpointError,
    DataError,
    DivergedError,
    ForgettingError,
    NotPreservableError,
    PaeError,
    PhaseError,
    StructureError,
    UnknownTaskError,
)
from pae_jax.lifelong import metrics, recipes
from pae_jax.lifelong.learning import Stream, baseline, learn, learn_all
from pae_jax.lifelong.one_task import Outcome
from pae_jax.lifelong.policy import Status
from pae_jax.lifelong.recipes import Recipe
from pae_jax.lifelong.run_folder import Run
from pae_jax.lifelong.task import MeanOf, Metric, Task
from pae_jax.nets.linen import linen
from pae_jax.nets.network import Net, width_for
from pae_jax.nets.nnx import nnx
from pae_jax.reports import sizes
from pae_jax.reports.ownership_table import report
from pae_jax.serving.server import Inference, Server
from pae_jax.storage.checkpoint import load, read_metadata, save
from pae_jax.training.choice import Best, Plateau
from pae_jax.training.evaluation import evaluate, features, predict
from pae_jax.training.fitting import fit
from pae_jax.training.loop import History
from pae_jax.training.sharding import Devices
from pae_jax.training.train_state import TrainState
from pae_jax.version import __version__ as __version__
from pae_jax.widening import WidenMaps, widen_maps

__all__ = [
    "ArgumentError",
    "Best",
    "CapacityError",
    "CheckpointError",
    "CubicSchedule",
    "DataError",
    "Devices",
    "DivergedError",
    "ForgettingError",
    "Growth",
    "History",
    "Inference",
    "MeanOf",
    "Metric",
    "Net",
    "NotPreservableError",
    "Outcome",
    "PaeError",
    "PhaseError",
    "Picking",
    "Plateau",
    "Recipe",
    "Run",
    "Server",
    "State",
    "Status",
    "Stream",
    "StructureError",
    "Task",
    "TaskState",
    "TrainState",
    "UnknownTaskError",
    "WidenMaps",
    "as_flax",
    "baseline",
    "check",
    "clear_caches",
    "commit",
    "data",
    "drop",
    "evaluate",
    "expand",
    "faces",
    "features",
    "fit",
    "free_fraction",
    "freeze",
    "from_variables",
    "gate",
    "init",
    "learn",
    "learn_all",
    "linen",
    "load",
    "masks",
    "metrics",
    "models",
    "nnx",
    "pack",
    "predict",
    "prune",
    "read_metadata",
    "recipes",
    "report",
    "save",
    "sizes",
    "task_variables",
    "trainable",
    "verify",
    "widen_maps",
    "width_for",
]

"""A user's Flax model as pure functions of plain trees, at any width."""

from pae_jax.nets.answers import require_single_answers as require_single_answers
from pae_jax.nets.answers import trial_inputs as trial_inputs
from pae_jax.nets.forward import apply_backbone as apply_backbone
from pae_jax.nets.forward import apply_task as apply_task
from pae_jax.nets.forward import task_function as task_function
from pae_jax.nets.inputs import as_inputs as as_inputs
from pae_jax.nets.inputs import examples as examples
from pae_jax.nets.inputs import in_pieces as in_pieces
from pae_jax.nets.inputs import owned as owned
from pae_jax.nets.inputs import read_inputs as read_inputs
from pae_jax.nets.inputs import refuse_masks as refuse_masks
from pae_jax.nets.inputs import require_range as require_range
from pae_jax.nets.linen import linen as linen
from pae_jax.nets.modes import mode_arguments as mode_arguments
from pae_jax.nets.network import Net as Net
from pae_jax.nets.network import Program as Program
from pae_jax.nets.network import Rngs as Rngs
from pae_jax.nets.network import batch_size as batch_size
from pae_jax.nets.network import check_net as check_net
from pae_jax.nets.network import layout as layout
from pae_jax.nets.network import width_for as width_for
from pae_jax.nets.nnx import merged as merged
from pae_jax.nets.nnx import nnx as nnx
from pae_jax.nets.nnx import variables_of as variables_of
from pae_jax.nets.variables import own_variables as own_variables
from pae_jax.nets.variables import plain_variables as plain_variables

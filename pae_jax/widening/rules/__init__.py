"""The rules, one file per kind of operation; importing this package fills the table of `registry`."""

from pae_jax.widening.rules import (
    contraction as contraction,
)
from pae_jax.widening.rules import (
    control as control,
)
from pae_jax.widening.rules import (
    cutting as cutting,
)
from pae_jax.widening.rules import (
    elementwise as elementwise,
)
from pae_jax.widening.rules import (
    indexing as indexing,
)
from pae_jax.widening.rules import (
    layout as layout,
)
from pae_jax.widening.rules import (
    reduction as reduction,
)
from pae_jax.widening.rules.unknown import unknown_primitive as unknown_primitive

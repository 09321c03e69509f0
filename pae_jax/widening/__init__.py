"""The widening engine: maps the weights of a narrow network into a wider build of the same architecture.

`widen_maps` traces both networks and compares them operation by operation. The files, each using only those before it:
`terms` (index maps and their unification), `ranges` and `pointwise` (what is known about numbers), `values`, `programs`
(jaxprs), `registry` and `steps` (one operation of both programs), `rules` (one file per kind of operation), `walk`,
`axismaps`, `maps` and `serial` (the result), `analysis` (`widen_maps`). `influence`, by the rules of `marks`, reads one
program and finds which weights can change its outputs; `channels` finds the channels that it uses.
"""

from pae_jax.widening.analysis import starts_at_zero as starts_at_zero
from pae_jax.widening.analysis import widen_maps as widen_maps
from pae_jax.widening.axismaps import ArrayMap as ArrayMap
from pae_jax.widening.axismaps import AxisMap as AxisMap
from pae_jax.widening.channels import Cuts as Cuts
from pae_jax.widening.channels import find_cuts as find_cuts
from pae_jax.widening.influence import find_influence as find_influence
from pae_jax.widening.maps import WidenMaps as WidenMaps
from pae_jax.widening.programs import tables as tables
from pae_jax.widening.programs import trace as trace
from pae_jax.widening.report import WidenReport as WidenReport
from pae_jax.widening.values import Reason as Reason

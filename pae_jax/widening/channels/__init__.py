"""Which channels a function with given weights uses, and the same function on these channels alone.

The files, each using only those before it: `inlining` (a program without nested calls), `sizes` (what of it depends on
the sizes of the inputs), `known` (what its values are for every input), `sets` (the coordinates in use), `links` (how
operations connect them), `reduced` (an operation on fewer coordinates) and `cuts` (`find_cuts`).
"""

from pae_jax.widening.channels.cuts import Cuts as Cuts
from pae_jax.widening.channels.cuts import find_cuts as find_cuts

"""Check that a model's outputs use no random numbers and depend on no other example of the batch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pae_jax.caching import Cache, jax_settings
from pae_jax.errors import StructureError
from pae_jax.nets import heads
from pae_jax.nets.forward import features_function
from pae_jax.nets.inputs import traces
from pae_jax.nets.network import Net, Program, batch_size
from pae_jax.nets.retracing import same_trace
from pae_jax.nets.rounding import as_complex, largest
from pae_jax.trees import PARAMS, Tree, abstract, merge, path_name

_ASKED, _DIGESTS = Cache(64), Cache(64)
_FEW, _MANY = 4, 32
_OPERATIONS = 2e9  # of one run of the larger batch
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def require_single_answers(net: Net, head: Any, width: float) -> None:
    """Raise `StructureError` if evaluation draws random numbers or mixes the examples of a batch.

    Backbone and head run with random weights, on batches that have some rows in common. It is a trial, not a proof.
    Random numbers of NumPy, drawn when a model is built or traced, are seen by doing it twice.
    """
    for part in _parts(net, head, width):
        _ASKED.get(part.key, functools.partial(_ask, part, net.couples_examples))


def program_digest(net: Net, head: Any, width: float) -> str:
    """Return a digest of the programs of backbone and head in evaluation."""
    digests = [str(head)] if isinstance(head, int) else []
    for part in _parts(net, head, width):
        make = lambda part=part: _Trial(part, net.couples_examples).digest()  # noqa: E731
        digests.append(_DIGESTS.get((part.key, jax_settings()), make))
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


class _Part(NamedTuple):
    """A backbone or a head module: its name, key in caches, program, what makes that program anew, and its inputs.

    Inputs are abstract; `example` has their values if they are known.
    """

    name: str
    key: Any
    program: Program
    rebuilt: Callable[[], Program]
    sample: Tree
    example: Tree | None


def _parts(net: Net, head: Any, width: float) -> list[_Part]:
    build = functools.partial(net.build, width)
    found = [_Part(net.source, (net, width), net.program(width), build, net.sample, net.example)]
    if head is not None and not isinstance(head, int):
        key, features = (net, width, heads.key_of(head)), net.layout(width).features
        build = functools.partial(heads.program, head)
        found.append(_Part(f"head {type(head).__name__}", key, build(), build, features, None))
    return found


def trial_inputs(net: Net, rows: int) -> Tree:
    """Return a batch of normal floats, and of integers as in the sample, permuted in all examples but the first."""
    rng = np.random.default_rng(1)

    def draw(wanted: Any, known: Any) -> np.ndarray:
        shape = (rows, *wanted.shape[1:])
        if jnp.issubdtype(wanted.dtype, jnp.inexact) or known is None:
            return _first(rng, shape, wanted.dtype, None)
        tiled = np.resize(np.asarray(known), shape)
        tiled[1:] = rng.permuted(tiled[1:], axis=-1) if tiled.ndim > 1 else tiled[1:]
        return tiled.astype(wanted.dtype)

    return _mapped(draw, net.sample, net.example)


def trial_batch(net: Net, width: float, rows: int) -> Tree:
    """Return `trial_inputs` of so many examples, or of as many as the sample has where the model takes no others."""
    x, layout = trial_inputs(net, rows), net.layout(width)
    if traces(features_function(net, width), merge(layout.shared, layout.local), abstract(x)):
        return x
    return trial_inputs(net, batch_size(net.sample))


def _batches(sample: Tree, example: Tree | None, rows: int) -> list[Tree]:
    """Return batches with the same example in the rows asked for: twice among others, among its copies if many."""

    def among_others(seed: int) -> Tree:
        firsts, others = np.random.default_rng(0), np.random.default_rng(seed)

        def draw(wanted: Any, known: Any) -> np.ndarray:
            shape = wanted.shape[1:]
            batch = _others(others, (rows, *shape), wanted.dtype, known)
            batch[_asked(rows)] = _first(firsts, (1, *shape), wanted.dtype, known)
            return batch

        return _mapped(draw, sample, example)

    first, second = among_others(1), among_others(2)
    copies = [jax.tree.map(lambda leaf: np.repeat(leaf[:1], rows, 0), first)] if rows == _MANY else []
    return [first, second, *copies]


def _asked(rows: int) -> list[int]:
    return [0, rows // 2, rows - 1]


def _mapped(draw: Callable[[Any, Any], np.ndarray], sample: Tree, example: Tree | None) -> Tree:
    if example is None:
        return jax.tree.map(lambda wanted: draw(wanted, None), sample)
    return jax.tree.map(draw, sample, example)


def _first(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, known: Any) -> np.ndarray:
    """Draw floats; take integers from the first example of the sample, 0 if it has no values."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return rng.normal(size=shape).astype(dtype)
    return np.zeros(shape, dtype) if known is None else np.asarray(known)[:1].astype(dtype)


def _others(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, known: Any) -> np.ndarray:
    """Draw floats; draw integers from the range of the sample and from 0 and 1, no others: they may be token ids."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return _first(rng, shape, dtype, None)
    values = np.zeros(1, dtype) if known is None or not np.size(known) else np.asarray(known).astype(dtype)
    low, high = int(values.min()), int(values.max())
    beyond = [number for number in (0, 1) if not low <= number <= high]
    wide = np.uint64 if high > np.iinfo(np.int64).max else np.int64
    drawn = rng.integers(low, high, shape, dtype=wide, endpoint=True)
    if beyond:
        chosen = rng.random(shape) * (high - low + 1 + len(beyond)) < len(beyond)
        drawn = np.where(chosen, rng.choice(np.asarray(beyond, wide), shape), drawn)
    return drawn.astype(dtype)


class _Trial:
    """A program in evaluation, lowered for a batch of which it returns some rows; a costly one gets few rows.

    The random weights are without zeros that hide an influence.
    """

    def __init__(self, part: _Part, couples_examples: bool):
        program, sample = part.program, part.sample
        shapes = jax.eval_shape(lambda x: program.init(jax.random.key(0), x), sample)
        self.variables = jax.tree_util.tree_map_with_path(_weights, shapes)
        self.rows = batch_size(sample) if couples_examples else _MANY

        def traced(program: Program) -> Any:
            x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.rows, *leaf.shape[1:]), leaf.dtype), sample)
            return _traced(program, self.variables, x, _asked(self.rows))

        self.lowered = _same_each_time(part, traced).lower()
        if not couples_examples and (self.lowered.cost_analysis() or {}).get("flops", np.inf) > _OPERATIONS:
            self.rows = _FEW
            self.lowered = traced(program).lower()

    def digest(self) -> str:
        """Return the digest of the program's text."""
        return hashlib.sha256(self.lowered.as_text().encode()).hexdigest()

    def answers(self) -> Callable[[Tree, int], list[np.ndarray]]:
        """Return `(x, seed) -> outputs of the rows asked for`."""
        # Compiled and called explicitly, on host arrays, so that `pack` itself may be traced.
        run = self.lowered.compile(compiler_options=_QUICK)
        return lambda x, seed: [np.asarray(leaf) for leaf in jax.tree.leaves(run(self.variables, x, np.uint32(seed)))]


def _ask(part: _Part, couples_examples: bool) -> bool:
    trial = _Trial(part, couples_examples)
    _DIGESTS.get((part.key, jax_settings()), trial.digest)
    if couples_examples:
        return True
    answer = trial.answers()
    first, *others = _batches(part.sample, part.example, trial.rows)
    alone = answer(first, 0)
    # The key is changed along with the others; what made a difference is asked only after one was seen.
    if not any(_differs(alone, answer(batch, 1)) for batch in others):
        return True
    if _differs(alone, answer(first, 1)):
        hint = "Draw in training alone; or, with Linen, name the stream: pae.linen(..., rngs=) draws from a fixed key."
        found = "an answer that depends on random numbers in evaluation"
        raise StructureError(part.name, "", found, "one that does not", hint)
    hint = (
        "A norm that takes the statistics of the batch in evaluation is the usual cause. To accept it, describe "
        "the net with couples_examples=True: its answers then hold for one composition of the batch."
    )
    found = "an answer that depends on the other examples of the batch"
    raise StructureError(part.name, "", found, "one that does not, in evaluation", hint)


def _traced(program: Program, variables: Tree, x: Tree, rows: list[int]) -> Any:
    """Trace `(variables, x, seed) -> outputs of some rows` in evaluation."""

    def run(variables: Tree, x: Tree, seed: np.ndarray) -> Tree:
        out, _ = program.apply(variables, x, False, jax.random.key(seed))
        return jax.tree.map(lambda leaf: leaf[np.asarray(rows)], out)

    return jax.jit(run).trace(variables, x, np.uint32(0))


def _same_each_time(part: _Part, trace: Callable[[Program], Any]) -> Any:
    """Return a trace of a program; raise `StructureError` if the next one, or that of the program built anew, differs.

    Names of mapped axes may be found in the first trace of each, which then has the operations up to there twice.
    """
    rebuilt = part.rebuilt()
    first, anew = trace(part.program), _traced_anew(part, rebuilt, trace)
    if same_trace(first.jaxpr, anew.jaxpr):
        return first
    second, third = trace(part.program), trace(part.program)
    if same_trace(second.jaxpr, third.jaxpr) and same_trace(second.jaxpr, trace(rebuilt).jaxpr):
        return second
    hint = (
        "Random numbers of NumPy or Python are drawn anew in every process or compilation, which would change the "
        "answers of frozen tasks: draw them from a fixed seed, or keep them in a parameter or variable of the model."
    )
    raise StructureError(part.name, "", "a constant that changes from trace to trace", "the same one each time", hint)


def _traced_anew(part: _Part, rebuilt: Program, trace: Callable[[Program], Any]) -> Any:
    """Trace the program built anew; raise `StructureError` if it does not take the variables of the first."""
    try:
        return trace(rebuilt)
    except Exception as error:  # whatever a model raises for variables of another one
        hint = "Make the model from the width alone; describe another net for each value of another setting."
        raise StructureError(part.name, "", "another model when built again", "the same one each time", hint) from error


def _weights(path: Any, leaf: Any) -> np.ndarray:
    """Return values of a variable: kernels of unit gain, everything else near 1, so that a variance is positive."""
    rng = np.random.default_rng(leaf.size)
    if jnp.issubdtype(leaf.dtype, jnp.floating) and path_name(path).startswith(PARAMS):
        values = rng.random(leaf.shape, np.float32)
        fan_in = max(leaf.size // leaf.shape[-1], 1) if leaf.ndim else 1
        return ((values - 0.5) * (12 / fan_in) ** 0.5 if leaf.ndim >= 2 else 0.5 + values).astype(leaf.dtype)
    return (
        np.ones(leaf.shape, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else np.zeros(leaf.shape, leaf.dtype)
    )


def _differs(found: list[np.ndarray], other: list[np.ndarray]) -> bool:
    def apart(a: np.ndarray, b: np.ndarray) -> bool:
        a, b = as_complex(a), as_complex(b)
        known = np.isfinite(a)
        if (known != np.isfinite(b)).any():
            return True
        return largest(a[known] - b[known]) > 1e-4 * largest(a[known])

    return any(map(apart, found, other))

"""Harsher than a user's run: broadcasting between ranks raises, and so does every warning (see pyproject.toml)."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes, dtypes and tree structures are checked at every call of the functions that all others of the core are made of.
# Not where a user's arguments come in: what those raise is what the tests are about.
with install_import_hook(["pae_jax.core.ownership", "pae_jax.core.selection"], "beartype.beartype"):
    import pae_jax as pae

from pae_jax.trees import describe, flatten

jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell starts background jobs with interrupts ignored; the tests of interrupts, and their subprocesses, need them.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Compiling with few optimizations is twice as fast, and so it is again without XLA's newer code generator on CPUs.
# Set here, since session fixtures come before those of modules; tests/optimized compiles as users do.
jax.config.update("jax_disable_most_optimizations", True)
FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
collect_ignore = ["core/spread_process.py"]  # a program of its own, which imports its neighbour
# Many tests compile the same programs, in many processes and in every run.
CACHE = {
    "jax_compilation_cache_dir": str(Path(__file__).parent.parent / ".pytest_cache" / "compiled"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for option, value in CACHE.items():
    jax.config.update(option, value)
    os.environ[option.upper()] = str(value)

# The same examples on every machine and in every run; `make fuzz` draws others.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("fuzz", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

_COMPILED: list[str] = []


def _count_compilation(event, duration, **details):
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


class Vector(nn.Module):
    """The usual test backbone: two kernels, a bias, PReLU slopes and batch statistics; counts its training traces."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        if train:
            TRACES.append(self.width)
        x = nn.Dense(int(8 * self.width), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.PReLU()(x)
        return nn.Dense(int(6 * self.width))(x)


TRACES: list[float] = []


def _bits(leaf):
    host = np.asarray(leaf)
    return f"{host.dtype}{host.shape}", host.tobytes()


OPTIMIZED = ("data", "faces", "models", "widening")


@pytest.fixture(scope="module", autouse=True)
def all_optimizations_where_no_network_is_shared(request):
    """Compile with all optimizations in modules of some folders, but for those that use the networks below.

    Programs compiled one way and the other differ in bits. So no module uses what another compiled the other way.
    """
    optimized = _folder(request.path) in OPTIMIZED and not any(map(_shares_network, _tests_of(request)))
    if optimized == jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", not optimized)
        jax.clear_caches()


def _folder(path):
    return path.relative_to(Path(__file__).parent).parts[0] if "tests" in path.parts else ""


def _tests_of(request):
    return [item for item in request.session.items if item.path == request.path]


def _shares_network(item):
    """Return whether a test uses a network of this file, not one of its own module's."""
    found = getattr(item, "_fixtureinfo", None)
    uses = [] if found is None else [found.name2fixturedefs.get(name) for name in ("net", "vector_module")]
    return any(definitions and definitions[-1].func.__module__ == __name__ for definitions in uses)


@pytest.fixture(scope="session")
def free_port():
    """Return a function that finds a port on which processes can meet."""

    def find():
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def run_together():
    """Return a function that runs programs at the same time, from words and environment; `(output, status)` of each.

    They compile as this process does.
    """

    def run(calls, timeout=600):
        quick = str(int(jax.config.read("jax_disable_most_optimizations")))
        started = [
            subprocess.Popen(
                [sys.executable, *map(str, words)],
                env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": quick, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for words, environment in calls
        ]
        try:
            return [(process.communicate(timeout=timeout)[0], process.returncode) for process in started]
        finally:  # a process waits for the others for minutes
            for process in started:
                process.kill()
                process.communicate()

    return run


@pytest.fixture(scope="session")
def on_devices(run_together):
    """Return a function that runs a program on some virtual devices; it returns the lines that the program printed."""

    def run(count, code, *words):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        [(output, status)] = run_together([(["-c", code, *words], {"XLA_FLAGS": flags})])
        assert status == 0, output[-3000:]
        return output.splitlines()

    return run


@pytest.fixture(scope="session")
def bits():
    """Return `{path: (dtype and shape, bytes)}` of a tree: equal only if the arrays are, NaN and -0.0 included."""
    return lambda tree: {path: _bits(leaf) for path, leaf in flatten(tree).items()}


@pytest.fixture(scope="session")
def assert_same(bits):
    """Assert that two trees hold the same bits; the message names the leaves that differ."""

    def check(found, expected):
        found, expected = bits(found), bits(expected)
        differing = sorted(p for p in found.keys() | expected.keys() if found.get(p) != expected.get(p))
        assert not differing, f"leaves differ: {differing}"

    return check


@pytest.fixture(scope="session")
def state_facts(bits):
    """Everything a state says: arrays as bits, and the records."""

    def facts(state):
        tasks = {
            name: (e.id, e.width, str(e.head_spec), e.sharing, *map(bits, ({"digests": e.digests}, e.local, e.head)))
            for name, e in state.tasks.items()
        }
        local = None if state.local is None else bits(state.local)
        growth = tuple((g.narrow, g.wide) for g in state.growth)
        return bits(state.shared), bits(state.owner), tasks, state.width, growth, local

    return facts


@pytest.fixture
def compilations():
    """Return a context manager whose value counts the programs that XLA compiled inside it."""

    @contextlib.contextmanager
    def counting():
        found = SimpleNamespace(count=0)
        before = len(_COMPILED)
        yield found
        found.count = len(_COMPILED) - before

    return counting


@pytest.fixture
def traces():
    """Widths at which the usual backbone was traced in training mode since the start of the test."""
    TRACES.clear()
    return TRACES


@pytest.fixture(scope="session")
def vector_module():
    return Vector


@pytest.fixture(scope="session")
def net():
    """The usual network: 80 shared weights in two leaves at width 1."""
    return pae.linen(Vector, jnp.zeros((1, 4)))


@pytest.fixture(scope="session")
def data():
    """40 examples of two classes, as NumPy arrays."""
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    return x, (x[:, 0] + x[:, 1] > 0).astype(np.int32)


@pytest.fixture(scope="session")
def adam():
    return optax.adam(0.01)


@pytest.fixture(scope="session")
def quick_fit(net, data, adam):
    """`fit` with small defaults; returns `(state, history)`."""

    def fit(state, task, train=data, *, optimizer=adam, epochs=2, batch_size=8, key=2, net=net, **options):
        return pae.fit(
            net,
            state,
            task,
            train,
            optimizer=optimizer,
            epochs=epochs,
            batch_size=batch_size,
            key=jax.random.key(key),
            **options,
        )

    return fit


@pytest.fixture(scope="session")
def empty(net):
    """A network without tasks."""
    return pae.init(net, jax.random.key(0))


@pytest.fixture(scope="session")
def packed(net, empty):
    """One task, "a", packed and not trained."""
    return pae.pack(net, empty, "a", head=2, key=jax.random.key(1))


@pytest.fixture(scope="session")
def frozen(packed, quick_fit):
    """One task, "a", trained, pruned by half and frozen."""
    state, _ = quick_fit(packed, "a")
    return pae.freeze(pae.prune(state, "a", 0.5), "a")


@pytest.fixture(scope="session")
def second(net, frozen, quick_fit):
    """Task "a" frozen, task "b" packed, trained and not frozen."""
    return quick_fit(pae.pack(net, frozen, "b", head=2, key=jax.random.key(3)), "b", key=4)[0]


@pytest.fixture(scope="session")
def third(net, second):
    """Tasks "a" and "b" frozen, task "c" packed; each owns weights in every leaf, none is free."""
    state = pae.freeze(pae.prune(second, "b", 0.25), "b")
    return pae.pack(net, state, "c", head=2, key=jax.random.key(5))


@pytest.fixture(scope="session")
def edit_leaf():
    """Return a tree with one leaf (by path) replaced by what a function makes of its host copy."""

    def edit(tree, path, change):
        def visit(where, leaf):
            if jax.tree_util.keystr(where, simple=True, separator="/") != path:
                return leaf
            return jnp.asarray(change(np.array(leaf)))

        assert path in flatten(tree), f"no leaf {path}: {sorted(flatten(tree))}"
        return jax.tree_util.tree_map_with_path(visit, tree)

    return edit


@pytest.fixture(scope="session")
def shapes():
    """Return `{path: "dtype[shape]"}` of a tree."""
    return lambda tree: {path: describe(leaf) for path, leaf in flatten(tree).items()}

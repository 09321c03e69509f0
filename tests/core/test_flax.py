"""A task as plain Flax: the gate in anybody's trainer, what `commit` takes and refuses, and what `as_flax` computes."""

import json

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae
from pae_jax.trees import flatten

CE = optax.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 4)).astype(np.float32)
Y = (X[:, 0] > X[:, 1]).astype(np.int32)


class NnxVector(nnx.Module):
    """As the usual backbone, in NNX and with modes."""

    def __init__(self, width, rngs):
        self.first = nnx.Linear(4, int(8 * width), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(int(8 * width), momentum=0.5, rngs=rngs)
        self.last = nnx.Linear(int(8 * width), int(6 * width), rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


def two_tasks(net, head=2, seed=0, **options):
    """A frozen task "old", with some -0.0 among its weights, and a packed one, "new"."""
    key = KEY(seed)
    state = pae.pack(net, pae.init(net, key), "old", head=2, key=key)
    state = pae.prune(state, "old", 0.5)

    def plant(w, o):
        w = np.array(w)
        w.ravel()[np.flatnonzero(np.asarray(o) == 1)[:3]] = -0.0
        return jnp.asarray(w)

    state = state.replace(shared=jax.tree.map(plant, state.shared, state.owner))
    return pae.pack(net, pae.freeze(state, "old"), "new", head=head, key=jax.random.fold_in(key, 1), **options)


@pytest.fixture(scope="module")
def nnx_net():
    return pae.nnx(NnxVector, X[:1])


@pytest.fixture(scope="module")
def state(net):
    return two_tasks(net)


@pytest.fixture(scope="module")
def nnx_state(nnx_net):
    return two_tasks(nnx_net)


@pytest.fixture
def unforgotten(assert_same):
    """Check that "new" trained in every leaf, and that nothing of anything else moved by a bit."""

    def check(net, before, after):
        pae.check(after, net)
        pae.verify(after)
        assert_same(after.owner, before.owner)
        for path, w in flatten(after.shared).items():
            own = np.asarray(flatten(before.owner)[path]) == 2
            old, new = np.asarray(flatten(before.shared)[path]), np.asarray(w)
            assert new[~own].tobytes() == old[~own].tobytes(), path
            assert np.signbit(new[~own][new[~own] == 0]).sum() == 3, path
            assert (new[own] != old[own]).mean() > 0.9, path
        assert_same(after.tasks["old"], before.tasks["old"])
        assert_same(pae.predict(net, after, "old", X), pae.predict(net, before, "old", X))
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.tasks["new"].head, before.tasks["new"].head)
        assert all(jax.tree.leaves(moved))

    return check


def grads_of(module, params, rest, x, y):
    """Return gradients and the collections after the call."""

    def loss(params):
        out, moved = module.apply({"params": params, **rest}, x, train=True, mutable=list(rest))
        return CE(out, y).mean(), moved

    return jax.grad(loss, has_aux=True)(params)


def step_of(module, tx):
    def step(carry, batch):
        params, rest, opt_state = carry
        grads, rest = grads_of(module, params, rest, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), None

    return step


BATCHES = jnp.asarray(X).reshape(4, 8, 4), jnp.asarray(Y).reshape(4, 8)


# The gate


CHAINS = {
    "decay": lambda gate: optax.chain(optax.adamw(0.1, weight_decay=0.5), gate),
    "nesterov, clipped": lambda gate: optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9, nesterov=True), gate
    ),
    "lion": lambda gate: optax.chain(optax.lion(0.05, weight_decay=0.3), gate),
    "noise": lambda gate: optax.chain(optax.sgd(0.1), optax.add_noise(0.1, 0.5, KEY(7)), gate),
    "MultiSteps inside": lambda gate: optax.chain(
        optax.MultiSteps(optax.adamw(0.1, weight_decay=0.5), 2).gradient_transformation(), gate
    ),
    "MultiSteps outside": lambda gate: optax.MultiSteps(optax.chain(optax.adamw(0.1, weight_decay=0.5), gate), 2),
    "parts": lambda gate: optax.partition(
        {"body": optax.chain(optax.adamw(0.1), gate), "head": optax.chain(optax.sgd(0.3), gate)},
        lambda params: {part: "head" if part == "head" else "body" for part in params},
    ),
    "with a schedule": lambda gate: optax.chain(
        optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.05, 4), weight_decay=0.5), gate
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_gate_composes_with_any_optax_chain(net, state, unforgotten, name):
    module, variables = pae.as_flax(net, state, "new")
    tx = CHAINS[name](pae.gate(net, state, "new"))
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    carry, step = (params, rest, tx.init(params)), jax.jit(step_of(module, tx))
    for batch in zip(*BATCHES, strict=True):
        carry, _ = step(carry, batch)
    unforgotten(net, state, pae.commit(net, state, "new", {"params": carry[0], **carry[1]}))


def test_the_gate_changes_no_bit_where_the_task_owns_nothing_not_even_of_a_negative_zero(net, state):
    params = pae.as_flax(net, state, "new")[1]["params"]
    owned = {path: np.asarray(mask) for path, mask in flatten(pae.trainable(state, "new")).items()}
    for path, mask in owned.items():
        layer = path.split("/")[0]
        values = np.asarray(params["backbone"][layer]["kernel"])
        params["backbone"][layer]["kernel"] = jnp.asarray(np.where(mask, values, np.float32(-0.0)))
    tx = optax.chain(optax.adamw(0.1, weight_decay=0.5), pae.gate(net, state, "new"))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    for path, mask in owned.items():
        layer = path.split("/")[0]
        old, new = (np.asarray(tree["backbone"][layer]["kernel"]) for tree in (params, after))
        assert np.signbit(np.asarray(updates["backbone"][layer]["kernel"])[~mask]).all()
        assert new[~mask].tobytes() == old[~mask].tobytes()
        assert np.signbit(new[~mask]).all()
        assert (new[mask] != old[mask]).all()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a != b).all()), after["head"], params["head"]))


def test_the_gate_stops_what_is_not_finite_where_the_task_owns_nothing(net, state):
    params = pae.task_variables(net, state, "new")
    params = {part: collections["params"] for part, collections in params.items()}
    gate = pae.gate(net, state, "new")
    for value in (jnp.nan, jnp.inf):
        updates, _ = gate.update(jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params), gate.init(params))
        mask = np.asarray(flatten(pae.trainable(state, "new"))["Dense_0/kernel"])
        found = np.asarray(updates["backbone"]["Dense_0"]["kernel"])
        assert not found[~mask].any() and not np.isfinite(found[mask]).any()


def test_the_gate_in_a_flax_train_state_under_jit(net, state, unforgotten):
    module, variables = pae.as_flax(net, state, "new")
    tx = optax.chain(optax.adamw(0.1, weight_decay=0.5), pae.gate(net, state, "new"))
    trainer = flax.training.train_state.TrainState.create(apply_fn=module.apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(trainer, stats, x, y):
        grads, moved = grads_of(module, trainer.params, {"batch_stats": stats}, x, y)
        return trainer.apply_gradients(grads=grads), moved["batch_stats"]

    stats = variables["batch_stats"]
    for x, y in zip(*BATCHES, strict=True):
        trainer, stats = step(trainer, stats, x, y)
    unforgotten(net, state, pae.commit(net, state, "new", {"params": trainer.params, "batch_stats": stats}))


def test_the_gate_in_an_nnx_optimizer(nnx_net, nnx_state, unforgotten):
    module, _ = pae.as_flax(nnx_net, nnx_state, "new")
    assert module.head.in_features == module.head.kernel.shape[0]
    tx = optax.chain(optax.adamw(0.1, weight_decay=0.5), pae.gate(nnx_net, nnx_state, "new"))
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x, y):
        optimizer.update(module, nnx.grad(lambda module: CE(module(x), y).mean())(module))

    module.train()
    for x, y in zip(*BATCHES, strict=True):
        step(module, optimizer, x, y)
    after = pae.commit(nnx_net, nnx_state, "new", module)
    unforgotten(nnx_net, nnx_state, after)
    module.eval()
    np.testing.assert_allclose(module(X), pae.predict(nnx_net, after, "new", X), rtol=1e-5, atol=1e-6)


def test_the_gate_in_a_scan(net, state, unforgotten):
    module, variables = pae.as_flax(net, state, "new")
    tx = optax.chain(optax.adamw(0.1, weight_decay=0.5), pae.gate(net, state, "new"))

    @jax.jit
    def train(params, rest):
        return jax.lax.scan(step_of(module, tx), (params, rest, tx.init(params)), BATCHES)[0]

    params, rest, _ = train(variables["params"], {"batch_stats": variables["batch_stats"]})
    unforgotten(net, state, pae.commit(net, state, "new", {"params": params, **rest}))


def test_the_gate_under_vmap_over_seeds_each_with_owners_of_its_own(net, unforgotten):
    states = [two_tasks(net, seed=seed) for seed in (0, 5, 9)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    @jax.jit
    @jax.vmap
    def life(state):
        module, variables = pae.as_flax(net, state, "new")
        tx = optax.chain(optax.adamw(0.1, weight_decay=0.5), pae.gate(net, state, "new"))
        params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
        params, rest, _ = jax.lax.scan(step_of(module, tx), (params, rest, tx.init(params)), BATCHES)[0]
        return pae.commit(net, state, "new", {"params": params, **rest})

    after = life(stacked)
    for number, state in enumerate(states):
        unforgotten(net, state, jax.tree.map(lambda leaf, number=number: leaf[number], after))


DEVICES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import pae_jax as pae
from pae_jax.trees import flatten

class Backbone(nn.Module):
    width: float
    @nn.compact
    def __call__(self, x, train):
        return nn.tanh(nn.Dense(16)(nn.tanh(nn.Dense(32)(x))))

X = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
net = pae.linen(Backbone, X[:1])
state = pae.pack(net, pae.init(net, jax.random.key(0)), "old", head=2, key=jax.random.key(1))
state = pae.prune(state, "old", 0.5)
def plant(w, o):
    w = np.array(w); w.ravel()[np.flatnonzero(np.asarray(o) == 1)[:3]] = -0.0
    return jnp.asarray(w)
state = pae.freeze(state.replace(shared=jax.tree.map(plant, state.shared, state.owner)), "old")
state = pae.pack(net, state, "new", head=2, key=jax.random.key(2))
meshes = {"auto": Mesh(np.asarray(jax.devices()), ("d",)), "explicit": jax.make_mesh((8,), ("d",))}
found = {"devices": len(jax.devices()), "axes": {name: str(mesh.axis_types[0]) for name, mesh in meshes.items()}}
for name, mesh in meshes.items():
    module, variables = pae.as_flax(net, state, "new")
    spec = lambda leaf: P(None, "d") if leaf.ndim == 2 and leaf.shape[1] % 8 == 0 else P()
    params = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), variables["params"])
    tx = optax.chain(optax.adamw(0.1, weight_decay=0.5), pae.gate(net, state, "new"))
    def loss(params):
        if name == "explicit":
            return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))
        return jnp.sum((module.apply({"params": params}, X, train=True) - 1) ** 2)
    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state
    opt_state = tx.init(params)
    kept = params
    for _ in range(3):
        params, opt_state = step(params, opt_state)
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(kept)))
    # Where axes are Auto, the partitioner may spread more than it was asked to.
    spread = all(len(a.sharding.device_set) == 8 for a, _ in pairs)
    spread &= name == "auto" or all(a.sharding.is_equivalent_to(b.sharding, a.ndim) for a, b in pairs)
    spread &= all(not a.sharding.is_fully_replicated for a, b in pairs if not b.sharding.is_fully_replicated)
    after = pae.commit(net, state, "new", {"params": params})
    home = all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state)))
    placed = pae.commit(net, jax.device_put(state, NamedSharding(mesh, P())), "new", {"params": params})
    same = all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(placed)))
    pae.verify(after); pae.check(after, net); pae.verify(placed)
    bits = moved = True
    for path, w in flatten(after.shared).items():
        own = np.asarray(flatten(state.owner)[path]) == 2
        old, new = np.asarray(flatten(state.shared)[path]), np.asarray(w)
        bits &= new[~own].tobytes() == old[~own].tobytes() and np.signbit(new[~own]).any()
        moved &= (new[own] != old[own]).all()
    before, now = (flatten(pae.as_flax(net, s, "new")[1]["params"]["backbone"]) for s in (state, after))
    raw = flatten(jax.device_get(params["backbone"]))
    own = flatten(pae.trainable(state, "new"))
    foreign = {path: ~np.asarray(mask) for path, mask in own.items()}
    bits &= all(raw[p][m].tobytes() == np.asarray(before[p])[m].tobytes() for p, m in foreign.items())
    result = {"spread": spread, "home": home, "same": same, "bits": bits, "moved": moved}
    found[name] = {key: bool(value) for key, value in result.items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def on_eight_devices(on_devices):
    return json.loads(on_devices(8, DEVICES)[-1])


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_the_gate_on_eight_devices_keeps_every_bit_and_every_sharding(on_eight_devices, axes):
    assert on_eight_devices["devices"] == 8
    assert on_eight_devices["axes"][axes].lower().endswith(axes)
    assert on_eight_devices[axes] == {"spread": True, "home": True, "same": True, "bits": True, "moved": True}


def test_the_gate_is_for_the_parameters_of_its_task_alone(net, state, nnx_state, nnx_net):
    variables = pae.task_variables(net, state, "new")
    params = {part: collections["params"] for part, collections in variables.items()}
    gate = pae.gate(net, state, "new")
    for part in (params, {"backbone": params["backbone"]}, {"head": params["head"]}, params["backbone"]):
        assert jax.tree.structure(gate.init(part).open) == jax.tree.structure(part)
    with pytest.raises(pae.StructureError, match=r"parameters of task 'new', leaf 'Conv_0/kernel': found nothing"):
        gate.init({"backbone": {"Conv_0": params["backbone"]["Dense_0"]}, "head": params["head"]})
    other = {**params, "backbone": {**params["backbone"], "Dense_0": {"kernel": jnp.zeros((4, 9))}}}
    with pytest.raises(
        pae.StructureError, match=r"leaf 'Dense_0/kernel': found shape \(4, 9\), expected shape \(4, 8\)"
    ):
        gate.init(other)
    with pytest.raises(pae.PhaseError, match="gate cannot be called now: task 'old' is frozen"):
        pae.gate(net, state, "old")
    with pytest.raises(pae.UnknownTaskError):
        pae.gate(net, state, "none")
    with pytest.raises(pae.StructureError, match="Was the state made with this net"):
        pae.gate(net, nnx_state, "new")


# commit


def moved_by(net, state, amount=0.25):
    """Variables of "new" with everything that belongs to it moved."""
    variables = pae.task_variables(net, state, "new")
    own = pae.trainable(state, "new")
    flat = flatten(own)
    backbone = {
        path: leaf + amount * np.asarray(flat[path.removeprefix("params/")], np.float32)
        if path.removeprefix("params/") in flat
        else leaf + amount
        for path, leaf in flatten(variables["backbone"]).items()
    }
    return {
        "backbone": jax.tree.unflatten(jax.tree.structure(variables["backbone"]), list(backbone.values())),
        "head": jax.tree.map(lambda leaf: leaf + amount, variables["head"]),
    }


def by_collection(parts):
    return {
        name: {part: trees[name] for part, trees in parts.items() if name in trees}
        for name in {name for trees in parts.values() for name in trees}
    }


def test_commit_takes_every_form_in_which_a_linen_task_is_handed_out(net, state, unforgotten, assert_same):
    parts = moved_by(net, state)
    wanted = pae.commit(net, state, "new", parts)
    unforgotten(net, state, wanted)
    assert_same(pae.task_variables(net, wanted, "new"), parts)
    collections = by_collection(parts)
    sown = {**collections, "intermediates": {"backbone": {"h": (jnp.ones(3),)}}}
    host = jax.tree.map(np.asarray, parts)
    for form in (collections, sown, host, nn.FrozenDict(collections) if hasattr(nn, "FrozenDict") else collections):
        assert_same(pae.commit(net, state, "new", form), wanted)
    less = pae.commit(net, state, "new", {"params": collections["params"]})
    assert_same(less.tasks["new"].local["batch_stats"], state.tasks["new"].local["batch_stats"])
    assert_same((less.shared, less.tasks["new"].head), (wanted.shared, wanted.tasks["new"].head))


def test_commit_takes_an_nnx_module_its_state_and_plain_variables(nnx_net, nnx_state, unforgotten, assert_same):
    parts = moved_by(nnx_net, nnx_state)
    wanted = pae.commit(nnx_net, nnx_state, "new", parts)
    unforgotten(nnx_net, nnx_state, wanted)
    module, values = pae.as_flax(nnx_net, wanted, "new")
    for form in (module, values, nnx.state(module), by_collection(parts)):
        assert_same(pae.commit(nnx_net, nnx_state, "new", form), wanted)


def test_commit_of_unchanged_variables_changes_nothing(net, state, nnx_net, nnx_state, assert_same, state_facts):
    facts = state_facts(state)
    assert_same(pae.commit(net, state, "new", pae.task_variables(net, state, "new")), state)
    assert_same(pae.commit(net, state, "new", pae.as_flax(net, state, "new")[1]), state)
    assert_same(pae.commit(nnx_net, nnx_state, "new", pae.as_flax(nnx_net, nnx_state, "new")[0]), nnx_state)
    assert state_facts(state) == facts


def test_what_is_handed_out_are_copies(net, state, nnx_net, nnx_state, state_facts):
    before = state_facts(state), state_facts(nnx_state)
    _, variables = pae.as_flax(net, state, "new")
    _, values = pae.as_flax(nnx_net, nnx_state, "new")
    for leaf in jax.tree.leaves((pae.task_variables(net, state, "new"), variables, values)):
        leaf.delete()
    assert (state_facts(state), state_facts(nnx_state)) == before


def flipped(leaf, own, count):
    """Flip the lowest bit of some entries that the task does not own."""
    host = np.array(leaf)
    raw = host.view(np.uint32)
    places = np.flatnonzero(~np.asarray(own) & (host != 0))[:count]
    assert len(places) == count
    raw.ravel()[places] ^= 1
    return jnp.asarray(host)


@pytest.mark.parametrize("count", [1, 5])
def test_commit_refuses_a_changed_bit_that_the_task_does_not_own_by_leaf_and_count(
    net, state, nnx_net, nnx_state, count
):
    own = flatten(pae.trainable(state, "new"))["Dense_1/kernel"]
    parts = moved_by(net, state)
    kernel = parts["backbone"]["params"]["Dense_1"]["kernel"]
    parts["backbone"]["params"]["Dense_1"]["kernel"] = flipped(kernel, own, count)
    message = rf"task 'new': {count} of 24 weights of 'Dense_1/kernel' that it does not own have changed.*pae.gate"
    for form in (parts, by_collection(parts)):
        with pytest.raises(pae.ForgettingError, match=message):
            pae.commit(net, state, "new", form)
    module, _ = pae.as_flax(nnx_net, nnx_state, "new")
    own = flatten(pae.trainable(nnx_state, "new"))["last/kernel"]
    module.backbone.last.kernel[...] = flipped(module.backbone.last.kernel[...], own, count)
    for form in (module, nnx.state(module)):
        with pytest.raises(pae.ForgettingError, match=message.replace("Dense_1", "last")):
            pae.commit(nnx_net, nnx_state, "new", form)


def test_commit_refuses_what_training_without_the_gate_did(net, state):
    module, variables = pae.as_flax(net, state, "new")
    tx = optax.adamw(0.1)
    carry = (variables["params"], {"batch_stats": variables["batch_stats"]}, tx.init(variables["params"]))
    (params, rest, _), _ = step_of(module, tx)(carry, (X, Y))
    with pytest.raises(pae.ForgettingError, match=r"of 16 weights of 'Dense_0/kernel' that it does not own"):
        pae.commit(net, state, "new", {"params": params, **rest})


def test_commit_refuses_what_a_gate_from_before_a_pruning_let_through_and_says_so(net, state):
    params = pae.as_flax(net, state, "new")[1]["params"]
    old, pruned = pae.gate(net, state, "new"), pae.prune(state, "new", 0.5)
    updates, _ = old.update(jax.tree.map(jnp.ones_like, params), old.init(params))
    moved = optax.apply_updates(pae.as_flax(net, pruned, "new")[1]["params"], updates)
    with pytest.raises(
        pae.ForgettingError, match=r"pae.gate\(net, state, task\), made after the last pruning, last in"
    ):
        pae.commit(net, pruned, "new", {"params": moved})


def test_commit_says_how_to_restore_what_an_average_has_rounded(net, state, unforgotten):
    params = pae.as_flax(net, state, "new")[1]["params"]
    moved = jax.tree.map(lambda own, leaf: jnp.where(own, leaf + 0.1, leaf), open_of(net, state, params), params)
    average = optax.incremental_update(moved, params, 0.1)
    with pytest.raises(pae.ForgettingError, match=r"by a rounding.*jax.tree.map\(jnp.where, own, average, params\)"):
        pae.commit(net, state, "new", {"params": average})
    restored = jax.tree.map(jnp.where, open_of(net, state, params), average, params)
    after = pae.commit(net, state, "new", {"params": restored})
    unforgotten(net, state, after)
    assert (after.tasks["new"].head["params"]["bias"] != state.tasks["new"].head["params"]["bias"]).all()
    for wrong in (jax.tree.map(lambda leaf: leaf * 1.001, average), jax.tree.map(lambda leaf: leaf + jnp.nan, average)):
        with pytest.raises(pae.ForgettingError, match=r"have changed. Put pae.gate") as found:
            pae.commit(net, state, "new", {"params": wrong})
        assert "rounding" not in str(found.value)


def open_of(net, state, params):
    return pae.gate(net, state, "new").init(params).open


def test_a_zero_of_the_other_sign_is_no_change_and_the_state_keeps_its_own(net, state, unforgotten):
    parts = moved_by(net, state)
    for layer, mask in pae.trainable(state, "new").items():
        kernel = parts["backbone"]["params"][layer]["kernel"]
        for zero in (0.0, -0.0):
            other = jnp.where((kernel == 0) & ~mask["kernel"], jnp.float32(zero), kernel)
            parts["backbone"]["params"][layer]["kernel"] = other
            unforgotten(net, state, pae.commit(net, state, "new", parts))


def changed(parts, path, value):
    """Return variables with one leaf replaced, or left out if the value is None."""
    names = path.split("/")
    copy = jax.tree.map(lambda leaf: leaf, parts)
    branch = copy
    for name in names[:-1]:
        branch = branch.setdefault(name, {})
    if value is None:
        del branch[names[-1]]
    else:
        branch[names[-1]] = value
    return copy


MALFORMED = {
    "missing kernel": ("backbone/params/Dense_0/kernel", None, r"backbone.*'params/Dense_0/kernel': found nothing"),
    "missing bias": ("backbone/params/Dense_1/bias", None, r"backbone.*'params/Dense_1/bias': found nothing"),
    "missing statistics": (
        "backbone/batch_stats/BatchNorm_0/var",
        None,
        r"'batch_stats/BatchNorm_0/var': found nothing",
    ),
    "missing head": ("head/params/bias", None, r"head of task 'new', leaf 'params/bias': found nothing"),
    "extra": (
        "backbone/params/Dense_9/kernel",
        np.zeros((4, 8), np.float32),
        r"'params/Dense_9/kernel': .*expected nothing",
    ),
    "extra collection": (
        "backbone/cache/h",
        np.zeros(3, np.float32),
        r"'cache/h': found float32\[3\], expected nothing",
    ),
    "shape": (
        "backbone/params/Dense_0/kernel",
        np.zeros((8, 4), np.float32),
        r"found float32\[8,4\], expected float32\[4,8\]",
    ),
    "head shape": (
        "head/params/kernel",
        np.zeros((6, 3), np.float32),
        r"found float32\[6,3\], expected float32\[6,2\]",
    ),
    "dtype": (
        "backbone/params/Dense_0/kernel",
        np.zeros((4, 8), np.float16),
        r"found float16\[4,8\], expected float32\[4,8\]",
    ),
    "no array": ("head/params/bias", 3.0, r"'params/bias': found float 3.0, expected float32\[2\]"),
    "NaN statistics": (
        "backbone/batch_stats/BatchNorm_0/mean",
        np.full(8, np.nan, np.float32),
        r"task 'new', leaf 'backbone/batch_stats/BatchNorm_0/mean': found NaN or infinity, expected finite values",
    ),
    "infinite head": (
        "head/params/bias",
        np.asarray([0.0, np.inf], np.float32),
        r"leaf 'head/params/bias': found NaN or infinity.*Training diverged; nothing was taken",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_commit_refuses_variables_of_another_make_by_leaf(net, state, name):
    path, value, message = MALFORMED[name]
    with pytest.raises(pae.StructureError, match=message):
        pae.commit(net, state, "new", changed(pae.task_variables(net, state, "new"), path, value))


def test_commit_refuses_a_weight_of_its_own_that_is_not_finite(net, state, nnx_net, nnx_state):
    own = np.asarray(flatten(pae.trainable(state, "new"))["Dense_0/kernel"])
    parts = moved_by(net, state)
    kernel = parts["backbone"]["params"]["Dense_0"]["kernel"]
    parts["backbone"]["params"]["Dense_0"]["kernel"] = jnp.where(own, jnp.nan, kernel)
    with pytest.raises(pae.StructureError, match="leaf 'backbone/params/Dense_0/kernel': found NaN or infinity"):
        pae.commit(net, state, "new", parts)
    module, _ = pae.as_flax(nnx_net, nnx_state, "new")
    module.head.bias[...] = jnp.asarray([0.0, jnp.nan])
    with pytest.raises(pae.StructureError, match="leaf 'head/params/bias': found NaN or infinity"):
        pae.commit(nnx_net, nnx_state, "new", module)


def test_commit_refuses_a_frozen_task_an_unknown_one_and_what_are_no_variables(net, state, nnx_net):
    variables = pae.task_variables(net, state, "old")
    with pytest.raises(pae.PhaseError, match="commit cannot be called now: task 'old' is frozen"):
        pae.commit(net, state, "old", variables)
    frozen = pae.freeze(state, "new")
    with pytest.raises(pae.PhaseError, match="commit cannot be called now: task 'new' is frozen"):
        pae.commit(net, frozen, "new", pae.task_variables(net, frozen, "new"))
    with pytest.raises(pae.UnknownTaskError):
        pae.commit(net, state, "none", variables)
    for wrong in (None, [1, 2], {}, {"params": {}}):
        with pytest.raises(pae.StructureError):
            pae.commit(net, state, "new", wrong)
    with pytest.raises(pae.StructureError, match="Was the state made with this net"):
        pae.commit(nnx_net, state, "new", variables)


# as_flax and task_variables


class DeepHead(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.BatchNorm(use_running_average=deterministic, momentum=0.5)(x)
        return {"a": nn.Dense(2)(nn.Dropout(0.2, deterministic=deterministic)(x)), "b": nn.Dense(3)(x)}


class NnxHead(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.out = nnx.BatchNorm(6, momentum=0.5, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(self.norm(x)))


class NnxTrainHead(nnx.Module):
    def __init__(self, rngs):
        self.dropout, self.out = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x, train):
        return self.out(self.dropout(x, deterministic=not train))


SHARING = {
    "all": {},
    "first": {"sharing": "first"},
    "picked": {"sharing": "picked"},
    "ternary": {"sharing": "picked", "picking": pae.Picking(ternary=True)},
}
HEADS = {
    "linen": {"classes": lambda: 3, "none": lambda: None, "module": DeepHead, "layer": lambda: nn.Dense(2)},
    "nnx": {
        "classes": lambda: 3,
        "none": lambda: None,
        "module": lambda: NnxHead(nnx.Rngs(3)),
        "module with train": lambda: NnxTrainHead(nnx.Rngs(3)),
    },
}


def answer(net, state, task, x=X):
    module, variables = pae.as_flax(net, state, task)
    if net.kind == "linen":
        return jax.jit(lambda variables: module.apply(variables, x, train=False))(variables)
    return nnx.jit(lambda module: module(x))(module)


def scored(state, task):
    """Scores on all sides of the thresholds."""
    entry = state.tasks[task]
    if entry.pick is None:
        return state
    draw = np.random.default_rng(1)
    pick = jax.tree.map(lambda p: jnp.asarray(draw.choice([-0.1, 0.0, 0.1], p.shape), jnp.float32), entry.pick)
    return state.replace(tasks={**state.tasks, task: entry.replace(pick=pick)})


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_as_flax_computes_what_predict_does_bit_for_bit_whatever_the_task_shares(
    net, nnx_net, kind, sharing, assert_same
):
    used = net if kind == "linen" else nnx_net
    state = pae.freeze(pae.prune(two_tasks(used), "new", 0.5), "new")
    state = scored(pae.pack(used, state, "third", head=3, key=KEY(3), weight_init="fresh", **SHARING[sharing]), "third")
    for now in (state, pae.freeze(state, "third"), pae.expand(used, pae.freeze(state, "third"), width=1.5, key=KEY(4))):
        for task in ("old", "new", "third"):
            assert_same(answer(used, now, task), pae.predict(used, now, task, X))
    hidden = ~np.asarray(jax.tree.leaves(pae.masks(state, "third"))[0])
    weights = jax.tree.leaves(used.split(pae.task_variables(used, state, "third")["backbone"])[0])[0]
    assert not np.asarray(weights)[hidden].any()
    if sharing == "ternary":
        older = np.asarray(jax.tree.leaves(state.owner)[0]) < 3
        shared = np.asarray(jax.tree.leaves(state.shared)[0])
        assert (np.asarray(weights) == -shared)[older & (shared != 0)].any()


@pytest.mark.parametrize(("kind", "head"), [(kind, head) for kind in HEADS for head in HEADS[kind]])
def test_as_flax_takes_every_head_of_its_kind(net, nnx_net, kind, head, assert_same):
    used = net if kind == "linen" else nnx_net
    state = two_tasks(used, head=HEADS[kind][head]())
    assert_same(answer(used, state, "new"), pae.predict(used, state, "new", X))
    variables = pae.task_variables(used, state, "new")
    assert ("params" in variables["head"]) == (head != "none")
    assert_same(pae.commit(used, state, "new", pae.as_flax(used, state, "new")[0 if kind == "nnx" else 1]), state)


class Two(nn.Module):
    @nn.compact
    def __call__(self, a, b, mode):
        return nn.Dropout(0.5, deterministic=mode == "eval")(nn.Dense(6)(a) + nn.Dense(6)(b))


class NnxTwo(nnx.Module):
    def __init__(self, width, rngs):
        self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(4, 6, rngs=rngs)

    def both(self, a, b):
        return self.a(a) + self.b(b)


def test_as_flax_calls_a_model_as_call_says(assert_same):
    sample, x = {"a": X[:1], "b": X[:1]}, {"a": X, "b": X[::-1].copy()}
    mode = lambda train: "train" if train else "eval"  # noqa: E731
    nets = (
        pae.linen(lambda width: Two(), sample, call=lambda module, x, train: module(x["a"], x["b"], mode(train))),
        pae.nnx(NnxTwo, sample, call=lambda module, x, train: module.both(x["a"], x["b"])),
    )
    for used in nets:
        state = two_tasks(used)
        for task in ("old", "new"):
            assert_same(answer(used, state, task, x), pae.predict(used, state, task, x))


def test_as_flax_trains_and_evaluates_by_the_modules_own_words(net, state, nnx_net, nnx_state):
    module, variables = pae.as_flax(net, state, "new")
    told, moved = module.apply(variables, X, train=True, mutable=["batch_stats"])
    assert (np.asarray(told) != np.asarray(module.apply(variables, X))).any()
    before, after = (tree["batch_stats"]["backbone"]["BatchNorm_0"]["mean"] for tree in (variables, moved))
    assert (np.asarray(before) != np.asarray(after)).any()
    module, _ = pae.as_flax(nnx_net, nnx_state, "new")
    quiet = np.asarray(module(X))
    module.train()
    told = np.asarray(module(X))
    assert (told != quiet).any()
    np.testing.assert_array_equal(pae.as_flax(nnx_net, nnx_state, "new")[0](X), quiet)


def test_as_flax_refuses_a_head_of_the_other_kind_and_an_unknown_task(net, nnx_net, state):
    with pytest.raises(pae.ArgumentError, match="as_flax makes one module of a linen backbone and its head"):
        pae.as_flax(net, two_tasks(net, head=NnxHead(nnx.Rngs(0))), "new")
    with pytest.raises(pae.ArgumentError, match="as_flax makes one module of a nnx backbone and its head"):
        pae.as_flax(nnx_net, two_tasks(nnx_net, head=nn.Dense(2)), "new")
    for call in (pae.as_flax, pae.task_variables):
        with pytest.raises(pae.UnknownTaskError):
            call(net, state, "none")
        with pytest.raises(pae.StructureError, match="Was the state made with this net"):
            call(nnx_net, state, "new")


def test_what_the_trainer_does_to_its_arrays_after_commit_changes_no_bit(net, state, bits):
    """A trainer in NumPy writes in place; a jitted one donates."""
    variables = jax.tree.map(np.array, pae.task_variables(net, state, "new"))
    committed = pae.freeze(pae.commit(net, state, "new", variables), "new")
    before = bits(pae.predict(net, committed, "new", X))
    for leaf in jax.tree.leaves(variables):
        leaf += 1
    assert bits(pae.predict(net, committed, "new", X)) == before
    given = pae.task_variables(net, state, "new")
    committed = pae.freeze(pae.commit(net, state, "new", given), "new")
    for leaf in jax.tree.leaves(given):
        leaf.delete()
    assert bits(pae.predict(net, committed, "new", X)) == before


class LinenAttention(nn.Module):
    width: float

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, qkv_features=int(4 * self.width), out_features=4)(x, x).mean(axis=1)


class NnxAttention(nnx.Module):
    def __init__(self, width, rngs):
        self.att = nnx.MultiHeadAttention(2, 4, int(4 * width), decode=False, rngs=rngs)

    def __call__(self, x):
        return self.att(x).mean(axis=1)


@pytest.mark.parametrize("make", [lambda s: pae.linen(LinenAttention, s), lambda s: pae.nnx(NnxAttention, s)])
def test_the_gate_finds_parameters_that_are_named_value(make):
    net = make(np.zeros((1, 3, 4), np.float32))
    state = pae.pack(net, pae.init(net, KEY(0)), "a", head=2, key=KEY(1))
    module, variables = pae.as_flax(net, state, "a")
    params = variables["params"] if net.kind == "linen" else nnx.state(module, nnx.Param)
    shapes = jax.tree.map(jnp.shape, jax.tree.leaves(pae.gate(net, state, "a").init(params).open))
    assert shapes.count((4, 2, 2)) == 3  # query, key and value

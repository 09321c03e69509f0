"""What people train with, in steps of their own: each leaves every older task bit-identical."""

import functools

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import pae_jax as pae

CE = optax.softmax_cross_entropy_with_integer_labels
KEY = jax.random.key


class Backbone(nn.Module):
    """Two hidden layers with a norm and dropout; the width is a factor."""

    width: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(int(32 * self.width))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.relu(nn.Dense(int(16 * self.width))(x))


class NnxBackbone(nnx.Module):
    """The same in NNX, which takes its mode by `.train()` and `.eval()`."""

    def __init__(self, width, rngs):
        self.first = nnx.Linear(8, int(32 * width), rngs=rngs)
        self.norm = nnx.BatchNorm(int(32 * width), momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(int(32 * width), int(16 * width), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.last(self.dropout(nnx.relu(self.norm(self.first(x))))))


X = np.random.default_rng(0).normal(size=(128, 8)).astype(np.float32)
Y = X[:, :3].argmax(1)


def second_task(net, head, **options):
    """Return a network whose first task is frozen and whose second, "new", is packed."""
    state = pae.pack(net, pae.init(net, KEY(0)), "old", head=3, key=KEY(1))
    state = pae.freeze(pae.prune(state, "old", 0.5), "old")
    return pae.pack(net, state, "new", head=head, key=KEY(2), **options)


@pytest.fixture(scope="module", params=["linen", "nnx"])
def vectors(request):
    return pae.linen(Backbone, X[:1]) if request.param == "linen" else pae.nnx(NnxBackbone, X[:1])


@pytest.fixture(scope="module")
def linen_net():
    return pae.linen(Backbone, X[:1])


@pytest.fixture
def unforgotten(assert_same):
    """Check that a state passes every check and that the task "old" answers as in another state."""

    def check(net, before, after, x=X):
        pae.check(after, net)
        pae.verify(after)
        assert_same(pae.predict(net, after, "old", x), pae.predict(net, before, "old", x))
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.shared, before.shared)
        assert all(jax.tree.leaves(moved))

    return check


def loss_of(ts, params, x, y):
    out, updates = ts.apply_fn(params, x, train=True)
    return CE(out, y).mean(), updates


def plain_step(ts, x, y):
    (value, updates), grads = jax.value_and_grad(lambda p: loss_of(ts, p, x, y), has_aux=True)(ts.params)
    return ts.apply_gradients(grads=grads, updates=updates), value


def accuracy(net, state, x=X, y=Y):
    return pae.evaluate(net, state, "new", (x, y))["accuracy"]


def test_a_step_of_ones_own_learns_the_task_and_forgets_nothing(vectors, unforgotten):
    before = second_task(vectors, 3)
    ts = pae.TrainState.create(vectors, before, "new", tx=optax.adamw(1e-2, weight_decay=0.1), key=KEY(3))
    step = jax.jit(plain_step, donate_argnums=0)
    for _ in range(60):
        ts, _ = step(ts, X, Y)
    after = ts.commit(vectors, before)
    unforgotten(vectors, before, after)
    assert accuracy(vectors, after) > 0.9


def test_many_steps_in_a_scan_equal_the_same_steps_one_by_one(linen_net, assert_same):
    state = second_task(linen_net, 3)
    ts = pae.TrainState.create(linen_net, state, "new", tx=optax.sgd(0.1, momentum=0.9), key=KEY(3))
    batches = jnp.asarray(X).reshape(8, 16, 8), jnp.asarray(Y).reshape(8, 16)
    scanned, values = jax.jit(lambda ts: jax.lax.scan(lambda ts, batch: plain_step(ts, *batch), ts, batches))(ts)
    assert int(scanned.step) == 8
    one, single = ts, jax.jit(plain_step)
    for x, y in zip(*batches, strict=True):
        one, value = single(one, x, y)
    np.testing.assert_allclose(values[-1], value, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(scanned.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


OPTIMIZERS = {
    "sam": lambda: optax.contrib.sam(
        optax.sgd(0.2, momentum=0.9), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), opaque_mode=True
    ),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(0.03, warmup_steps=5),
    "look-ahead": lambda: optax.lookahead(optax.adam(0.02), 5, 0.5),
    "two optimizers": lambda: optax.partition(
        {"body": optax.adamw(0.01), "head": optax.sgd(0.3)},
        lambda params: {part: "head" if part == "head" else "body" for part in params},
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_that_want_more_than_gradients(make, linen_net, unforgotten):
    before = second_task(linen_net, 3)
    ts = pae.TrainState.create(linen_net, before, "new", tx=make(), key=KEY(3))

    @jax.jit
    def step(ts, x, y):
        def grad_fn(params, *_):
            return jax.grad(lambda p: loss_of(ts, p, x, y)[0])(params)

        (_, updates), grads = jax.value_and_grad(lambda p: loss_of(ts, p, x, y), has_aux=True)(ts.params)
        return ts.apply_gradients(grads=grads, updates=updates, grad_fn=grad_fn)

    for _ in range(60):
        ts = step(ts, X, Y)
    if isinstance(ts.opt_state, optax.contrib.ScheduleFreeState):
        ts = ts.replace(params=optax.contrib.schedule_free_eval_params(ts.opt_state, ts.params))
    if ts.slow is not None:
        ts = ts.replace(params=ts.slow)
    after = ts.commit(linen_net, before)
    unforgotten(linen_net, before, after)
    assert accuracy(linen_net, after) > 0.8


def test_l_bfgs_with_its_line_search(linen_net, unforgotten):
    before = second_task(linen_net, 3)
    ts = pae.TrainState.create(
        linen_net, before, "new", tx=optax.lbfgs(memory_size=5), key=KEY(3), parts=("shared", "head")
    )

    @jax.jit
    def step(ts):
        def loss(params):
            return loss_of(ts, params, X, Y)[0]

        value, grads = optax.value_and_grad_from_state(loss)(ts.params, state=ts.opt_state)
        return ts.apply_gradients(grads=grads, value=value, grad=grads, value_fn=loss), value

    first = step(ts)[1]
    for _ in range(15):
        ts, value = step(ts)
    assert value < 0.5 * first
    unforgotten(linen_net, before, ts.commit(linen_net, before))


def test_a_mean_teacher_by_ema_may_be_what_is_kept(linen_net, unforgotten):
    """Tarvainen and Valpola, 2017: unlabelled examples agree with an average of the student."""
    before = second_task(linen_net, 3)
    ts = pae.TrainState.create(linen_net, before, "new", tx=optax.adam(0.01), key=KEY(3))
    labelled = np.arange(128) < 64

    @jax.jit
    def step(ts, teacher):
        target, _ = ts.apply_fn(teacher, X)

        def loss(params):
            out, updates = ts.apply_fn(params, X, train=True)
            agree = ((jax.nn.softmax(out) - jax.nn.softmax(target)) ** 2).mean()
            return (CE(out, Y) * labelled).mean() + agree, updates

        grads, updates = jax.grad(loss, has_aux=True)(ts.params)
        ts = ts.apply_gradients(grads=grads, updates=updates)
        return ts, optax.incremental_update(ts.params, teacher, 0.1)

    teacher = ts.params
    for _ in range(60):
        ts, teacher = step(ts, teacher)
    after = ts.replace(params=teacher).commit(linen_net, before)
    unforgotten(linen_net, before, after)
    assert accuracy(linen_net, after) > 0.8


def test_distillation_from_an_online_teacher_that_is_an_older_task(linen_net, unforgotten):
    before = second_task(linen_net, 3)
    teacher, variables = pae.as_flax(linen_net, before, "old")
    ts = pae.TrainState.create(linen_net, before, "new", tx=optax.adam(0.01), key=KEY(3))

    @jax.jit
    def step(ts):
        target = jax.nn.softmax(teacher.apply(variables, X, train=False))

        def loss(params):
            out, updates = ts.apply_fn(params, X, train=True)
            return optax.softmax_cross_entropy(out, target).mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(ts.params)
        return ts.apply_gradients(grads=grads, updates=updates)

    for _ in range(80):
        ts = step(ts)
    after = ts.commit(linen_net, before)
    unforgotten(linen_net, before, after)
    answers = [pae.predict(linen_net, after, name, X).argmax(1) for name in ("old", "new")]
    assert (answers[0] == answers[1]).mean() > 0.9


def test_simclr_without_labels(linen_net, unforgotten):
    """Chen et al., 2020: two views of an example attract, all others repel."""
    before = second_task(linen_net, 16)
    ts = pae.TrainState.create(linen_net, before, "new", tx=optax.adam(0.01), key=KEY(3))

    @jax.jit
    def step(ts, key):
        views = X[None] + 0.3 * jax.random.normal(key, (2, *X.shape))

        def loss(params):
            out, updates = ts.apply_fn(params, views.reshape(-1, 8), train=True)
            z = out / jnp.linalg.norm(out, axis=-1, keepdims=True)
            similar = z @ z.T / 0.5 - 1e9 * jnp.eye(256)
            return CE(similar, (jnp.arange(256) + 128) % 256).mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(ts.params)
        return ts.apply_gradients(grads=grads, updates=updates), value

    values = []
    for i in range(40):
        ts, value = step(ts, KEY(i))
        values.append(float(value))
    assert values[-1] < 0.85 * values[0]
    unforgotten(linen_net, before, ts.commit(linen_net, before))


def test_a_gan_whose_generator_is_a_task(linen_net, unforgotten):
    before = second_task(linen_net, 2)
    ts = pae.TrainState.create(linen_net, before, "new", tx=optax.adam(0.01), key=KEY(3))
    critic = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(1)])
    other = flax.training.train_state.TrainState.create(
        apply_fn=critic.apply, params=critic.init(KEY(4), jnp.zeros((1, 2))), tx=optax.adam(0.01)
    )
    real = jnp.asarray(X[:, :2]) * 0.1 + jnp.asarray([[2.0, -1.0]])

    @jax.jit
    def step(ts, other, key):
        noise = jax.random.normal(key, (128, 8))

        def fool(params):
            fake, updates = ts.apply_fn(params, noise, train=True)
            return jax.nn.softplus(-other.apply_fn(other.params, fake)).mean(), (fake, updates)

        def judge(params, fake):
            score = functools.partial(other.apply_fn, params)
            return (jax.nn.softplus(score(fake)) + jax.nn.softplus(-score(real))).mean()

        grads, (fake, updates) = jax.grad(fool, has_aux=True)(ts.params)
        other = other.apply_gradients(grads=jax.grad(judge)(other.params, jax.lax.stop_gradient(fake)))
        return ts.apply_gradients(grads=grads, updates=updates), other

    for i in range(150):
        ts, other = step(ts, other, KEY(i))
    after = ts.commit(linen_net, before)
    unforgotten(linen_net, before, after)
    fake = pae.predict(linen_net, after, "new", np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32))
    assert np.abs(np.asarray(fake).mean(0) - [2.0, -1.0]).max() < 1.5


def test_actor_and_critic_on_one_packed_body(linen_net, unforgotten):
    """A bandit with a state: the reward is 1 for the action that Y names."""

    class ActorCritic(nn.Module):
        @nn.compact
        def __call__(self, features):
            return {"policy": nn.Dense(3)(features), "value": nn.Dense(1)(features)[..., 0]}

    before = second_task(linen_net, ActorCritic())
    ts = pae.TrainState.create(linen_net, before, "new", tx=optax.adam(0.02), key=KEY(3))

    @jax.jit
    def step(ts, key):
        out, _ = ts.apply_fn(ts.params, X)
        action = jax.random.categorical(key, out["policy"])
        reward = (action == Y).astype(jnp.float32)

        def loss(params):
            out, updates = ts.apply_fn(params, X, train=True)
            advantage = reward - out["value"]
            chosen = jnp.take_along_axis(jax.nn.log_softmax(out["policy"]), action[:, None], 1)[:, 0]
            return (-chosen * jax.lax.stop_gradient(advantage) + advantage**2).mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(ts.params)
        return ts.apply_gradients(grads=grads, updates=updates), reward.mean()

    rewards = []
    for i in range(120):
        ts, reward = step(ts, KEY(i))
        rewards.append(float(reward))
    assert np.mean(rewards[-10:]) > 0.6
    unforgotten(linen_net, before, ts.commit(linen_net, before))


def test_a_language_model_with_padding_mask_and_length_buckets(assert_same):
    class Tokens(nn.Module):
        width: float

        @nn.compact
        def __call__(self, batch, train):
            x = nn.Embed(16, 16)(batch["ids"]) * batch["mask"][..., None]
            before = jnp.cumsum(x, axis=1) / jnp.maximum(jnp.cumsum(batch["mask"], axis=1), 1.0)[..., None]
            return nn.relu(nn.Dense(int(32 * self.width))(jnp.concatenate([x, before], -1)))

    def bucket(length, seed):
        ids = (np.arange(length) + np.random.default_rng(seed).integers(0, 16, (24, 1))).astype(np.int32) % 16
        mask = (np.arange(length) < np.random.default_rng(seed).integers(3, length + 1, (24, 1))).astype(np.float32)
        return {"ids": ids, "mask": mask}, {"next": (ids + 1) % 16, "mask": mask}

    def loss(out, y):
        return (CE(out, y["next"]) * y["mask"]).sum(1) / y["mask"].sum(1)

    buckets = [bucket(length, seed) for length, seed in ((6, 0), (10, 1), (6, 2), (14, 3))]
    net = pae.linen(Tokens, buckets[0][0], free_axes=(1,))
    before = second_task(net, 16)
    after, history = pae.fit(net, before, "new", buckets, optimizer=optax.adam(0.02), epochs=40, key=KEY(3), loss=loss)
    assert history.rows[-1]["loss"] < 0.3
    for x, y in buckets:
        right = pae.predict(net, after, "new", x).argmax(-1) == y["next"]
        assert (right * y["mask"]).sum() / y["mask"].sum() > 0.9
        assert_same(pae.predict(net, after, "old", x), pae.predict(net, before, "old", x))
    pae.verify(after)


def test_segmentation_with_an_ignore_index(assert_same):
    class Pixels(nn.Module):
        width: float

        @nn.compact
        def __call__(self, x, train):
            return nn.relu(nn.Conv(int(16 * self.width), (3, 3))(x))

    x = np.random.default_rng(0).normal(size=(32, 8, 8, 1)).astype(np.float32)
    y = np.where(np.random.default_rng(1).random((32, 8, 8)) < 0.2, 255, x[..., 0] > 0).astype(np.uint8)

    def loss(out, y):
        known = y != 255
        return (CE(out, jnp.where(known, y, 0)) * known).sum((1, 2)) / known.sum((1, 2))

    def pixel_accuracy(out, y):
        known = y != 255
        return ((out.argmax(-1) == y) * known).sum((1, 2)) / known.sum((1, 2))

    net = pae.linen(Pixels, x[:1])
    before = second_task(net, 2)
    after, history = pae.fit(
        net,
        before,
        "new",
        (x, y),
        val=(x, y),
        optimizer=optax.adam(0.02),
        epochs=60,
        key=KEY(3),
        loss=loss,
        metrics={"pixels": pixel_accuracy},
    )
    assert history.rows[-1]["val_pixels"] > 0.95
    assert "val_accuracy" not in history.rows[-1]
    pae.verify(after)
    assert_same(pae.predict(net, after, "old", x), pae.predict(net, before, "old", x))


def test_a_plain_flax_train_state_with_the_gate(linen_net, unforgotten):
    before = second_task(linen_net, 3)
    module, variables = pae.as_flax(linen_net, before, "new")
    tx = optax.chain(optax.adamw(0.02, weight_decay=0.1), pae.gate(linen_net, before, "new"))
    trainer = flax.training.train_state.TrainState.create(apply_fn=module.apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(trainer, stats, key):
        def loss(params):
            out, updates = trainer.apply_fn(
                {"params": params, "batch_stats": stats}, X, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )
            return CE(out, Y).mean(), updates["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(trainer.params)
        return trainer.apply_gradients(grads=grads), stats

    stats = variables["batch_stats"]
    for i in range(60):
        trainer, stats = step(trainer, stats, KEY(i))
    after = pae.commit(linen_net, before, "new", {"params": trainer.params, "batch_stats": stats})
    unforgotten(linen_net, before, after)
    assert accuracy(linen_net, after) > 0.9


def test_nnx_optimizer_with_the_gate(unforgotten):
    net = pae.nnx(NnxBackbone, X[:1])
    before = second_task(net, 3)
    model, _ = pae.as_flax(net, before, "new")
    np.testing.assert_allclose(model(X), pae.predict(net, before, "new", X), atol=1e-5)
    tx = optax.chain(optax.adamw(0.02, weight_decay=0.1), pae.gate(net, before, "new"))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: CE(model(X), Y).mean())(model)
        optimizer.update(model, grads)

    model.train()
    for _ in range(60):
        step(model, optimizer)
    model.eval()
    after = pae.commit(net, before, "new", model)
    unforgotten(net, before, after)
    assert accuracy(net, after) > 0.9
    assert (model(X).argmax(1) == pae.predict(net, after, "new", X).argmax(1)).all()

"""The published sizes come out of owner counts; stored and dense sizes are those of the files and the arrays."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pae_jax as pae
from pae_jax.core import integrity
from pae_jax.core.state import State, TaskState, layout_of
from pae_jax.nets import heads
from pae_jax.reports import sizes
from pae_jax.trees import flatten

MB = sizes.MB
TOLERANCE = 0.003  # MB: masks are published to 3 decimals, and an owned weight counts 5 bytes

WEIGHTS = {1.0: 23_432_032, 1.2: 27_936_335}
VECTORS = {
    1.0: {"norms": 3 * 14_800, "biases": 20_992, "kernels": 133},
    1.2: {"norms": 3 * 16_139, "biases": 22_960, "kernels": 133},
}
FACE_RATE = 0.38531

# Name: owned weights in MB of one mask byte each, classes, size ratio, published MB of the task.
PUBLISHED = {
    "face": (13.7362, 0, 1.0, 68.931),
    "age 0": (1.769, 8, 1.0, 9.109),
    "age 1": (2.641, 8, 1.0, 13.472),
    "age 2": (1.765, 8, 1.0, 9.089),
    "age 3": (3.526, 8, 1.0, 17.896),
    "age 4": (5.272, 8, 1.0, 26.623),
    "gender 0": (2.818, 2, 1.0, 14.345),
    "gender 1": (1.224, 2, 1.0, 6.374),
    "gender 2": (2.115, 2, 1.0, 10.829),
    "gender 3": (3.640, 2, 1.0, 18.456),
    "gender 3, poster": (4.166, 2, 1.0, 21.084),
    "gender 4": (3.061, 2, 1.0, 15.561),
    "expression": (5.176, 7, 1.0, 26.145),
    "FotW gender": (0.791, 3, 1.2, 4.235),
    "FotW gender, poster": (2.397, 3, 1.2, 12.263),
}
FACENET, AGENET, GENDERNET, EMOTIONNET, FOTWNET = 89.636, 89.652, 89.640, 89.649, 89.641

# Pruned rate / own mask in MB, at every rung of the published pruning curves.
FACE = """0.00000/22.347 0.08647/20.414 0.18216/18.276 0.28625/15.950 0.38531/13.736 0.48888/11.422 0.59204/9.116
0.69387/6.841 0.79573/4.565 0.89894/2.258"""
AGE = [
    """0.00000/8.610 0.08881/7.846 0.18921/6.981 0.28763/6.134 0.38729/5.276 0.48937/4.397 0.59052/3.526 0.69269/2.646
    0.79459/1.769 0.89771/0.881""",
    """0.00000/8.610 0.08743/7.858 0.18768/6.994 0.28753/6.135 0.38658/5.282 0.48922/4.398 0.59154/3.517 0.69325/2.641
    0.79549/1.761 0.89775/0.880""",
    """0.00000/8.610 0.08777/7.855 0.18556/7.013 0.28706/6.139 0.38867/5.264 0.48925/4.398 0.59145/3.518 0.69344/2.640
    0.79506/1.765 0.89748/0.883""",
    """0.00000/8.610 0.08784/7.854 0.18545/7.014 0.28887/6.123 0.38759/5.273 0.48983/4.393 0.59048/3.526 0.69357/2.638
    0.79544/1.761 0.89778/0.880""",
    """0.00000/8.610 0.08562/7.873 0.18765/6.995 0.28861/6.125 0.38777/5.272 0.49084/4.384 0.58848/3.543 0.69285/2.645
    0.79536/1.762 0.89836/0.875""",
]
AGE_CHOSEN = [0.79459, 0.69325, 0.79506, 0.59048, 0.38777]  # pruned rate of the age task that gender builds on
GENDER = [
    """0.00000/6.842 0.07990/6.295 0.17832/5.622 0.28026/4.924 0.38348/4.218 0.48684/3.511 0.58807/2.818 0.68982/2.122
    0.79371/1.411 0.89697/0.705""",
    """0.00000/5.969 0.08529/5.460 0.18398/4.871 0.27973/4.299 0.38365/3.679 0.48433/3.078 0.58818/2.458 0.69045/1.848
    0.79496/1.224 0.89707/0.614""",
    """0.00000/6.846 0.08154/6.288 0.18176/5.601 0.28152/4.919 0.38517/4.209 0.48433/3.530 0.58952/2.810 0.69105/2.115
    0.79492/1.404 0.89717/0.704""",
    """0.00000/5.084 0.08196/4.668 0.18061/4.166 0.28400/3.640 0.38643/3.120 0.48705/2.608 0.58939/2.088 0.69333/1.559
    0.79514/1.042 0.89794/0.519""",
    """0.00000/3.339 0.08309/3.061 0.18034/2.737 0.28156/2.399 0.38410/2.056 0.48430/1.722 0.59014/1.368 0.69285/1.026
    0.79447/0.686 0.89792/0.341""",
]
FOTW = [
    """0.07327/7.163 0.17078/6.410 0.27580/5.598 0.38146/4.781 0.48246/4.000 0.58798/3.185 0.68705/2.419 0.79329/1.598
    0.89764/0.791""",
    """0.00000/7.730 0.07547/7.146 0.17227/6.398 0.28005/5.565 0.38308/4.769 0.48444/3.985 0.58891/3.178 0.68991/2.397
    0.79454/1.588 0.89797/0.789""",
    """0.00000/7.730 0.07873/7.121 0.17470/6.379 0.28232/5.548 0.38569/4.749 0.48803/3.957 0.59137/3.159 0.69415/2.364
    0.79693/1.570 0.89788/0.789""",
]


def published_counts(name):
    mask, classes, ratio, _ = PUBLISHED[name]
    return sizes.Counts(name, own=round(mask * MB), head=513 * classes, whole=WEIGHTS[ratio], **VECTORS[ratio])


def kept(available, rate):
    return available - round(rate * available)


def curves():
    """Every published point: previous owners, size ratio, pruned rate, mask in MB, and the mask's rounding error.

    The error is that of the mask itself (3 decimals), and of the rates (5 decimals) and masks that it is computed from.
    """
    face = kept(WEIGHTS[1.0], FACE_RATE)
    after_face = WEIGHTS[1.0] - face
    emotion = round(5.176 * MB)
    rate_error, mask_error, face_error = 0.5e-5, 0.5e-3, 0.5e-5 * WEIGHTS[1.0] / MB
    chains = [("face", FACE, [], 1.0, 0.0)]
    for fold, (age, chosen, gender) in enumerate(zip(AGE, AGE_CHOSEN, GENDER, strict=True)):
        age_error = face_error + rate_error * after_face / MB
        chains.append((f"age-{fold}", age, [face], 1.0, face_error))
        chains.append((f"gender-{fold}", gender, [face, kept(after_face, chosen)], 1.0, age_error))
    chains += [(f"fotw-{i}", points, [face, emotion], 1.2, face_error + mask_error) for i, points in enumerate(FOTW)]
    for name, points, older, ratio, error in chains:
        for point in points.split():
            rate, mask = map(float, point.split("/"))
            rounding = mask_error + error + rate_error * (WEIGHTS[ratio] - sum(older)) / MB
            yield pytest.param(older, ratio, rate, mask, rounding, id=f"{name}-{rate}")


def make_entry(number, local=None, head=None, width=1.0, head_spec=2):
    """A task of which nothing but its arrays counts."""
    digests = integrity.no_digests({}, {}, {}, None)
    layout = layout_of(local=local or {}, head=head or {})
    return TaskState(local or {}, head or {}, digests, id=number, width=width, head_spec=head_spec, layout=layout)


@pytest.fixture(scope="module")
def facenet():
    return pae.linen(lambda width: pae.models.InceptionResnetV1(width), jnp.zeros((1, 160, 160, 3)))


@pytest.fixture(scope="module")
def facenet_state(facenet):
    """Return a state whose tasks own given numbers of weights; only the owners are real arrays."""

    def make(tasks, width=1.0):
        layout = facenet.layout(width)
        leaves, structure = jax.tree.flatten(layout.shared)
        ids = np.zeros(sum(leaf.size for leaf in leaves), np.int8)
        start, entries = 0, {}
        for number, (name, own, head) in enumerate(tasks, 1):
            ids[start : start + own] = number
            start += own
            variables, _ = heads.layout(facenet, head, width)
            entries[name] = make_entry(number, layout.local, variables, width=width, head_spec=head)
        ends = np.cumsum([leaf.size for leaf in leaves])
        owners = [part.reshape(leaf.shape) for part, leaf in zip(np.split(ids, ends[:-1]), leaves, strict=True)]
        return State(layout.shared, jax.tree.unflatten(structure, owners), entries, width=width)

    return make


# The paper's formula


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_paper_size_of_a_task_is_the_published_one(name):
    found = sizes.paper([published_counts(name)])
    assert found[name]["bytes"] / MB == pytest.approx(PUBLISHED[name][3], abs=TOLERANCE)


@pytest.mark.parametrize("older, ratio, rate, mask, rounding", list(curves()))
def test_the_pruned_rates_of_the_published_curves_lead_to_the_published_masks(older, ratio, rate, mask, rounding):
    available = WEIGHTS[ratio] - sum(older)
    own = kept(available, rate)
    before = [sizes.Counts(f"task {i}", own=n) for i, n in enumerate(older)]
    found = sizes.paper([*before, sizes.Counts("new", own=own, whole=WEIGHTS[ratio], **VECTORS[ratio])])
    columns = sizes.csv_columns(found, "new")
    assert rounding < TOLERANCE
    assert columns["Task specific masks (MB)"] == pytest.approx(mask, abs=rounding)
    fixed = sum(VECTORS[ratio].values()) * 4 / MB
    assert columns["Task specific part (MB)"] == pytest.approx(5 * mask + fixed, abs=5 * rounding)
    assert columns["Shared part (MB)"] == pytest.approx(5 * sum(older) / MB)
    assert own + sum(older) + round(rate * available) == WEIGHTS[ratio]


def test_the_poster_total_of_experiment_1_is_97_8_mb_and_36_4_percent_of_three_networks():
    face = sizes.paper([published_counts("face")]).total / MB
    age, gender = (
        np.mean([sizes.paper([published_counts(name)]).total for name in names]) / MB
        for names in (
            [f"age {fold}" for fold in range(5)],
            ["gender 0", "gender 1", "gender 2", "gender 3, poster", "gender 4"],
        )
    )
    assert age == pytest.approx(15.238, abs=TOLERANCE)
    assert gender == pytest.approx(13.639, abs=TOLERANCE)
    assert round(face + age + gender, 1) == 97.8
    assert round((face + age + gender) / (FACENET + AGENET + GENDERNET), 3) == 0.364


def test_the_poster_total_of_experiment_2_is_107_3_mb_and_39_9_percent_of_three_networks():
    total = sizes.paper([published_counts(n) for n in ("face", "expression", "FotW gender, poster")]).total / MB
    assert total == pytest.approx(107.339, abs=TOLERANCE)
    misprinted = 89.576
    assert round(100 * total / (misprinted + EMOTIONNET + FOTWNET), 2) == 39.92
    assert round(100 * total / (FACENET + EMOTIONNET + FOTWNET), 2) == 39.91


def test_counting_an_inception_resnet_v1_reproduces_the_published_columns(facenet_state):
    keys = {"face": "face", "age": "age 0", "gender": "gender 0"}
    tasks = [(name, round(PUBLISHED[key][0] * MB), PUBLISHED[key][1] or 8631) for name, key in keys.items()]
    found = sizes.paper(facenet_state(tasks), without_head="face")
    for name, key in keys.items():
        columns = sizes.csv_columns(found, name)
        assert columns["Task specific part (MB)"] == pytest.approx(PUBLISHED[key][3], abs=TOLERANCE)
        assert columns["Whole masks (MB)"] == pytest.approx(22.3465, abs=5e-5)
        assert columns["Task specific batch norm vars (MB)"] == pytest.approx(0.16937, abs=5e-6)
        assert columns["Task specific biases (MB)"] == pytest.approx(0.08008, abs=5e-6)
        assert found[name]["thresholds"] == 4 * 133
    assert found["face"]["head"] == 0
    assert found["age"]["head"] == 4 * 513 * 8
    assert any(note == "heads left out: face" for note in found.notes)


def test_counting_the_wider_inception_resnet_v1_reproduces_the_published_counts(facenet_state):
    own = round(0.791 * MB)
    (counts,) = sizes.count(facenet_state([("gender", own, 3)], width=pae.width_for(1.2)))
    assert counts == sizes.Counts("gender", own, 0, **VECTORS[1.2], head=513 * 3, whole=WEIGHTS[1.2])
    assert sizes.paper([counts]).total / MB == pytest.approx(4.235, abs=TOLERANCE)


def test_separate_networks_have_the_published_sizes_but_for_the_thresholds(facenet):
    found = sizes.dense_networks(facenet, {"age": 8, "gender": 2, "expression": 7, "FotW": 3})
    thresholds = 4 * 133
    published = {"age": AGENET, "gender": GENDERNET, "expression": EMOTIONNET, "FotW": FOTWNET}
    for name, size in published.items():
        assert (found[name]["bytes"] + thresholds) / MB == pytest.approx(size, abs=0.002)


def test_the_shared_part_counts_each_older_weight_that_a_task_sees_once(net, third):
    found = sizes.paper(third)
    own = [row["masks"] for row in found.rows]
    assert own == [40, 30, 10]
    assert [row["shared"] for row in found.rows] == [0, 5 * 40, 5 * 70]
    assert all(row["inference"] == row["shared"] + row["bytes"] for row in found.rows)
    first = pae.pack(net, pae.drop(third, "c"), "c", head=2, key=jax.random.key(0), sharing="first")
    assert [row["shared"] for row in sizes.paper(first).rows] == [0, 5 * 40, 5 * 40]


def test_counts_tell_biases_from_norms_and_leave_nothing_out(third):
    for counts in sizes.count(third):
        local = third.tasks[counts.task].local
        assert counts.biases == 6  # of the second dense layer; the first has none
        assert counts.norms == 4 * 8 + 1  # batch norm: scale, offset, mean, variance of 8 channels; one PReLU slope
        assert counts.norms + counts.biases == sum(leaf.size for leaf in jax.tree.leaves(local))
        assert (counts.kernels, counts.head, counts.whole) == (2, 6 * 2 + 2, 80)


def test_the_total_is_the_sum_of_the_tasks_and_every_list_of_counts_gives_what_its_state_does(third):
    found = sizes.paper(third)
    assert found.total == sum(row["bytes"] for row in found.rows)
    assert sizes.paper(sizes.count(third)).rows == found.rows
    assert found.total - sizes.paper(third, without_head=["a", "c"]).total == 2 * 4 * 14


# Stored


def test_a_stage_below_the_home_folder_has_its_bytes(empty, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pae.save("~/stage", empty)
    assert sizes.stored("~/stage").total == sizes.stored(tmp_path / "stage").total > 0


def test_stored_is_every_byte_of_the_stage_on_disk(third, tmp_path):
    pae.save(tmp_path / "stage", third, {"note": "x" * 1000})
    found = sizes.stored(tmp_path / "stage")
    files = [file for file in (tmp_path / "stage").rglob("*") if file.is_file()]
    assert found.total == sum(len(file.read_bytes()) for file in files)
    text = json.dumps(pae.read_metadata(tmp_path / "stage"))
    assert len(text) * 0.5 < found["(metadata)"]["bytes"]
    bare = tmp_path / "bare"
    pae.save(bare, third)
    assert found["(metadata)"]["bytes"] - sizes.stored(bare)["(metadata)"]["bytes"] > 900


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_arrays_of_random_weights_take_what_their_values_take(dtype, tmp_path):
    weights = jax.random.bits(jax.random.key(0), (500, 400), f"uint{8 * jnp.dtype(dtype).itemsize}").view(dtype)
    state = State(shared={"w": weights}, owner={"w": jnp.zeros((500, 400), jnp.int8)}, tasks={}, width=1.0)
    pae.save(tmp_path / "stage", state)
    found = sizes.stored(tmp_path / "stage")
    # Random bits cannot be compressed, the zeros of the owners can.
    assert 0.95 < found["(arrays)"]["bytes"] / weights.nbytes < 1.1
    assert found.notes == (f"uncompressed arrays: {weights.nbytes + 200_000:,} bytes",)


def test_stored_refuses_what_is_no_stage(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(pae.CheckpointError, match="no stage at"):
        sizes.stored(tmp_path / "none")
    with pytest.raises(pae.CheckpointError, match="not a complete"):
        sizes.stored(tmp_path)


def test_the_estimate_counts_owned_values_one_owner_map_vectors_and_heads(third):
    found = sizes.stored_estimate(third)
    owners = np.concatenate([np.asarray(o).ravel() for o in jax.tree.leaves(third.owner)])
    for name in ("a", "b", "c"):
        entry, row = third.tasks[name], found[name]
        assert row["weights"] == 4 * int((owners == entry.id).sum())
        assert row["local"] == sum(leaf.nbytes for leaf in jax.tree.leaves(entry.local))
        assert row["head"] == sum(leaf.nbytes for leaf in jax.tree.leaves(entry.head))
        assert row["picks"] == 0
    assert found["(owner map)"]["bytes"] == 80 * 2 // 8
    half = sizes.stored_estimate(pae.prune(third, "c", 0.5))
    freed = pae.report(pae.prune(third, "c", 0.5)).rows[-1]["weights"]
    assert found.total - half.total == 4 * freed > 0


def test_pretrained_weights_count_before_a_task_owns_them_and_the_backbones_local_variables_always(net):
    variables = net.program(1.0).init(jax.random.key(0), jnp.zeros((1, 4)))
    state = pae.from_variables(net, variables)
    assert sizes.stored_estimate(state).total == sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert sizes.stored_estimate(pae.init(net, jax.random.key(0))).total == sizes.stored_estimate(state).total
    packed = sizes.stored_estimate(pae.pack(net, state, "a", head=2, key=jax.random.key(0)))
    assert [row["part"] for row in packed.rows] == ["a", "(owner map)", "(backbone)"]
    assert packed["(backbone)"]["bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.local))


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 7, 8, 127])
def test_the_owner_map_takes_the_bits_that_tell_the_tasks_and_free_apart(tasks):
    entries = {str(i): make_entry(i) for i in range(1, tasks + 1)}
    state = State({"w": jnp.zeros((13, 11))}, {"w": jnp.zeros((13, 11), jnp.int8)}, entries, width=1.0)
    bits = math.ceil(math.log2(tasks + 1))
    assert sizes.stored_estimate(state)["(owner map)"]["bytes"] == math.ceil(13 * 11 * bits / 8)


def test_the_weights_of_16_bits_count_two_bytes():
    shared = {"a": jnp.zeros((4, 5), jnp.bfloat16), "b": jnp.zeros((2, 3), jnp.float32)}
    owner = {"a": jnp.ones((4, 5), jnp.int8), "b": jnp.asarray([[1, 1, 0], [0, 0, 0]], jnp.int8)}
    state = State(shared, owner, {"t": make_entry(1)}, width=1.0)
    assert sizes.stored_estimate(state)["t"]["weights"] == 20 * 2 + 2 * 4
    assert sizes.deployed(state, "t")["t"]["own"] == 20 * 2 + 2 * 4
    assert sizes.dense(state)["(shared weights)"]["bytes"] == 20 * 2 + 6 * 4


@pytest.mark.parametrize("ternary", [False, True])
def test_picks_count_as_many_bytes_as_a_stage_holds(net, frozen, tmp_path, ternary):
    rule = pae.Picking(ternary=ternary)
    state = pae.pack(net, frozen, "b", head=2, key=jax.random.key(3), sharing="picked", picking=rule)
    assert sizes.stored_estimate(state)["b"]["picks"] == 4 * 40  # scores of the older weights, while they can change
    state = pae.freeze(state, "b")
    pae.save(tmp_path / "stage", state)
    saved = pae.read_metadata(tmp_path / "stage")["arrays"]["tasks/2/pick"]
    assert sizes.stored_estimate(state)["b"]["picks"] == math.prod(saved["shape"]) == (10 if ternary else 5)
    assert sizes.stored_estimate(state)["a"]["picks"] == 0
    assert any("picks" in note for note in sizes.paper(state).notes)
    assert not any("picks" in note for note in sizes.paper(frozen).notes)


def test_one_task_alone_needs_its_visible_weights_a_bit_per_weight_its_vectors_and_its_head(third):
    for name, older in (("a", 0), ("b", 40), ("c", 70)):
        row = sizes.deployed(third, name)[name]
        mask = sum(int(leaf.sum()) for leaf in jax.tree.leaves(pae.masks(third, name)))
        assert row["own"] + row["older"] == 4 * mask
        assert row["older"] == 4 * older
        assert row["mask"] == 10
        estimate = sizes.stored_estimate(third)[name]
        assert (row["local"], row["head"]) == (estimate["local"], estimate["head"])
        assert row["bytes"] == sum(row[key] for key in ("own", "older", "mask", "local", "head"))


def test_unpicked_weights_are_not_deployed(net, frozen, edit_leaf):
    state = pae.pack(net, frozen, "b", head=2, key=jax.random.key(3), sharing="picked")
    entry = state.tasks["b"]
    path = next(iter(flatten(entry.pick)))
    none = edit_leaf(entry.pick, path, np.zeros_like)
    dropped = 4 * int((np.asarray(flatten(state.owner)[path]) == 1).sum())
    state_without = state.replace(tasks={**state.tasks, "b": entry.replace(pick=none)})
    assert sizes.deployed(state, "b").total - sizes.deployed(state_without, "b").total == dropped > 0
    shared = [sizes.paper(s)["b"]["shared"] for s in (state, state_without)]
    assert shared[0] - shared[1] == 5 * dropped // 4


def test_widening_changes_no_size_of_an_old_task(net, frozen):
    wide = pae.expand(net, frozen, width=1.5, key=jax.random.key(7))
    assert sizes.count(wide) == sizes.count(frozen)
    assert sizes.deployed(wide, "a") == sizes.deployed(frozen, "a")
    assert sizes.stored_estimate(wide)["a"] == sizes.stored_estimate(frozen)["a"]
    wider = pae.expand(net, wide, width=2.0, key=jax.random.key(8))
    assert sizes.count(wider) == sizes.count(frozen)
    packed = pae.pack(net, wider, "b", head=2, key=jax.random.key(9))
    assert [counts.whole for counts in sizes.count(packed)] == [80, 4 * 16 + 16 * 12]
    maps = sum(len(json.dumps(growth.maps.to_json())) for growth in wider.growth)
    assert sizes.stored_estimate(wider)["(expansions)"]["bytes"] == maps > 0


# Dense


def test_dense_is_every_array_of_the_state(net, empty, packed, third):
    picked = pae.pack(net, pae.drop(third, "c"), "c", head=2, key=jax.random.key(0), sharing="picked")
    pretrained = pae.from_variables(net, net.program(1.0).init(jax.random.key(0), jnp.zeros((1, 4))))
    for state in (empty, packed, third, picked, pretrained):
        assert sizes.dense(state).total == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    abstract = jax.eval_shape(lambda: third)
    assert sizes.dense(abstract) == sizes.dense(third)


def test_dense_networks_are_one_backbone_and_one_head_per_task(net, third):
    variables = net.program(1.5).init(jax.random.key(0), jnp.zeros((1, 4)))
    backbone = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    found = sizes.dense_networks(net, {"x": 3, "y": 5}, width=1.5)
    assert [row["bytes"] for row in found.rows] == [backbone + 4 * 10 * 3, backbone + 4 * 10 * 5]
    of_state = sizes.dense_networks(net, third)
    assert [row["part"] for row in of_state.rows] == ["a", "b", "c"]
    assert len({row["bytes"] for row in of_state.rows}) == 1


# Tables and errors


def test_every_table_names_its_kind_and_ends_in_its_total(net, third, tmp_path):
    pae.save(tmp_path / "stage", third)
    tables = {
        "paper: published formula": sizes.paper(third),
        "stored: files of a stage, measured": sizes.stored(tmp_path / "stage"),
        "stored: estimate of what a stage needs": sizes.stored_estimate(third),
        "stored: estimate of one task": sizes.deployed(third, "b"),
        "dense: allocated arrays": sizes.dense(third),
        "dense: 3 separate networks": sizes.dense_networks(net, third),
    }
    for title, table in tables.items():
        lines = str(table).splitlines()
        assert not any(line.endswith(" ") for line in lines)
        assert lines[0].startswith(title)
        assert lines[0].endswith("in KiB")
        notes = lines[len(lines) - len(table.notes) :] if table.notes else []
        assert notes == [f"- {note}" for note in table.notes]
        body = lines[1 : len(lines) - len(notes)]
        assert body[-1].startswith("total")
        assert f"{table.total / 1024:,.3f}" in body[-1]
        assert len(body) == len(table.rows) + 2
        assert [line.split("  ")[0].strip() for line in body[1:-1]] == [row["part"] for row in table.rows]
        for row, parts in itertools.product(table.rows, [("part", "bytes", "shared", "inference", "whole_masks")]):
            consists = [size for key, size in row.items() if key not in parts]
            assert not consists or sum(consists) == row["bytes"]


def test_a_large_table_is_in_mebibytes():
    text = str(sizes.paper([published_counts("face")]))
    assert text.splitlines()[0].endswith("in MiB")
    assert "68.931" in text


def test_wrong_names_and_numbers_are_refused(net, third):
    with pytest.raises(pae.UnknownTaskError, match="unknown task 'z'; the source has: 'a', 'b', 'c'"):
        sizes.paper(third, without_head=["z"])
    with pytest.raises(pae.UnknownTaskError, match="unknown task 'z'; the state has"):
        sizes.deployed(third, "z")
    with pytest.raises(pae.UnknownTaskError, match="unknown task 'z'; this table has: 'a', 'b', 'c'"):
        sizes.paper(third)["z"]
    with pytest.raises(pae.ArgumentError, match="own of task 'a' must be at least 0, found -1"):
        sizes.Counts("a", own=-1)
    with pytest.raises(pae.ArgumentError, match="distinct names"):
        sizes.paper([sizes.Counts("a", 1), sizes.Counts("a", 2)])
    with pytest.raises(pae.ArgumentError, match="found a 'dense' table"):
        sizes.csv_columns(sizes.dense(third), "a")
    with pytest.raises(pae.ArgumentError, match="width is a positive"):
        sizes.dense_networks(net, third, width=0)
    with pytest.raises(pae.ArgumentError, match="at least 1 class"):
        sizes.dense_networks(net, {"x": 0})

"""The report counts what the owners say."""

import jax
import numpy as np

import pae_jax as pae


def test_the_rows_count_every_weight_once_in_order_of_learning(third):
    report = pae.report(third)
    assert [row["task"] for row in report.rows] == ["a", "b", "c", "(free)"]
    owners = np.concatenate([np.asarray(o).ravel() for o in jax.tree.leaves(third.owner)])
    assert [row["weights"] for row in report.rows] == [int((owners == k).sum()) for k in (1, 2, 3, 0)]
    assert sum(row["weights"] for row in report.rows) == owners.size
    assert sum(row["share"] for row in report.rows) == 1.0
    assert [row["phase"] for row in report.rows] == ["frozen", "frozen", "packed", ""]
    assert [row["id"] for row in report.rows] == [1, 2, 3, ""]
    assert report.rows[-1]["share"] == pae.free_fraction(third)


def test_sees_counts_the_visible_weights_under_either_sharing(net, third):
    first = pae.pack(net, pae.drop(third, "c"), "c", head=2, key=jax.random.key(0), sharing="first")
    for state in (third, first):
        for row in pae.report(state).rows[:-1]:
            masks = pae.masks(state, row["task"])
            assert row["sees"] == sum(int(m.sum()) for m in jax.tree.leaves(masks))
            assert row["sharing"] == state.tasks[row["task"]].sharing


def test_zero_counts_the_weights_of_a_task_that_are_exactly_0(net, frozen):
    zeros, fresh = (
        pae.pack(net, frozen, "b", head=2, key=jax.random.key(3), weight_init=init) for init in ("zeros", "fresh")
    )
    assert [row["zero"] for row in pae.report(zeros).rows] == [0, 40, None]
    assert [row["zero"] for row in pae.report(fresh).rows] == [0, 0, None]


def test_leaves_count_the_owners_of_each_array(third):
    report = pae.report(third)
    assert {path: count.tolist() for path, count in report.leaves.items()} == {
        "Dense_0/kernel": [0, 16, 12, 4],
        "Dense_1/kernel": [0, 24, 18, 6],
    }


def test_a_network_without_tasks_is_all_free(empty):
    report = pae.report(empty)
    assert [(row["task"], row["weights"], row["share"]) for row in report.rows] == [("(free)", 80, 1.0)]
    assert "80 shared weights in 2 arrays at width 1" in str(report)
    report.plot()


def test_the_table_has_one_aligned_line_per_row(third):
    lines = str(pae.report(third)).splitlines()
    assert len(lines) == 6
    assert len({len(line) for line in lines[1:-2]}) == 1
    assert lines[1].startswith("a ")


def test_the_picture_has_one_full_bar_per_array_in_the_order_of_the_rows(third):
    axes = pae.report(pae.prune(third, "c", 0.5)).plot().axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["a", "b", "c", "(free)"]
    widths = np.array([[bar.get_width() for bar in container] for container in axes.containers])
    np.testing.assert_allclose(widths.sum(axis=0), 1.0)
    np.testing.assert_allclose(widths[:, 0], [16 / 32, 12 / 32, 2 / 32, 2 / 32])

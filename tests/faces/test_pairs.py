"""Pairs files read as LFW means them, images found or reported, and drawn pairs that keep people apart."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pae_jax.errors import ArgumentError, DataError
from pae_jax.faces.pairs import Pairs, find_images, generate_pairs, read_pairs

KEY = jax.random.key(0)
SMALL = "2\t1\nAnn\t1\t2\nAnn\t1\tBob\t1\nCid\t3\t1\nBob\t1\tCid\t3\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="pairs.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def faces(tmp_path):
    """A folder that holds every image of SMALL, one of them as .png, one as both."""
    for image in ("Ann_0001.jpg", "Ann_0002.png", "Bob_0001.jpg", "Bob_0001.png", "Cid_0001.jpg", "Cid_0003.jpg"):
        file = tmp_path / "lfw" / image[:3] / image
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "lfw"


def test_a_small_file_reads_as_written(write):
    pairs = read_pairs(write(SMALL))
    assert pairs.images == ("Ann/Ann_0001", "Ann/Ann_0002", "Bob/Bob_0001", "Cid/Cid_0003", "Cid/Cid_0001")
    assert pairs.first.tolist() == [0, 0, 3, 2]
    assert pairs.second.tolist() == [1, 2, 4, 3]
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.folds.tolist() == [0, 0, 1, 1]
    assert pairs.skipped == ()


def test_a_file_of_lfw_size_gives_ten_folds_of_300_and_300(write):
    lines = ["10\t300"]
    for fold in range(10):
        lines += [f"P{fold}_{i}\t1\t2" for i in range(300)]
        lines += [f"P{fold}_{i}\t1\tQ{fold}_{i}\t12345" for i in range(300)]
    pairs = read_pairs(write("\n".join(lines)))
    assert len(pairs.same) == 6000
    for fold in range(10):
        assert pairs.same[pairs.folds == fold].tolist() == [True] * 300 + [False] * 300
    assert pairs.images[pairs.second[-1]] == "Q9_299/Q9_299_12345"


@pytest.mark.parametrize("text", [SMALL.replace("\n", "\r\n"), SMALL.replace("\t", "  "), SMALL + "\n\n"])
def test_newlines_spaces_and_empty_lines_at_the_end_do_not_matter(write, text):
    assert read_pairs(write(text)).images == read_pairs(write(SMALL)).images


def test_one_number_in_the_first_line_means_one_fold(write):
    pairs = read_pairs(write("1\nAnn\t1\t2\nAnn\t1\tBob\t1\n"))
    assert pairs.folds.tolist() == [0, 0]


def test_names_with_spaces_are_kept_where_tabs_separate(write):
    assert read_pairs(write("1\nAnn Lee\t1\t2\nAnn Lee\t1\tBob\t1\n")).images[0] == "Ann Lee/Ann Lee_0001"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing as the first line, expected the numbers of folds and pairs"),
        ("Ann\t1\t2\n", "as the first line, expected"),
        ("0\t300\n", "as the first line, expected"),
        ("2\t1\nAnn\t1\t2\n", "found 1 pairs, expected 4"),
        ("1\nAnn\t1\tBob\t1\nAnn\t1\t2\n", r"2 of 2 lines are no such pairs.\n  line 2: .* expected two images of one"),
        ("1\nAnn\t1\t1\nAnn\t1\tBob\t1\n", "line 2: .* with i and j different"),
        ("1\nAnn\t1\t2\nAnn\t1\tAnn\t2\n", "line 3: .* with different names"),
        ("1\nAnn\t0\t2\nAnn\t1\tBob\t1\n", "line 2"),
        ("1\nAnn\t1\tx\nAnn\t1\tBob\t1\n", "line 2"),
        ("1\n../Ann\t1\t2\nAnn\t1\tBob\t1\n", "line 2"),
        ("1\nAnn\t1\t2\n..\t1\tBob\t1\n", "line 3"),
        (b"1\n\xff\xfe\t1\t2\n", "cannot be read as a pairs file"),
    ],
)
def test_a_file_that_is_no_pairs_file_is_refused_with_its_name_and_lines(write, text, message):
    with pytest.raises(DataError, match=message) as error:
        read_pairs(write(text))
    assert "pairs.txt" in str(error.value)


def test_many_wrong_lines_are_counted_and_the_first_ones_shown(write):
    with pytest.raises(DataError, match=r"40 of 40 lines.*(?s:.*)and 30 more"):
        read_pairs(write("1\t20\n" + "wrong\n" * 40))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: cannot be read"):
        read_pairs(tmp_path / "nowhere.txt")


def test_images_are_found_as_jpg_first(write, faces):
    pairs, files = find_images(read_pairs(write(SMALL)), faces)
    assert [file.name for file in files] == [
        "Ann_0001.jpg",
        "Ann_0002.png",
        "Bob_0001.jpg",
        "Cid_0003.jpg",
        "Cid_0001.jpg",
    ]
    assert pairs.skipped == ()
    assert len(pairs.same) == 4


def test_a_missing_image_leaves_out_its_pairs_and_moves_no_other_pair_to_another_fold(write, faces):
    (faces / "Ann" / "Ann_0002.png").unlink()
    before = read_pairs(write(SMALL))
    pairs, files = find_images(before, faces)
    assert pairs.folds.tolist() == [0, 1, 1]
    assert pairs.same.tolist() == [False, True, False]
    assert pairs.skipped == ("fold 1: Ann/Ann_0001 and Ann/Ann_0002, no file Ann/Ann_0002",)
    assert "Ann_0002.png" not in [file.name for file in files]
    for kept, row in zip([1, 2, 3], range(3), strict=True):
        for old, new in ((before.first, pairs.first), (before.second, pairs.second)):
            assert files[new[row]].stem == before.images[old[kept]].split("/")[1]
            assert pairs.images[new[row]] == before.images[old[kept]]


def test_names_without_a_folder_are_listed_as_wrong_names(write, faces):
    text = "1\t3\n" + "Ann\t1\t2\n" * 3 + "Ann\t1\tZoe\t1\nAnn\t1\tBob\t1\nYan\t1\tBob\t1\n"
    with pytest.raises(DataError, match=r"no folder for 2 of 4 people(?s:.*)  Zoe\n  Yan"):
        find_images(read_pairs(write(text)), faces)


def test_folders_without_any_image_are_refused(write, tmp_path):
    for name in ("Ann", "Bob", "Cid"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"none of the 4 pairs has both images; expected files such as Ann/Ann"):
        find_images(read_pairs(write(SMALL)), tmp_path)


def distinct(pairs):
    ends = {frozenset(pair) for pair in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)}
    return len(ends) == len(pairs.first) and all(len(pair) == 2 for pair in ends)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=4, max_size=14), st.integers(2, 4), st.booleans(), st.integers(0, 2**31 - 1)
)
def test_drawn_pairs_are_true_distinct_and_equally_many_and_disjoint_folds_share_nobody(sizes, folds, disjoint, seed):
    people = np.repeat(np.arange(len(sizes)), sizes)
    people = np.random.default_rng(seed).permutation(people)
    try:
        pairs = generate_pairs(people, key=jax.random.key(seed), folds=folds, disjoint=disjoint)
    except ArgumentError as error:
        assert "at most 0 pairs of one person" in str(error)
        return
    assert ((people[pairs.first] == people[pairs.second]) == pairs.same).all()
    assert distinct(pairs)
    kinds = [pairs.same[pairs.folds == fold].tolist() for fold in range(folds)]
    assert all(kind == sorted(kind, reverse=True) and sum(kind) * 2 == len(kind) > 0 for kind in kinds)
    assert len({len(kind) for kind in kinds}) == 1
    assert (np.diff(pairs.folds) >= 0).all()
    if disjoint:
        ends = np.stack([pairs.first, pairs.second])
        of_fold = [set(people[ends[:, pairs.folds == fold]].ravel()) for fold in range(folds)]
        assert sum(map(len, of_fold)) == len(set().union(*of_fold))


def test_every_pair_can_be_drawn():
    """As many distinct pairs as there are must be all of them."""
    same = generate_pairs([0, 1, 0, 1, 1, 0], key=KEY, folds=2, per_fold=3, disjoint=False)
    assert len(same.same) == 2 * 6 and distinct(same)
    different = generate_pairs([0, 1, 0, 0, 0], key=KEY, folds=2, per_fold=2, disjoint=False)
    assert len(different.same) == 2 * 4 and distinct(different)
    for options in ({"per_fold": 4}, {"per_fold": 3, "folds": 3}):
        with pytest.raises(ArgumentError, match="at most"):
            generate_pairs([0, 1, 0, 1, 1, 0], key=KEY, disjoint=False, **{"folds": 2, **options})


def test_the_faces_of_forty_people_give_ten_folds_of_180_and_180():
    pairs = generate_pairs(np.repeat(np.arange(40), 10), key=KEY)
    assert len(pairs.same) == 10 * 2 * 180
    assert len(generate_pairs(np.repeat(np.arange(40), 10), key=KEY, per_fold=50).same) == 1000


def test_no_more_than_300_are_drawn_unless_asked_for():
    people = np.repeat(np.arange(20), 40)
    assert len(generate_pairs(people, key=KEY, folds=2).same) == 2 * 2 * 300
    assert len(generate_pairs(people, key=KEY, folds=2, per_fold=400).same) == 2 * 2 * 400


def test_the_key_alone_decides_the_draw():
    people = np.repeat(np.arange(12), 6)
    first, again, other = (generate_pairs(people, key=jax.random.key(k), folds=3, per_fold=9) for k in (1, 1, 2))
    assert (first.first == again.first).all() and (first.second == again.second).all()
    assert (first.first != other.first).any()


def test_names_serve_as_identities():
    pairs = generate_pairs(["ann", "bob"] * 6, key=KEY, folds=2, disjoint=False)
    assert len(pairs.same) == 2 * 2 * 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 10}, "8 people in 10 folds with people of their own give at most 0 pairs"),
        (
            {"folds": 4, "per_fold": 10},
            r"per_fold: found 10, .* at most 6 pairs of one .*pass disjoint=False",
        ),
        ({"folds": 4, "per_fold": 0}, "per_fold: found 0"),
        ({"folds": 4, "per_fold": 1.5}, "per_fold: found 1.5"),
        ({"folds": 1}, "folds must be an integer of at least 2, found 1"),
        ({"folds": 2.0}, "folds must be an integer"),
        ({"key": 3}, "key must be one random key"),
    ],
)
def test_pairs_that_cannot_be_drawn_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        generate_pairs(np.repeat(np.arange(8), 3), **{"key": KEY, **options})


@pytest.mark.parametrize("identities", [np.zeros(5), np.zeros((5, 2)), []])
def test_identities_that_are_no_labels_of_several_people_are_refused(identities):
    with pytest.raises(DataError, match="expected one label per image, of 2 people or more"):
        generate_pairs(identities, key=KEY)


def test_pairs_are_plain_values():
    assert Pairs(*np.zeros((4, 2), int)).images == ()

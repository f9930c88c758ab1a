"""Splits: found by name, or drawn with the same classes on both sides and no group divided."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freqmask.data.splits import choose_split, split_indices
from freqmask.errors import UserError


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["train", "val"], "auto", "train"),
        (["Training", "validation"], "auto", "Training"),
        (["train"], "auto", None),
        (["val", "test"], "auto", None),
        (["train", "val"], "all", None),
        (["train", "validation"], "val", "validation"),
        (["train", "fold3"], "fold3", "fold3"),
    ],
)
def test_the_split_meant_is_found(names, split, chosen):
    assert choose_split(names, split, "DATA") == chosen


def test_an_unknown_split_names_those_there_are():
    with pytest.raises(UserError, match="did you mean 'test'"):
        choose_split(["train", "test"], "tset", "DATA")


@given(
    labels=st.lists(st.integers(0, 3), min_size=60, max_size=200),
    group_size=st.integers(1, 5),
    share=st.floats(0.2, 0.8),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_every_image_is_in_one_part_and_no_group_in_two(labels, group_size, share, seed):
    groups = [str(index // group_size) for index in range(len(labels))]
    parts = split_indices(labels, groups, [share, 1 - share], seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert not {groups[index] for index in parts[0]} & {groups[index] for index in parts[1]}


@pytest.mark.parametrize("grouped", [False, True])
def test_classes_keep_their_shares(grouped):
    labels = np.repeat([0, 1, 2], [700, 200, 100])
    groups = [f"{label}-{index // 5}" for index, label in enumerate(labels)] if grouped else None
    parts = split_indices(labels, groups, [0.7, 0.2, 0.1], seed=3)
    assert [len(part) for part in parts] == [700, 200, 100]
    for part, share in zip(parts, (0.7, 0.2, 0.1), strict=True):
        counts = np.bincount(labels[part], minlength=3)
        assert np.abs(counts - share * np.array([700, 200, 100])).max() <= (5 if grouped else 1)


def test_a_class_of_one_image_is_in_the_largest_part():
    labels = [0] * 90 + list(range(1, 11))
    for seed in range(5):
        parts = split_indices(labels, None, [0.2, 0.8], seed)
        assert set(range(90, 100)) <= set(parts[1].tolist())


def test_the_seed_decides_and_nothing_else():
    labels = np.arange(100) % 4
    np.random.seed(0)
    first = split_indices(labels, None, [0.5, 0.5], 1)
    again = split_indices(labels, None, [0.5, 0.5], 1)
    other = split_indices(labels, None, [0.5, 0.5], 2)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != other[0]).any()


def test_images_without_group_or_label_are_dealt_out_too():
    parts = split_indices([None, 0, 1, None] * 10, [None, "a", None, "b"] * 10, [0.5, 0.5], 0)
    assert sum(map(len, parts)) == 40
    assert min(map(len, parts)) >= 15


def test_equal_parts_serve_as_folds():
    parts = split_indices(np.arange(50) % 5, None, [1] * 5, 0)
    assert [np.bincount(np.arange(50)[part] % 5).tolist() for part in parts] == [[2] * 5] * 5


@pytest.mark.parametrize(("classes", "members", "folds"), [(10, 2, 5), (10, 3, 5), (100, 6, 10), (7, 5, 3)])
def test_folds_are_alike_in_size_and_classes_where_these_are_small(classes, members, folds):
    labels = np.repeat(np.arange(classes), members)
    parts = split_indices(labels, None, [1] * folds, 0)
    assert {len(part) for part in parts} <= {len(labels) // folds, -(-len(labels) // folds)}
    counts = np.array([np.bincount(labels[part], minlength=classes) for part in parts])
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("labels", "groups", "fractions", "words"),
    [
        ([0, 1], None, [0.5, 0.0], "above 0"),
        (
            [0] * 6,
            ["same"] * 6,
            [0.5, 0.5],
            "6 images in 1 group, none of .* too few .*; there must be 2 groups",
        ),
        ([0] * 6, list("aabbcc"), [1] * 4, "6 images in 3 groups, .* too few .*; there must be 4 groups"),
        ([7], None, [0.5, 0.5], "1 image of 1 class are too few"),
        (range(120), None, [0.8, 0.2], "120 images of 120 classes are too few .*: are these its labels?"),
        ([], None, [0.5, 0.5], "no images"),
    ],
)
def test_a_split_that_cannot_be_is_refused(labels, groups, fractions, words):
    with pytest.raises(UserError, match=words):
        split_indices(labels, groups, fractions, 0)


def test_many_groups_of_many_classes_fit_in_memory_and_are_dealt_as_by_a_table():
    generator = np.random.default_rng(0)
    labels, groups = generator.integers(0, 40, 600), generator.integers(0, 150, 600)
    parts = split_indices(labels, [f"{number}" for number in groups], [0.7, 0.3], 3)
    assert [part.tolist() for part in parts] == [part.tolist() for part in dealt_by_a_table(labels, groups)]
    labels = np.arange(6_000) // 3  # a table of groups by classes would take 96 MB
    tracemalloc.start()
    split_indices(labels, [f"{number // 2}" for number in range(6_000)], [0.8, 0.2], 0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20e6


def dealt_by_a_table(labels, groups):
    """Largest groups first, each to the part whose shortfalls, squared and over its share, it lessens most."""
    known = list(dict.fromkeys(groups.tolist()))
    table = np.array([[np.sum((groups == group) & (labels == one)) for one in range(40)] for group in known])
    shares, order = np.array([0.7, 0.3]), np.random.default_rng(3).permutation(len(known))
    missing, part_of = shares[:, None] * table.sum(0), {}
    for place in sorted(order, key=lambda place: -table[place].sum()):
        gains = [(((missing[p] - table[place]) ** 2 - missing[p] ** 2) / shares[p]).sum() for p in (0, 1)]
        part_of[known[place]] = int(np.argmin(gains))
        missing[part_of[known[place]]] -= table[place]
    return [np.flatnonzero([part_of[group] == part for group in groups.tolist()]) for part in (0, 1)]

"""The cut and the subset, as theorems about ids, labels and groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerprobe.errors import UsageError
from layerprobe.tasks.duplicates import sample_ids
from layerprobe.tasks.split import SHARES, assign, cut, limited_sizes, stratified_order


def some_rows(seed: int, n: int = 300, n_classes: int = 5, n_groups: int = 260):
    random = np.random.default_rng(seed)
    groups = random.integers(0, n_groups, n)
    labels = random.integers(0, n_classes, n)
    ids = np.array([f"{value:08x}" for value in random.permutation(10**6)[:n]])
    return labels, groups, ids


@given(st.integers(0, 1000), st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_a_group_of_equal_images_stays_on_one_side(data_seed: int, seed: int) -> None:
    labels, groups, ids = some_rows(data_seed)
    split = cut(labels, groups, ids, SHARES, seed)
    for group in np.unique(groups):
        assert len(set(split[groups == group].tolist())) == 1


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_row_order_plays_no_part_in_cut_and_order(data_seed: int) -> None:
    labels, groups, ids = some_rows(data_seed)
    order = np.random.default_rng(data_seed + 1).permutation(len(labels))
    renamed = np.random.default_rng(0).permutation(groups.max() + 1)[groups]  # group numbers are only names
    assert np.array_equal(
        cut(labels[order], renamed[order], ids[order], SHARES, 0), cut(labels, groups, ids, SHARES, 0)[order]
    )
    first = ids[stratified_order(labels, ids, 0)]
    assert np.array_equal(first, ids[order][stratified_order(labels[order], ids[order], 0)])


def test_distinct_images_are_cut_exactly_in_proportion() -> None:
    labels = np.repeat(np.arange(4), 100)
    ids = np.array([f"{i:04d}" for i in range(400)])
    split = cut(labels, np.arange(400), ids, SHARES, 0)
    for label in range(4):
        names, counts = np.unique(split[labels == label], return_counts=True)
        assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == {
            "test": 25,
            "train": 60,
            "validation": 15,
        }


def test_another_seed_cuts_otherwise() -> None:
    labels, groups, ids = some_rows(0)
    assert (cut(labels, groups, ids, SHARES, 0) != cut(labels, groups, ids, SHARES, 1)).any()


@pytest.mark.parametrize(("n", "expected"), [(1, "t"), (2, "st"), (3, "stv"), (4, "sttv")])
def test_small_classes_keep_a_training_image_first(n: int, expected: str) -> None:
    split = cut(np.zeros(n, int), np.arange(n), np.array([str(i) for i in range(n)]), SHARES, 0)
    letters = {"train": "t", "test": "s", "validation": "v"}
    assert "".join(sorted(letters[name] for name in split.tolist())) == expected


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_every_prefix_holds_the_classes_in_proportion(data_seed: int) -> None:
    random = np.random.default_rng(data_seed)
    labels = np.repeat(np.arange(6), random.integers(1, 80, 6))
    ids = np.array([f"{value:08x}" for value in random.permutation(10**6)[: len(labels)]])
    order = stratified_order(labels, ids, 0)
    assert sorted(order.tolist()) == list(range(len(labels)))
    counts = np.bincount(labels)
    for size in range(6, len(labels) + 1):
        found = np.bincount(labels[order[:size]], minlength=6)
        assert (found >= 1).all()
        # one image per class is promised, which may cost large classes a few images
        assert (np.abs(found - size * counts / len(labels)) <= 6).all()


def test_balanced_classes_differ_by_one_at_most() -> None:
    labels = np.repeat(np.arange(10), 50)
    order = stratified_order(labels, np.array([f"{i:03d}" for i in range(500)]), 0)
    for size in range(10, 501):
        assert np.ptp(np.bincount(labels[order[:size]])) <= 1


def test_limit_shrinks_the_others_in_proportion_but_not_to_noise() -> None:
    sizes, classes = (
        {"train": 1000, "validation": 400, "test": 2000},
        dict.fromkeys(("train", "validation", "test"), 10),
    )
    assert limited_sizes(sizes, classes, None) == sizes
    assert limited_sizes(sizes, classes, 1000) == sizes
    assert limited_sizes(sizes, classes, 5000) == sizes
    assert limited_sizes(sizes, classes, 500) == {"train": 500, "validation": 250, "test": 1000}
    assert limited_sizes(sizes, classes, 900) == {"train": 900, "validation": 400, "test": 1800}
    assert limited_sizes(sizes, classes, 12) == {"train": 12, "validation": 10, "test": 24}
    with pytest.raises(UsageError, match="limit 9 is below the 10 classes; give at least 10"):
        limited_sizes(sizes, classes, 9)


def test_ids_of_equal_files_are_told_apart_by_split_label_and_name() -> None:
    digests = ["aa", "bb", "aa", "aa"]
    official, labels = ["train", "train", "test", "train"], np.array([1, 0, 0, 0])
    names = {0: "x", 2: "y", 3: "z"}
    ids = sample_ids(digests, official, labels, names)
    assert ids.tolist() == ["aa-3", "bb", "aa", "aa-2"]
    order = [3, 2, 1, 0]
    turned = sample_ids(
        [digests[i] for i in order], [official[i] for i in order], labels[order], {0: "z", 1: "y", 3: "x"}
    )
    assert turned.tolist() == ids[order].tolist()


def assigned(official: list[str], groups: list[int]) -> list[str]:
    n = len(official)
    labels = np.zeros(n, int)
    split, _ = assign(official, labels, np.array(groups), np.array([f"{i:02d}" for i in range(n)]), 0)
    return split.tolist()


def test_official_test_is_kept_and_what_it_shows_is_not_trained_on() -> None:
    official = ["train"] * 20 + ["test"] * 3
    split = assigned(official, [*range(20), 4, 4, 30])
    assert split[20:] == ["test"] * 3
    assert split[4] == ""
    assert sorted(split[:20]) == [""] + ["train"] * 17 + ["validation"] * 2


def test_official_validation_without_test_serves_as_test() -> None:
    split = assigned(["train"] * 20 + ["validation"] * 3, [*range(23)])
    assert split[20:] == ["test"] * 3
    assert split[:20].count("validation") == 2


def test_three_official_splits_are_kept_and_cleaned_towards_the_test() -> None:
    official = ["train"] * 4 + ["validation"] * 3 + ["test"] * 2
    assert assigned(official, [0, 1, 2, 3, 1, 5, 6, 5, 3]) == [
        "train",
        "",
        "train",
        "",
        "validation",
        "",
        "validation",
        "test",
        "test",
    ]


@pytest.mark.parametrize("names", [["test"], ["train"], ["all"], ["validation", "test"]])
def test_anything_else_is_pooled_and_cut(names: list[str]) -> None:
    official = [names[i % len(names)] for i in range(100)]
    split = assigned(official, [*range(100)])
    assert (split.count("train"), split.count("validation"), split.count("test")) == (60, 15, 25)

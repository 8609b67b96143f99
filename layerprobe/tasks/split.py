"""Train, validation and test: who goes where, by a rule that is stated, seeded and blind to row order."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from layerprobe.choices import SPLITS
from layerprobe.errors import UsageError
from layerprobe.tables import percent

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "t10k": "test",
}
"""How files and folders call their splits, and how layerprobe does."""

_WORD = "<U10"  # numpy would cut "validation" off at the length of the longest word so far
VALIDATION_SHARE = 0.10
SHARES = {"test": 0.25, "validation": 0.15}


_SET = r"(sets?|data|images?|imgs?|folder|dir|splits?)?\d*"
"""What may follow a split's word without a space: trainset, val2017."""
_SPLIT = re.compile(rf"({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))}){_SET}")


def split_word(name: str) -> str | None:
    """The split that a file or folder name speaks of, if it does: training_set, TrainImages, seg_train, val2017."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    for word in re.split(r"[^a-z0-9]+", spaced.lower()):
        if match := _SPLIT.fullmatch(word):
            return SPLIT_WORDS[match[1]]
    return None


def assign(
    official: Sequence[str], labels: np.ndarray, groups: np.ndarray, ids: np.ndarray, seed: int
) -> tuple[np.ndarray, str]:
    """Put every row into a split, or into none ("").

    - Official train and test: test is kept whole, 10 % of each class of train become validation.
    - Official train and validation only: the official validation is the test, and the same applies.
    - Official train, validation and test: kept.
    - Anything else is pooled and cut 60 : 15 : 25, class by class.

    A group of equal images stays on one side of every cut. Training (and validation) images that also
    occur in an official test (or validation) are dropped, so that the official test keeps its published
    composition and nothing in it has been trained on.

    Returns
    -------
    tuple[np.ndarray, str]
        Array of str with "train", "validation", "test" or "", and the rule in words.
    """
    source = np.array(official)
    present = set(source.tolist())
    if present in ({"train", "test"}, {"train", "validation"}):
        held_out = "test" if "test" in present else "validation"
        split = np.where(source == held_out, "test", "train").astype(_WORD)
        _drop_known(split, groups, "train", ("test",))
        train = np.flatnonzero(split == "train")
        split[train] = cut(labels[train], groups[train], ids[train], {"validation": VALIDATION_SHARE}, seed)
        kept = (
            "official test kept whole" if held_out == "test" else "official validation serves as test, whole"
        )
        rule = (
            f"{kept}; validation is {percent(VALIDATION_SHARE, 0)} of each class of the official training images; "
            "equal images stay on one side; training images that also occur in test are dropped"
        )
        return split, rule
    if present == set(SPLITS):
        split = source.astype(_WORD)
        _drop_known(split, groups, "validation", ("test",))
        _drop_known(split, groups, "train", ("validation", "test"))
        rule = (
            "official splits kept; training images that also occur in validation or test, "
            "and validation images that also occur in test, are dropped"
        )
        return split, rule
    rest = 1 - sum(SHARES.values())
    rule = (
        f"{' and '.join(sorted(present))} images pooled and cut, class by class, into {percent(rest, 0)} train, "
        f"{percent(SHARES['validation'], 0)} validation, {percent(SHARES['test'], 0)} test; "
        "equal images stay on one side"
    )
    return cut(labels, groups, ids, SHARES, seed), rule


def _drop_known(split: np.ndarray, groups: np.ndarray, name: str, elsewhere: Sequence[str]) -> None:
    known = np.isin(groups, groups[np.isin(split, elsewhere)])
    split[(split == name) & known] = ""


def cut(
    labels: np.ndarray, groups: np.ndarray, ids: np.ndarray, shares: Mapping[str, float], seed: int
) -> np.ndarray:
    """Divide rows by class into the held-out `shares` and "train", whole groups at a time.

    Groups come in the order of a keyed hash of their smallest id and fill the held-out splits first,
    as far as a group still fits. Each class has round(share·n) rows held out, at least one where it has
    a row to spare. A group of equal images with different labels counts for its smallest label.

    Returns
    -------
    np.ndarray
        Array of str: a key of `shares`, or "train".
    """
    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups.tolist()):
        members[group].append(row)
    by_class: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for rows in members.values():
        label = min(int(labels[row]) for row in rows)
        by_class[label].append((keyed_hash("cut", seed, min(str(ids[row]) for row in rows)), rows))
    split = np.full(len(labels), "train", dtype=_WORD)
    for candidates in by_class.values():
        n_class = sum(len(rows) for _, rows in candidates)
        to_spare = n_class - 1
        room = {}
        for name, share in shares.items():
            room[name] = min(max(1, int(share * n_class + 0.5)), to_spare)
            to_spare -= room[name]
        for _, rows in sorted(candidates):
            for name in shares:
                if len(rows) <= room[name]:
                    room[name] -= len(rows)
                    split[rows] = name
                    break
    return split


def stratified_order(labels: np.ndarray, ids: np.ndarray, seed: int) -> np.ndarray:
    """An order of rows in which every prefix holds the classes in proportion, none left out.

    First one row of each class, then the k-th of a class of n at (k + ½)/n, ties by a keyed hash of the
    id. Shorter prefixes are therefore subsets of longer ones, and row order plays no part.

    Returns
    -------
    np.ndarray
        int64 array, a permutation of the rows.
    """
    hashes = np.array([keyed_hash("order", seed, sample) for sample in ids.tolist()], dtype=np.uint64)
    by_class = np.lexsort((hashes, labels))
    _, counts = np.unique(labels, return_counts=True)
    place = np.empty(len(labels))
    start = 0
    for count in counts.tolist():
        turn = (np.arange(count) + 0.5) / count
        turn[0] = 0.0
        place[by_class[start : start + count]] = turn
        start += count
    return np.lexsort((hashes, place))


def limited_sizes(
    sizes: Mapping[str, int], n_classes: Mapping[str, int], limit: int | None
) -> dict[str, int]:
    """How many rows of each split remain under `limit`.

    Train keeps `limit` images. Validation and test shrink in the same proportion, but to no fewer than
    half of `limit` and one per class (as far as they have them): selection on a handful of images would
    be noise.

    Raises
    ------
    UsageError
        A limit below the number of classes.
    """
    if limit is None or limit >= sizes["train"]:
        return dict(sizes)
    if limit < n_classes["train"]:
        raise UsageError(
            f"limit {limit} is below the {n_classes['train']} classes; give at least {n_classes['train']}"
        )
    kept = {"train": limit}
    for name in ("validation", "test"):
        in_proportion = int(sizes[name] * limit / sizes["train"] + 0.5)
        kept[name] = min(sizes[name], max(in_proportion, limit // 2, n_classes[name]))
    return kept


def keyed_hash(purpose: str, seed: int, text: str) -> int:
    """64 bits that depend on all three alone."""
    key = f"{purpose}/{seed}".encode()
    return int.from_bytes(hashlib.blake2b(text.encode(), key=key, digest_size=8).digest(), "little")

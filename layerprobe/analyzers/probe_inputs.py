"""What probes take and what they refuse: splits of features by layer, with labels that fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.layers import LayerRef
from layerprobe.metrics.validation import check_features, check_labels

Layer = LayerRef | int


class ProbeSplit(NamedTuple):
    """Features of one split: arrays by layer, labels as 0 … K−1, ids for messages and control labels."""

    name: str
    arrays: dict[Layer, np.ndarray]
    labels: np.ndarray
    ids: np.ndarray


def place_of(layer: Layer) -> dict[str, Any]:
    """The table columns of a layer."""
    if isinstance(layer, LayerRef):
        return {"block": layer.block, "site": layer.site}
    return {"block": layer, "site": None}


def name_of(layer: Layer) -> str:
    """What messages call a layer."""
    return str(layer) if isinstance(layer, LayerRef) else f"layer {layer}"


def undefined(X: np.ndarray) -> str | None:
    """Why a layer cannot be probed, or None."""
    first = X[0]
    return "constant layer: every image has the same features" if bool((first == X).all()) else None


def read_splits(
    *sides: tuple[Any, Any],
) -> tuple[list[ProbeSplit], list[str], dict[str, Any]]:
    """Train, validation and test as `ProbeSplit`, the class names, and model, revision and task where known.

    Raises
    ------
    UsageError : see `linear_probes`.
    """
    names = ("train", "validation", "test")
    read = [_read(name, given, labels) for name, (given, labels) in zip(names, sides, strict=True)]
    first = sides[0][0]
    if hasattr(first, "classes"):
        classes = list(first.classes)
        coded = [
            check_labels(labels, len(ids), f"labels of {name}", len(classes))[0]
            for name, (_, labels, ids) in zip(names, read, strict=True)
        ]
    else:
        values, coded = np.unique(read[0][1]), []
        classes = [str(value) for value in values]
        for name, (_, labels, _) in zip(names, read, strict=True):
            index = np.searchsorted(values, labels).clip(max=len(values) - 1)
            if not np.array_equal(values[index], labels):
                alien = np.asarray(labels)[values[index] != labels][0]
                raise UsageError(f"class {alien} occurs in {name} but has no training image")
            coded.append(index.astype(np.int64))
    splits = [
        ProbeSplit(name, arrays, labels, ids)
        for name, (arrays, _, ids), labels in zip(names, read, coded, strict=True)
    ]
    _check_classes(splits[0].labels, classes)
    _check_layers(splits)
    _check_overlap(splits, [given for given, _ in sides])
    facts = {key: getattr(first, key, None) for key in ("model", "revision", "task")}
    return splits, classes, facts


def _read(name: str, given: Any, labels: Any) -> tuple[dict[Layer, np.ndarray], np.ndarray, np.ndarray]:
    if labels is None:
        if hasattr(given, "labels"):
            labels = given.labels
        elif isinstance(given, tuple) and len(given) == 2 and not hasattr(given[0], "ndim"):
            given, labels = given
        else:
            raise UsageError(f"the {name} features are plain arrays; give their labels as well")
    if isinstance(given, Mapping):
        arrays: dict[Layer, Any] = {_as_layer(key): given[key] for key in given}
    elif hasattr(given, "ndim") and given.ndim == 2:
        arrays = {0: given}
    else:
        arrays = dict(enumerate(given))
    if not arrays:
        raise UsageError(f"the {name} features hold no layer")
    labels = np.asarray(labels)
    ids = np.asarray(getattr(given, "ids", [f"{name}-{i}" for i in range(len(labels))]))
    checked = {
        layer: check_features(array, f"{name_of(layer)} of {name}", ids) for layer, array in arrays.items()
    }
    for layer, array in checked.items():
        if len(array) != len(labels):
            raise UsageError(
                f"{name_of(layer)} of {name} has {len(array)} rows, but there are {len(labels)} labels"
            )
    return checked, labels, ids


def _as_layer(key: Any) -> Layer:
    return LayerRef.parse(key) if isinstance(key, str) else key


def _check_classes(labels: np.ndarray, classes: list[str]) -> None:
    found = np.bincount(labels, minlength=len(classes))
    present = int((found > 0).sum())
    if present < 2:
        raise UsageError(
            f"all {len(labels)} training images are of class '{classes[int(found.argmax())]}'; "
            "a probe needs at least two classes"
        )
    if len(labels) < len(classes):
        raise UsageError(
            f"{len(classes)} classes but only {len(labels)} training images; a probe needs one of each class"
        )
    if present < len(classes):
        absent = [classes[i] for i in np.flatnonzero(found == 0)]
        raise UsageError(
            f"{len(absent)} of {len(classes)} classes have no training image (first: '{absent[0]}'); "
            "use more images or fewer classes"
        )


def _check_layers(splits: list[ProbeSplit]) -> None:
    first = splits[0]
    for other in splits[1:]:
        if list(other.arrays) != list(first.arrays):
            raise UsageError(
                f"{first.name} holds layers {', '.join(map(name_of, first.arrays))}, "
                f"{other.name} holds {', '.join(map(name_of, other.arrays))}"
            )
        for layer, array in other.arrays.items():
            if array.shape[1] != first.arrays[layer].shape[1]:
                raise UsageError(
                    f"{name_of(layer)} has {first.arrays[layer].shape[1]} features in {first.name} "
                    f"but {array.shape[1]} in {other.name}"
                )


def _check_overlap(splits: list[ProbeSplit], given: list[Any]) -> None:
    """A sample that is trained on and tested on makes every accuracy worthless."""
    if not all(hasattr(side, "ids") for side in given):
        return
    seen: dict[Any, str] = {}
    for split in splits:
        for sample in split.ids.tolist():
            if seen.setdefault(sample, split.name) != split.name:
                raise UsageError(f"image {sample} is in {seen[sample]} and in {split.name}")


def origin(features: Any) -> dict[str, Any]:
    """The provenance that the features brought along."""
    return {"features": features.provenance} if getattr(features, "provenance", None) else {}


def absent_classes(splits: list[ProbeSplit], classes: list[str]) -> dict[str, Any]:
    """Classes that validation or test lack: the probe is judged on the others alone, and says so."""
    absent = {
        split.name: [
            classes[i] for i in np.flatnonzero(np.bincount(split.labels, minlength=len(classes)) == 0)
        ]
        for split in splits
    }
    return {"classes_absent": {name: names for name, names in absent.items() if names}}

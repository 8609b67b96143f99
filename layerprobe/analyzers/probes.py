"""What can a linear classifier read off each layer, by depth, and is it the layer or the classifier?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from layerprobe.analyzers.features import (
    FeatureSet,
    Layer,
    arrays_by_layer,
    extract_features,
    layer_name,
    place,
)
from layerprobe.analyzers.probe_extras import EXTRAS, Parts, Row, Setting
from layerprobe.analyzers.probe_record import LinearProbes
from layerprobe.backbones.backbone import Backbone
from layerprobe.choices import SPLITS
from layerprobe.errors import UnknownNameError, UsageError, did_you_mean
from layerprobe.layers import EMBED, LayerRef
from layerprobe.metrics.probing.curves import control_labels
from layerprobe.metrics.probing.logistic import ProbeResult, check_refit, select_probe
from layerprobe.metrics.validation import C_GRID, check_features, check_grid, check_labels
from layerprobe.progress import progress_bar
from layerprobe.provenance import provenance
from layerprobe.shared_work import SharedWork
from layerprobe.tasks import ImageSplit, Task

CONSTANT = "constant layer: every image has the same features"
PIXEL_SIZE = 32
"""Raw pixels are probed at the images' own size, at most at this many pixels per side."""

Given = FeatureSet | tuple[FeatureSet, ArrayLike]
"""Features that bring their labels, arrays without labels, or a pair (arrays, labels)."""


def linear_probes(
    features_train: Given,
    features_val: Given,
    features_test: Given,
    y_train: ArrayLike | None = None,
    y_val: ArrayLike | None = None,
    y_test: ArrayLike | None = None,
    *,
    Cs: ArrayLike = C_GRID,
    refit: str = "train+validation",
    tol: float = 1e-4,
    seed: int = 0,
    device: str = "cpu",
    extras: Sequence[str] = (),
    surface: Sequence[np.ndarray] | None = None,
    quiet: bool = False,
    work: SharedWork | None = None,
) -> LinearProbes:
    """Probe every layer with multinomial logistic regression.

    Parameters
    ----------
    features_train, features_val, features_test : Given
        `Features` of three splits; or lists or mappings of n×d arrays by layer, with their labels as y_train,
        y_val, y_test or as a pair (arrays, labels).
    y_train, y_val, y_test : ArrayLike | None
        Labels where the features carry none; any integers or strings.
    Cs, tol, device, refit
        See `layerprobe.metrics.probing.logistic.select_probe`.
    seed : int
        Of the bootstrap, and of the extras.
    extras : Sequence[str]
        Further measurements per layer: "labels" (a control task with random labels: control accuracy and
        selectivity), "knn", "ridge", "mdl" (online code length), "few-shot".
    surface : Sequence[np.ndarray] | None
        See `control_labels`, n×d of each split; default: the first layer that is not constant.
    work : SharedWork | None
        Through which several processes that make this very call share the layers.

    A constant layer is a row with a reason.

    Raises
    ------
    UsageError
        Non-finite values (named by layer and image), different layers or lengths, one class only, a class
        without a training image, a sample that is in two splits.
    """
    check_refit(refit)
    grid = check_grid(Cs)
    _check_extras(extras)
    sides = (features_train, y_train), (features_val, y_val), (features_test, y_test)
    splits, classes, facts = _read_splits(*sides)
    train, _, test = splits
    options: dict[str, Any] = {"Cs": grid, "seed": seed, "tol": tol, "device": device}
    setting = Setting(n_classes=len(classes), **options)
    if "labels" in extras:
        labels = control_labels(surface or _surface(splits), len(classes), seed=seed)
        setting = setting._replace(control=labels)
    layers = list(train.arrays)
    results, extra_rows = _probe_layers(layers, splits, refit, extras, setting, work, quiet)
    constants = {"model": facts["model"], "revision": facts["revision"], "seed": seed}
    extra_rows = [{**constants, **row} for row in extra_rows]
    arguments = {**options, "Cs": grid.tolist(), "refit": refit, "extras": list(extras)}
    origin = getattr(features_train, "provenance", None)
    facts_of_origin = {"features": origin} if origin else {}
    absent = {part.name: names for part in splits if (names := _absent(part.labels, classes))}
    return LinearProbes(
        layers=layers,
        results=results,
        reasons=[CONSTANT if result is None else None for result in results],
        Cs=grid,
        classes=classes,
        counts={part.name: len(part.labels) for part in splits},
        majority=float(np.mean(test.labels == np.bincount(train.labels).argmax())),
        facts=facts,
        seed=seed,
        extra_rows=extra_rows,
        provenance=provenance("probe", arguments, **facts_of_origin, classes_absent=absent),
    )


def _check_extras(extras: Sequence[str]) -> None:
    for kind in extras:
        if kind not in EXTRAS:
            raise UnknownNameError(
                f"unknown extra '{kind}'.{did_you_mean(kind, EXTRAS)} Extras: {', '.join(EXTRAS)}"
            )


def _probe_layers(
    layers: Sequence[Layer],
    splits: Sequence[_Split],
    refit: str,
    extras: Sequence[str],
    setting: Setting,
    work: SharedWork | None,
    quiet: bool,
) -> tuple[list[ProbeResult | None], list[Row]]:
    """`_probe_layer` of every layer, by this process or shared with others."""

    def probe(number: int) -> tuple[ProbeResult | None, list[Row]]:
        parts = [(part.arrays[layers[number]], part.labels) for part in splits]
        return _probe_layer(parts, refit, extras, setting)

    if work is not None:
        found = work.results(len(layers), probe, unit="layer", what="probes", quiet=quiet)
    else:
        numbers = progress_bar(range(len(layers)), unit="layer", desc="probes", quiet=quiet)
        found = [probe(number) for number in numbers]
    rows = [{**place(layer), **row} for layer, (_, more) in zip(layers, found, strict=True) for row in more]
    return [result for result, _ in found], rows


def _probe_layer(
    parts: Parts, refit: str, extras: Sequence[str], setting: Setting
) -> tuple[ProbeResult | None, list[Row]]:
    """The probe of one layer, None where it is constant, and the rows of its extras."""
    train, validation, test = parts
    if _is_constant(train[0]):
        return None, []
    options: dict[str, Any] = {"Cs": setting.Cs, "tol": setting.tol, "device": setting.device}
    result = select_probe(train, validation, test, setting.n_classes, refit=refit, **options)
    return result, [row for kind in extras for row in EXTRAS[kind](parts, result, setting)]


def probe_backbone(
    backbone: Backbone,
    task: Task,
    *,
    twin: Backbone | None = None,
    pixels: bool = True,
    layers: Sequence[LayerRef] | None = None,
    pooling: str | None = None,
    batch_size: int = 256,
    cache_dir: str | os.PathLike[str] | None = None,
    extras: Sequence[str] = (),
    Cs: ArrayLike = C_GRID,
    refit: str = "train+validation",
    seed: int = 0,
    device: str = "cpu",
    quiet: bool = False,
    work: SharedWork | None = None,
) -> LinearProbes:
    """Linear probes of every layer, of the layers of an untrained copy, and of the raw pixels.

    Parameters
    ----------
    backbone, task
        What to probe, on what.
    twin : Backbone | None
        The same architecture before training (`load_backbone(..., init="random")`); its probes become the
        control "random", also with the layers' `extras`.
    pixels : bool
        Probe the raw pixels, the mark to beat; the control "pixels".
    layers : Sequence[LayerRef] | None
        Default `embed` and every block's `resid_post`.
    pooling : str | None
        Default the backbone's.
    extras, Cs, refit, seed, device, work
        See `linear_probes`. device is where probes are fitted.

    Returns
    -------
    LinearProbes
        With `.controls`.

    Raises
    ------
    UsageError, UnknownNameError, LayerprobeError
        See `extract_features` and `linear_probes`.
    """
    shared: dict[str, Any] = {"layers": layers, "pooling": pooling, "batch_size": batch_size}
    options: dict[str, Any] = {"Cs": Cs, "refit": refit, "seed": seed, "device": device, "quiet": quiet}
    options["work"] = work

    def probed(of: Backbone) -> LinearProbes:
        parts = [
            extract_features(of, task, split, **shared, cache_dir=cache_dir, quiet=quiet) for split in SPLITS
        ]
        return linear_probes(parts[0], parts[1], parts[2], **options, extras=extras)

    raw: list[np.ndarray] | None = None
    size = min(task.image_size or PIXEL_SIZE, PIXEL_SIZE)
    if pixels or "labels" in extras:
        raw = [pixel_features(task.splits[name], size) for name in SPLITS]
        options["surface"] = raw
    record = probed(backbone)
    if pixels:
        assert raw is not None
        sides = [([rows], task.splits[name].labels) for rows, name in zip(raw, SPLITS, strict=True)]
        control = linear_probes(sides[0], sides[1], sides[2], **options)
        control.layers = [LayerRef(None, EMBED)]
        control.facts = {"model": f"pixels {size}×{size}", "revision": None, "task": task.name}
        record.controls["pixels"] = control
    if twin is not None:
        record.controls["random"] = probed(twin)
    return record


def _surface(splits: Sequence[_Split]) -> list[np.ndarray]:
    """Train, validation and test of the first layer that tells images apart."""
    names = list(splits[0].arrays)
    varied = [name for name in names if not _is_constant(splits[0].arrays[name])] or names[:1]
    return [part.arrays[varied[0]] for part in splits]


def _is_constant(X: np.ndarray) -> bool:
    return bool((X[0] == X).all())


def pixel_features(split: ImageSplit, size: int) -> np.ndarray:
    """Images as rows of raw pixel values, float32 in 0 … 1, resized to size×size where they differ."""
    from PIL import Image

    def flat(image: np.ndarray) -> np.ndarray:
        if image.shape[:2] != (size, size):
            image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
        return image.reshape(-1)

    return np.stack([flat(image) for image in split.images()]).astype(np.float32) / 255


class _Split(NamedTuple):
    """Features of one split: arrays by layer, labels as 0 … K−1, ids for messages and control labels."""

    name: str
    arrays: dict[Layer, np.ndarray]
    labels: np.ndarray
    ids: np.ndarray


def _read_splits(
    *sides: tuple[Given, ArrayLike | None],
) -> tuple[list[_Split], list[str], dict[str, Any]]:
    """Train, validation and test, the class names, and model, revision and task where known."""
    read = [_read(name, given, labels) for name, (given, labels) in zip(SPLITS, sides, strict=True)]
    first = sides[0][0]
    if hasattr(first, "classes"):
        classes = list(first.classes)
        splits = [
            part._replace(
                labels=check_labels(part.labels, len(part.ids), f"labels of {part.name}", len(classes))[0]
            )
            for part in read
        ]
    else:
        values = np.unique(read[0].labels)
        classes = [str(value) for value in values]
        splits = []
        for part in read:
            index = np.searchsorted(values, part.labels).clip(max=len(values) - 1)
            if not np.array_equal(values[index], part.labels):
                alien = part.labels[values[index] != part.labels][0]
                raise UsageError(f"class {alien} occurs in {part.name} but has no training image")
            splits.append(part._replace(labels=index.astype(np.int64)))
    _check_classes(splits[0].labels, classes)
    for other in splits[1:]:
        _check_layers(splits[0], other)
    if all(hasattr(given, "ids") for given, _ in sides):
        _check_overlap(splits)
    return splits, classes, {key: getattr(first, key, None) for key in ("model", "revision", "task")}


def _read(name: str, given: Given, labels: ArrayLike | None) -> _Split:
    if labels is None:
        if hasattr(given, "labels"):
            labels = given.labels
        elif isinstance(given, tuple) and len(given) == 2 and not hasattr(given[0], "ndim"):
            given, labels = given
        else:
            raise UsageError(f"the {name} features are plain arrays; give their labels as well")
    arrays = arrays_by_layer(given)
    if not arrays:
        raise UsageError(f"the {name} features hold no layer")
    y = np.asarray(labels)
    ids = np.asarray(getattr(given, "ids", [f"{name}-{i}" for i in range(len(y))]))
    for layer, array in arrays.items():
        arrays[layer] = check_features(array, f"{layer_name(layer)} of {name}", ids)
        if len(array) != len(y):
            raise UsageError(
                f"{layer_name(layer)} of {name} has {len(array)} rows, but there are {len(y)} labels"
            )
    return _Split(name=name, arrays=arrays, labels=y, ids=ids)


def _absent(labels: np.ndarray, classes: list[str]) -> list[str]:
    return [classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]


def _check_classes(labels: np.ndarray, classes: list[str]) -> None:
    absent = _absent(labels, classes)
    if len(classes) - len(absent) < 2:
        raise UsageError(
            f"all {len(labels)} training images are of class '{classes[labels[0]]}'; "
            "a probe needs at least two classes"
        )
    if len(labels) < len(classes):
        raise UsageError(
            f"{len(classes)} classes but only {len(labels)} training images; a probe needs one of each class"
        )
    if absent:
        raise UsageError(
            f"{len(absent)} of {len(classes)} classes have no training image (first: '{absent[0]}'); "
            "use more images or fewer classes"
        )


def _check_layers(first: _Split, other: _Split) -> None:
    if list(other.arrays) != list(first.arrays):
        held = [", ".join(map(layer_name, part.arrays)) for part in (first, other)]
        raise UsageError(f"{first.name} holds layers {held[0]}, {other.name} holds {held[1]}")
    for layer, array in other.arrays.items():
        if array.shape[1] != first.arrays[layer].shape[1]:
            raise UsageError(
                f"{layer_name(layer)} has {first.arrays[layer].shape[1]} features in {first.name} "
                f"but {array.shape[1]} in {other.name}"
            )


def _check_overlap(splits: list[_Split]) -> None:
    """A sample that is trained on and tested on makes every accuracy worthless."""
    seen: dict[str, str] = {}
    for split in splits:
        for sample in split.ids.tolist():
            if seen.setdefault(sample, split.name) != split.name:
                raise UsageError(f"image {sample} is in {seen[sample]} and in {split.name}")

"""What can a linear classifier read off each layer, by depth, and is it the layer or the classifier?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from layerprobe.analyzers.probe_extras import ExtraSetting, check_extras, measure_extra
from layerprobe.errors import UsageError
from layerprobe.layers import LayerRef
from layerprobe.metrics.probing import C_GRID, ProbeResult, check_grid, check_refit, select_probe
from layerprobe.metrics.probing_checks import check_features, check_labels
from layerprobe.metrics.uncertainty import PairedDifference, paired_bootstrap
from layerprobe.progress import progress_bar
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.tables import tidy

Layer = LayerRef | int


class ProbeSplit(NamedTuple):
    """Features of one split: arrays by layer, labels as 0 … K−1, ids for messages and control labels."""

    name: str
    arrays: dict[Layer, np.ndarray]
    labels: np.ndarray
    ids: np.ndarray


@dataclass
class LinearProbes(Record):
    """A linear probe per layer: chosen on validation, measured once on test, each fit with its optimality.

    Attributes
    ----------
    layers : from input to output; integers where plain lists were given.
    results : one `ProbeResult` per layer; None where undefined, then `reasons` says why.
    Cs : the grid of inverse regularisation strengths.
    majority : test accuracy of always saying the most frequent training class: chance.
    extra_rows : rows of further measurements (controls, kNN, ridge, code length, few-shot), long form.
    controls : other features probed the same way, by name ("pixels", "random").
    """

    command: ClassVar[str] = "probe"

    layers: list[Layer]
    results: list[ProbeResult | None]
    reasons: list[str | None]
    Cs: np.ndarray
    classes: list[str]
    counts: dict[str, int]
    majority: float
    facts: dict[str, Any]
    seed: int
    provenance: dict[str, Any]
    extra_rows: list[dict[str, Any]] = field(default_factory=list)
    controls: dict[str, LinearProbes] = field(default_factory=dict)

    @property
    def test_accuracy(self) -> np.ndarray:
        """Per layer, share in [0, 1]; NaN where undefined."""
        return np.array([np.nan if r is None else r.test_accuracy for r in self.results])

    @property
    def test_interval(self) -> np.ndarray:
        """Per layer, lower and upper end of the 95 % Wilson interval of `test_accuracy`."""
        return np.array([(np.nan, np.nan) if r is None else r.interval for r in self.results])

    @property
    def val_accuracy(self) -> np.ndarray:
        """Layer × C, share of validation images the probe fitted on train gets right."""
        return self._grid(lambda r: r.val_accuracy)

    @property
    def train_accuracy(self) -> np.ndarray:
        """Layer × C, share of training images the probe fitted on them gets right."""
        return self._grid(lambda r: r.train_accuracy)

    @property
    def best_C(self) -> np.ndarray:
        """Per layer, the smallest C with the highest validation accuracy."""
        return np.array([np.nan if r is None else r.best_C for r in self.results])

    @property
    def suboptimality(self) -> np.ndarray:
        """Layer × C, how far each objective may be above its minimum, relative: the Newton decrement."""
        return self._grid(lambda r: [min(fit.newton_decrement, fit.duality_gap) for fit in r.fits])

    @property
    def converged(self) -> np.ndarray:
        """Layer × C, whether the fit reached its tolerance."""
        return self._grid(lambda r: [fit.converged for fit in r.fits]) == 1

    @property
    def correct(self) -> np.ndarray:
        """Layer × test image, whether the chosen probe is right (False where undefined)."""
        n = self.counts["test"]
        return np.array([np.zeros(n, bool) if r is None else r.correct for r in self.results])

    @property
    def best_layer(self) -> int | None:
        """Index into `layers` of the layer with the highest validation accuracy (the earliest of equals)."""
        best = [-1.0 if r is None else float(r.val_accuracy.max()) for r in self.results]
        return int(np.argmax(best)) if max(best) >= 0 else None

    def compare(self, a: int, b: int, *, seed: int = 0) -> PairedDifference:
        """Test accuracy of layer index `a` minus that of `b`, by paired bootstrap over test images."""
        for index in (a, b):
            if self.results[index] is None:
                raise UsageError(f"{name_of(self.layers[index])} has no probe: {self.reasons[index]}")
        return paired_bootstrap(self.correct[a], self.correct[b], seed=seed)

    def _grid(self, values: Any) -> np.ndarray:
        blank = np.full(len(self.Cs), np.nan)
        return np.array([blank if r is None else np.asarray(values(r), float) for r in self.results])

    def to_frame(self) -> pd.DataFrame:
        """Long table. Beside the common columns: `C`, `low`, `high`, `pvalue`, `shots` and `control`.

        `control` is empty for the layers probed, "chance" for the majority class, "pixels", "random" (the
        same architecture before training) or "labels" (the same features with random labels).
        """
        rows = self._rows()
        rows.append(
            {
                "metric": "probe_accuracy",
                "split": "test",
                "value": self.majority,
                "n": self.counts["test"],
                "control": "chance",
            }
        )
        for name, control in self.controls.items():
            rows += [{**row, "control": row.get("control") or name} for row in control._rows()]
        frame = tidy(rows, task=self.facts.get("task"))
        for column in ("C", "low", "high", "pvalue", "shots", "control"):
            if column not in frame:
                frame[column] = None
        return frame

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        best = self.best_layer
        for index, (layer, result) in enumerate(zip(self.layers, self.results, strict=True)):
            place = {**place_of(layer), "model": self.facts.get("model"), "seed": self.seed}
            place["revision"] = self.facts.get("revision")
            if result is None:
                reason = self.reasons[index]
                rows.append({**place, "metric": "probe_accuracy", "split": "test", "reason": reason})
                continue
            n = self.counts["test"]
            low, high = result.interval
            share = result.test_accuracy
            rows.append(
                {
                    **place,
                    "metric": "probe_accuracy",
                    "split": "test",
                    "value": share,
                    "stderr": float(np.sqrt(share * (1 - share) / n)),
                    "n": n,
                    "C": result.best_C,
                    "low": low,
                    "high": high,
                }
            )
            if best is not None and index != best:
                difference = self.compare(index, best, seed=self.seed)
                rows.append(
                    {
                        **place,
                        "metric": "probe_accuracy_minus_best",
                        "split": "test",
                        "value": difference.difference,
                        "n": n,
                        "low": difference.low,
                        "high": difference.high,
                        "pvalue": difference.p,
                    }
                )
            final = result.probe.fit
            for metric, value in (
                ("probe_newton_decrement", final.newton_decrement),
                ("probe_duality_gap", final.duality_gap),
            ):
                rows.append(
                    {**place, "metric": metric, "split": result.refit, "value": value, "C": result.best_C}
                )
            for j, fit in enumerate(result.fits):
                for metric, split, value in (
                    ("probe_accuracy", "validation", result.val_accuracy[j]),
                    ("probe_accuracy", "train", result.train_accuracy[j]),
                    ("probe_objective", "train", fit.objective),
                    ("probe_newton_decrement", "train", fit.newton_decrement),
                    ("probe_duality_gap", "train", fit.duality_gap),
                    ("probe_evaluations", "train", fit.evaluations),
                ):
                    cell = {"metric": metric, "split": split, "value": value, "C": fit.C}
                    rows.append({**place, **cell, "n": self.counts[split]})
        rows += self.extra_rows
        return rows

    def overview(self) -> list[dict[str, Any]]:
        """One row a layer, for a terminal."""
        table: list[dict[str, Any]] = []
        for layer, result, reason in zip(self.layers, self.results, self.reasons, strict=True):
            row: dict[str, Any] = {"layer": name_of(layer), "accuracy": None}
            if result is not None:
                low, high = result.interval
                row |= {
                    "accuracy": result.test_accuracy,
                    "95 %": f"{low:.3f} to {high:.3f}",
                    "validation": float(result.val_accuracy.max()),
                    "C": result.best_C,
                    "suboptimality": max(
                        min(fit.newton_decrement, fit.duality_gap) for fit in [*result.fits, result.probe.fit]
                    ),
                }
            for name, control in self.controls.items():
                if len(control.layers) == len(self.layers):
                    row[name] = float(control.test_accuracy[len(table)])
            for extra in self.extra_rows:
                if place_of(layer) == {k: extra.get(k) for k in ("block", "site")} and not extra.get("shots"):
                    row[extra["metric"].removesuffix("_accuracy")] = extra["value"]
            if reason:
                row["reason"] = reason
            table.append(row)
        return table

    def summary(self) -> str:
        best = self.best_layer
        if best is None:
            return "No layer could be probed: " + "; ".join(sorted({r for r in self.reasons if r})) + "."
        result = self.results[best]
        assert result is not None
        low, high = result.interval
        text = (
            f"The layer read best is {name_of(self.layers[best])}: {100 * result.test_accuracy:.1f} % of "
            f"{self.counts['test']:,} test images (95 % interval {100 * low:.1f} to {100 * high:.1f}; chosen on "
            f"validation); chance {100 * self.majority:.1f} %"
        )
        for name, control in self.controls.items():
            index = control.best_layer
            if index is not None:
                text += f"; {name} {100 * control.test_accuracy[index]:.1f} %"
        unfinished = int((~self.converged & ~np.isnan(self.suboptimality)).sum())
        if unfinished:
            text += f". {unfinished} of {self.converged.size} fits did not reach their optimum"
        return text + "."


def linear_probes(
    features_train: Any,
    features_val: Any,
    features_test: Any,
    y_train: Any = None,
    y_val: Any = None,
    y_test: Any = None,
    *,
    Cs: Sequence[float] = C_GRID,
    refit: str = "train+validation",
    tol: float = 1e-4,
    seed: int = 0,
    device: str = "cpu",
    extras: Sequence[str] = (),
    quiet: bool = False,
) -> LinearProbes:
    """Probe every layer with multinomial logistic regression; see `layerprobe.metrics.probing.select_probe`.

    Parameters
    ----------
    features_train, features_val, features_test : `Features` of three splits; or lists or mappings of n×d
        arrays by layer, with their labels as y_train, y_val, y_test or as a pair (arrays, labels).
    y_train, y_val, y_test : labels where the features carry none; any integers or strings.
    Cs : inverse regularisation strengths. refit : "train+validation" or "train".
    tol : relative suboptimality at which a fit counts as converged.
    seed : of the bootstrap, and of the extras. device : a torch device with float64.
    extras : further measurements per layer, from `layerprobe.analyzers.probe_extras.EXTRAS`: "labels" (random
        labels: control accuracy and selectivity), "knn", "ridge", "mdl" (online code length), "few-shot".

    Returns
    -------
    LinearProbes. A constant layer is a row with a reason.

    Raises
    ------
    UsageError : non-finite values (named by layer and image), different layers or lengths, one class only, a
        class without a training image, a sample that is in two splits.
    """
    check_refit(refit)
    grid = check_grid(Cs)
    check_extras(extras)
    splits, classes, facts = _read_splits(
        (features_train, y_train), (features_val, y_val), (features_test, y_test)
    )
    train, validation, test = splits
    extra_rows: list[dict[str, Any]] = []
    results: list[ProbeResult | None] = []
    reasons: list[str | None] = []
    for layer in progress_bar(list(train.arrays), unit="layer", desc="probes", quiet=quiet):
        reason = _undefined(train.arrays[layer])
        reasons.append(reason)
        if reason:
            results.append(None)
            continue
        pairs = [(part.arrays[layer], part.labels) for part in (train, validation, test)]
        result = select_probe(
            pairs[0], pairs[1], pairs[2], len(classes), Cs=grid, refit=refit, tol=tol, device=device
        )
        results.append(result)
        setting = ExtraSetting(len(classes), train.ids, grid, seed, tol, device)
        for kind in extras:
            for row in measure_extra(kind, pairs, result, setting):
                extra_rows.append({**place_of(layer), **row})
    constants = {"model": facts["model"], "revision": facts["revision"], "seed": seed}
    majority = int(np.bincount(train.labels).argmax())
    arguments = {"Cs": grid.tolist(), "refit": refit, "tol": tol, "seed": seed, "device": device}
    arguments["extras"] = list(extras)
    return LinearProbes(
        layers=list(train.arrays),
        results=results,
        reasons=reasons,
        Cs=grid,
        classes=classes,
        counts={part.name: len(part.labels) for part in splits},
        majority=float(np.mean(test.labels == majority)),
        facts=facts,
        seed=seed,
        extra_rows=[{**constants, **row} for row in extra_rows],
        provenance=provenance("probe", arguments, **_origin(features_train), **_absent(splits, classes)),
    )


def place_of(layer: Layer) -> dict[str, Any]:
    """The table columns of a layer."""
    if isinstance(layer, LayerRef):
        return {"block": layer.block, "site": layer.site}
    return {"block": layer, "site": None}


def name_of(layer: Layer) -> str:
    """What messages call a layer."""
    return str(layer) if isinstance(layer, LayerRef) else f"layer {layer}"


def _undefined(X: np.ndarray) -> str | None:
    first = X[0]
    return "constant layer: every image has the same features" if bool((first == X).all()) else None


def _read_splits(
    *sides: tuple[Any, Any],
) -> tuple[list[ProbeSplit], list[str], dict[str, Any]]:
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


def _origin(features: Any) -> dict[str, Any]:
    return {"features": features.provenance} if getattr(features, "provenance", None) else {}


def _absent(splits: list[ProbeSplit], classes: list[str]) -> dict[str, Any]:
    """Classes that validation or test lack: the probe is judged on the others alone, and says so."""
    absent = {
        split.name: [
            classes[i] for i in np.flatnonzero(np.bincount(split.labels, minlength=len(classes)) == 0)
        ]
        for split in splits
    }
    return {"classes_absent": {name: names for name, names in absent.items() if names}}

"""What else is measured of a layer beside its probe: a control task, kNN, ridge, code length, few images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from layerprobe.analyzers.probe_record import accuracy_row
from layerprobe.metrics.intervals import mean_interval, paired_bootstrap
from layerprobe.metrics.probing.curves import control_probe, few_shot_curve, online_code_length
from layerprobe.metrics.probing.knn_ridge import select_knn, select_ridge
from layerprobe.metrics.probing.logistic import ProbeResult

Parts = list[tuple[np.ndarray, np.ndarray]]
"""One layer's features and labels of train, validation and test."""
Row = dict[str, Any]


class Setting(NamedTuple):
    """What all extras of a run share."""

    n_classes: int
    Cs: np.ndarray
    seed: int
    tol: float
    device: str
    control: Sequence[np.ndarray] | None = None
    """Labels of the control task on train, validation and test."""


def _labels(parts: Parts, result: ProbeResult, setting: Setting) -> list[Row]:
    assert setting.control is not None, "linear_probes"
    options: dict[str, Any] = {"Cs": setting.Cs, "tol": setting.tol, "device": setting.device}
    found = control_probe([X for X, _ in parts], setting.control, **options)
    row = accuracy_row("control_accuracy", found.test_accuracy, found.interval, len(found.correct))
    gap = paired_bootstrap(result.correct, found.correct, seed=setting.seed)
    bounds = {"low": gap.low, "high": gap.high, "n": len(found.correct)}
    return [
        {**row, "C": found.best_C, "control": "labels"},
        {"metric": "selectivity", "split": "test", "value": gap.value, **bounds, "control": "labels"},
    ]


def _knn(parts: Parts, _: ProbeResult, setting: Setting) -> list[Row]:
    found = select_knn(parts[0], parts[1], parts[2], setting.n_classes, device=setting.device)
    return [accuracy_row("knn_accuracy", found.test_accuracy, found.interval, len(parts[2][1]))]


def _ridge(parts: Parts, _: ProbeResult, setting: Setting) -> list[Row]:
    X, y = (np.concatenate([parts[0][i], parts[1][i]]) for i in (0, 1))
    found = select_ridge((X, y), parts[2], setting.n_classes, device=setting.device)
    return [accuracy_row("ridge_accuracy", found.test_accuracy, found.interval, len(parts[2][1]))]


def _mdl(parts: Parts, result: ProbeResult, setting: Setting) -> list[Row]:
    X, y = parts[0]
    options: dict[str, Any] = {"seed": setting.seed, "tol": setting.tol, "device": setting.device}
    found = online_code_length(X, y, setting.n_classes, C=result.best_C, **options)
    common = {"split": "train", "n": len(y), "C": result.best_C}
    return [
        {"metric": "mdl_bits_per_label", "value": found.bits / len(y), **common},
        {"metric": "mdl_compression", "value": found.compression, **common},
    ]


def _few_shot(parts: Parts, _: ProbeResult, setting: Setting) -> Iterator[Row]:
    options: dict[str, Any] = {"seed": setting.seed, "tol": setting.tol, "device": setting.device}
    curve = few_shot_curve(parts[0], parts[1], parts[2], setting.n_classes, Cs=list(setting.Cs), **options)
    for point in curve:
        found = mean_interval(point.accuracies)
        row = {name: getattr(found, name) for name in ("value", "stderr", "n", "low", "high")}
        yield {"metric": "few_shot_accuracy", "split": "test", **row, "shots": point.shots}


EXTRAS: dict[str, Callable[[Parts, ProbeResult, Setting], list[Row] | Iterator[Row]]] = {
    "labels": _labels,
    "knn": _knn,
    "ridge": _ridge,
    "mdl": _mdl,
    "few-shot": _few_shot,
}
"""Name to measurement; `linear_probes(extras=…)` takes these names."""

"""What may be measured beside the linear probe of a layer: controls, other classifiers, other budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from layerprobe.errors import UnknownNameError, did_you_mean
from layerprobe.metrics.intervals import mean_interval
from layerprobe.metrics.probing.curves import control_accuracy, few_shot_curve, online_code_length
from layerprobe.metrics.probing.logistic import ProbeResult
from layerprobe.metrics.probing.neighbours import select_knn
from layerprobe.metrics.probing.ridge import select_ridge
from layerprobe.tasks.random_labels import random_labels

Pair = tuple[np.ndarray, np.ndarray]
Row = dict[str, Any]


class ExtraSetting(NamedTuple):
    """What all extras of a run share."""

    n_classes: int
    train_ids: np.ndarray
    Cs: np.ndarray
    seed: int
    tol: float
    device: str


def check_extras(kinds: Sequence[str]) -> None:
    """Raises UnknownNameError for a name that is not in `EXTRAS`."""
    for kind in kinds:
        if kind not in EXTRAS:
            raise UnknownNameError(
                f"unknown extra '{kind}'.{did_you_mean(kind, EXTRAS)} Extras: {', '.join(EXTRAS)}"
            )


def measure_extra(kind: str, parts: Sequence[Pair], result: ProbeResult, setting: ExtraSetting) -> list[Row]:
    """Rows of one extra for one layer; `parts` are (features, labels) of train, validation and test."""
    return EXTRAS[kind](parts, result, setting)


def _labels(parts: Sequence[Pair], result: ProbeResult, setting: ExtraSetting) -> list[Row]:
    X = parts[0][0]
    labels = random_labels(setting.train_ids, setting.n_classes, setting.seed)
    share = control_accuracy(X, labels, result.best_C, tol=setting.tol, device=setting.device)
    common = {"n": len(X), "C": result.best_C, "control": "labels"}
    return [
        {"metric": "control_accuracy", "split": "train", "value": share, **common},
        {"metric": "selectivity", "split": "test", "value": result.test_accuracy - share, **common},
    ]


def _knn(parts: Sequence[Pair], _: ProbeResult, setting: ExtraSetting) -> list[Row]:
    found = select_knn(parts[0], parts[1], parts[2], setting.n_classes, device=setting.device)
    return [_accuracy("knn_accuracy", found.test_accuracy, found.interval, len(parts[2][1]))]


def _ridge(parts: Sequence[Pair], _: ProbeResult, setting: ExtraSetting) -> list[Row]:
    known = tuple(np.concatenate([parts[0][i], parts[1][i]]) for i in (0, 1))
    found = select_ridge((known[0], known[1]), parts[2], setting.n_classes, device=setting.device)
    return [_accuracy("ridge_accuracy", found.test_accuracy, found.interval, len(parts[2][1]))]


def _mdl(parts: Sequence[Pair], result: ProbeResult, setting: ExtraSetting) -> list[Row]:
    X, y = parts[0]
    found = online_code_length(
        X, y, setting.n_classes, C=result.best_C, seed=setting.seed, tol=setting.tol, device=setting.device
    )
    common = {"split": "train", "n": len(y), "C": result.best_C}
    return [
        {"metric": "mdl_bits_per_label", "value": found.bits / len(y), **common},
        {"metric": "mdl_compression", "value": found.compression, **common},
    ]


def _few_shot(parts: Sequence[Pair], _: ProbeResult, setting: ExtraSetting) -> list[Row]:
    curve = few_shot_curve(
        parts[0],
        parts[1],
        parts[2],
        setting.n_classes,
        seed=setting.seed,
        Cs=list(setting.Cs),
        tol=setting.tol,
        device=setting.device,
    )
    rows = []
    for point in curve:
        found = mean_interval(point.accuracies)
        rows.append(
            {
                "metric": "few_shot_accuracy",
                "split": "test",
                "value": found.value,
                "stderr": found.stderr,
                "n": found.n,
                "low": found.low,
                "high": found.high,
                "shots": point.shots,
            }
        )
    return rows


def _accuracy(metric: str, value: float, interval: tuple[float, float], n: int) -> Row:
    stderr = float(np.sqrt(value * (1 - value) / n))
    bounds = {"low": interval[0], "high": interval[1]}
    return {"metric": metric, "split": "test", "value": value, "stderr": stderr, "n": n, **bounds}


EXTRAS: dict[str, Callable[[Sequence[Pair], ProbeResult, ExtraSetting], list[Row]]] = {
    "labels": _labels,
    "knn": _knn,
    "ridge": _ridge,
    "mdl": _mdl,
    "few-shot": _few_shot,
}
"""Name to measurement; `linear_probes(extras=…)` takes these names."""

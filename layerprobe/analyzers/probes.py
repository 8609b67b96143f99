"""What can a linear classifier read off each layer, by depth, and is it the layer or the classifier?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from layerprobe.analyzers.probe_extras import ExtraSetting, check_extras, measure_extra
from layerprobe.analyzers.probe_inputs import (
    Layer,
    absent_classes,
    name_of,
    origin,
    place_of,
    read_splits,
    undefined,
)
from layerprobe.errors import UsageError
from layerprobe.metrics.intervals import paired_bootstrap
from layerprobe.metrics.probing.logistic import C_GRID, ProbeResult, check_grid, check_refit, select_probe
from layerprobe.progress import progress_bar
from layerprobe.provenance import provenance
from layerprobe.records import Estimate, Record
from layerprobe.tables import tidy


@dataclass(repr=False)
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

    def compare(self, a: int, b: int, *, seed: int = 0) -> Estimate:
        """Test accuracy of layer index `a` minus that of `b`, by paired bootstrap over test images."""
        for index in (a, b):
            if self.results[index] is None:
                raise UsageError(f"{name_of(self.layers[index])} has no probe: {self.reasons[index]}")
        return paired_bootstrap(self.correct[a], self.correct[b], seed=seed)

    def compare_control(self, index: int, name: str, *, seed: int = 0) -> Estimate | None:
        """Test accuracy of layer index `index` minus that of a control, by paired bootstrap over test images.

        A control with the same layers ("random") is read at the same layer, another ("pixels") at its own
        best on validation. None where either has no probe.
        """
        control = self.controls[name]
        there = index if len(control.layers) == len(self.layers) else control.best_layer
        if self.results[index] is None or there is None or control.results[there] is None:
            return None
        return paired_bootstrap(self.correct[index], control.correct[there], seed=seed)

    def _grid(self, values: Any) -> np.ndarray:
        blank = np.full(len(self.Cs), np.nan)
        return np.array([blank if r is None else np.asarray(values(r), float) for r in self.results])

    def to_frame(self) -> pd.DataFrame:
        """Long table. Beside the common columns: `C`, `low`, `high`, `pvalue`, `shots` and `control`.

        `control` is empty for the layers probed, "chance" for the majority class, "pixels", "random" (the
        same architecture before training) or "labels" (the same features with random labels). Rows
        `probe_accuracy_minus_control` are paired differences from a control (see `compare_control`).
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
            rows += self._differences(name)
            rows += [{**row, "control": row.get("control") or name} for row in control._rows()]
        frame = tidy(rows, task=self.facts.get("task"))
        for column in ("C", "low", "high", "pvalue", "shots", "control"):
            if column not in frame:
                frame[column] = None
        return frame

    def _differences(self, name: str) -> list[dict[str, Any]]:
        rows = []
        for index, layer in enumerate(self.layers):
            difference = self.compare_control(index, name, seed=self.seed)
            if difference is not None:
                rows.append(
                    {
                        **place_of(layer),
                        "model": self.facts.get("model"),
                        "revision": self.facts.get("revision"),
                        "seed": self.seed,
                        "metric": "probe_accuracy_minus_control",
                        "split": "test",
                        "value": difference.value,
                        "n": self.counts["test"],
                        "low": difference.low,
                        "high": difference.high,
                        "pvalue": difference.pvalue,
                        "control": name,
                    }
                )
        return rows

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
                        "value": difference.value,
                        "n": n,
                        "low": difference.low,
                        "high": difference.high,
                        "pvalue": difference.pvalue,
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

    def table(self) -> list[dict[str, Any]]:
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
    """Probe every layer with multinomial logistic regression; see `layerprobe.metrics.probing.logistic.select_probe`.

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
    splits, classes, facts = read_splits(
        (features_train, y_train), (features_val, y_val), (features_test, y_test)
    )
    train, validation, test = splits
    extra_rows: list[dict[str, Any]] = []
    results: list[ProbeResult | None] = []
    reasons: list[str | None] = []
    for layer in progress_bar(list(train.arrays), unit="layer", desc="probes", quiet=quiet):
        reason = undefined(train.arrays[layer])
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
        provenance=provenance(
            "probe", arguments, **origin(features_train), **absent_classes(splits, classes)
        ),
    )

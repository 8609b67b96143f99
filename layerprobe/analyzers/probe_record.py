"""What linear probes give: accuracies with intervals, paired comparisons, controls, and the table of it all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from layerprobe.analyzers.features import Layer, layer_name, place
from layerprobe.errors import UsageError
from layerprobe.metrics.intervals import paired_bootstrap
from layerprobe.metrics.probing.logistic import ProbeResult
from layerprobe.records import Estimate, Record
from layerprobe.tables import MARK, SHOWN_AS, tidy


@dataclass(repr=False, kw_only=True)
class LinearProbes(Record):
    """A linear probe per layer: chosen on validation, measured once on test, each fit with its optimality.

    Attributes
    ----------
    layers : list[Layer]
        From input to output; integers where plain lists were given.
    results : list[ProbeResult | None]
        One `ProbeResult` per layer; None where undefined, then `reasons` says why.
    Cs : np.ndarray
        The grid of inverse regularisation strengths.
    majority : float
        Test accuracy of always saying the most frequent training class: chance.
    extra_rows : list[dict[str, Any]]
        Rows of further measurements (controls, kNN, ridge, code length, few-shot), long form.
    controls : dict[str, LinearProbes]
        Other features probed the same way, by name ("pixels", "random").
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

    def _grid(self, values: Callable[[ProbeResult], ArrayLike]) -> np.ndarray:
        blank = np.full(len(self.Cs), np.nan)
        return np.array([blank if r is None else np.asarray(values(r), float) for r in self.results])

    def compare(self, a: int, b: int, *, seed: int = 0) -> Estimate:
        """Test accuracy of layer index `a` minus that of `b`, by paired bootstrap over test images."""
        for index in (a, b):
            if self.results[index] is None:
                raise UsageError(f"{layer_name(self.layers[index])} has no probe: {self.reasons[index]}")
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

    def to_frame(self) -> pd.DataFrame:
        """Long table. Beside the common columns: `C`, `low`, `high`, `pvalue`, `shots` and `control`.

        `control` is empty for the layers probed, "chance" for the majority class, "pixels", "random" (the
        same architecture before training) or "labels" (the same features with random labels). Rows
        `probe_accuracy_minus_control` are paired differences from a control (see `compare_control`).
        """
        n = self.counts["test"]
        chance = {"metric": "probe_accuracy", "split": "test", "value": self.majority, "n": n}
        rows = [*self._rows(), {**chance, "control": "chance"}]
        for name, control in self.controls.items():
            for index in range(len(self.layers)):
                difference = self.compare_control(index, name, seed=self.seed)
                if difference is not None:
                    rows.append(self._difference_row(index, "control", difference) | {"control": name})
            # A control of a control (random labels on the random init) names both.
            own = [(row, row.get("control")) for row in control._rows()]
            rows += [{**row, "control": f"{name}, {inner}" if inner else name} for row, inner in own]
        frame = tidy(rows, task=self.facts.get("task"))
        for column in ("C", "low", "high", "pvalue", "shots", "control"):
            if column not in frame:
                frame[column] = None
        return frame

    def _place(self, index: int) -> dict[str, Any]:
        facts = {key: self.facts.get(key) for key in ("model", "revision")}
        return {**place(self.layers[index]), **facts, "seed": self.seed}

    def _difference_row(self, index: int, other: str, found: Estimate) -> dict[str, Any]:
        names = {"metric": f"probe_accuracy_minus_{other}", "split": "test"}
        interval = {"low": found.low, "high": found.high, "pvalue": found.pvalue}
        return {**self._place(index), **names, "value": found.value, "n": self.counts["test"], **interval}

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        best = self.best_layer
        for index, result in enumerate(self.results):
            where = self._place(index)
            if result is None:
                reason = self.reasons[index]
                rows.append({**where, "metric": "probe_accuracy", "split": "test", "reason": reason})
                continue
            found = accuracy_row("probe_accuracy", result.test_accuracy, result.interval, self.counts["test"])
            rows.append({**where, "C": result.best_C, **found})
            if best is not None and index != best:
                rows.append(self._difference_row(index, "best", self.compare(index, best, seed=self.seed)))
            final = result.probe.fit
            for metric, value in (
                ("probe_newton_decrement", final.newton_decrement),
                ("probe_duality_gap", final.duality_gap),
            ):
                cell = {"metric": metric, "split": result.refit, "value": value, "C": result.best_C}
                rows.append({**where, **cell})
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
                    rows.append({**where, **cell, "n": self.counts[split]})
        return rows + self.extra_rows

    def table(self) -> list[dict[str, Any]]:
        """One row a layer."""
        rows: list[dict[str, Any]] = []
        for index, (layer, result) in enumerate(zip(self.layers, self.results, strict=True)):
            row: dict[str, Any] = {"layer": layer_name(layer), "accuracy, %": None}
            if result is not None:
                low, high = result.interval
                row |= {
                    "accuracy, %": (MARK if index == self.best_layer else "")
                    + _in_percent(result.test_accuracy),
                    "95 % interval": f"{100 * low:.1f} to {100 * high:.1f}",
                    "validation, %": _in_percent(float(result.val_accuracy.max())),
                }
            for name, control in self.controls.items():
                if len(control.layers) == len(self.layers):
                    row[SHOWN_AS.get(name, f"{name}, %")] = _in_percent(float(control.test_accuracy[index]))
            for extra in self.extra_rows:
                if place(layer).items() <= extra.items() and not extra.get("shots"):
                    metric = extra["metric"]
                    is_share = metric.endswith("_accuracy") or metric == "selectivity"
                    column = SHOWN_AS.get(
                        metric, f"{metric.removesuffix('_accuracy')}{', %' if is_share else ''}"
                    )
                    row[column] = _in_percent(extra["value"]) if is_share else float(f"{extra['value']:.3g}")
            if result is not None:
                row["C"] = f"{result.best_C:g}"
            if reason := self.reasons[index]:
                row["reason"] = reason
            rows.append(row)
        return rows

    def summary(self) -> str:
        best = self.best_layer
        if best is None:
            return "No layer could be probed: " + "; ".join(sorted({r for r in self.reasons if r})) + "."
        low, high = self.test_interval[best]
        text = (
            f"The layer read best is {layer_name(self.layers[best])}: {100 * self.test_accuracy[best]:.1f} % of "
            f"{self.counts['test']:,} test images (95 % interval {100 * low:.1f} to {100 * high:.1f}; chosen on "
            f"validation); chance {100 * self.majority:.1f} %"
        )
        for name, control in self.controls.items():
            if (index := control.best_layer) is not None:
                text += f"; {name} {100 * control.test_accuracy[index]:.1f} %"
        unfinished = int((~self.converged & ~np.isnan(self.suboptimality)).sum())
        tested = [result.probe.fit.converged for result in self.results if result is not None]
        if unfinished or not all(tested):
            text += (
                f". {unfinished} of {self.converged.size} fits that chose, and {tested.count(False)} of {len(tested)} "
                "that were tested, did not reach their optimum"
            )
        return text + "."


def _in_percent(share: float) -> str:
    return f"{100 * share:.1f}"


def accuracy_row(metric: str, accuracy: float, interval: tuple[float, float], n: int) -> dict[str, Any]:
    """The table columns of a test accuracy over `n` images."""
    stderr = float(np.sqrt(accuracy * (1 - accuracy) / n))
    bounds = {"low": interval[0], "high": interval[1]}
    return {"metric": metric, "split": "test", "value": accuracy, "stderr": stderr, "n": n, **bounds}

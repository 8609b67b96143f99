"""Which layer of one model resembles which layer of another, how surely, and is it more than chance?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from layerprobe.analyzers.features import (
    FeatureSet,
    Layer,
    arrays_by_layer,
    layer_name,
    place,
    row_name,
)
from layerprobe.errors import UsageError
from layerprobe.metrics.similarity.all_pairs import PairwiseCKA, pairwise_cka
from layerprobe.metrics.similarity.permutation import PermutationNull, permutation_null
from layerprobe.progress import progress_bar
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.tables import tidy

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two feature sets: its arrays by layer, where they come from, and the order of its rows."""

    arrays: dict[Layer, Any]
    facts: dict[str, Any]
    rows: NDArray[np.intp] | None = None

    def names(self, side: str) -> list[str]:
        """What errors and reasons call the layers."""
        return [f"{layer_name(layer)} of {self.facts.get('model', side)}" for layer in self.arrays]

    def columns(self, index: int) -> dict[str, Any]:
        return {**self.facts, **place(list(self.arrays)[index])}


@dataclass(repr=False, kw_only=True)
class CKAMatrix(Record):
    """Debiased linear CKA of every layer of one model with every layer of another (or of itself).

    Attributes
    ----------
    values
        len(A)×len(B), debiased CKA; NaN where undefined, then `reasons[i][j]` says why.
    stderr
        The same shape, standard error over images.
    pvalue
        Chance of a value at least as large if the images of B were shuffled, cell by cell.
    pvalue_max
        The same, corrected for the search over all cells (largest cell of each permutation). The permutations
        run when either is first read; until then the record refers to the features.
    """

    command: ClassVar[str] = "cka"

    side_x: Side
    side_y: Side
    pairs: PairwiseCKA
    n_permutations: int
    seed: int
    self_comparison: bool
    device: str
    quiet: bool
    provenance: dict[str, Any]
    _null: PermutationNull | None = None

    @property
    def values(self) -> FloatArray:
        return self.pairs.values

    @property
    def stderr(self) -> FloatArray:
        return self.pairs.stderr

    @property
    def reasons(self) -> list[list[str | None]]:
        return self.pairs.reasons

    @property
    def n(self) -> int:
        return self.pairs.n

    @property
    def null(self) -> PermutationNull:
        """The permutation distribution, computed once."""
        if self._null is None:
            self._null = permutation_null(
                list(self.side_x.arrays.values()),
                None if self.self_comparison else list(self.side_y.arrays.values()),
                rows_x=self.side_x.rows,
                rows_y=self.side_y.rows,
                names_x=self.side_x.names("A"),
                names_y=self.side_y.names("B"),
                n_permutations=self.n_permutations,
                seed=self.seed,
                device=self.device,
                progress=_bar("permutations", self.quiet),
            )
        return self._null

    @property
    def pvalue(self) -> FloatArray:
        return self.null.pvalue(self.values)

    @property
    def pvalue_max(self) -> FloatArray:
        return self.null.pvalue_max(self.values)

    def interval(self, confidence: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Lower and upper ends per cell: value ± t·stderr. Symmetric, so an end may pass 1."""
        half = self.pairs.quantile(confidence) * self.stderr
        return self.values - half, self.values + half

    def to_frame(self) -> pd.DataFrame:
        cells = self._cells()
        indices = np.ndindex(self.values.shape)
        return tidy(self._row(i, j, cells, reason=self.reasons[i][j]) for i, j in indices)

    def _cells(self) -> dict[str, FloatArray]:
        """Everything that is known of each cell, by column of the table."""
        low, high = self.interval()
        cells = {"value": self.values, "stderr": self.stderr, "low": low, "high": high}
        return {**cells, "pvalue": self.pvalue, "pvalue_max": self.pvalue_max}

    def _row(self, i: int, j: int, cells: dict[str, FloatArray], **more: object) -> dict[str, Any]:
        return {
            **self.side_x.columns(i),
            "metric": "cka_debiased",
            **{name: values[i, j] for name, values in cells.items()},
            "n": self.n,
            "seed": self.seed,
            **more,
            **{f"{key}_y": value for key, value in self.side_y.columns(j).items()},
        }

    def extra_tables(self) -> dict[str, pd.DataFrame]:
        return {"cka_closest": self.closest()}

    def closest(self) -> pd.DataFrame:
        """For each layer of A the nearest layer of B: one row each, `value`, interval, corrected p-value.

        In a comparison of a model with itself a layer is not its own neighbour. `gap` is the lead over the
        runner-up and `gap_stderr` its standard error: a lead within two of them names no single layer. The
        interval is that of the cell, not widened for its having been picked as the largest; the p-value is
        corrected for that.
        """
        cells = self._cells()
        del cells["pvalue"]
        rows = []
        for i in range(len(self.side_x.arrays)):
            candidates = self.values[i].copy()
            if self.self_comparison:
                candidates[i] = np.nan
            ranked = [int(j) for j in np.argsort(-candidates) if not np.isnan(candidates[j])]
            if not ranked:
                reason = next((r for r in self.reasons[i] if r), "there is no other layer to compare with")
                rows.append({**self.side_x.columns(i), "metric": "cka_debiased", "reason": reason})
                continue
            gap = gap_stderr = None
            if len(ranked) > 1:
                gap = float(candidates[ranked[0]] - candidates[ranked[1]])
                gap_stderr = self.pairs.difference_stderr((i, ranked[0]), (i, ranked[1]))
            rows.append(self._row(i, ranked[0], cells, gap=gap, gap_stderr=gap_stderr))
        return tidy(rows)

    def table(self) -> list[dict[str, Any]]:
        """One row per layer of A: its closest layer of B, with interval and p-value."""
        rows = []
        for row in self.closest().to_dict("records"):
            defined = not pd.isna(row["value"])
            rows.append(
                {
                    "layer": row_name(row["block"], row["site"]),
                    "closest": row_name(row["block_y"], row["site_y"]) if defined else row["reason"],
                    "CKA": row["value"] if defined else None,
                    "95 % interval": f"[{row['low']:.3f}, {row['high']:.3f}]" if defined else "–",
                    "p (corrected)": row["pvalue_max"] if defined else None,
                    "lead": f"{row['gap']:.2g} ± {row['gap_stderr']:.1g}"
                    if defined and not pd.isna(row["gap"])
                    else "–",
                }
            )
        return rows

    def summary(self) -> str:
        nearest = self.closest()
        defined = nearest[nearest["value"].notna()]
        if defined.empty:
            return f"CKA is undefined for every pair of layers: {nearest['reason'].iloc[0]}"
        sure = int((defined["pvalue_max"] <= 0.05).sum())
        best = defined.loc[defined["value"].astype(float).idxmax()]
        a = self.side_x.facts.get("model", "A")
        b = a if self.self_comparison else self.side_y.facts.get("model", "B")
        shuffled = 1 + self.null.n_permutations  # the observed permutation among them
        all_of_them = self.n < 20 and shuffled == math.factorial(self.n)
        shuffles = f"all {shuffled}" if all_of_them else f"{self.null.n_permutations}"
        shuffles += " permutations"
        if self.null.n_used < self.n:
            shuffles += f" of {self.null.n_used} of the images"
        return (
            f"{sure} of {len(nearest)} layers of {a} resemble {'another' if self.self_comparison else 'some'} "
            f"layer of {b} more than chance (p ≤ 0.05 after correction for the search over "
            f"{self.values.size} cells, {shuffles}, n = {self.n}). The closest pair: "
            f"{row_name(best['block'], best['site'])} and {row_name(best['block_y'], best['site_y'])}, "
            f"debiased CKA {best['value']:.3f} [{best['low']:.3f}, {best['high']:.3f}], p = {best['pvalue_max']:.2g}."
        )


def cka_matrix(
    A: FeatureSet,
    B: FeatureSet | None = None,
    *,
    permutations: int = 1000,
    method: str = "auto",
    seed: int = 0,
    device: str = "cpu",
    quiet: bool = True,
) -> CKAMatrix:
    """Debiased linear CKA of all layers of `A` with all layers of `B`, with standard errors and p-values.

    Parameters
    ----------
    A, B
        Features as `extract_features` returns them, or plain sequences of n×d arrays (memory-mapped ones are
        read piece by piece), rows paired by image. With features, sample ids are compared: equal sets in
        another order are aligned, different sets are refused. `B=None` compares `A` with itself.
    permutations : int
        At least how many shuffles of the images the p-values rest on; with up to six images all of them by default.
    method : str
        "gram", "features" or "auto"; both are exact, "auto" takes the cheaper one.
    seed : int
        Of the permutations, and of the groups of images behind the standard errors.
    device : str
        Where the products run.
    quiet : bool
        No progress bar.

    Returns
    -------
    CKAMatrix
        With `.values`, `.stderr`, `.pvalue` (all len(A)×len(B)), `.closest()`, `.to_frame()`.

    Raises
    ------
    UsageError
        Different images or image counts, fewer than 4 images, non-finite activations.
    """
    if permutations < 1:
        raise UsageError(f"permutations must be at least 1, got {permutations}")
    side_x = _side(A, "A")
    side_y = side_x if B is None else _side(B, "B", _paired_rows(A, B))
    pairs = pairwise_cka(
        list(side_x.arrays.values()),
        None if B is None else list(side_y.arrays.values()),
        rows_x=side_x.rows,
        rows_y=side_y.rows,
        names_x=side_x.names("A"),
        names_y=side_y.names("B"),
        method=method,
        seed=seed,
        device=device,
        progress=_bar("CKA", quiet),
    )
    return CKAMatrix(
        side_x=side_x,
        side_y=side_y,
        pairs=pairs,
        n_permutations=permutations,
        seed=seed,
        self_comparison=B is None,
        device=device,
        quiet=quiet,
        provenance=provenance(
            "cka",
            {"permutations": permutations, "method": pairs.method, "seed": seed},
            features_x=_origin(A),
            features_y=_origin(B),
        ),
    )


def _origin(features: FeatureSet | None) -> dict[str, Any] | None:
    """What made the features; versions and machine are those of the comparison already."""
    found = getattr(features, "provenance", None)
    kept = ("arguments", "backbone", "task")
    return {key: found[key] for key in kept if key in found} if found else None


def _side(features: FeatureSet, name: str, rows: NDArray[np.intp] | None = None) -> Side:
    arrays = arrays_by_layer(features)
    if arrays is None:
        raise UsageError(
            f"{name} must be features or a sequence of n×d arrays, not {type(features).__name__}"
        )
    if not arrays:
        raise UsageError(f"{name} holds no layers")
    columns = ("model", "revision", "task", "split")
    facts = {column: getattr(features, column) for column in columns if hasattr(features, column)}
    return Side(arrays=arrays, facts=facts, rows=rows)


def _paired_rows(A: FeatureSet, B: FeatureSet) -> NDArray[np.intp] | None:
    """The row order of B that pairs its images with those of A; None where they are in order."""
    ids_x, ids_y = getattr(A, "ids", None), getattr(B, "ids", None)
    if ids_x is None or ids_y is None or np.array_equal(ids_x, ids_y):
        return None
    only_x, only_y = np.setdiff1d(ids_x, ids_y), np.setdiff1d(ids_y, ids_x)
    if len(only_x) or len(only_y) or len(ids_x) != len(ids_y):
        example = (only_x if len(only_x) else only_y)[:1]
        raise UsageError(
            f"the two feature sets hold different images: {len(ids_x)} and {len(ids_y)} ids, {len(only_x)} only in "
            f"the first, {len(only_y)} only in the second"
            + (f" (for example '{example[0]}')" if len(example) else "")
            + "; extract both from the same task, split, limit and seed"
        )
    rows = np.empty(len(ids_x), dtype=np.intp)
    rows[np.argsort(ids_x, kind="stable")] = np.argsort(ids_y, kind="stable")
    return rows


def _bar(what: str, quiet: bool) -> Callable[[float], None]:
    """A progress callback that takes shares of the whole."""
    if quiet:
        return lambda share: None
    bar = progress_bar(total=100, unit="%", desc=what, bar_format="{desc}: {percentage:3.0f}%|{bar}|")
    return lambda share: bar.update(100 * share) and None

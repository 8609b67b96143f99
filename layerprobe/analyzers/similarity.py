"""Which layer of one model resembles which layer of another, how surely, and is it more than chance?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from layerprobe.errors import UsageError
from layerprobe.layers import LayerRef
from layerprobe.metrics.similarity.all_pairs import PairwiseCKA, pairwise_cka
from layerprobe.metrics.similarity.permutation import PermutationNull, permutation_null
from layerprobe.progress import progress_bar
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.tables import tidy, write_frame

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Side:
    """One of the two feature sets: its arrays in order, what each is called, and where they come from."""

    arrays: list[Any]
    layers: list[LayerRef | int]
    rows: NDArray[np.intp] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def names(self, side: str) -> list[str]:
        """What errors and reasons call the layers."""
        owner = self.facts.get("model", side)
        return [
            f"{layer} of {owner}" if isinstance(layer, LayerRef) else f"layer {layer} of {owner}"
            for layer in self.layers
        ]

    def columns(self, index: int) -> dict[str, Any]:
        layer = self.layers[index]
        if isinstance(layer, LayerRef):
            return {**self.facts, "block": layer.block, "site": layer.site}
        return {**self.facts, "block": layer, "site": None}


@dataclass(repr=False)
class CKAMatrix(Record):
    """Debiased linear CKA of every layer of one model with every layer of another (or of itself).

    Attributes
    ----------
    values : len(A)×len(B), debiased CKA; NaN where undefined, then `reasons[i][j]` says why.
    stderr : the same shape, standard error over images.
    pvalue : chance of a value at least as large if the images of B were shuffled, cell by cell.
    pvalue_max : the same, corrected for the search over all cells (largest cell of each permutation).
        The permutations run when either is first read; until then the record refers to the features.
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
                self.side_x.arrays,
                None if self.self_comparison else self.side_y.arrays,
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
        low, high = self.interval()
        pvalue, corrected = self.pvalue, self.pvalue_max
        rows = []
        for i in range(len(self.side_x.layers)):
            for j in range(len(self.side_y.layers)):
                rows.append(
                    {
                        **self.side_x.columns(i),
                        "metric": "cka_debiased",
                        "value": self.values[i, j],
                        "stderr": self.stderr[i, j],
                        "n": self.n,
                        "seed": self.seed,
                        "reason": self.reasons[i][j],
                        "low": low[i, j],
                        "high": high[i, j],
                        "pvalue": pvalue[i, j],
                        "pvalue_max": corrected[i, j],
                        **{f"{key}_y": value for key, value in self.side_y.columns(j).items()},
                    }
                )
        return tidy(rows)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As every record; a folder gets the closest layers as `cka_closest.csv`, too."""
        target = super().save(path)
        if target.suffix not in (".csv", ".parquet", ".json"):
            write_frame(self.closest(), target / "cka_closest.csv")
        return target

    def closest(self) -> pd.DataFrame:
        """For each layer of A the nearest layer of B: one row each, `value`, interval, corrected p-value.

        In a comparison of a model with itself a layer is not its own neighbour. `gap` is the lead over the
        runner-up and `gap_stderr` its standard error: a lead within two of them names no single layer. The
        interval is that of the cell, not widened for its having been picked as the largest; the p-value is
        corrected for that.
        """
        low, high = self.interval()
        corrected = self.pvalue_max
        rows = []
        for i in range(len(self.side_x.layers)):
            candidates = self.values[i].copy()
            if self.self_comparison:
                candidates[i] = np.nan
            if np.isnan(candidates).all():
                reason = next((r for r in self.reasons[i] if r), "there is no other layer to compare with")
                rows.append({**self.side_x.columns(i), "metric": "cka_debiased", "reason": reason})
                continue
            ranked = [int(j) for j in np.argsort(-candidates) if not np.isnan(candidates[j])]
            j = ranked[0]
            gap = gap_stderr = None
            if len(ranked) > 1:
                gap = float(candidates[j] - candidates[ranked[1]])
                gap_stderr = self.pairs.difference_stderr((i, j), (i, ranked[1]))
            rows.append(
                {
                    **self.side_x.columns(i),
                    "metric": "cka_debiased",
                    "value": self.values[i, j],
                    "stderr": self.stderr[i, j],
                    "n": self.n,
                    "seed": self.seed,
                    "low": low[i, j],
                    "high": high[i, j],
                    "pvalue_max": corrected[i, j],
                    "gap": gap,
                    "gap_stderr": gap_stderr,
                    **{f"{key}_y": value for key, value in self.side_y.columns(j).items()},
                }
            )
        return tidy(rows)

    def table(self) -> list[dict[str, Any]]:
        """One row per layer of A for a terminal: its closest layer of B, with interval and p-value."""
        rows = []
        for row in self.closest().to_dict("records"):
            defined = row["value"] is not None and not pd.isna(row["value"])
            rows.append(
                {
                    "layer": _place(row["block"], row["site"]),
                    "closest": _place(row["block_y"], row["site_y"]) if defined else row["reason"],
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
        shuffles = f"{self.null.n_permutations} permutations"
        if self.null.n_used < self.n:
            shuffles += f" of {self.null.n_used} of the images"
        place_x, place_y = _place(best["block"], best["site"]), _place(best["block_y"], best["site_y"])
        return (
            f"{sure} of {len(nearest)} layers of {a} resemble {'another' if self.self_comparison else 'some'} "
            f"layer of {b} more than chance (p ≤ 0.05 after correction for the search over "
            f"{self.values.size} cells, {shuffles}, n = {self.n}). The closest pair: "
            f"{place_x} and {place_y}, debiased CKA {best['value']:.3f} "
            f"[{best['low']:.3f}, {best['high']:.3f}], p = {best['pvalue_max']:.2g}."
        )


def cka_matrix(
    A: Any,
    B: Any = None,
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
    A, B : features as `extract_features` returns them, or plain sequences of n×d arrays (memory-mapped ones
        are read piece by piece), rows paired by image. With features, sample ids are compared: equal sets in
        another order are aligned, different sets are refused. `B=None` compares `A` with itself.
    permutations : at least how many shuffles of the images the p-values rest on.
    method : "gram", "features" or "auto"; both are exact, "auto" takes the cheaper one.
    seed : of the permutations, and of the groups of images behind the standard errors.
    device : where the products run. quiet : no progress bar.

    Returns
    -------
    CKAMatrix with `.values`, `.stderr`, `.pvalue` (all len(A)×len(B)), `.closest()`, `.to_frame()`.

    Raises
    ------
    UsageError : different images or image counts, fewer than 4 images, non-finite activations.
    """
    if permutations < 1:
        raise UsageError(f"permutations must be at least 1, got {permutations}")
    side_x = _side(A, "A")
    side_y = side_x if B is None else _aligned(side_x, A, _side(B, "B"), B)
    pairs = pairwise_cka(
        side_x.arrays,
        None if B is None else side_y.arrays,
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


def _origin(features: Any) -> dict[str, Any] | None:
    """What made the features; versions and machine are those of the comparison already."""
    found = getattr(features, "provenance", None)
    return (
        None if not found else {key: found[key] for key in ("arguments", "backbone", "task") if key in found}
    )


def _side(features: Any, name: str) -> Side:
    if isinstance(features, Mapping):
        keys = list(getattr(features, "layers", features))
        layers: list[LayerRef | int] = [LayerRef.parse(key) if isinstance(key, str) else key for key in keys]
        arrays = [features[key] for key in keys]
        facts = {
            column: getattr(features, column)
            for column in ("model", "revision", "task", "split")
            if hasattr(features, column)
        }
    elif isinstance(features, Sequence) or getattr(features, "ndim", 0) == 3:
        arrays, facts = list(features), {}
        layers = list(range(len(arrays)))
    else:
        raise UsageError(
            f"{name} must be features or a sequence of n×d arrays, not {type(features).__name__}"
        )
    if not arrays:
        raise UsageError(f"{name} holds no layers")
    return Side(arrays, layers, None, facts)


def _aligned(side_x: Side, A: Any, side_y: Side, B: Any) -> Side:
    """`side_y` with the row order that pairs its images with those of `side_x`."""
    ids_x, ids_y = getattr(A, "ids", None), getattr(B, "ids", None)
    if ids_x is None or ids_y is None:
        return side_y
    ids_x, ids_y = np.asarray(ids_x), np.asarray(ids_y)
    if np.array_equal(ids_x, ids_y):
        return side_y
    only_x, only_y = np.setdiff1d(ids_x, ids_y), np.setdiff1d(ids_y, ids_x)
    if len(only_x) or len(only_y) or len(ids_x) != len(ids_y):
        example = (only_x if len(only_x) else only_y)[:1]
        raise UsageError(
            f"the two feature sets hold different images: {len(ids_x)} and {len(ids_y)} ids, {len(only_x)} only in "
            f"the first, {len(only_y)} only in the second"
            + (f" (for example '{example[0]}')" if len(example) else "")
            + "; extract both from the same task, split, limit and seed"
        )
    order_x, order_y = np.argsort(ids_x, kind="stable"), np.argsort(ids_y, kind="stable")
    rows = np.empty(len(ids_x), dtype=np.intp)
    rows[order_x] = order_y
    return Side(side_y.arrays, side_y.layers, rows, side_y.facts)


def _bar(what: str, quiet: bool) -> Callable[[float], None]:
    """A progress callback that takes shares of the whole."""
    if quiet:
        return lambda share: None
    bar = progress_bar(total=100, unit="%", desc=what, bar_format="{desc}: {percentage:3.0f}%|{bar}|")
    return lambda share: bar.update(100 * share) and None


def _place(block: Any, site: Any) -> str:
    if block is None or pd.isna(block):
        return str(site)
    return f"block {int(block)}" + (
        "" if site is None or pd.isna(site) or site == "resid_post" else f" {site}"
    )

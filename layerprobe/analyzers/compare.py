"""Do models differ in their outlier parameters, and where: by module kind, by relative depth, by group."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from layerprobe.analyzers.outlier_scan import ScannedTensor
from layerprobe.analyzers.outliers import OutlierReport, definitions, gaussian_tail, outlier_report
from layerprobe.errors import UsageError
from layerprobe.metrics.outliers import OutlierRules, TensorOutliers, merge_outliers
from layerprobe.metrics.outliers.comparison import (
    Blocks,
    cliffs_delta,
    group_test,
    hedges_g,
    log_ratios,
    ratio_of_ratios,
)
from layerprobe.provenance import provenance
from layerprobe.records import Estimate, Record
from layerprobe.tables import tidy

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FAMILIES: dict[str, tuple[str, ...]] = {
    "attention in": ("q", "k", "v", "kv", "qkv"),
    "attention out": ("o",),
    "mlp in": ("gate", "up", "gate_up", "fc"),
    "mlp out": ("down",),
    "mixer": ("mixer",),
}
"""Module kinds that do the same job in different architectures, pooled for comparison."""

DEPTHS = ("early", "middle", "late")
"""Thirds of the blocks: block b of L is at (b + ½)/L."""

Cell = tuple[str, str]
"""A part of the model (all, a family, a module kind or a group) and a depth."""


@dataclass(repr=False, kw_only=True)
class OutlierComparison(Record):
    """What `compare_outliers` returns: one row per pair of models (or of groups), part, depth and quantity.

    Columns beyond the common ones: `level` (model, pair, group), `model_y` and `revision_y`, `part` (all block
    matrices, a family of `FAMILIES`, a module kind, or a group of weights), `depth`, `low` and `high` (interval
    at `confidence`), `n_y` (units or models of the second side, as `n` of the first) and `gaussian` (what a
    Gaussian has).
    """

    command: ClassVar[str] = "compare"

    reports: list[OutlierReport]
    groups: dict[str, list[str]]
    n_sigma: float
    rows: list[dict[str, Any]]
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        return tidy(self.rows)

    def table(self) -> list[dict[str, Any]]:
        """The rows worth a look on a terminal: every pair (or the groups) by part over all depths, and by depth."""
        many = not self.groups and len(self.reports) > 2
        shown = []
        for row in self._answers():
            if "all" not in (row["depth"], row["part"]):
                continue
            x, y = self._short(row["model"]), self._short(row["model_y"])
            shares = {"first" if many else x: row["ratio"], "second" if many else y: row["ratio_y"]}
            interval = None if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}"
            shown.append(
                {
                    **({"models": f"{x} : {y}"} if many else {}),
                    "part": row["part"],
                    "depth": row["depth"],
                    **{f"{side} %": None if v is None else 100 * v for side, v in shares.items()},
                    "ratio": row["value"],
                    f"{100 * row['confidence']:g} %": interval,
                    **({"p": row["pvalue"]} if self.groups else {"g": row["effect"]}),
                }
            )
        return shown

    def _answers(self) -> list[dict[str, Any]]:
        """The rows that answer: of pairs, or where there are groups of groups, at `n_sigma`."""
        wanted = ("group" if self.groups else "pair", f"ratio_of_ratios_{self.n_sigma:g}sigma")
        return [row for row in self.rows if (row["level"], row["metric"]) == wanted]

    def _short(self, model: str) -> str:
        """The last part of a path where that is enough to tell the models apart."""
        last = [report.model.rstrip("/").rsplit("/", 1)[-1] for report in self.reports]
        return model.rstrip("/").rsplit("/", 1)[-1] if len(set(last)) == len(last) else model

    def summary(self) -> str:
        main = [row for row in self._answers() if (row["part"], row["depth"]) == ("all", "all")]
        return "\n".join(map(self._sentence, main))

    def _sentence(self, row: Mapping[str, Any]) -> str:
        x, y, k = self._short(row["model"]), self._short(row["model_y"]), self.n_sigma
        shares = (
            f"{100 * row['ratio']:.3g} % against {100 * row['ratio_y']:.3g} % of the block weights lie beyond "
            f"{k:g}σ of their tensor (a Gaussian has {100 * row['gaussian']:.3g} %)"
        )
        if row["value"] is None:
            return f"{x} and {y}: {shares}; {row['reason']}."
        span = f" [{row['low']:.3g}, {row['high']:.3g}]" if row["low"] is not None else ""
        factor = f"{row['value']:.3g}{span} times"
        if self.groups:
            differ = row["pvalue"] <= 0.05
            shares = f"geometric means {shares}"
            more = (
                f"; permutation p = {row['pvalue']:.3g} over {row['n']} and {row['n_y']} models (the least that so "
                f"few models can give is {row['p_smallest']:.3g})"
            )
        else:
            differ = row["low"] is not None and not row["low"] <= 1 <= row["high"]
            more = f", Hedges' g = {row['effect']:.2f} over blocks" if row["effect"] is not None else ""
        verdict = "differ" if differ else "are not shown to differ"
        return f"{x} and {y} {verdict}: {shares}, {factor} as many{more}{self._where(row)}."

    def _where(self, main: Mapping[str, Any]) -> str:
        """The family and the third of the depth in which the two sides differ most."""
        pair = (main["model"], main["model_y"])
        rows = [row for row in self._answers() if (row["model"], row["model_y"]) == pair and row["value"]]
        by_part = [row for row in rows if row["part"] in FAMILIES and row["depth"] == "all"]
        by_depth = [row for row in rows if row["part"] == "all" and row["depth"] != "all"]
        places = []
        for group, words in ((by_part, "in {part}"), (by_depth, "in the {depth} third")):
            if group:
                most = max(group, key=lambda row: abs(np.log(row["value"])))
                places.append(f"{words.format(**most)} ({most['value']:.3g} times)")
        return "; farthest apart " + " and ".join(places) if places else ""

    def plot(self, *, ax: Axes | None = None, **style: Any) -> Axes:
        """Ratio of ratios with intervals, by part and depth."""
        return super().plot(ax=ax, **{"n_sigma": self.n_sigma, **style})


def check_groups(groups: Mapping[str, Sequence[object]] | None) -> None:
    """UsageError for groups that cannot be compared; copies of a model are no independent models."""
    if groups is None:
        return
    if len(groups) < 2 or not all(groups.values()):
        raise UsageError("groups need at least two names with at least one model each")
    counts = Counter(member for members in groups.values() for member in members)
    if twice := [member for member, count in counts.items() if count > 1]:
        raise UsageError(f"'{twice[0]}' stands twice in the groups; each model counts once")


def check_number(n_models: int) -> None:
    """UsageError for fewer than two different models."""
    if n_models < 2:
        raise UsageError(f"a comparison needs at least two different models, got {n_models}")


def compare_outliers(
    *models: str | Path | OutlierReport,
    groups: Mapping[str, Sequence[str | Path | OutlierReport]] | None = None,
    n_sigma: float = 3.0,
    rules: OutlierRules | None = None,
    confidence: float = 0.95,
    n_resamples: int = 5000,
    seed: int = 0,
    threads: int | None = None,
    engine: str = "auto",
    offline: bool = False,
    quiet: bool = False,
) -> OutlierComparison:
    """Compare the outlier ratios of models, or of two or more groups of models.

    Per part (all block matrices, families, module kinds) and third of the depth: the ratio of the two outlier
    ratios with a block-bootstrap interval, Hedges' g of the blocks' log ratios, Cliff's delta, the
    Gaussian's share. Groups are compared by the geometric mean of their models with a permutation test.

    Parameters
    ----------
    models
        Two or more names (or finished reports); with `groups` they may be left out.
    groups : Mapping[str, Sequence[str | Path | OutlierReport]] | None
        Name → models, for example {"language": ["gpt2"], "vision": ["vit-base"]}.
    n_sigma : float
        The k that answers and figures use; every k of `rules.sigmas` is in the table.

    Raises
    ------
    UsageError
        Fewer than two models, fewer than two groups, no model with blocks, or a finished report that did not
        count at `n_sigma`.
    """
    rules = rules or OutlierRules()
    if n_sigma not in rules.all_sigmas:
        rules = dataclasses.replace(rules, sigmas=(*rules.sigmas, n_sigma))
    named = {name: list(members) for name, members in (groups or {}).items()}
    check_groups(groups and {name: [_key(m) for m in members] for name, members in named.items()})
    options: dict[str, Any] = {"threads": threads, "engine": engine, "offline": offline, "quiet": quiet}
    made: dict[str, OutlierReport] = {}
    for model in (*models, *(member for members in named.values() for member in members)):
        if isinstance(model, OutlierReport):
            made.setdefault(_key(model), model)
        elif _key(model) not in made:
            made[_key(model)] = outlier_report(model, rules=rules, **options)
    by_name = Counter(report.model for report in made.values())
    names = {
        key: r.model if by_name[r.model] == 1 else f"{r.model} ({r.revision})" for key, r in made.items()
    }
    reports = {names[key]: report for key, report in made.items()}
    check_number(len(reports))
    _check_comparable(reports.values(), n_sigma)
    members = {name: [names[_key(m)] for m in group] for name, group in named.items()}
    bootstrap = {"confidence": confidence, "n_resamples": n_resamples, "seed": seed}
    maker = _Rows(reports, _counted_by_all(reports.values(), (n_sigma, *rules.sigmas)), bootstrap)
    facts = provenance(
        "compare",
        {"models": list(reports), "groups": members, "n_sigma": n_sigma, **bootstrap},
        revisions={report.model: report.revision for report in reports.values()},
        definitions=definitions(rules)
        | {
            "ratio_of_ratios": "outlier ratio of `model` divided by that of `model_y`; interval: percentile "
            "bootstrap over units, which are blocks, and in a third of the depth matrices (groups: over models, too)",
            "hedges_g, cliffs_delta": "of the units' log outlier ratios, model above model_y positive",
            "depth": "thirds of the blocks; block b of L is at (b + 1/2)/L; in a third the units are matrices",
            "families": {name: list(kinds) for name, kinds in FAMILIES.items()},
        },
    )
    return OutlierComparison(
        reports=list(reports.values()),
        groups=members,
        n_sigma=n_sigma,
        rows=[*maker.models(), *maker.pairs(), *maker.groups(members)],
        provenance=facts,
    )


def _key(model: str | Path | OutlierReport) -> str:
    return f"{model.model} ({model.revision})" if isinstance(model, OutlierReport) else str(model)


def _counted_by_all(reports: Collection[OutlierReport], sigmas: Iterable[float]) -> tuple[float, ...]:
    counted = [k for k in sigmas if all(k in report.rules.all_sigmas for report in reports)]
    return tuple(dict.fromkeys(counted))


def _check_comparable(reports: Iterable[OutlierReport], n_sigma: float) -> None:
    """UsageError for a report without blocks, or one that did not count at `n_sigma`."""
    for report in reports:
        if not report.n_blocks:
            raise UsageError(f"{report.model} has no blocks that its tensor names reveal; nothing to compare")
        if n_sigma not in report.rules.all_sigmas:
            counted = ", ".join(f"{k:g}" for k in report.rules.all_sigmas)
            raise UsageError(
                f"the report of {report.model} counted outliers beyond {counted} σ, not beyond {n_sigma:g}; choose "
                "another n_sigma, or give the model's name instead of its report"
            )


class _Rows:
    """Makes the rows; one cell is a part of the model at a depth, for one k."""

    def __init__(
        self, reports: Mapping[str, OutlierReport], sigmas: Sequence[float], bootstrap: dict[str, Any]
    ) -> None:
        self.reports, self.sigmas, self.bootstrap = reports, sigmas, bootstrap
        self._cells = {name: _cells(report) for name, report in reports.items()}

    def models(self) -> Iterator[dict[str, Any]]:
        """The outlier ratio of each model in each cell."""
        for name, report in self.reports.items():
            for cell, units in self._cells[name].items():
                for k in self.sigmas:
                    ratio = _share(found := _at(units, k))
                    yield self._about("model", name, None, cell, k) | {
                        "revision": report.revision,
                        "metric": f"outlier_ratio_{k:g}sigma",
                        "value": ratio,
                        "n": int(found[1].sum()),
                        "reason": None if ratio is not None else "no finite entries",
                    }

    def pairs(self) -> Iterator[dict[str, Any]]:
        for x, y in combinations(self.reports, 2):
            for cell in self._shared_cells(x, y):
                for k in self.sigmas:
                    yield from self._pair(x, y, cell, k)

    def _pair(self, x: str, y: str, cell: Cell, k: float) -> Iterator[dict[str, Any]]:
        a, b = (_at(self._cells[name][cell], k) for name in (x, y))
        logs = log_ratios(a), log_ratios(b)
        effect, delta = hedges_g(*logs), cliffs_delta(*logs)
        about = {
            **self._about("pair", x, y, cell, k),
            "revision": self.reports[x].revision,
            "revision_y": self.reports[y].revision,
            "n": len(a[0]),
            "n_y": len(b[0]),
        }
        shares = {"ratio": _share(a), "ratio_y": _share(b), "effect": effect}
        yield {**about, **shares, **self._ratio(k, ratio_of_ratios(a, b, **self.bootstrap))}
        few = "needs at least two units on either side, with some spread" if effect is None else None
        yield {**about, "metric": f"hedges_g_{k:g}sigma", "value": effect, "reason": few}
        yield {**about, "metric": f"cliffs_delta_{k:g}sigma", "value": delta}

    def groups(self, members: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
        for x, y in combinations(members, 2):
            for cell in self._shared_cells(*members[x], *members[y]):
                for k in self.sigmas:
                    sides = [[_at(self._cells[name][cell], k) for name in members[side]] for side in (x, y)]
                    test = group_test(*sides, **self.bootstrap)
                    means = [float(np.exp(np.mean([np.log(_smooth(one)) for one in side]))) for side in sides]
                    yield {
                        **self._about("group", x, y, cell, k),
                        **self._ratio(k, test.ratio),
                        "ratio": means[0],
                        "ratio_y": means[1],
                        "pvalue": test.pvalue,
                        "p_smallest": test.p_smallest,
                        "n": len(members[x]),
                        "n_y": len(members[y]),
                    }

    def _shared_cells(self, first: str, *others: str) -> list[Cell]:
        return [cell for cell in self._cells[first] if all(cell in self._cells[name] for name in others)]

    def _about(self, level: str, x: str, y: str | None, cell: Cell, k: float) -> dict[str, Any]:
        names = {"level": level, "model": x, "model_y": y, "part": cell[0], "depth": cell[1]}
        confidence = self.bootstrap["confidence"] if y is not None else None
        return {**names, "gaussian": gaussian_tail(k), "confidence": confidence}

    def _ratio(self, k: float, ratio: Estimate) -> dict[str, Any]:
        return {
            "metric": f"ratio_of_ratios_{k:g}sigma",
            "value": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "stderr_log": ratio.stderr,
            "reason": ratio.reason,
            "seed": self.bootstrap["seed"],
        }


def _cells(report: OutlierReport) -> dict[Cell, list[TensorOutliers]]:
    """(part, depth) → one roll-up per unit: per block over all depths, per matrix in a third."""
    rows = _separated(report)
    n_blocks: dict[str | None, int] = {}
    for row in rows:
        stack = row.place.stack
        n_blocks[stack] = max(n_blocks.get(stack, 0), 1 + (row.place.block or 0))
    members: dict[Cell, dict[object, list[TensorOutliers]]] = {}
    for row in rows:
        place = row.place
        parts, depths = [place.kind], ["all"]
        if place.group == "blocks":
            parts = ["all", *(name for name, kinds in FAMILIES.items() if place.kind in kinds), place.kind]
            if place.block is not None:
                depths.append(DEPTHS[int(3 * (place.block + 0.5) / n_blocks[place.stack])])
        assert row.found is not None
        for part, depth in product(dict.fromkeys(parts), depths):
            # A third of a small model has two blocks: too few to resample, so its matrices are the units.
            unit = (place.stack, place.block) if depth == "all" else row.name
            members.setdefault((part, depth), {}).setdefault(unit, []).append(row.found)
    ordered = sorted(members, key=lambda cell: (_part_rank(cell[0]), ("all", *DEPTHS).index(cell[1])))
    return {cell: [merge_outliers(found) for found in members[cell].values()] for cell in ordered}


def _separated(report: OutlierReport) -> list[ScannedTensor]:
    """The weights that count, fused matrices replaced by their parts: the same in every layout."""
    parts = [row for row in report.tensors if row.part_of is not None]
    fused = {row.part_of for row in parts}
    return [row for row in report.counted() if row.name not in fused and row.part_of is None] + parts


def _part_rank(part: str) -> tuple[int, str]:
    order = ["all", *FAMILIES]
    return (order.index(part), "") if part in order else (len(order), part)


def _at(units: Sequence[TensorOutliers], k: float) -> Blocks:
    rule = f"{k:g}sigma"
    return (
        np.array([unit.counts.get(rule, 0) for unit in units], dtype=np.float64),
        np.array([unit.counted.get(rule, 0) for unit in units], dtype=np.float64),
    )


def _share(blocks: Blocks) -> float | None:
    return float(blocks[0].sum() / blocks[1].sum()) if blocks[1].sum() else None


def _smooth(blocks: Blocks) -> float:
    return float((blocks[0].sum() + 0.5) / (blocks[1].sum() + 1.0))

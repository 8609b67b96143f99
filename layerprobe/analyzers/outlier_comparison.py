"""Do models differ in their outlier parameters, and where: by module kind, by relative depth, by group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from layerprobe.analyzers.outliers import OutlierReport, definitions, gaussian_tail, outlier_report
from layerprobe.errors import UsageError
from layerprobe.metrics.outliers import OutlierRules, merge_outliers
from layerprobe.metrics.outliers.comparison import (
    Blocks,
    cliffs_delta,
    group_test,
    hedges_g,
    log_ratios,
    ratio_of_ratios,
)
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.tables import tidy

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FAMILIES: dict[str, tuple[str, ...]] = {
    "attention in": ("q", "k", "v", "qkv"),
    "attention out": ("o",),
    "mlp in": ("gate", "up", "gate_up", "fc"),
    "mlp out": ("down",),
}
"""Module kinds that do the same job in different architectures, pooled for comparison."""

DEPTHS = ("early", "middle", "late")
"""Thirds of the blocks: block b of L is at (b + ½)/L."""


@dataclass(repr=False)
class OutlierComparison(Record):
    """What `compare_outliers` returns: one row per pair of models (or of groups), part, depth and quantity.

    Columns beyond the common ones: `level` (model, pair, group), `model_y` and `revision_y`, `part` (all block
    matrices, a family of `FAMILIES`, a module kind, or a group of weights), `depth`, `low` and `high` (interval
    at `confidence`), `n_y` (units or models of the second side, as `n` of the first) and `gaussian` (what a
    Gaussian has).
    """

    command: ClassVar[str] = "compare"
    figure: ClassVar[str | None] = "outliers.plot_outlier_comparison"

    reports: list[OutlierReport]
    groups: dict[str, list[str]]
    n_sigma: float
    rows: list[dict[str, Any]]
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """The long table."""
        return tidy(self.rows)

    def table(self) -> list[dict[str, Any]]:
        """The rows worth a look on a terminal: every pair (or the groups) by part over all depths, and by depth."""
        wanted = "group" if self.groups else "pair"
        shown = []
        for row in self.rows:
            if row["level"] != wanted or row["metric"] != self._main:
                continue
            if row["depth"] != "all" and row["part"] != "all":
                continue
            x, y = self._short(row["model"]), self._short(row["model_y"])
            line: dict[str, Any] = {"models": f"{x} : {y}"} if self._many else {}
            line |= {
                "part": row["part"],
                "depth": row["depth"],
                f"{'first' if self._many else x} %": _percent(row["ratio"]),
                f"{'second' if self._many else y} %": _percent(row["ratio_y"]),
                "ratio": row["value"],
                f"{100 * row['confidence']:g} %": _span(row),
            }
            if self.groups:
                line["p"] = row["pvalue"]
            else:
                line["g"] = row["effect"]
            shown.append(line)
        return shown

    def _short(self, model: str) -> str:
        """The last part of a path where that is enough to tell the models apart."""
        last = [report.model.rstrip("/").rsplit("/", 1)[-1] for report in self.reports]
        return model.rstrip("/").rsplit("/", 1)[-1] if len(set(last)) == len(last) else model

    @property
    def _many(self) -> bool:
        return not self.groups and len(self.reports) > 2

    @property
    def _main(self) -> str:
        return f"ratio_of_ratios_{self.n_sigma:g}sigma"

    def summary(self) -> str:
        wanted = "group" if self.groups else "pair"
        return "\n".join(
            self._sentence(row)
            for row in self.rows
            if row["level"] == wanted
            and (row["metric"], row["part"], row["depth"]) == (self._main, "all", "all")
        )

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
            verdict = "differ" if row["pvalue"] <= 0.05 else "are not shown to differ"
            text = (
                f"{x} and {y} {verdict}: geometric means {shares}, {factor} as many; permutation "
                f"p = {row['pvalue']:.3g} over {row['n']} and {row['n_y']} models (the least that so few models "
                f"can give is {row['p_smallest']:.3g})"
            )
        else:
            unsure = row["low"] is None or row["low"] <= 1 <= row["high"]
            verdict = "are not shown to differ" if unsure else "differ"
            effect = f", Hedges' g = {row['effect']:.2f} over blocks" if row["effect"] is not None else ""
            text = f"{x} and {y} {verdict}: {shares}, {factor} as many{effect}"
        where = self._where(row)
        return f"{text}{where}."

    def _where(self, main: Mapping[str, Any]) -> str:
        same = [
            row
            for row in self.rows
            if (row["level"], row["metric"], row["model"], row["model_y"])
            == (main["level"], main["metric"], main["model"], main["model_y"])
            and row["value"]
        ]

        def most(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
            return max(rows, key=lambda row: abs(np.log(row["value"])), default=None)

        part = most([row for row in same if row["part"] in FAMILIES and row["depth"] == "all"])
        depth = most([row for row in same if row["part"] == "all" and row["depth"] != "all"])
        said = []
        if part is not None:
            said.append(f"in {part['part']} ({part['value']:.3g} times)")
        if depth is not None:
            said.append(f"in the {depth['depth']} third ({depth['value']:.3g} times)")
        return "; farthest apart " + " and ".join(said) if said else ""

    def plot(self, *, ax: Axes | None = None, **style: Any) -> Axes:
        """Ratio of ratios with intervals, by part and depth."""
        return super().plot(ax=ax, **{"n_sigma": self.n_sigma, **style})


def check_groups(groups: Mapping[str, Sequence[object]] | None) -> None:
    """UsageError for groups that cannot be compared."""
    if groups is not None and (len(groups) < 2 or not all(groups.values())):
        raise UsageError("groups need at least two names with at least one model each")


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
    models : two or more names (or finished reports); with `groups` they may be left out.
    groups : name → models, for example {"language": ["gpt2"], "vision": ["vit-base"]}.
    n_sigma : the k that answers and figures use; every k of `rules.sigmas` is in the table.

    Raises
    ------
    UsageError : fewer than two models, fewer than two groups, or no model with blocks.
    """
    rules = rules or OutlierRules()
    if n_sigma not in rules.all_sigmas:
        rules = OutlierRules(**{**rules.__dict__, "sigmas": (*rules.sigmas, n_sigma)})
    named = {name: list(members) for name, members in (groups or {}).items()}
    check_groups(groups)
    asked = [*models, *(member for members in named.values() for member in members)]
    reports: dict[str, OutlierReport] = {}
    for model in asked:
        key = model.model if isinstance(model, OutlierReport) else str(model)
        if key not in reports:
            reports[key] = (
                model
                if isinstance(model, OutlierReport)
                else outlier_report(
                    model, rules=rules, threads=threads, engine=engine, offline=offline, quiet=quiet
                )
            )
    check_number(len(reports))
    for report in reports.values():
        if not report.n_blocks:
            raise UsageError(f"{report.model} has no blocks that its tensor names reveal; nothing to compare")
    members = {
        name: [member.model if isinstance(member, OutlierReport) else str(member) for member in group]
        for name, group in named.items()
    }
    maker = _Rows(reports, rules, n_sigma, confidence, n_resamples, seed)
    rows = [*maker.models(), *maker.pairs(), *maker.groups(members)]
    facts = provenance(
        "compare",
        {
            "models": list(reports),
            "groups": members,
            "n_sigma": n_sigma,
            "confidence": confidence,
            "n_resamples": n_resamples,
            "seed": seed,
        },
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
    return OutlierComparison(list(reports.values()), members, n_sigma, rows, facts)


class _Rows:
    """Makes the rows; one cell is a part of the model at a depth, for one k."""

    def __init__(
        self,
        reports: Mapping[str, OutlierReport],
        rules: OutlierRules,
        n_sigma: float,
        confidence: float,
        n_resamples: int,
        seed: int,
    ) -> None:
        self.reports = reports
        self.sigmas = tuple(dict.fromkeys((n_sigma, *rules.sigmas)))
        self.options: dict[str, Any] = {"confidence": confidence, "n_resamples": n_resamples, "seed": seed}
        self.confidence = confidence
        self._cells = {name: _cells(report) for name, report in reports.items()}

    def models(self) -> Iterator[dict[str, Any]]:
        """The outlier ratio of each model in each cell."""
        for name, report in self.reports.items():
            for (part, depth), blocks in self._cells[name].items():
                for k in self.sigmas:
                    counts, entries = _at(blocks, k)
                    ratio = float(counts.sum() / entries.sum()) if entries.sum() else None
                    yield {
                        **self._about("model", name, None, part, depth, k),
                        "revision": report.revision,
                        "metric": f"outlier_ratio_{k:g}sigma",
                        "value": ratio,
                        "n": int(entries.sum()),
                        "reason": None if ratio is not None else "no finite entries",
                    }

    def pairs(self) -> Iterator[dict[str, Any]]:
        for x, y in combinations(self.reports, 2):
            for cell, blocks_x in self._cells[x].items():
                if cell not in self._cells[y]:
                    continue
                for k in self.sigmas:
                    yield from self._pair(x, y, cell, _at(blocks_x, k), _at(self._cells[y][cell], k), k)

    def _pair(
        self, x: str, y: str, cell: tuple[str, str], a: Blocks, b: Blocks, k: float
    ) -> Iterator[dict[str, Any]]:
        ratio = ratio_of_ratios(a, b, **self.options)
        logs = log_ratios(a), log_ratios(b)
        effect, delta = hedges_g(*logs), cliffs_delta(*logs)
        about = {
            **self._about("pair", x, y, *cell, k),
            "revision": self.reports[x].revision,
            "revision_y": self.reports[y].revision,
            "n": len(a[0]),
            "n_y": len(b[0]),
        }
        shares = {"ratio": _share(a), "ratio_y": _share(b), "effect": effect}
        yield {
            **about,
            **shares,
            "metric": f"ratio_of_ratios_{k:g}sigma",
            "value": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "stderr_log": ratio.stderr,
            "reason": ratio.reason,
            "seed": self.options["seed"],
        }
        few = "needs at least two units on either side, with some spread"
        yield {
            **about,
            "metric": f"hedges_g_{k:g}sigma",
            "value": effect,
            "reason": few if effect is None else None,
        }
        yield {**about, "metric": f"cliffs_delta_{k:g}sigma", "value": delta}

    def groups(self, members: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
        for x, y in combinations(members, 2):
            everyone = [*members[x], *members[y]]
            for cell in self._cells[everyone[0]]:
                if not all(cell in self._cells[name] for name in everyone):
                    continue
                for k in self.sigmas:
                    sides = [[_at(self._cells[name][cell], k) for name in members[side]] for side in (x, y)]
                    test = group_test(*sides, **self.options)
                    means = [float(np.exp(np.mean([np.log(_smooth(one)) for one in side]))) for side in sides]
                    yield {
                        **self._about("group", x, y, *cell, k),
                        "metric": f"ratio_of_ratios_{k:g}sigma",
                        "value": test.ratio.value,
                        "low": test.ratio.low,
                        "high": test.ratio.high,
                        "stderr_log": test.ratio.stderr,
                        "reason": test.ratio.reason,
                        "ratio": means[0],
                        "ratio_y": means[1],
                        "pvalue": test.pvalue,
                        "p_smallest": test.p_smallest,
                        "n": len(members[x]),
                        "n_y": len(members[y]),
                        "seed": self.options["seed"],
                    }

    def _about(self, level: str, x: str, y: str | None, part: str, depth: str, k: float) -> dict[str, Any]:
        return {
            "level": level,
            "model": x,
            "model_y": y,
            "part": part,
            "depth": depth,
            "gaussian": gaussian_tail(k),
            "confidence": self.confidence if y is not None else None,
        }


def _cells(report: OutlierReport) -> dict[tuple[str, str], list[Any]]:
    """(part, depth) → one pooled `TensorOutliers` per unit: per block over all depths, per matrix in a third."""
    rows = report.separated()
    stacks = sorted({row.place.stack or "" for row in rows if row.place.block is not None})
    n_blocks = {
        stack: 1 + max(row.place.block or 0 for row in rows if (row.place.stack or "") == stack)
        for stack in stacks
    }
    members: dict[tuple[str, str], dict[Any, list[Any]]] = {}
    for row in rows:
        place = row.place
        parts = [place.kind]
        if place.group == "blocks":
            parts = ["all", *(name for name, kinds in FAMILIES.items() if place.kind in kinds), place.kind]
        depths = ["all"]
        if place.block is not None and place.group == "blocks":
            third = int(3 * (place.block + 0.5) / n_blocks[place.stack or ""])
            depths.append(DEPTHS[third])
        for part in dict.fromkeys(parts):
            for depth in depths:
                cell = members.setdefault((part, depth), {})
                # A third of a small model has two blocks: too few to resample, so its matrices are the units.
                unit = (place.stack, place.block) if depth == "all" else row.name
                cell.setdefault(unit, []).append(row.found)
    ordered = sorted(members, key=lambda cell: (_part_rank(cell[0]), ("all", *DEPTHS).index(cell[1])))
    return {cell: [merge_outliers(found) for found in members[cell].values()] for cell in ordered}


def _part_rank(part: str) -> tuple[int, str]:
    order = ["all", *FAMILIES]
    return (order.index(part), "") if part in order else (len(order), part)


def _at(blocks: Sequence[Any], k: float) -> Blocks:
    rule = f"{k:g}sigma"
    return (
        np.array([block.counts.get(rule, 0) for block in blocks], dtype=np.float64),
        np.array([block.counted.get(rule, 0) for block in blocks], dtype=np.float64),
    )


def _share(blocks: Blocks) -> float | None:
    return float(blocks[0].sum() / blocks[1].sum()) if blocks[1].sum() else None


def _smooth(blocks: Blocks) -> float:
    return float((blocks[0].sum() + 0.5) / (blocks[1].sum() + 1.0))


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _span(row: Mapping[str, Any]) -> str | None:
    return None if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}"

"""Outlier parameters of a checkpoint: what share of its weights lies far from the rest, and where."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from layerprobe.analyzers.outlier_rows import (
    Cell,
    Owner,
    coordinates,
    dict_rows,
    metric_cells,
    tensor_rows,
    write_tables,
)
from layerprobe.analyzers.outlier_scan import ScannedTensor, open_model, read_norms, scan
from layerprobe.checkpoints import GROUPS, KINDS, TensorRole
from layerprobe.files import atomic_write
from layerprobe.metrics.outliers import OutlierRules, TensorOutliers, merge_outliers
from layerprobe.metrics.outliers.moments import norm_dimension_votes
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.tables import strict_value, tidy

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

AXES_BELOW = 512 << 20
"""Rows and columns are measured without being asked for in checkpoints of up to so many bytes."""


LEVELS: dict[str, tuple[str, ...]] = {
    "kind": ("stack", "block", "kind"),
    "block": ("stack", "block"),
    "block_group": ("stack", "block", "group"),
    "group": ("group",),
}
"""Roll-ups: level → by what tensors are pooled."""


@dataclass(repr=False, kw_only=True)
class OutlierReport(Record):
    """What `outlier_report` returns: per tensor and rolled up by kind, block, group and model.

    `tensors` are the measured (or skipped) tensors in file order. `norm_votes` has, for "weight" and "bias" of the
    norms inside blocks, the dimensions that stand out in at least two tensors and how many tensors voted.
    In roll-ups each entry is judged within its own tensor, and the counts are added.
    """

    command: ClassVar[str] = "outliers"

    model: str
    revision: str
    tensors: list[ScannedTensor]
    rules: OutlierRules
    norm_votes: dict[str, tuple[list[tuple[int, int]], int]]
    provenance: dict[str, Any]
    _frame: pd.DataFrame | None = field(default=None, compare=False)
    _merged: dict[bool, dict[TensorRole, TensorOutliers]] = field(default_factory=dict, compare=False)

    def pool(self, **where: object) -> TensorOutliers:
        """The roll-up of all tensors whose place has these attributes, for example `block=3, kind="q"`.

        Tied weights count once, skipped tensors do not count.
        """
        return merge_outliers(
            found
            for place, found in self._places(parts=False).items()
            if all(getattr(place, key) == value for key, value in where.items())
        )

    def counted(self) -> list[ScannedTensor]:
        """The tensors that enter roll-ups: neither skipped nor tied, fused matrices whole, experts one by one."""
        return [row for row in self.tensors if row.found is not None and row.tied_to is None and row.counts]

    @property
    def n_blocks(self) -> int:
        """Number of different blocks, over all stacks."""
        return len(
            {(row.place.stack, row.place.block) for row in self.counted() if row.place.block is not None}
        )

    def to_frame(self) -> pd.DataFrame:
        """The long table: the common columns, then `level`, `group`, `kind`, `stack`, `tensor`, `entry`.

        `level` is tensor, part (of a fused matrix), kind (one module kind within one block, or outside the
        blocks), block (all its entries), block_group (its matrices apart from its norms and biases), group
        or model. `entry` holds the coordinates of a `top_entry` row, or the lines that stand out.
        """
        if self._frame is None:
            self._frame = tidy(dict_rows(self._rows()), model=self.model, revision=self.revision)
        return self._frame

    def roll_up_frame(self) -> pd.DataFrame:
        """Of the rows of `to_frame` that are of no single tensor the outlier ratios: what the figures show."""
        ratios = (
            (owner, [cell for cell in cells if cell.metric.startswith("outlier_ratio")])
            for owner, cells in self._roll_up_rows()
        )
        return tidy(dict_rows(ratios), model=self.model, revision=self.revision)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As every record; tables of very many tensors are written as they come."""
        target = Path(path)
        if target.suffix == ".parquet":
            return super().save(target)
        folder = target.suffix not in (".csv", ".json")
        with contextlib.ExitStack() as files:

            def opened(ending: str) -> TextIO | None:
                if not folder and target.suffix != ending:
                    return None
                path = target / f"{self.command}{ending}" if folder else target
                aside = files.enter_context(atomic_write(path))
                return files.enter_context(aside.open("w", encoding="utf-8", newline=""))

            self._write(opened(".csv"), opened(".json"))
        return target

    def write_json(self, stream: TextIO) -> None:
        """What `to_json` returns, row by row."""
        self._write(None, stream)

    def _write(self, csv: TextIO | None, body: TextIO | None) -> None:
        named = {"model": self.model, "revision": self.revision, "schema": f"layerprobe.{self.command}/v1"}
        facts = {"provenance": self.provenance, "summary": self.summary(), "table": self.table()}
        write_tables(self._rows(), csv, body, named=named, facts=strict_value(facts))

    def _rows(self) -> Iterator[tuple[Owner, list[Cell]]]:
        yield from tensor_rows(self.tensors, self.rules)
        yield from self._roll_up_rows()

    def _roll_up_rows(self) -> Iterator[tuple[Owner, list[Cell]]]:
        for level, keys in LEVELS.items():
            sigmas = self.rules.all_sigmas if level == "group" else self.rules.sigmas
            for key, part in self._grouped(*keys, parts=level == "kind"):
                about = dict(zip(keys, key, strict=True))
                if about.get("block") is not None or level in ("kind", "group"):
                    yield Owner(level, **about), metric_cells(part, self.rules, sigmas)
        yield Owner("model"), metric_cells(self.pool(), self.rules, self.rules.all_sigmas)
        for role, (votes, voters) in self.norm_votes.items():
            metric = f"norm_{role}_dimension_votes"
            cells = [Cell(metric, count, voters, entry=f"[{dimension}]") for dimension, count in votes[:20]]
            yield Owner("model"), cells

    def _grouped(self, *keys: str, parts: bool = False) -> Iterator[tuple[tuple[Any, ...], TensorOutliers]]:
        members: dict[tuple[Any, ...], list[TensorOutliers]] = {}
        for place, found in self._places(parts).items():
            members.setdefault(tuple(getattr(place, key) for key in keys), []).append(found)
        for key in sorted(members, key=lambda key: [_rank(part) for part in key]):
            yield key, merge_outliers(members[key])

    def _places(self, parts: bool) -> dict[TensorRole, TensorOutliers]:
        """The roll-up of each place, merged once; with `parts` those of fused matrices beside the whole ones."""
        if parts not in self._merged:
            rows = self.counted()
            if parts:
                rows += [row for row in self.tensors if row.part_of is not None and not row.counts]
            members: dict[TensorRole, list[TensorOutliers]] = {}
            for row in rows:
                if row.found is not None:
                    members.setdefault(row.place, []).append(row.found)
            self._merged[parts] = {place: merge_outliers(found) for place, found in members.items()}
        return self._merged[parts]

    def table(self) -> list[dict[str, Any]]:
        """One row per block (its matrices), then one per group and one for the model."""
        blocks = list(self._block_matrices())
        stacks = {row.place.stack for row in self.counted() if row.place.block is not None}
        names = [f"{stack}.{block}" if len(stacks) > 1 else str(block) for stack, block, _ in blocks]
        lines = list(zip(names, (part for _, _, part in blocks), strict=True))
        for (group,), part in self._grouped("group"):
            lines.append(("all blocks" if group == "blocks" else group, part))
        whole = self.pool()
        lines.append(("model", whole))
        first, *others = self.rules.sigmas
        ratios = [_ratio(part, first) for _, part in lines]
        greatest = max((ratio or 0.0 for ratio in ratios[: len(blocks)] or ratios), default=0.0)
        rows = []
        for index, ((name, part), ratio) in enumerate(zip(lines, ratios, strict=True)):
            row: dict[str, Any] = {
                "block": name,
                "weights": part.n,
                f">{first:g}σ %": _rounded(ratio, 4, scale=100),
                "": _bar(ratio, greatest) if index < len(blocks) else "",
            }
            for second in others[:1]:
                row[f">{second:g}σ ppm"] = _rounded(_ratio(part, second), 2, scale=1e6)
            row["kurtosis"] = _rounded(part.values.get("kurtosis"), 2)
            row["max σ"] = _rounded(part.values.get("max_sigma"), 1)
            if whole.nan + whole.inf:
                row["nonfinite"] = part.nan + part.inf
            rows.append(row)
        return rows

    def _block_matrices(self) -> Iterator[tuple[str, int, TensorOutliers]]:
        """Stack, block and roll-up of each block's matrices."""
        for (stack, block, group), part in self._grouped("stack", "block", "group"):
            if block is not None and group == "blocks":
                yield stack, block, part

    def summary(self) -> str:
        k = self.rules.sigmas[0]
        blocks = self.pool(group="blocks")
        what = "block weights"
        if not blocks.n:
            blocks, what = self.pool(), "weights"
        if not blocks.n:
            return f"{self.model}: no weight could be measured; the table says why for each tensor."
        text = (
            f"{self.model}: {100 * (_ratio(blocks, k) or 0):.3g} % of {blocks.n:,} {what} lie more than {k:g}σ from "
            f"the mean of their tensor (a Gaussian has {100 * gaussian_tail(k):.3g} %)"
        )
        per_block = [(block, _ratio(part, k) or 0) for _, block, part in self._block_matrices()]
        if per_block:
            block, ratio = max(per_block, key=lambda pair: pair[1])
            text += f"; most in block {block} ({100 * ratio:.3g} %)"
        tops = [(*row.found.top[0], row) for row in self.counted() if row.found and row.found.top]
        if tops:
            value, index, row = max(tops, key=lambda top: abs(top[0]))
            text += f". Largest entry: {row.name}{coordinates(row.shape, index)} = {value:.4g}"
        whole = self.pool()
        if whole.nan + whole.inf:
            text += f". {whole.nan + whole.inf:,} entries are NaN or infinite and were left out"
        if skipped := sum(row.found is None for row in self.tensors):
            text += f". Skipped, the table says why: {skipped} of {len(self.tensors)} tensors"
        if left := self.provenance.get("left_out"):
            text += ". Left out of the file: " + "; ".join(f"{name} ({what})" for name, what in left.items())
        return text + "."

    def plot(self, *, ax: Axes | None = None, **style: Any) -> Axes:
        """Outlier ratio by depth and module kind; see `layerprobe.plotting.outliers` for the other figures."""
        return super().plot(ax=ax, **{"n_sigma": self.rules.sigmas[0], **style})


def outlier_report(
    model: str | Path,
    *,
    revision: str | None = None,
    rules: OutlierRules | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    state: str | None = None,
    threads: int | None = None,
    engine: str = "auto",
    axes: bool | None = None,
    offline: bool = False,
    quiet: bool = False,
) -> OutlierReport:
    """Count the outlier parameters of a checkpoint, exactly, without building the model.

    Parameters
    ----------
    model : str | Path
        Alias, hub id, local folder, bridge run, or one weight file.
    rules : OutlierRules | None
        What is counted; see `layerprobe.metrics.outliers.OutlierRules`.
    include, exclude : Iterable[str] | None
        Shell patterns on tensor names, for example "*.mlp.*".
    state : str | None
        Which state of a training checkpoint; default: the model's own, not an average or a copy of it.
    threads : int | None
        Tensors read at once; default: the usable cores, at most 8.
    engine : str
        "auto", "numba" or "torch"; the numbers are the same.
    axes : bool | None
        Also find rows and columns whose spread stands out, which takes several times longer; default: for
        checkpoints up to 512 MiB.

    Raises
    ------
    UnknownNameError, NotAvailableError
        No such model, or not here.
    BrokenFileError
        A file that cannot be what it says it is; names file and tensor.

    Examples
    --------
    >>> report = outlier_report("llama-7b")                                # doctest: +SKIP
    >>> report.to_frame().query("level == 'block' and metric == 'outlier_ratio_3sigma'")   # doctest: +SKIP
    """
    rules = rules or OutlierRules()
    include, exclude = list(include or []), list(exclude or [])
    name, model_id, checkpoint, found_revision = open_model(model, revision, offline, state)
    checkpoint = checkpoint.select(include, exclude)
    axes = checkpoint.nbytes <= AXES_BELOW if axes is None else axes
    tensors = scan(checkpoint, rules=rules, engine=engine, threads=threads, axes=axes, quiet=quiet)
    votes = {role: norm_dimension_votes(norms) for role, norms in read_norms(checkpoint, tensors).items()}
    arguments = {"model": name, "revision": revision, "include": include, "exclude": exclude}
    facts = provenance(
        "outliers",
        {**arguments, "state": state, "threads": threads, "engine": engine, "axes": axes},
        model_id=model_id,
        model_revision=found_revision,
        files=[file.name for file in checkpoint.files],
        bytes=checkpoint.nbytes,
        definitions=definitions(rules),
        tied={row.name: row.tied_to for row in tensors if row.tied_to},
        skipped={row.name: row.skip for row in tensors if row.found is None},
        **({"left_out": checkpoint.left_out} if checkpoint.left_out else {}),
    )
    return OutlierReport(
        model=name,
        revision=found_revision,
        tensors=tensors,
        rules=rules,
        norm_votes=votes,
        provenance=facts,
    )


def definitions(rules: OutlierRules) -> dict[str, str]:
    """Metric → what it is, as it stands in every output."""
    found = {
        "count": "finite entries",
        "mean, std, kurtosis": "of the finite entries in float64; population std; kurtosis m4/m2^2 (Gaussian 3)",
        "max_sigma": "max |w - mean| / std",
        "mad": "median of |w - median|",
        "mean_abs": "mean of |w|",
        "zero_ratio": "share of entries equal to 0",
        "quantile_q": "numpy's linear convention",
        "tail_index": f"Hill estimate from the largest {rules.tail:g} of |w|; smaller is heavier; large float32 "
        "tensors: from bins of relative width below 0.8 %",
        "top_entry_r": "entry of r-th largest |w|; `entry` holds its coordinates",
        "row_outlier_count_4z, column_*": "lines whose std (n - 1) has a z-score above 4 among the lines of the "
        "matrix; columns are input dimensions (of transposed Conv1D matrices, too)",
        "norm_*_dimension_votes": "in how many of n norm tensors inside blocks dimension `entry` lies more than 3 std "
        "from the tensor's mean",
        "outlier_ppm_*": "outlier_ratio_* times 1e6",
        "quantised tensors": "measured as the matrix that codes and scales define, each entry rounded once to float32; "
        "zero points of GPTQ are stored less one unless the configuration says gptq_v2",
        "roll-ups": "each entry is judged within its own tensor and counts are added; moments are those of all "
        "entries together; tied weights count once; "
        "each expert of a stack is judged as a matrix of its own",
    }
    found |= {
        f"outlier_ratio_{rule}": f"share of entries with {text}" for rule, text in rules.definitions().items()
    }
    return found


def gaussian_tail(k: float) -> float:
    """Share of a Gaussian beyond k standard deviations on either side."""
    from math import erfc, sqrt

    return erfc(k / sqrt(2))


def _ratio(part: TensorOutliers, k: float) -> float | None:
    rule = f"{k:g}sigma"
    return part.counts[rule] / part.counted[rule] if part.counted.get(rule) else None


def _rounded(value: float | None, digits: int, *, scale: float = 1) -> float | None:
    return None if value is None else round(scale * value, digits)


def _bar(ratio: float | None, greatest: float, width: int = 12) -> str:
    if not ratio or not greatest:
        return ""
    eighths = round(8 * width * ratio / greatest)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _rank(part: int | str | None) -> tuple[int, int, str]:
    if part is None:
        return (2, 0, "")
    if isinstance(part, int):
        return (0, part, "")
    order = KINDS if part in KINDS else GROUPS
    return (1, order.index(part) if part in order else -1, part)

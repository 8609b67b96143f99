"""Outlier parameters of a checkpoint: what share of its weights lies far from the rest, and where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from layerprobe.analyzers.outlier_scan import ScannedTensor, read_norms, scan
from layerprobe.backbones.resolve import RUN_FILE, resolve_model, weights_hash
from layerprobe.checkpoints import GROUPS, KINDS, Checkpoint, open_checkpoint
from layerprobe.metrics.outliers import OutlierRules, TensorOutliers, merge_outliers
from layerprobe.metrics.outliers.axes import norm_dimension_votes
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.tables import tidy

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

AXES_BELOW = 512 << 20
"""Rows and columns are measured without being asked for in checkpoints of up to so many bytes."""


@dataclass(repr=False)
class OutlierReport(Record):
    """What `outlier_report` returns: per tensor and rolled up by kind, block, group and model.

    `tensors` are the measured (or skipped) tensors in file order. `norm_votes` has, for "weight" and "bias" of the
    norms inside blocks, the dimensions that stand out in at least two tensors and how many tensors voted.
    In roll-ups each entry is judged within its own tensor, and the counts are added.
    """

    command: ClassVar[str] = "outliers"
    figure: ClassVar[str | None] = "outliers.plot_outlier_depth"

    model: str
    revision: str
    tensors: list[ScannedTensor]
    rules: OutlierRules
    norm_votes: dict[str, tuple[list[tuple[int, int]], int]]
    provenance: dict[str, Any]
    _frame: Any = field(default=None, repr=False, compare=False)

    def pool(self, **where: Any) -> TensorOutliers:
        """The roll-up of all tensors whose place has these attributes, for example `block=3, kind="q"`.

        Tied weights count once, skipped tensors do not count.
        """
        return merge_outliers(
            row.found
            for row in self.counted()
            if row.found is not None and all(getattr(row.place, key) == value for key, value in where.items())
        )

    def counted(self) -> list[ScannedTensor]:
        """The tensors that enter roll-ups: neither skipped nor tied, fused matrices whole."""
        return [
            row
            for row in self.tensors
            if row.found is not None and row.tied_to is None and row.part_of is None
        ]

    def separated(self) -> list[ScannedTensor]:
        """The same weights with fused matrices replaced by their parts, for comparison with other layouts."""
        fused = {row.part_of for row in self.tensors if row.part_of is not None}
        parts = [row for row in self.tensors if row.part_of is not None]
        return [row for row in self.counted() if row.name not in fused] + parts

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
            self._frame = tidy(self._rows(), model=self.model, revision=self.revision)
        return self._frame

    def _rows(self) -> Iterator[dict[str, Any]]:
        for row in self.tensors:
            about = {
                "level": "tensor" if row.part_of is None else "part",
                "block": row.place.block,
                "group": row.place.group,
                "kind": row.place.kind,
                "stack": row.place.stack,
                "tensor": row.name,
            }
            if row.found is None:
                yield {**about, "metric": "count", "value": None, "reason": f"skipped: {row.skip}"}
                continue
            yield from self._metrics(row.found, about, self.rules.sigmas)
            for rank, (value, index) in enumerate(row.found.top, start=1):
                entry = [int(i) for i in np.unravel_index(index, row.shape)] if row.shape else []
                yield {
                    **about,
                    "metric": f"top_entry_{rank}",
                    "value": value,
                    "n": row.found.n,
                    "entry": str(entry),
                }
            yield from self._axes(row, about)
        everything = [*self.counted(), *(row for row in self.tensors if row.part_of is not None)]
        for (stack, block, kind), part in self._grouped("stack", "block", "kind", rows=everything):
            about = {"level": "kind", "block": block, "kind": kind, "stack": stack}
            yield from self._metrics(part, about, self.rules.sigmas)
        for (stack, block), part in self._grouped("stack", "block"):
            if block is not None:
                yield from self._metrics(
                    part, {"level": "block", "block": block, "stack": stack}, self.rules.sigmas
                )
        for (stack, block, group), part in self._grouped("stack", "block", "group"):
            if block is not None:
                about = {"level": "block_group", "block": block, "group": group, "stack": stack}
                yield from self._metrics(part, about, self.rules.sigmas)
        for (group,), part in self._grouped("group"):
            yield from self._metrics(part, {"level": "group", "group": group}, self.rules.all_sigmas)
        yield from self._metrics(self.pool(), {"level": "model"}, self.rules.all_sigmas)
        for role, (votes, voters) in self.norm_votes.items():
            for dimension, count in votes[:20]:
                about = {
                    "level": "model",
                    "metric": f"norm_{role}_dimension_votes",
                    "entry": f"[{dimension}]",
                }
                yield {**about, "value": count, "n": voters}

    def _axes(self, row: ScannedTensor, about: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        assert row.found is not None
        for axis, found in row.found.axes.items():
            # What is a column of a linear layer is a row of a transposed Conv1D: named by what it carries.
            line = {"row": "column", "column": "row"}[axis] if row.place.transposed else axis
            if isinstance(found, str):
                yield {**about, "metric": f"{line}_outlier_count_4z", "value": None, "reason": found}
                continue
            lines = str(found.lines) if found.lines else None
            yield {
                **about,
                "metric": f"{line}_outlier_count_4z",
                "value": found.count,
                "n": found.n,
                "entry": lines,
            }
            yield {**about, "metric": f"{line}_max_z", "value": found.max_z, "n": found.n}

    def _grouped(
        self, *keys: str, rows: list[ScannedTensor] | None = None
    ) -> Iterator[tuple[tuple[Any, ...], TensorOutliers]]:
        members: dict[tuple[Any, ...], list[TensorOutliers]] = {}
        for row in self.counted() if rows is None else rows:
            assert row.found is not None
            members.setdefault(tuple(getattr(row.place, key) for key in keys), []).append(row.found)
        for key in sorted(members, key=lambda key: [_rank(part) for part in key]):
            yield key, merge_outliers(members[key])

    def _metrics(
        self, found: TensorOutliers, about: Mapping[str, Any], sigmas: Sequence[float]
    ) -> Iterator[dict[str, Any]]:
        n = found.n
        yield {**about, "metric": "count", "value": n, "n": found.size}
        yield {**about, "metric": "nonfinite", "value": found.nan + found.inf, "n": found.size}
        yield {**about, "metric": "nan_count", "value": found.nan, "n": found.size}
        yield {**about, "metric": "inf_count", "value": found.inf, "n": found.size}
        for name, value in found.values.items():
            yield {**about, "metric": name, "value": value, "n": n}
        shown = {f"{k:g}sigma" for k in sigmas}
        for rule, count in found.counts.items():
            if rule.endswith("sigma") and rule not in shown:
                continue
            of = found.counted[rule]
            yield {**about, "metric": f"outlier_count_{rule}", "value": count, "n": of}
            if of:
                yield {**about, "metric": f"outlier_ratio_{rule}", "value": count / of, "n": of}
                yield {**about, "metric": f"outlier_ppm_{rule}", "value": count / of * 1e6, "n": of}
            else:
                yield {
                    **about,
                    "metric": f"outlier_ratio_{rule}",
                    "value": None,
                    "n": 0,
                    "reason": "no finite entries",
                }
        for name, reason in found.reasons.items():
            metric = name if name in _PLAIN or name.startswith("quantile") else f"outlier_ratio_{name}"
            yield {**about, "metric": metric, "value": None, "n": n, "reason": reason}

    def table(self) -> list[dict[str, Any]]:
        """One row per block (its matrices) and per group, formatted for a terminal."""
        first = self.rules.sigmas[0]
        second = self.rules.sigmas[1] if len(self.rules.sigmas) > 1 else None
        lines: list[tuple[str, TensorOutliers]] = []
        stacks = {row.place.stack for row in self.counted() if row.place.block is not None}
        for (stack, block, group), part in self._grouped("stack", "block", "group"):
            if block is not None and group == "blocks":
                lines.append((f"{stack}.{block}" if len(stacks) > 1 else str(block), part))
        n_blocks = len(lines)
        for (group,), part in self._grouped("group"):
            lines.append(("all blocks" if group == "blocks" else group, part))
        lines.append(("model", self.pool()))
        ratios = [_ratio(part, first) for _, part in lines]
        greatest = max([ratio for ratio in ratios[:n_blocks] or ratios if ratio is not None], default=0.0)
        rows = []
        for index, ((name, part), ratio) in enumerate(zip(lines, ratios, strict=True)):
            row: dict[str, Any] = {
                "block": name,
                "weights": part.n,
                f">{first:g}σ %": None if ratio is None else round(100 * ratio, 4),
                "": _bar(ratio, greatest) if index < n_blocks else "",
            }
            if second is not None:
                far = _ratio(part, second)
                row[f">{second:g}σ ppm"] = None if far is None else round(1e6 * far, 2)
            row["kurtosis"] = _rounded(part.values.get("kurtosis"), 2)
            row["max σ"] = _rounded(part.values.get("max_sigma"), 1)
            if (bad := part.nan + part.inf) or self.pool().nan + self.pool().inf:
                row["nonfinite"] = bad
            rows.append(row)
        return rows

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
        if per_block := [
            (block, _ratio(part, k))
            for (_, block, group), part in self._grouped("stack", "block", "group")
            if group == "blocks"
        ]:
            block, ratio = max(per_block, key=lambda pair: pair[1] or 0)
            text += f"; most in block {block} ({100 * (ratio or 0):.3g} %)"
        top = max(
            ((abs(row.found.top[0][0]), row) for row in self.counted() if row.found and row.found.top),
            key=lambda pair: pair[0],
            default=None,
        )
        if top is not None:
            row = top[1]
            assert row.found is not None
            value, index = row.found.top[0]
            entry = [int(i) for i in np.unravel_index(index, row.shape)] if row.shape else []
            text += f". Largest entry: {row.name}{entry} = {value:.4g}"
        whole = self.pool()
        if whole.nan + whole.inf:
            text += f". {whole.nan + whole.inf:,} entries are NaN or infinite and were left out"
        if skipped := sum(row.found is None for row in self.tensors):
            text += f". Skipped, being no floating-point weights: {skipped} of {len(self.tensors)} tensors"
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
    threads: int | None = None,
    engine: str = "auto",
    axes: bool | None = None,
    offline: bool = False,
    quiet: bool = False,
) -> OutlierReport:
    """Count the outlier parameters of a checkpoint, exactly, without building the model.

    Parameters
    ----------
    model : alias, hub id, local folder, bridge run, or one weight file.
    rules : what is counted; see `layerprobe.metrics.outliers.OutlierRules`.
    include, exclude : shell patterns on tensor names, for example "*.mlp.*".
    threads : tensors read at once; default: the usable cores, at most 8.
    engine : "auto", "numba" or "torch"; the numbers are the same.
    axes : also find rows and columns whose spread stands out, which takes several times longer; default: for
        checkpoints up to 512 MiB.

    Raises
    ------
    UnknownNameError, NotAvailableError : no such model, or not here.
    BrokenFileError : a file that cannot be what it says it is; names file and tensor.

    Examples
    --------
    >>> report = outlier_report("llama-7b")                                # doctest: +SKIP
    >>> report.to_frame().query("level == 'block' and metric == 'outlier_ratio_3sigma'")   # doctest: +SKIP
    """
    rules = rules or OutlierRules()
    include, exclude = list(include or []), list(exclude or [])
    name, model_id, checkpoint, found_revision = _open(model, revision, offline)
    checkpoint = checkpoint.select(include, exclude)
    axes = checkpoint.nbytes <= AXES_BELOW if axes is None else axes
    tensors = scan(checkpoint, rules=rules, engine=engine, threads=threads, axes=axes, quiet=quiet)
    votes = {role: norm_dimension_votes(norms) for role, norms in read_norms(checkpoint, tensors).items()}
    facts = provenance(
        "outliers",
        {
            "model": name,
            "revision": revision,
            "include": include,
            "exclude": exclude,
            "threads": threads,
            "engine": engine,
            "axes": axes,
        },
        model_id=model_id,
        model_revision=found_revision,
        files=[file.name for file in checkpoint.files],
        bytes=checkpoint.nbytes,
        definitions=definitions(rules),
        tied={row.name: row.tied_to for row in tensors if row.tied_to},
        skipped={row.name: row.skip for row in tensors if row.found is None},
    )
    return OutlierReport(name, found_revision, tensors, rules, votes, facts)


def checkpoint_facts(
    model: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
) -> dict[str, Any]:
    """What a report would read, from the headers alone: folder, files, tensors, bytes, dtypes."""
    name, model_id, checkpoint, _ = _open(model, revision, offline)
    checkpoint = checkpoint.select(list(include or []), list(exclude or []))
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
    return {
        "model": name,
        "model_id": model_id,
        "folder": str(checkpoint.folder),
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "skipped": sum(tensor.skip is not None for tensor in checkpoint.tensors),
        "dtypes": dtypes,
        "bytes": checkpoint.nbytes,
    }


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
        "roll-ups": "each entry is judged within its own tensor and counts are added; moments are those of all "
        "entries together; tied weights count once",
    }
    found |= {
        f"outlier_ratio_{rule}": f"share of entries with {text}" for rule, text in rules.definitions().items()
    }
    return found


def gaussian_tail(k: float) -> float:
    """Share of a Gaussian beyond k standard deviations on either side."""
    from math import erfc, sqrt

    return erfc(k / sqrt(2))


def _open(model: str | Path, revision: str | None, offline: bool) -> tuple[str, str, Checkpoint, str]:
    """Name, model id, checkpoint and revision."""
    path = Path(model).expanduser()
    if path.is_file() or (path.is_dir() and not (path / RUN_FILE).is_file()):
        # Weights without a configuration are enough here, unlike for everything that builds a model; and
        # the checkpoint's own check of a broken folder names the tensor.
        checkpoint = open_checkpoint(path)
        found = weights_hash(path) if (path / "config.json").is_file() else "local"
        return str(model), path.resolve().name, checkpoint, found
    source = resolve_model(str(model), revision=revision, offline=offline)
    return source.name, source.model_id, open_checkpoint(source.folder), source.revision


def _ratio(part: TensorOutliers, k: float) -> float | None:
    rule = f"{k:g}sigma"
    return part.counts[rule] / part.counted[rule] if part.counted.get(rule) else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _bar(ratio: float | None, greatest: float, width: int = 12) -> str:
    if not ratio or not greatest:
        return ""
    eighths = round(8 * width * ratio / greatest)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _rank(part: Any) -> tuple[int, int, str]:
    if part is None:
        return (2, 0, "")
    if isinstance(part, int):
        return (0, part, "")
    order = KINDS if part in KINDS else GROUPS
    return (1, order.index(part) if part in order else -1, part)


_PLAIN = {
    "mean", "std", "kurtosis", "max_sigma", "median", "mad", "minimum", "maximum", "mean_abs", "zero_ratio",
    "tail_index",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # `compare_outliers` builds on this module, and is offered here beside `outlier_report`.
    if name in ("compare_outliers", "OutlierComparison"):
        from layerprobe.analyzers import outlier_comparison

        return getattr(outlier_comparison, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

"""The record of a bridge training: its history step by step, and how far it moved the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from layerprobe.errors import BrokenFileError
from layerprobe.metrics.outliers.summary import outlier_ratio
from layerprobe.plans import FreezePlan
from layerprobe.plans.adapters import adapter_updates
from layerprobe.plans.names import clean_name, is_adapter, is_expert
from layerprobe.reading import open_file
from layerprobe.records import Record
from layerprobe.tables import percent, tidy, write_frame
from layerprobe.training.classifier import whole
from layerprobe.training.config import BridgeConfig
from layerprobe.training.loop import Step

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone

COLUMNS = ["step", "epoch", "loss", "accuracy", "lr", "grad_norm", "images_per_second"]
SPECTRUM_LIMIT = 1 << 22
"""Singular values are computed for matrices of at most this many entries (their cost grows with d³)."""


@dataclass(repr=False, kw_only=True)
class BridgeRun(Record):
    """A finished bridge training.

    Attributes
    ----------
    backbone : Backbone
        The trained backbone, in memory.
    plan, config
        What was trained, and how.
    labels : np.ndarray
        Random label of every training image, in the order of the split.
    history : pd.DataFrame
        One row per optimizer step: step, epoch, loss, accuracy, lr, grad_norm, images_per_second.
    rows : list[dict[str, Any]]
        Final figures and, per block, how far the weights moved (`drift_rows`).
    folder : Path | None
        Where checkpoints and the final model are, or None.
    is_main : bool
        False on all but one of several processes; those have nothing to print or save.
    """

    command: ClassVar[str] = "bridge"
    backbone: Backbone
    plan: FreezePlan
    config: BridgeConfig
    labels: np.ndarray
    history: pd.DataFrame
    rows: list[dict[str, Any]]
    about: dict[str, Any]
    folder: Path | None = None
    is_main: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        about = {key: self.about[key] for key in ("model", "revision", "task")}
        return tidy(self.rows, **about, seed=self.config.seed)

    def value(self, metric: str) -> float:
        """A figure of the whole run, such as `random_label_accuracy`."""
        return next(row["value"] for row in self.rows if row["metric"] == metric and row["block"] is None)

    def table(self) -> list[dict[str, Any]]:
        """One row per block for a terminal."""
        frame = self.to_frame()
        wide = frame[frame["block"].notna()].pivot(index="block", columns="metric", values="value")
        states = self.plan.block_states
        return [
            {
                "block": int(block),
                "plan": states[int(block)],
                "change, %": _digits(100 * row["weight_change"]),
                "update rank": _digits(row["update_rank"]),
                "σ₁ after/before": _digits(row["spectral_norm_ratio"], 4),
                "> 6σ before, ppm": _digits(1e6 * row["outlier_ratio_6sigma_before"]),
                "after, ppm": _digits(1e6 * row["outlier_ratio_6sigma_after"]),
            }
            for block, row in wide.iterrows()
        ]

    def summary(self) -> str:
        k = self.config.random_classes
        text = (
            f"After {len(self.history):,} steps {percent(self.value('random_label_accuracy'))} of the random labels "
            f"are recalled (a guess: {percent(1 / k)} of {k}); {self.plan.summary()}."
        )
        return text + (f" Model: {self.folder}" if self.folder is not None else "")


def _digits(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")


class History:
    """One row per optimizer step; history.csv is written with every checkpoint, so that the two agree.

    Parameters
    ----------
    folder : Path | None
        Where history.csv lies, or None for memory alone.
    keep : int
        Steps taken by an earlier part of the run; later rows of its file are dropped.
    """

    def __init__(self, folder: Path | None, *, keep: int = 0) -> None:
        self._path = folder / "history.csv" if folder is not None else None
        self._rows: list[tuple[float, ...]] = []
        if keep and self._path is not None and self._path.exists():
            try:
                # The default parser of floats is off by a last bit now and then.
                with open_file(self._path, what="history", inside=folder) as stream:
                    earlier = pd.read_csv(stream, float_precision="round_trip")[COLUMNS]
            except (ValueError, KeyError, OSError) as error:
                raise BrokenFileError(f"cannot read {self._path}: {error}") from error
            self._rows = list(earlier[earlier["step"] <= keep].itertuples(index=False, name=None))

    def add(self, step: Step, batch_size: int, n_images: int) -> None:
        """Append a step; `step` counts from 1 in the table, `epoch` in passes over the images."""
        taken = step.index + 1
        epoch, speed = taken * batch_size / n_images, batch_size / step.seconds
        self._rows.append((taken, epoch, step.loss, step.accuracy, step.lr, step.grad_norm, speed))

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self._rows, columns=COLUMNS).astype({"step": "int64"})

    def write(self) -> None:
        if self._path is not None:
            write_frame(self.frame(), self._path)


def initial_weights(backbone: Backbone) -> dict[str, Tensor]:
    """Copies, on the CPU, of the parameters that training may change, by name within the model; of sharded ones the
    part that lies here."""
    return {
        clean_name(n): p.detach().clone() if isinstance(p, DTensor) else p.detach().cpu().clone()
        for n, p in backbone.model.named_parameters()
        if p.requires_grad
    }


def drift_rows(backbone: Backbone, before: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Per block, and for what lies outside the blocks (`block` None), against the weights in `before`.

    - `weight_change`: ‖W₁ − W₀‖ / ‖W₀‖ over all entries of the group (Frobenius); 0 for frozen blocks.
    - `update_rank`: effective rank of the change, exp of the entropy of its normalised squared singular
      values, mean over the group's changed matrices.
    - `spectral_norm_ratio`: largest singular value after over before, mean over the changed matrices.
    - `outlier_ratio_6sigma_before`, `…_after`: entries beyond 6 deviations of their matrix, pooled.
    """
    groups: dict[int | None, list[tuple[str, nn.Parameter]]] = {}
    names = {clean_name(name): group for name, group in backbone.layout.parameter_groups.items()}
    updates = adapter_updates(backbone.model)
    for full, parameter in backbone.model.named_parameters():
        if is_adapter(full):
            continue
        name = clean_name(full)
        group = names.get(name, "other")
        block = int(group[6:]) if group.startswith("block.") else None
        groups.setdefault(block, []).append((name, parameter))

    def pair(name: str, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        after = whole(parameter.detach()).cpu()
        if name in updates:  # the weight itself stays as it was
            return after, after + updates[name].cpu()
        return (whole(before[name]) if name in before else after), after

    def matrices(name: str, parameter: nn.Parameter) -> list[tuple[Tensor, Tensor]]:
        start, end = pair(name, parameter)
        if name.endswith("bias"):
            return [(start.flatten(), end.flatten())]
        stacked = end.ndim == 3 and is_expert(name)  # one matrix an expert
        return list(zip(start, end, strict=True)) if stacked else [(start, end)]

    place = {"site": None, "split": None}
    return [
        {"block": block, **place, **row}
        for block in sorted(groups, key=lambda b: (b is None, b))
        for row in _group_drift([each for named in groups[block] for each in matrices(*named)])
    ]


def _group_drift(pairs: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """The rows of one group from (before, after) of its tensors."""
    moved = norm = 0.0
    ranks: list[float] = []
    ratios: list[float] = []
    outliers = [0.0, 0.0]
    skipped = 0
    for before, after in pairs:
        start, end = before.double(), after.double()
        change = end - start
        moved += float(change.square().sum())
        norm += float(start.square().sum())
        if end.ndim != 2:
            continue
        outliers = [total + _n_outliers(w) for total, w in zip(outliers, (before, after), strict=True)]
        if not bool(change.any()):
            continue
        if end.numel() > SPECTRUM_LIMIT:
            skipped += 1
            continue
        ranks.append(_effective_rank(change))
        if (first := _spectral_norm(start)) > 0:
            ratios.append(_spectral_norm(end) / first)
    why = "no matrix changed"
    if skipped:
        why = f"{skipped} changed matrices are larger than {SPECTRUM_LIMIT:,} entries"
    entries = sum(end.numel() for _, end in pairs if end.ndim == 2)
    shares = [total / entries if entries else None for total in outliers]
    share = (moved / norm) ** 0.5 if norm else None
    found = [
        ("weight_change", share, sum(end.numel() for _, end in pairs), "all weights were zero"),
        ("update_rank", sum(ranks) / len(ranks) if ranks else None, len(ranks), why),
        ("spectral_norm_ratio", sum(ratios) / len(ratios) if ratios else None, len(ratios), why),
        ("outlier_ratio_6sigma_before", shares[0], entries, "no matrices"),
        ("outlier_ratio_6sigma_after", shares[1], entries, "no matrices"),
    ]
    return [
        {"metric": metric, "value": value, "n": n, "reason": reason if value is None else None}
        for metric, value, n, reason in found
    ]


def _effective_rank(change: Tensor) -> float:
    squared = torch.linalg.svdvals(change.float()).double().square()
    share = squared / squared.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def _spectral_norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.float(), 2))


def _n_outliers(weight: Tensor) -> float:
    """Entries beyond 6 deviations of their matrix; a constant matrix has none."""
    if bool((weight == weight.flatten()[0]).all()):
        return 0.0
    # Not in float64, which would be held nine times. A copy: FSDP cannot free a gathered tensor that numpy has seen.
    return outlier_ratio(weight.clone(), n_sigma=6.0) * weight.numel()

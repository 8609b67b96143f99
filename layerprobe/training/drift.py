"""How far each block moved during training, and what that did to its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerprobe.metrics.outliers.summary import outlier_ratio
from layerprobe.training.sharding import full

SPECTRUM_LIMIT = 1 << 22
"""Singular values are computed for matrices of at most this many entries (their cost grows with d³)."""


def initial_weights(backbone: Any) -> dict[str, Tensor]:
    """Copies, on the CPU, of the parameters that training may change, by name within the model."""
    return {n: p.detach().cpu().clone() for n, p in backbone.model.named_parameters() if p.requires_grad}


def drift_rows(backbone: Any, before: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Per block, and for what lies outside the blocks (`block` None), against the weights in `before`.

    - `weight_change`: ‖W₁ − W₀‖ / ‖W₀‖ over all entries of the group (Frobenius); 0 for frozen blocks.
    - `update_rank`: effective rank of the change, exp of the entropy of its normalised squared singular
      values, mean over the group's changed matrices.
    - `spectral_norm_ratio`: largest singular value after over before, mean over the changed matrices.
    - `outlier_ratio_6sigma_before`, `…_after`: entries beyond 6 deviations of their matrix, pooled.
    """
    groups: dict[int | None, list[tuple[str, Tensor]]] = {}
    for name, parameter in backbone.model.named_parameters():
        group = backbone.layout.parameter_groups.get(name, "other")
        block = int(group[6:]) if group.startswith("block.") else None
        groups.setdefault(block, []).append((name, full(parameter.detach()).cpu()))
    rows: list[dict[str, Any]] = []
    for block in sorted(groups, key=lambda b: (b is None, b)):
        rows += [
            {"block": block, "site": None, "split": None, **row} for row in _group_rows(groups[block], before)
        ]
    return rows


def _group_rows(members: list[tuple[str, Tensor]], before: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    moved = norm = 0.0
    ranks: list[float] = []
    spectral: list[float] = []
    outliers = {"before": 0.0, "after": 0.0}
    entries = skipped = 0
    n = sum(after.numel() for _, after in members)
    for name, after in members:
        start = before.get(name, after).double()
        end = after.double()
        change = end - start
        moved += float(change.square().sum())
        norm += float(start.square().sum())
        if after.ndim != 2:
            continue
        entries += after.numel()
        for when, weight in (("before", start), ("after", end)):
            if bool((weight != weight.flatten()[0]).any()):
                outliers[when] += outlier_ratio(weight.numpy(), n_sigma=6.0) * after.numel()
        if name in before and bool(change.any()):
            if after.numel() > SPECTRUM_LIMIT:
                skipped += 1
                continue
            singular = torch.linalg.svdvals(change.float()).double()
            share = singular.square() / singular.square().sum()
            ranks.append(float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum())))
            first = torch.linalg.matrix_norm(start.float(), 2)
            if first > 0:
                spectral.append(float(torch.linalg.matrix_norm(end.float(), 2) / first))
    why = (
        f"{skipped} changed matrices are larger than {SPECTRUM_LIMIT:,} entries"
        if skipped
        else "no matrix changed"
    )
    return [
        _row("weight_change", (moved / norm) ** 0.5 if norm else None, n, "all weights were zero"),
        _row("update_rank", sum(ranks) / len(ranks) if ranks else None, len(ranks), why),
        _row("spectral_norm_ratio", sum(spectral) / len(spectral) if spectral else None, len(spectral), why),
        *(
            _row(
                f"outlier_ratio_6sigma_{when}",
                outliers[when] / entries if entries else None,
                entries,
                "no matrices",
            )
            for when in ("before", "after")
        ),
    ]


def _row(metric: str, value: float | None, n: int, reason: str) -> dict[str, Any]:
    return {"metric": metric, "value": value, "n": n, "reason": None if value is not None else reason}

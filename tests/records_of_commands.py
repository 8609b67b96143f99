"""One small saved record a command, as its rows look; for tests of pages, figures and `lp.load`."""

from __future__ import annotations

from typing import Any

import pandas as pd

from layerprobe.provenance import provenance
from layerprobe.records import SavedRecord
from layerprobe.tables import tidy

BLOCKS = (0, 1, 2)
ABOUT = {"model": "gpt2", "revision": "abc", "task": "digits", "seed": 0}


def _by_block(metric: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"block": block, "site": "resid_post", "metric": metric, "value": 0.5 + 0.1 * block, **more}
        for block in BLOCKS
    ]


def _probe() -> list[dict[str, Any]]:
    ends = {"split": "test", "low": 0.4, "high": 0.8, "n": 50, "C": 1.0, "control": None}
    chance = {"metric": "probe_accuracy", "split": "test", "value": 0.1, "n": 50, "control": "chance"}
    return [*_by_block("probe_accuracy", **ends), chance]


def _cka() -> list[dict[str, Any]]:
    return [
        {
            "block": i,
            "site": "resid_post",
            "metric": "cka_debiased",
            "value": 1 - 0.3 * abs(i - j),
            "low": 0.5,
            "high": 0.9,
            "pvalue": 0.01,
            "pvalue_max": 0.02,
            "n": 40,
            "model_y": "vit",
            "task_y": "digits",
            "block_y": j,
            "site_y": "resid_post",
        }
        for i in BLOCKS
        for j in BLOCKS
    ]


def _outliers() -> list[dict[str, Any]]:
    about = {"level": "kind", "stack": "model", "group": "blocks"}
    return [
        {
            "block": block,
            "metric": "outlier_ratio_3sigma",
            "value": 0.003 * (1 + block),
            "kind": kind,
            **about,
        }
        for kind in ("q", "down")
        for block in BLOCKS
    ]


def _compare() -> list[dict[str, Any]]:
    about = {"metric": "ratio_of_ratios_3sigma", "model_y": "vit", "level": "pair", "depth": "all"}
    return [
        {"part": part, "value": 1.5, "low": 1.1, "high": 2.2, **about} for part in ("all", "mlp in", "norm")
    ]


def _evaluate() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for arm, value, cost in (("language", 0.9, 2e9), ("random", 0.6, 3e9)):
        facts = {"arm": arm, "train_flops": cost, "train_seconds": 1.0, "trainable_parameters": 1e6}
        for seed in (0, 1):
            seen = value + 0.01 * seed
            rows.append({"metric": "test_accuracy", "split": "test", "value": seen, "seed": seed, **facts})
        mean = {"metric": "test_accuracy_mean", "split": "test", "value": value, "arm": arm}
        rows.append({**mean, "low": value - 0.05, "high": value + 0.05, "interval": "t 95 % over 2 seeds"})
    return rows


def _arms() -> list[dict[str, Any]]:
    return [
        {
            "metric": "test_accuracy",
            "split": "test",
            "arm": arm,
            "value": value,
            "low": 0.4,
            "high": 0.9,
            "n": 3,
        }
        | {"trainable_parameters": size}
        for arm, value, size in (("plan", 0.8, 1e6), ("all", 0.7, 2e6), ("probe", 0.6, 0))
    ]


def _plan() -> list[dict[str, Any]]:
    return [
        {
            "block": block,
            "metric": "trainable_parameters",
            "value": 100.0 * (block > 0),
            "n": 100,
            "plan": "p",
        }
        | {"group": f"block.{block}", "state": "trainable" if block else "frozen"}
        for block in BLOCKS
    ]


ROWS = {
    "outliers": _outliers(),
    "compare": _compare(),
    "features": _by_block("max_offset_sigma", split="train"),
    "cka": _cka(),
    "probe": _probe(),
    "transfer": _by_block(
        "transfer_logme", split="train", family="readable", low=0.4, high=0.9, higher_is_better=True
    ),
    "attribute": _by_block("attribution_skip", stderr=0.05),
    "bridge": [*_by_block("weight_change"), {"metric": "random_label_accuracy", "value": 0.9}],
    "evaluate": _evaluate(),
    "freeze-search": _arms(),
    "plan-show": _plan(),
}


def example(command: str, **changes: Any) -> SavedRecord:
    """The record of a command, `changes` over what all its rows say."""
    frame: pd.DataFrame = tidy(ROWS[command], **{**ABOUT, **changes})
    return SavedRecord(
        command=command,
        frame=frame,
        answer=f"The answer of {command}. It has two sentences.",
        rows=[{"layer": "block 0", "value": 0.5}],
        provenance=provenance(command, {"limit": 7}),
    )

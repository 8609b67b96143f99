"""What does each frozen layer already say about the task, and what would training it change?

Two families of scores, never mixed into one number: *readable* scores come from a layer's features and the
labels, *trainable* scores from gradients of a probe on the whole backbone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from layerprobe.analyzers.features import extract_features
from layerprobe.analyzers.heads import check_head, make_classifier
from layerprobe.analyzers.trainability import TRAINABLE_SCORES, trainable_scores
from layerprobe.backbones.backbone import Backbone
from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.layers import LayerRef
from layerprobe.metrics.transferability.scores import HIGHER_IS_BETTER, half_sample_errors, readable_scores
from layerprobe.progress import progress_bar
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.tables import tidy
from layerprobe.tasks import ImageSplit, Task

FAMILIES = ("readable", "trainable")
Z_95 = 1.959963984540054


@dataclass(repr=False)
class TransferScores(Record):
    """Transfer scores by layer. Rows carry `family`, `low` and `high` (95 %), and `higher_is_better`.

    Readable rows belong to a place (`embed` or a block's `resid_post`); trainable rows to a block's parameters,
    so their `site` is empty, and no direction is claimed for them.
    """

    command: ClassVar[str] = "transfer"

    frame: pd.DataFrame
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def score(self, name: str) -> pd.DataFrame:
        """The rows of one score ("logme" or "transfer_logme"), in order of layers."""
        metric = name if name.startswith("transfer_") else f"transfer_{name}"
        rows = self.frame[self.frame["metric"] == metric]
        if rows.empty:
            known = ", ".join(sorted(self.frame["metric"].unique()))
            raise UnknownNameError(f"no score '{name}' in this record; it has {known}")
        return rows

    def table(self) -> list[dict[str, Any]]:
        return self.wide().reset_index().to_dict("records")

    def wide(self) -> pd.DataFrame:
        """One row a layer, one column a score, for printing: readable scores first."""
        frame = self.frame.assign(
            layer=["embed" if b is pd.NA or pd.isna(b) else f"block {b}" for b in self.frame["block"]],
            score=[m.removeprefix("transfer_") for m in self.frame["metric"]],
        )
        order, columns = frame["layer"].unique(), frame["score"].unique()
        return frame.pivot(index="layer", columns="score", values="value").loc[order, columns]

    def summary(self) -> str:
        parts = []
        readable = self.frame[(self.frame["family"] == "readable") & self.frame["value"].notna()]
        if not readable.empty:
            votes = []
            for metric, rows in readable.groupby("metric", sort=False):
                sign = 1 if HIGHER_IS_BETTER[str(metric).removeprefix("transfer_")] else -1
                votes.append(_place(rows.loc[(sign * rows["value"].astype(float)).idxmax()]))
            best = pd.Series(votes).value_counts()
            logme = readable[readable["metric"] == "transfer_logme"]
            detail = ""
            if not logme.empty:
                top = logme.loc[logme["value"].astype(float).idxmax()]
                detail = f" (LogME is highest at {_place(top)}: {_with_error(top)})"
            parts.append(f"Readable: {best.index[0]} leads in {best.iloc[0]} of {len(votes)} scores{detail}.")
        trainable = self.frame[(self.frame["family"] == "trainable") & self.frame["value"].notna()]
        leads = [
            f"{name} at {_place(rows.loc[rows['value'].astype(float).idxmax()])}"
            for name in ("rgn", "gradient_snr")
            if not (rows := trainable[trainable["metric"] == f"transfer_{name}"]).empty
        ]
        if leads:
            parts.append(f"Trainable: highest {', '.join(leads)}.")
        if not parts:
            return f"No score is defined here: {self.frame['reason'].dropna().iloc[0]}"
        parts.append("The two families answer different questions and are not combined.")
        return " ".join(parts)


def transfer_scores(
    backbone: Backbone,
    task: Task,
    *,
    families: Sequence[str] = FAMILIES,
    layers: Sequence[LayerRef] | None = None,
    knn: bool = True,
    n_replicates: int = 30,
    n_batches: int = 8,
    batch_size: int = 32,
    n_fisher: int = 64,
    head: str | nn.Module = "probe",
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> TransferScores:
    """Readable and trainable transfer scores of every layer, on training images alone.

    Parameters
    ----------
    families : of `FAMILIES`.
    layers : where the readable scores look; default `embed` and every block's output.
    knn : also leave-one-out kNN, whose cost grows with the square of the images.
    n_replicates : half samples for the standard errors of the readable scores; 0 leaves errors out. kNN gets the
        binomial error of its accuracy instead.
    n_batches, batch_size : of the gradients, ≥ 3 batches; training images behind those the probe was fitted to,
        where there are enough.
    n_fisher : single images for the Fisher information, ≥ 2.
    head : what the gradients are gradients of, see `layerprobe.analyzers.heads.make_classifier`.

    Returns
    -------
    TransferScores.

    Raises
    ------
    UsageError : too few batches or images; LayerprobeError : non-finite features or loss.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families:
        raise UnknownNameError(f"unknown families {unknown}; choose of: {', '.join(FAMILIES)}")
    if isinstance(head, str):
        check_head(head)
    if "trainable" in families and (n_batches < 3 or batch_size < 1 or n_fisher < 2):
        raise UsageError(
            f"trainable scores need at least 3 batches and 2 images for Fisher: got n_batches={n_batches}, "
            f"batch_size={batch_size}, n_fisher={n_fisher}"
        )
    backbone.prepare(task)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    if "readable" in families:
        features = extract_features(backbone, task, "train", layers=layers, cache_dir=cache_dir, quiet=quiet)
        with progress_bar(features.layers, unit="layer", desc="readable", quiet=quiet) as bar:
            for layer in bar:
                rows += _readable_rows(layer, features[layer], features.labels, knn, n_replicates, seed)
    if "trainable" in families:
        found, facts = _trainable_rows(backbone, task, head, n_batches, batch_size, n_fisher, seed, quiet)
        rows += found
    frame = tidy(
        rows,
        model=backbone.name if backbone.init == "pretrained" else f"{backbone.name} (random init)",
        revision=backbone.source.revision,
        task=task.name,
        split="train",
        seed=seed,
    )
    arguments = {
        "families": list(families),
        "layers": None if layers is None else [str(layer) for layer in layers],
        "knn": knn,
        "n_replicates": n_replicates,
        "n_batches": n_batches,
        "batch_size": batch_size,
        "n_fisher": n_fisher,
        "seed": seed,
    }
    made = provenance(
        "transfer", arguments, backbone=backbone.describe(), task=task.describe(), gradients=facts
    )
    return TransferScores(frame, made)


def _readable_rows(
    layer: LayerRef, features: np.ndarray, labels: np.ndarray, knn: bool, n_replicates: int, seed: int
) -> list[dict[str, Any]]:
    X = np.asarray(features)
    names = tuple(name for name in HIGHER_IS_BETTER if knn or name != "knn")
    scores = readable_scores(X, labels, scores=names)
    errors = half_sample_errors(X, labels, n_replicates=n_replicates, seed=seed) if n_replicates else {}
    rows = []
    for name, (value, reason) in scores.items():
        stderr = errors[name].value if name in errors else None
        if name == "knn" and value is not None:
            stderr = float(np.sqrt(value * (1 - value) / len(X)))
        rows.append(
            {
                "block": layer.block,
                "site": layer.site,
                "metric": f"transfer_{name}",
                **_measured(value, stderr),
                "n": len(X),
                "reason": reason,
                "family": "readable",
                "higher_is_better": HIGHER_IS_BETTER[name],
            }
        )
    return rows


def _trainable_rows(
    backbone: Backbone,
    task: Task,
    head: str | nn.Module,
    n_batches: int,
    batch_size: int,
    n_fisher: int,
    seed: int,
    quiet: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    train = task.train
    wanted = n_batches * batch_size
    if len(train) < 3 * batch_size:
        raise UsageError(
            f"trainable scores need at least 3 batches of {batch_size}: {task.name} has {len(train)} training "
            "images; use a smaller batch size"
        )
    # Images that the probe has fitted have small gradients, so others come first.
    n_train = max(len(train) // 2, min(2000, len(train) - wanted))
    n_train = min(n_train, 2000)
    classifier = make_classifier(backbone, task, head, n_train=n_train)
    order = np.concatenate([np.arange(n_train, len(train)), np.arange(n_train)])
    n_batches = min(n_batches, len(train) // batch_size)
    batches = [
        _batch(backbone, train, order[i * batch_size : (i + 1) * batch_size]) for i in range(n_batches)
    ]
    singles = [_batch(backbone, train, order[i : i + 1])[0] for i in range(min(n_fisher, len(train)))]
    found = trainable_scores(classifier, batches, singles, seed=seed, quiet=quiet)
    rows = []
    for name in TRAINABLE_SCORES:
        for block, scores in enumerate(found):
            value, stderr, n = scores[name].value, scores[name].stderr, scores[name].n
            finite = np.isfinite(value)
            rows.append(
                {
                    "block": block,
                    "site": None,
                    "metric": f"transfer_{name}",
                    **_measured(
                        value if finite else None, stderr if finite and np.isfinite(stderr) else None
                    ),
                    "n": n if name == "fisher" else n * batch_size,
                    "reason": None if finite else "the gradients of all batches are equal: there is no noise",
                    "family": "trainable",
                    "higher_is_better": None,
                }
            )
    seen = max(n_batches * batch_size, n_fisher)
    fresh = "yes" if seen <= len(train) - n_train else "in part"
    return rows, {
        **classifier.facts,
        "n_batches": n_batches,
        "batch_size": batch_size,
        "images_unseen_by_the_probe": fresh if classifier.facts["head"] == "probe" else "unknown",
    }


def _batch(backbone: Backbone, split: ImageSplit, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    return backbone.preprocess(split.images(rows)), torch.from_numpy(split.labels[rows])


def _measured(value: float | None, stderr: float | None) -> dict[str, float | None]:
    if value is None or stderr is None:
        return {"value": value, "stderr": None, "low": None, "high": None}
    return {"value": value, "stderr": stderr, "low": value - Z_95 * stderr, "high": value + Z_95 * stderr}


def _place(row: pd.Series) -> str:
    return "embed" if pd.isna(row["block"]) else f"block {int(row['block'])}"


def _with_error(row: pd.Series) -> str:
    if row["stderr"] is None or pd.isna(row["stderr"]):
        return f"{row['value']:.4g}"
    return f"{row['value']:.4g} ± {row['stderr']:.2g}"

"""What does each frozen layer already say about the task, and what would training it change?

Two families of scores, never mixed into one number: *readable* scores come from a layer's features and the
labels, *trainable* scores from gradients of a probe on the whole backbone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from layerprobe.analyzers.extraction import pixel_batches
from layerprobe.analyzers.features import columns_of, extract_features, place, row_name
from layerprobe.analyzers.heads import Predictor, check_head, make_predictor, only_these_train
from layerprobe.analyzers.leader import add_gaps, best_row, lead_in_words
from layerprobe.backbones.backbone import Backbone
from layerprobe.errors import LayerprobeError, UnknownNameError, UsageError
from layerprobe.layers import LayerRef
from layerprobe.metrics.transferability.scores import HIGHER_IS_BETTER, half_sample_errors, readable_scores
from layerprobe.progress import progress_bar
from layerprobe.provenance import provenance
from layerprobe.records import Estimate, Record, Repeated
from layerprobe.tables import ranks, table_by_layer, tidy
from layerprobe.tasks import Task

if TYPE_CHECKING:
    from tqdm import tqdm

FAMILIES = ("readable", "trainable")
LOWER_IS_BETTER = {f"transfer_{name}" for name, higher in HIGHER_IS_BETTER.items() if not higher}
TRAINABLE_SCORES = ("rgn", "gradient_snr", "taylor", "fisher")
GRADIENT_BYTES = 4 << 30
"""Gradients of several batches are held up to this size; beyond it, blocks take turns."""
Z_95 = 1.959963984540054


@dataclass(repr=False)
class TransferScores(Record):
    """Transfer scores by layer. Rows carry `family`, `low` and `high` (95 %), and `higher_is_better`.

    `gap_to_best` is how far a layer is behind the best, or highest, of its score; `gap_low` and `gap_high` are the
    95 % interval from the same half samples or batches (kNN has none).

    Readable rows belong to a place (`embed` or a block's `resid_post`); trainable rows to a block's parameters,
    so their `site` is empty, and no direction is claimed for them.
    """

    command: ClassVar[str] = "transfer"

    frame: pd.DataFrame
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def table(self) -> list[dict[str, Any]]:
        """One row a layer, its rank in each score: 1 is best, or highest where no direction is claimed."""
        layers = [row_name(*where) for where in zip(self.frame["block"], self.frame["site"], strict=True)]
        ranked = self.frame.assign(value=ranks(self.frame, lower_is_better=LOWER_IS_BETTER))
        return table_by_layer(ranked, layers, key="layer", prefix="transfer_")

    def summary(self) -> str:
        defined = self.frame[self.frame["value"].notna()]
        if defined.empty:
            return f"No score is defined here: {self.frame['reason'].dropna().iloc[0]}"
        parts = []
        readable, trainable = (defined[defined["family"] == family] for family in FAMILIES)
        if not readable.empty:
            scores = {str(metric): rows for metric, rows in readable.groupby("metric", sort=False)}
            best = [_place_of(best_row(rows, lower_is_better=LOWER_IS_BETTER)) for rows in scores.values()]
            most = pd.Series(best).mode()
            parts.append(f"Readable: {_leads(scores.get('transfer_logme', next(iter(scores.values()))))}.")
            often = f"{' and '.join(most)} ({best.count(most[0])})"
            parts.append(f"Most often best of {len(best)} scores, which are correlated: {often}.")
        leads = [
            _leads(rows)
            for name in ("rgn", "gradient_snr")
            if not (rows := trainable[trainable["metric"] == f"transfer_{name}"]).empty
        ]
        if leads:
            parts.append(f"Trainable: {'; '.join(leads)}.")
        parts.append("The two families answer different questions and are not combined.")
        return " ".join(parts)


def _leads(rows: pd.DataFrame) -> str:
    """Where the one score of `rows` is highest, or lowest where that is better, and whether that is shown."""
    metric, top = str(rows["metric"].iloc[0]), best_row(rows, lower_is_better=LOWER_IS_BETTER)
    name = metric.removeprefix("transfer_").replace("logme", "LogME")
    extreme = "lowest" if metric in LOWER_IS_BETTER else "highest"
    return f"{name} is {extreme} at {_place_of(top)}{lead_in_words(rows, top, _place_of)}"


def _place_of(row: pd.Series) -> str:
    return row_name(row["block"], row["site"])


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
    families : Sequence[str]
        Of `FAMILIES`.
    layers : Sequence[LayerRef] | None
        Where the readable scores look; default `embed` and every block's output.
    knn : bool
        Also leave-one-out kNN, whose cost grows with the square of the images.
    n_replicates : int
        Half samples for the standard errors of the readable scores; 0 leaves errors out. kNN gets the
        binomial error of its accuracy instead.
    n_batches, batch_size : int
        Of the gradients, ≥ 3 batches; training images behind those the probe was fitted to, where there are
        enough.
    n_fisher : int
        Single images for the Fisher information, ≥ 2.
    head : str | nn.Module
        What the gradients are gradients of, see `layerprobe.analyzers.heads.make_predictor`.

    Raises
    ------
    UsageError
        Too few batches or images.
    LayerprobeError
        Non-finite features or loss.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families:
        raise UnknownNameError(f"unknown families {unknown}; choose of: {', '.join(FAMILIES)}")
    if isinstance(head, str):
        check_head(head)
    sizes = {"n_batches": n_batches, "batch_size": batch_size, "n_fisher": n_fisher}
    if "trainable" in families and (n_batches < 3 or batch_size < 1 or n_fisher < 2):
        given = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise UsageError(f"trainable scores need at least 3 batches and 2 images for Fisher: got {given}")
    backbone.prepare(task)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    if "readable" in families:
        features = extract_features(backbone, task, "train", layers=layers, cache_dir=cache_dir, quiet=quiet)
        for layer in progress_bar(features.layers, unit="layer", desc="readable", quiet=quiet):
            rows += _readable_rows(layer, features[layer], features.labels, knn, n_replicates, seed)
    if "trainable" in families:
        found, facts = _trainable_rows(backbone, task, head, seed=seed, quiet=quiet, **sizes)
        rows += found
    places = None if layers is None else [str(layer) for layer in layers]
    arguments = {"families": list(families), "layers": places, "knn": knn, "n_replicates": n_replicates}
    arguments |= {**sizes, "seed": seed}
    described = {"backbone": backbone.provenance(), "task": task.describe(), "gradients": facts}
    add_gaps(rows, lower_is_better=LOWER_IS_BETTER)
    frame = tidy(rows, **columns_of(backbone, task), split="train", seed=seed)
    return TransferScores(frame, provenance("transfer", arguments, **described))


def _readable_rows(
    layer: LayerRef, features: np.ndarray, labels: np.ndarray, knn: bool, n_replicates: int, seed: int
) -> list[dict[str, Any]]:
    X = np.asarray(features)
    names = tuple(name for name in HIGHER_IS_BETTER if knn or name != "knn")
    scores = readable_scores(X, labels, scores=names)
    errors = half_sample_errors(X, labels, n_replicates=n_replicates, seed=seed) if n_replicates else {}
    rows = []
    for name, score in scores.items():
        half_samples = errors.get(name)
        stderr = half_samples.value if half_samples else None
        if name == "knn" and score.value is not None:
            stderr = float(np.sqrt(score.value * (1 - score.value) / len(X)))
        reason = score.reason or (half_samples.reason if half_samples else None)
        found = Estimate(value=score.value, stderr=stderr, n=len(X), reason=reason)
        if isinstance(half_samples, Repeated):
            found = Repeated(**vars(found), repeats=half_samples.repeats)
        columns = {"family": "readable", "higher_is_better": HIGHER_IS_BETTER[name]}
        rows.append({**place(layer), "metric": f"transfer_{name}", **_measured(found), **columns})
    return rows


def _trainable_rows(
    backbone: Backbone,
    task: Task,
    head: str | nn.Module,
    *,
    n_batches: int,
    batch_size: int,
    n_fisher: int,
    seed: int,
    quiet: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    train = task.train
    if len(train) < 3 * batch_size:
        raise UsageError(
            f"trainable scores need at least 3 batches of {batch_size}: {task.name} has {len(train)} training "
            "images; use a smaller batch size"
        )
    # Images that the probe has fitted have small gradients, so others come first.
    n_train = min(max(len(train) // 2, min(2000, len(train) - n_batches * batch_size)), 2000)
    predictor = make_predictor(backbone, task, head, n_train=n_train)
    order = np.concatenate([np.arange(n_train, len(train)), np.arange(n_train)])
    n_batches = min(n_batches, len(train) // batch_size)
    part = train.subset(order[: n_batches * batch_size])
    batches = [
        (pixels, torch.from_numpy(part.labels[rows]))
        for rows, pixels in pixel_batches(backbone, part, batch_size)
    ]
    singles = [pixels for _, pixels in pixel_batches(backbone, train.subset(order[:n_fisher]), 1)]
    blocks = trainable_scores(predictor, batches, singles, seed=seed, quiet=quiet)
    rows = [
        {
            "block": block,
            "site": None,
            "metric": f"transfer_{name}",
            **_measured(scores[name], images=1 if name == "fisher" else batch_size),
            "family": "trainable",
            "higher_is_better": None,
        }
        for name in TRAINABLE_SCORES
        for block, scores in enumerate(blocks)
    ]
    seen = max(n_batches * batch_size, n_fisher)
    fresh = "yes" if seen <= len(train) - n_train else "in part"
    return rows, {
        **predictor.facts,
        "n_batches": n_batches,
        "batch_size": batch_size,
        "images_unseen_by_the_probe": fresh if predictor.facts["head"] == "probe" else "unknown",
    }


def _measured(found: Estimate, *, images: int = 1) -> dict[str, Any]:
    """The table columns of a score with its 95 % normal interval; it rests on n times so many `images`."""
    value, stderr, reason = found.value, found.stderr, found.reason
    if value is not None and not np.isfinite(value):
        value, reason = None, "the gradients of all batches are equal: there is no noise"
    if value is None or stderr is None or not np.isfinite(stderr):
        columns = {"value": value, "stderr": None, "low": None, "high": None}
    else:
        low, high = value - Z_95 * stderr, value + Z_95 * stderr
        columns = {"value": value, "stderr": stderr, "low": low, "high": high}
    return {**columns, "n": (found.n or 0) * images, "reason": reason, "found": found}


def trainable_scores(
    predictor: Predictor,
    batches: Sequence[tuple[Tensor, Tensor]],
    images: Sequence[Tensor],
    *,
    seed: int = 0,
    quiet: bool = False,
) -> list[dict[str, Estimate]]:
    """The four trainable scores of every block, from the gradient of the cross-entropy of a fixed head.

    With g_b the gradient of batch b's mean loss in the block's P parameters θ, over B batches:

    - `rgn`: ‖g_b‖/‖θ‖, mean over batches (Lee et al., Surgical fine-tuning, ICLR 2023, arXiv 2210.11466).
    - `gradient_snr`: squared length of the expected gradient over the variance of one batch's gradient, both
      estimated without bias from the products g_b·g_c; noise alone gives 0 on average, and may fall below.
      Its error is the jackknife over batches. It grows with the batch size.
    - `taylor`: mean over parameters of |θ·g_b|, mean over batches (Molchanov et al., Importance estimation for
      neural network pruning, CVPR 2019, arXiv 1906.10771, first order).
    - `fisher`: mean over parameters of the Fisher information: E ‖∇ log p(ŷ|x)‖²/P over single images x,
      labels ŷ drawn from the model's own prediction.

    Parameters
    ----------
    batches : Sequence[tuple[Tensor, Tensor]]
        At least 3 pairs of pixels b×C×H×W and labels b.
    images : Sequence[Tensor]
        Single images 1×C×H×W for the Fisher information.

    """
    blocks = predictor.backbone.blocks
    size = max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks)
    together = max(1, int(GRADIENT_BYTES // max(1, size * len(batches))))
    scores: list[dict[str, Estimate]] = []
    turns = [blocks[start : start + together] for start in range(0, len(blocks), together)]
    with progress_bar(total=len(turns) * (len(batches) + len(images)), unit="batch", quiet=quiet) as bar:
        for turn in turns:
            parameters = [list(block.parameters()) for block in turn]
            with only_these_train(predictor.backbone, [p for block in parameters for p in block]):
                scores += _scores(predictor, parameters, batches, images, seed, bar)
    return scores


def _scores(
    predictor: Predictor,
    blocks: list[list[nn.Parameter]],
    batches: Sequence[tuple[Tensor, Tensor]],
    images: Sequence[Tensor],
    seed: int,
    bar: tqdm[Any],
) -> list[dict[str, Estimate]]:
    """The scores of the blocks whose parameters are given, all from the same backward passes."""
    sizes = [sum(p.numel() for p in block) for block in blocks]
    kept: list[list[list[Tensor]]] = []  # batch, block, parameter
    taylor = np.zeros((len(blocks), len(batches)))
    for number, (pixels, labels) in enumerate(batches):
        logits = predictor(pixels).float()
        loss = functional.cross_entropy(logits, labels.to(logits.device))
        if not torch.isfinite(loss):
            raise LayerprobeError(
                f"the loss of batch {number} is {loss.item()}; try --dtype bfloat16 or float32"
            )
        kept.append(_gradients(loss, blocks))
        for index, block in enumerate(blocks):
            pairs = zip(block, kept[-1][index], strict=True)
            products = [float((p.detach() * g).abs().sum(dtype=torch.float64)) for p, g in pairs]
            taylor[index, number] = sum(products) / sizes[index]
        bar.update(1)
    fisher = np.zeros((len(blocks), len(images)))
    draw = torch.Generator().manual_seed(seed)
    for number, pixels in enumerate(images):
        logits = predictor(pixels).float()
        label = torch.multinomial(logits.detach().softmax(dim=1).cpu(), 1, generator=draw)[:, 0]
        gradients = _gradients(functional.cross_entropy(logits, label.to(logits.device)), blocks)
        fisher[:, number] = [
            sum(map(_square, own)) / size for own, size in zip(gradients, sizes, strict=True)
        ]
        bar.update(1)
    found = []
    for index, block in enumerate(blocks):
        inner = np.zeros((len(batches), len(batches)))
        for same in zip(*(gradients[index] for gradients in kept), strict=True):
            stacked = torch.stack([gradient.flatten() for gradient in same]).float()
            inner += (stacked @ stacked.T).double().cpu().numpy()
        length = float(np.sqrt(sum(_square(p.detach()) for p in block)))
        found.append(
            {
                "rgn": _mean(np.sqrt(np.diagonal(inner)) / length),
                "gradient_snr": gradient_snr(inner),
                "taylor": _mean(taylor[index]),
                "fisher": _mean(fisher[index]),
            }
        )
    return found


def gradient_snr(products: np.ndarray) -> Estimate:
    """Signal over noise of B gradients from the B×B matrix of their inner products, with its jackknife error.

    Signal: mean of g_b·g_c over b ≠ c, whose expectation is ‖E g‖². Noise: the unbiased variance
    Σ_b ‖g_b − ḡ‖²/(B − 1). B ≥ 3. Gradients that are all equal have no noise; the ratio is then infinite
    or, for zero gradients, 0.
    """
    n = len(products)

    def ratio(rows: np.ndarray) -> float:
        part = products[np.ix_(rows, rows)]
        m, own, total = len(rows), float(np.trace(part)), float(part.sum())
        signal = (total - own) / (m * (m - 1))
        noise = (own - total / m) / (m - 1)
        if noise <= 1e-12 * own / m:
            return float("inf") if signal > 0 else 0.0
        return signal / noise

    left_out = np.array([ratio(np.delete(np.arange(n), i)) for i in range(n)])
    value = ratio(np.arange(n))
    if not np.isfinite(left_out).all():
        return Estimate(value=value, n=n)
    scale = (n - 1) / np.sqrt(n)
    stderr = float(scale * left_out.std(ddof=1))
    return Repeated(value=value, stderr=stderr, n=n, repeats=left_out, scale=float(scale))


def _gradients(loss: Tensor, blocks: list[list[nn.Parameter]]) -> list[list[Tensor]]:
    """Gradients by block and parameter; a parameter that the loss does not reach gets zeros."""
    raw = iter(torch.autograd.grad(loss, [p for block in blocks for p in block], allow_unused=True))
    return [[torch.zeros_like(p) if (g := next(raw)) is None else g for p in block] for block in blocks]


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _mean(values: np.ndarray) -> Estimate:
    scale = 1 / float(np.sqrt(len(values)))
    stderr = scale * float(values.std(ddof=1))
    return Repeated(value=float(values.mean()), stderr=stderr, n=len(values), repeats=values, scale=scale)

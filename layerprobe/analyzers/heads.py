"""A backbone with a head that turns its features into logits, where an analysis needs a prediction.

Gradients and attributions ask "of what?": of a linear probe on the pooled final features, of the head that the
checkpoint itself brought, or of one the caller hands over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.analyzers.extraction import pixel_batches
from layerprobe.backbones.backbone import Backbone, evaluating
from layerprobe.backbones.own_head import own_head
from layerprobe.choices import HEADS
from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.metrics.probing.logistic import fit_logistic_path
from layerprobe.tasks import ImageSplit, Task


@dataclass
class Predictor:
    """Pixels B×C×H×W → logits B×K, with a note of where the head comes from."""

    backbone: Backbone
    logits: Callable[[Tensor], Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.logits(pixels)


def check_head(head: str) -> None:
    """UnknownNameError for what is not in `HEADS`."""
    if head not in HEADS:
        raise UnknownNameError(f"unknown head '{head}'; choose one of: {', '.join(HEADS)}, or pass a module")


def make_predictor(
    backbone: Backbone,
    task: Task,
    head: str | nn.Module = "probe",
    *,
    n_train: int = 2000,
    batch_size: int = 128,
) -> Predictor:
    """The backbone with a head for `task`.

    Parameters
    ----------
    head : str | nn.Module
        "probe" fits a linear probe to the pooled final features of the first `n_train` training images, its C
        chosen on validation; "own" takes the image classifier that the checkpoint brought, its outputs in
        the order of the task's classes; a module maps pooled features B×D to logits B×K (for example the
        head of a bridge run).

    Raises
    ------
    UsageError
        "own" where there is none, or its outputs are not the task's classes by name.
    UnknownNameError
        Another word.
    """
    backbone.prepare(task)
    if backbone.layout.tokens_first:
        raise UsageError(
            f"{backbone.name} keeps hidden states as tokens × images × width inside; attribution needs images first"
        )
    if isinstance(head, nn.Module):
        return Predictor(backbone, lambda pixels: head(backbone.features(pixels)), {"head": "given"})
    check_head(head)
    if head == "own":
        return Predictor(backbone, own_head(backbone, task), {"head": "own"})
    layer, facts = fit_probe_head(backbone, task, n_train=n_train, batch_size=batch_size)
    return Predictor(backbone, lambda pixels: layer(backbone.features(pixels).to(layer.weight.dtype)), facts)


def fit_probe_head(
    backbone: Backbone, task: Task, *, n_train: int = 2000, batch_size: int = 128
) -> tuple[nn.Linear, dict[str, Any]]:
    """A linear layer on the pooled final features (after the model's final norm), and how it was found.

    Multinomial logistic regression on standardised features; C by validation accuracy from the default grid of
    `metrics.probing`, the smallest on a tie. The standardisation is folded into the layer.

    Raises
    ------
    UsageError
        Fewer than two classes among the training images.
    """
    train = task.train.subset(range(min(n_train, len(task.train))))
    classes, labels = np.unique(train.labels, return_inverse=True)
    if len(classes) < 2:
        raise UsageError(f"a probe needs two classes; the first {len(train)} training images have one")
    X, X_val = (_final_features(backbone, split, batch_size) for split in (train, task.validation))
    # Some norms silence a dimension to 1e-9 of the others; standardised, it would get a weight of 1e9 and an
    # intervention that wakes it up would drown everything else.
    deviation = X.std(axis=0)
    alive = deviation > 1e-6 * deviation.max()
    if not alive.any():
        raise UsageError(f"the final features of {backbone.name} are equal for all {len(train)} images")
    probes = fit_logistic_path(X[:, alive], labels)
    scores = [float(np.mean(classes[p.predict(X_val[:, alive])] == task.validation.labels)) for p in probes]
    chosen = int(np.argmax(scores))
    probe = probes[chosen]
    layer = nn.Linear(X.shape[1], task.n_classes).requires_grad_(False)
    folded = np.zeros((len(classes), X.shape[1]))
    folded[:, alive] = probe.coef / probe.scale
    bias = probe.intercept - folded[:, alive] @ probe.mean
    # A class without training images is never predicted.
    layer.weight.zero_()
    layer.bias.fill_(float(bias.min()) - 30.0)
    layer.weight[torch.from_numpy(classes)] = torch.from_numpy(folded).float()
    layer.bias[torch.from_numpy(classes)] = torch.from_numpy(bias).float()
    facts = {"head": "probe", "C": probe.C, "validation_accuracy": scores[chosen], "n_train": len(train)}
    return layer.to(backbone.device), facts


@torch.inference_mode()
def _final_features(backbone: Backbone, split: ImageSplit, batch_size: int) -> np.ndarray:
    """Pooled final features, n×d in float64."""
    with evaluating(backbone):
        batches = [
            backbone.features(pixels).double().cpu().numpy()
            for _, pixels in pixel_batches(backbone, split, batch_size)
        ]
    features = np.concatenate(batches)
    if not np.isfinite(features).all():
        raise UsageError(
            f"{backbone.name}: final features hold non-finite values; try --dtype bfloat16 or float32"
        )
    return features


@contextmanager
def only_these_train(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for `parameters` alone, evaluation mode; everything is put back on leaving."""
    states = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in parameters}
    try:
        for p, _ in states:
            p.requires_grad_(id(p) in wanted)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for p, state in states:
            p.requires_grad_(state)

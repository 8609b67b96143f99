"""What training a block would change: gradients of a probed backbone, block by block, over several batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from layerprobe.analyzers.heads import Classifier, evaluating
from layerprobe.errors import LayerprobeError
from layerprobe.progress import progress_bar

TRAINABLE_SCORES = ("rgn", "gradient_snr", "taylor", "fisher")
GRADIENT_BYTES = 4 << 30
"""Gradients of several batches are held up to this size; beyond it, blocks take turns."""


@dataclass(frozen=True)
class Spread:
    """A value with its standard error and the number of batches (or images) it rests on."""

    value: float
    stderr: float
    n: int


def trainable_scores(
    classifier: Classifier,
    batches: Sequence[tuple[Tensor, Tensor]],
    images: Sequence[Tensor],
    *,
    seed: int = 0,
    quiet: bool = False,
) -> list[dict[str, Spread]]:
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
    batches : at least 3 pairs of pixels b×C×H×W and labels b.
    images : single images 1×C×H×W for the Fisher information.

    Returns
    -------
    One dict a block, in order.
    """
    backbone = classifier.backbone
    blocks = backbone.blocks
    size = max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks)
    together = max(1, int(GRADIENT_BYTES // max(1, size * len(batches))))
    scores: list[dict[str, Spread]] = []
    turns = [range(start, min(start + together, len(blocks))) for start in range(0, len(blocks), together)]
    with progress_bar(total=len(turns) * (len(batches) + len(images)), unit="batch", quiet=quiet) as bar:
        for turn in turns:
            parameters = [list(blocks[index].parameters()) for index in turn]
            with only_these_train(backbone, [p for block in parameters for p in block]):
                scores += _scores(classifier, parameters, batches, images, seed, bar)
    return scores


def _scores(
    classifier: Classifier,
    parameters: list[list[nn.Parameter]],
    batches: Sequence[tuple[Tensor, Tensor]],
    images: Sequence[Tensor],
    seed: int,
    bar: object,
) -> list[dict[str, Spread]]:
    flat = [p for block in parameters for p in block]
    kept: list[list[Tensor]] = [[] for _ in flat]
    taylor = np.zeros((len(parameters), len(batches)))
    for number, (pixels, labels) in enumerate(batches):
        logits = classifier(pixels).float()
        loss = functional.cross_entropy(logits, labels.to(logits.device))
        if not torch.isfinite(loss):
            raise LayerprobeError(
                f"the loss of batch {number} is {loss.item()}; try --dtype bfloat16 or float32"
            )
        gradients = _gradients(loss, flat)
        for store, gradient in zip(kept, gradients, strict=True):
            store.append(gradient)
        position = 0
        for index, block in enumerate(parameters):
            products = [
                float((p.detach() * g).abs().sum(dtype=torch.float64))
                for p, g in zip(block, gradients[position : position + len(block)], strict=True)
            ]
            taylor[index, number] = sum(products) / sum(p.numel() for p in block)
            position += len(block)
        bar.update(1)  # type: ignore[attr-defined]
    squares = np.zeros((len(parameters), len(images)))
    draw = torch.Generator().manual_seed(seed)
    for number, pixels in enumerate(images):
        logits = classifier(pixels).float()
        label = torch.multinomial(logits.detach().softmax(dim=1).cpu(), 1, generator=draw)[:, 0]
        gradients = _gradients(functional.cross_entropy(logits, label.to(logits.device)), flat)
        position = 0
        for index, block in enumerate(parameters):
            own = gradients[position : position + len(block)]
            squares[index, number] = sum(_square(g) for g in own) / sum(p.numel() for p in block)
            position += len(block)
        bar.update(1)  # type: ignore[attr-defined]
    found = []
    position = 0
    for index, block in enumerate(parameters):
        inner = np.zeros((len(batches), len(batches)))
        for store in kept[position : position + len(block)]:
            stacked = torch.stack([gradient.flatten() for gradient in store]).float()
            inner += (stacked @ stacked.T).double().cpu().numpy()
        position += len(block)
        length = float(np.sqrt(sum(_square(p.detach()) for p in block)))
        found.append(
            {
                "rgn": _mean(np.sqrt(np.diagonal(inner)) / length),
                "gradient_snr": gradient_snr(inner),
                "taylor": _mean(taylor[index]),
                "fisher": _mean(squares[index]),
            }
        )
    return found


def gradient_snr(products: np.ndarray) -> Spread:
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
        return Spread(value, float("nan"), n)
    return Spread(value, float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())), n)


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


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradients as separate tensors; a parameter that the loss does not reach gets zeros."""
    raw = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(raw, parameters, strict=True)]


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _mean(values: np.ndarray) -> Spread:
    return Spread(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), len(values))

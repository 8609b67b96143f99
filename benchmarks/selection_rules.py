"""Rules by which other projects choose what to train without training: one score a block, higher is chosen first.

Written from the published formulas. `best_blocks` turns scores into a mask of a given size, as arms of equal size need;
what the projects choose themselves (single matrices, or other layers every few steps) is said at each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def spectrum_snr(weight: Tensor) -> float:
    """Sum of singular values above the Marchenko–Pastur threshold over the sum of the others, over the largest.

    The deviation of the noise is the interquartile range of all singular values over 1.349; the threshold is it times
    1 + √β, β the ratio of the sides, at most 1. A matrix without noise has infinite ratio.

    References
    ----------
    Hartford et al., Spectrum: Targeted Training on Signal to Noise Ratio, 2024, arXiv 2406.06623; QuixiAI/spectrum
    1996495, spectrum.py (`calculate_snr_for_layer`).
    """
    values = torch.linalg.svdvals(weight.double())
    spread = torch.quantile(values, 0.75) - torch.quantile(values, 0.25)
    n, m = sorted(weight.shape)
    threshold = spread / 1.349 * (1 + math.sqrt(n / m))
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    return float(signal / noise / values[0]) if float(noise) else math.inf


def outlier_share(weights: Iterable[Tensor], *, multiple: float = 5.0) -> float:
    """Share of entries larger than `multiple` times the mean absolute entry of their matrix.

    The outlier ratio of OWL (arXiv 2310.05175), by which outlier-weighed sampling of layers (OWS, arXiv 2405.18380)
    draws the layers to train; there the activations' norms weigh the entries as well, and layers are drawn anew.
    """
    counted = [((w.abs() > multiple * w.abs().mean()).sum(), w.numel()) for w in weights]
    return float(sum(int(n) for n, _ in counted) / max(1, sum(size for _, size in counted)))


def spectrum_blocks(weights: Mapping[tuple[int, str], Tensor], n_blocks: int) -> list[float]:
    """Mean over a block's matrices of the share of blocks whose matrix of that kind has a lower ratio.

    Spectrum ranks the matrices of a kind against one another and takes the best of each kind; a mask of whole blocks
    can only follow their mean rank.
    """
    ratios: dict[str, dict[int, float]] = {}
    for (block, kind), weight in weights.items():
        ratios.setdefault(kind, {})[block] = spectrum_snr(weight)
    ranks: list[list[float]] = [[] for _ in range(n_blocks)]
    for by_block in ratios.values():
        for block, ratio in by_block.items():
            ranks[block].append(sum(other < ratio for other in by_block.values()) / max(1, len(by_block) - 1))
    return [sum(found) / len(found) if found else 0.0 for found in ranks]


def evenly_spaced(n_blocks: int, size: int) -> list[int]:
    """The last block of each of `size` equal parts, as LLaMA-Factory's `use_llama_pro` where `size` divides.

    >>> evenly_spaced(12, 4), evenly_spaced(5, 2)
    ([2, 5, 8, 11], [1, 4])
    """
    return [(part + 1) * n_blocks // size - 1 for part in range(size)]


def best_blocks(scores: Sequence[float], size: int) -> list[int]:
    """The `size` blocks of highest score, in order; the earlier of equals."""
    order = sorted(range(len(scores)), key=lambda block: (-scores[block], block))
    return sorted(order[:size])

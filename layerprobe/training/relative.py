"""Learning rates in proportion to the relative gradient norm of each block."""

from __future__ import annotations

from typing import Any

import torch

PER_BLOCK = "block"
"""Key of an optimizer's parameter group that names the block its parameters belong to, '' outside all."""


class RelativeRates:
    """Auto-RGN: a block learns at its share ‖g_b‖/‖θ_b‖ ÷ (the largest of all blocks) of the learning rate.

    Measured anew at the first step of every epoch. What lies outside the blocks learns at the full rate: stem
    and head are new here, so their ratio says nothing about pretrained weights (a bias that starts at zero
    has none at all).

    The authors' program measures five batches before each epoch and forgets Adam's moments there, and has a
    ratio per tensor, the head's included. Here it is one batch, the epoch's first, which costs no step more
    than any other plan's training; the moments stay; and the ratio is the block's, the unit of a freeze plan.

    Parameters
    ----------
    optimizer : its groups carry the key `block`, see `layerprobe.training.loop.make_optimizer`.

    References
    ----------
    Lee, Chen, Tajwar, Kumar, Yao, Liang, Finn, Surgical Fine-Tuning Improves Adaptation to Distribution
    Shifts, ICLR 2023, arXiv 2210.11466, section 4.
    """

    def __init__(self, optimizer: Any) -> None:
        self._groups: list[dict[str, Any]] = optimizer.param_groups
        self.shares: dict[str, float] = {}

    @torch.no_grad()
    def measure(self) -> None:
        """Take the shares from the gradients as they are now, before any clipping."""
        gradient: dict[str, float] = {}
        weight: dict[str, float] = {}
        for group in self._groups:
            if block := group[PER_BLOCK]:
                for p in group["params"]:
                    gradient[block] = gradient.get(block, 0.0) + (
                        0.0 if p.grad is None else float(p.grad.double().square().sum())
                    )
                    weight[block] = weight.get(block, 0.0) + float(p.double().square().sum())
        ratio = {
            block: (gradient[block] / weight[block]) ** 0.5 if weight[block] else 0.0 for block in weight
        }
        largest = max(ratio.values(), default=0.0)
        self.shares = {block: value / largest if largest else 1.0 for block, value in ratio.items()}

    def apply(self, lr: float) -> None:
        """Set every group's learning rate for the coming step."""
        for group in self._groups:
            group["lr"] = lr * self.shares.get(group[PER_BLOCK], 1.0)

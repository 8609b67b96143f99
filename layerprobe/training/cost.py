"""What a training step costs in arithmetic: a figure that does not depend on how busy the machine is."""

from __future__ import annotations

import torch

from layerprobe.training.classifier import Classifier, gradient_flow


def training_flops(
    classifier: Classifier, shape: tuple[int, ...], batch_size: int, cached_depth: int = 0
) -> float:
    """Operations of one optimizer step in the blocks' matrix products: 2 per multiply-add.

    Per token and block with P matrix entries: 2P forward; 2P more for the gradient of its input where
    anything before the block trains; 2 per trained entry for the gradient of the weights. Attention adds
    4·T²·d per image and block forward (T tokens of width d), and twice that backward. Stem, head, norms and
    the optimizer are left out; they are the same for every plan.

    Parameters
    ----------
    shape : n×C×H×W of the images.
    cached_depth : blocks at the input end whose outputs are kept, at no cost per step.
    """
    backbone = classifier.backbone
    sample = torch.zeros((1, *shape[1:]), device=next(classifier.parameters()).device)
    with torch.no_grad():
        tokens = backbone(sample).shape[1]
    inputs, outputs = gradient_flow(classifier, sample)
    total = 0.0
    for index, block in enumerate(backbone.blocks):
        if index < cached_depth:
            continue
        matrices = [p for p in block.parameters() if p.ndim == 2]
        entries = sum(p.numel() for p in matrices)
        trained = sum(p.numel() for p in matrices if p.requires_grad)
        attention = 4.0 * tokens * tokens * backbone.hidden_size
        total += tokens * 2.0 * (entries * (1 + inputs[index]) + trained)
        total += attention * (1 + 2 * outputs[index])
    return total * batch_size

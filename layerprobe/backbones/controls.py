"""Controls for what pretraining taught: weights that keep a part of the pretrained ones, and lose the rest.

A random init by the library's rule changes the scale of every matrix and the gains of every norm as well. These
controls tell the two apart: what they share with the pretrained model is not what language taught.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerprobe.backbones.layout import find_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def replace_weights(model: PreTrainedModel, init: str, *, seed: int, fresh: nn.Module | None = None) -> None:
    """Turn a pretrained model into one of `layerprobe.choices.CONTROLS`, in place.

    Each tensor draws from a generator of its own, seeded by (seed, its name): the result depends neither on
    the order of tensors nor on the rest of the model. Tied tensors stay tied.

    Parameters
    ----------
    model : PreTrainedModel
        The part that images go through, with its pretrained weights.
    fresh : nn.Module | None
        The same architecture as its constructor makes it; 'matched-reset' takes the norms from it.
    """
    layout = find_layout(model, model.config)
    new = dict(fresh.named_parameters()) if fresh is not None else {}
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(_seed(seed, name))
        in_block = layout.parameter_groups.get(name, "").startswith("block.")
        if init == "shuffled":
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
        elif name in layout.norm_names:
            if init == "matched-reset":
                parameter.copy_(new[name])
        elif in_block:
            parameter.copy_(_gaussian_like(parameter, generator))


def _gaussian_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    values = tensor.double()
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return values.mean() + values.std(correction=0) * drawn


def _seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

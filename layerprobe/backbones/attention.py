"""Causal or bidirectional: what a language backbone was pretrained with, found by trying, and what a mask changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerprobe.backbones.self_check import cannot_run
from layerprobe.errors import UsageError

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone


def choose_attention(backbone: Backbone, asked: str | None) -> None:
    """Settle `backbone.attention`: as asked, else as pretrained; also the width of the model's output.

    Raises
    ------
    UsageError
        The model does not run on embeddings, or the attention asked for cannot be had from it.
    """
    if backbone.device.type == "meta":
        backbone.attention = asked or _as_its_modules_say(backbone)
        return
    pretrained = "causal" if _is_causal(backbone) else "bidirectional"
    backbone.attention = asked or pretrained
    if backbone.attention == pretrained:
        return
    backbone.attention_override = backbone.attention
    refusal = f"attention '{asked}' cannot be had from {type(backbone.model).__name__}: "
    try:
        found = _is_causal(backbone)
    except UsageError as error:
        raise UsageError(f"{refusal}it takes no mask of every pair of tokens") from error
    if found != (asked == "causal"):
        raise UsageError(f"{refusal}its {pretrained} mask is built into the blocks")


def _as_its_modules_say(backbone: Backbone) -> str | None:
    """Of a model without values, which cannot be tried: by `is_causal` of its attention modules, where all agree."""
    attentions = [m for block in backbone.blocks for m in block.modules() if hasattr(m, "is_causal")]
    said = {bool(attention.is_causal) for attention in attentions}
    if len(said) != 1:
        return None
    return "causal" if said.pop() else "bidirectional"


@torch.no_grad()
def _is_causal(backbone: Backbone) -> bool:
    """Found by trying: does the first of three tokens change when the last one does?"""
    was_training = backbone.model.training
    backbone.model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 3, backbone.embedding_width, generator=generator)
    tokens[1, :2] = tokens[0, :2]
    model: Any = backbone.model
    kind = getattr(model, "attention_type", None)
    try:
        hidden = backbone.forward_tokens(tokens.to(backbone.device, backbone.dtype))
    except Exception as error:
        raise cannot_run(backbone, error) from error
    if kind != getattr(
        model, "attention_type", None
    ):  # BigBird gives up sparse attention for good on short inputs
        model.set_attention_type(kind)
    backbone.output_width = hidden.shape[-1]
    backbone.model.train(was_training)
    return bool(torch.equal(hidden[0, 0], hidden[1, 0]))


def attention_mask(attention: str, tokens: Tensor) -> Tensor:
    """An additive B×1×T×T mask; transformers hands four-dimensional masks on as they are."""
    b, t, _ = tokens.shape
    mask = torch.zeros(t, t, dtype=tokens.dtype, device=tokens.device)
    if attention == "causal":
        later = torch.ones(t, t, dtype=torch.bool, device=tokens.device).triu(1)
        mask = mask.masked_fill(later, torch.finfo(tokens.dtype).min)
    return mask.expand(b, 1, t, t)

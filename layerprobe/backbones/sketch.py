"""A backbone as its configuration draws it: blocks, sizes and tokens, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerprobe.backbones.backbone import (
    check_choices,
    no_attention_here,
    refuse_blind_cls,
    refuse_too_many_patches,
)
from layerprobe.backbones.layout import Layout, find_layout, hidden_size
from layerprobe.backbones.loading import (
    check_init,
    choose_device,
    choose_dtype,
    image_entry,
    image_or_text_tower,
    load_skeleton,
)
from layerprobe.backbones.preprocess import for_vision
from layerprobe.backbones.sources import ModelSource, resolve_model
from layerprobe.backbones.stem import count_patches, default_patch_size
from layerprobe.errors import UsageError

USUAL_TOKENS = 64
"""Tokens an image that are assumed where they cannot be counted; the default patch size aims at so many."""

_EXTRA_TOKENS = ("cls_token", "distillation_token", "class_embedding", "register_tokens")
"""What vision models put before the patches, by the names of its parameters."""


@dataclass(frozen=True)
class Sketch:
    """What is known of a backbone from its configuration.

    Attributes
    ----------
    model : the part that images go through, on the meta device: names and shapes, no memory.
    parameters : of the whole checkpoint, heads and a second tower included.
    n_tokens : tokens an image; None where they cannot be counted before the images are read.
    """

    source: ModelSource
    model: nn.Module
    layout: Layout
    device: torch.device
    dtype: torch.dtype
    parameters: int
    n_tokens: int | None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def n_blocks(self) -> int:
        return self.layout.n_blocks

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        return hidden_size(self.config)

    @property
    def weights_bytes(self) -> int:
        """Bytes that the weights take in `dtype`."""
        return self.parameters * torch.empty((), dtype=self.dtype).element_size()

    @property
    def tokens(self) -> int:
        """Tokens an image, counted or assumed."""
        return USUAL_TOKENS if self.n_tokens is None else self.n_tokens

    @property
    def tokens_in_words(self) -> str:
        """The number of tokens, and that it is assumed where it is."""
        if self.n_tokens is not None:
            return str(self.n_tokens)
        return f"{USUAL_TOKENS}, assumed: how many there are is known once the images are read"


def sketch_backbone(
    name: str,
    *,
    task_size: int | None = None,
    task_size_certain: bool = True,
    revision: str | None = None,
    init: str = "pretrained",
    device: str | None = None,
    dtype: str | None = None,
    stem: str = "random",
    patch_size: int | None = None,
    image_size: int | None = None,
    attention: str | None = None,
    pooling: str | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> Sketch:
    """Refuse what `load_backbone` and `Backbone.prepare` would refuse, as far as a configuration tells.

    Parameters
    ----------
    task_size : pixels per side of the task's images, None where unknown. With `task_size_certain` False it is
        a guess, by which tokens are counted but nothing is refused.
    Others as of `load_backbone`.

    Raises
    ------
    UnknownNameError, NotAvailableError, BrokenFileError, UsageError : see the messages.
    """
    check_init(init)
    check_choices(stem=stem, attention=attention, pooling=pooling)
    target, kind = choose_device(device), choose_dtype(dtype)
    source = resolve_model(name, revision=revision, offline=offline)
    skeleton = load_skeleton(source, trust_remote_code=trust_remote_code)
    tower = image_or_text_tower(skeleton)
    entry = image_entry(
        tower,
        source,
        stem_kind=stem,
        patch_size=patch_size,
        image_size=image_size,
        attention=attention,
        pooling=pooling,
    )
    return Sketch(
        source,
        tower,
        find_layout(tower, tower.config),
        target,
        kind,
        sum(parameter.numel() for parameter in skeleton.parameters()),
        _count_tokens(tower, source, entry, task_size, task_size_certain),
    )


def _count_tokens(
    tower: nn.Module, source: ModelSource, entry: dict[str, Any], task_size: int | None, certain: bool
) -> int | None:
    if getattr(tower, "main_input_name", "") == "pixel_values":
        if entry["attention"] is not None:
            raise no_attention_here(source.name)
        return _vision_tokens(tower, source, entry["image_size"])
    refuse_blind_cls(entry["pooling"], entry["attention"], source.name)
    size = entry["image_size"] or task_size
    if size is None:
        return None
    patch = entry["patch_size"] or default_patch_size(size)
    try:
        refuse_too_many_patches(tower.config, size, patch, source.name)
        return count_patches(size, size, patch)
    except UsageError:
        # The first image may be of another size than the others, which are then all resized.
        if certain or entry["image_size"]:
            raise
        return None


def _vision_tokens(tower: nn.Module, source: ModelSource, image_size: int | None) -> int | None:
    patch = getattr(tower.config, "patch_size", None)
    recipe = for_vision(source.folder, tower.config, image_size)
    edge = recipe.shortest_edge
    height, width = recipe.crop or recipe.size or (edge, edge)
    if not isinstance(patch, int) or height is None or width is None:
        return None
    before = sum(
        parameter.numel() // parameter.shape[-1]
        for name, parameter in tower.named_parameters()
        if name.rpartition(".")[2] in _EXTRA_TOKENS
    )
    return (height // patch) * (width // patch) + before

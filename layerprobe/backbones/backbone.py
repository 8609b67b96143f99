"""A loaded backbone: the untouched Hugging Face model, its layout, and the way images enter it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.backbones.layout import find_layout, hidden_size
from layerprobe.backbones.preprocess import Preprocessing, for_language, for_vision
from layerprobe.backbones.sources import ModelSource
from layerprobe.backbones.stem import STEM_KINDS, PatchStem, default_patch_size
from layerprobe.errors import UnknownNameError, UsageError

POOLINGS = ("mean", "last", "cls")
ATTENTIONS = ("causal", "bidirectional")
MIXED_SIZE = 224
"""Pixels per side to which a language backbone resizes images of several sizes, unless told otherwise."""
_PCA_IMAGES = 1000


class HasImages(Protocol):
    """What `Backbone.prepare` needs to know of a task."""

    @property
    def image_size(self) -> int | None: ...

    @property
    def train(self) -> Any: ...


class Backbone(nn.Module):
    """A pretrained transformer that takes images. Made by `load_backbone`.

    Shapes: pixels B×C×H×W → hidden states B×T×D → features B×D. `model` is exactly what transformers built:
    nothing in it is rewritten, folded or centred, and parameter names in freeze plans are names within it.
    """

    model: nn.Module
    stem: PatchStem | None

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        source: ModelSource,
        *,
        init: str = "pretrained",
        seed: int = 0,
        stem_kind: str = "random",
        patch_size: int | None = None,
        image_size: int | None = None,
        attention: str | None = None,
        pooling: str | None = None,
        with_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.source = source
        self.name = source.name
        self.init = init
        self.seed = seed
        self.layout = find_layout(model, config)
        self.hidden_size = hidden_size(config)
        self.modality = "vision" if getattr(model, "main_input_name", "") == "pixel_values" else "language"
        self.stem_kind = _one_of("stem", stem_kind, STEM_KINDS)
        self.pooling = _one_of("pooling", pooling or "mean", POOLINGS)
        self.patch_size = patch_size
        self.image_size = image_size
        self.stem = None
        self.preprocessing: Preprocessing | None = None
        # In a tuple, so that the wrapper's parameters are not registered a second time.
        self._with_head = (with_head,) if with_head is not None else ()
        self._parameters_accepted = set(inspect.signature(model.forward).parameters)
        if self.modality == "vision":
            if attention is not None:
                raise no_attention_here(self.name)
            self.attention = "bidirectional"
            self._attention_override: str | None = None
            self.preprocessing = for_vision(source.folder, config, image_size)
            self.patch_size = getattr(config, "patch_size", None)
        else:
            pretrained = "causal" if self._is_causal(None) else "bidirectional"
            self.attention = _one_of("attention", attention or pretrained, ATTENTIONS)
            self._attention_override = self.attention if self.attention != pretrained else None
            if self._attention_override and self._is_causal(self.attention) != (self.attention == "causal"):
                raise UsageError(
                    f"attention '{self.attention}' cannot be had from {type(model).__name__}: "
                    f"its {pretrained} mask is built into the blocks"
                )
        refuse_blind_cls(self.pooling, self.attention, self.name)

    # -- structure ---------------------------------------------------------------------------------------

    @property
    def n_blocks(self) -> int:
        return self.layout.n_blocks

    @property
    def blocks(self) -> list[nn.Module]:
        """The block modules, in order."""
        return self.layout.blocks(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def has_own_head(self) -> bool:
        """Whether the checkpoint brought an image classifier of its own."""
        return bool(self._with_head)

    # -- images in ---------------------------------------------------------------------------------------

    def prepare(self, task: HasImages) -> Backbone:
        """Settle what depends on the images: their size, the patch size, and the stem. Idempotent.

        A language backbone gets its stem here; `pca` looks at up to 1,000 training images, never at labels.
        """
        if self.modality == "vision" or self.stem is not None:
            return self
        size = self.image_size or task.image_size
        resize = self.image_size
        if size is None:
            size = resize = MIXED_SIZE
        self.image_size = size
        self.patch_size = self.patch_size or default_patch_size(size)
        channels = 3
        self.preprocessing = for_language(resize, channels)
        refuse_too_many_patches(self.config, size, self.patch_size, self.name)
        stem = PatchStem(channels, self.patch_size, self._embedding_width())
        token_std = self.token_std()
        if self.stem_kind == "pca":
            first = np.arange(min(_PCA_IMAGES, len(task.train)))
            stem.init_pca(self.preprocess(task.train.images(first)), token_std)
        else:
            stem.init_random(token_std, seed=self.seed)
        self.stem = stem.to(self.device, self.dtype)
        return self

    def restore(self, stem: PatchStem) -> None:
        """Take over a trained stem, as a bridge run saved it."""
        self.stem = stem
        self.preprocessing = for_language(self.image_size, stem.channels)

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 images H×W or H×W×C → float32 pixels B×C×H×W on the CPU."""
        if self.preprocessing is None:
            raise UsageError("call prepare(task) first: image size and stem depend on the task")
        return self.preprocessing(images)

    @torch.no_grad()
    def token_std(self) -> float:
        """Standard deviation of what the embedding layer hands to the blocks, over the first 4,096 tokens."""
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        ids = torch.arange(min(4096, embedding.num_embeddings), device=self.device)
        return float(embedding(ids).double().std())

    def _embedding_width(self) -> int:
        return int(self.model.get_input_embeddings().embedding_dim)  # type: ignore[operator]

    # -- forward -----------------------------------------------------------------------------------------

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels B×C×H×W → the model's last hidden states B×T×D, after its final norm where it has one."""
        pixels = pixels.to(self.device, self.dtype, non_blocking=True)
        if self.modality == "vision":
            extra: dict[str, Any] = {}
            native = getattr(self.config, "image_size", None)
            size = native if isinstance(native, int) else (native or [None])[0]
            if size is not None and pixels.shape[-1] != size:
                if "interpolate_pos_encoding" not in self._parameters_accepted:
                    raise UsageError(
                        f"{self.name} takes images of {size}×{size} only; leave out --image-size"
                    )
                extra["interpolate_pos_encoding"] = True
            return self._run(pixel_values=pixels, **extra)
        if self.stem is None:
            raise UsageError("call prepare(task) first: the stem depends on the task's image size")
        return self.forward_tokens(self.stem(pixels))

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens B×T×D (what the stem makes) → the model's last hidden states B×T×D."""
        return self._language(tokens, self._attention_override)

    def _language(self, tokens: Tensor, attention: str | None) -> Tensor:
        mask = None if attention is None else _mask(attention, tokens)
        extra: dict[str, Any] = {"use_cache": False} if "use_cache" in self._parameters_accepted else {}
        if mask is not None:
            extra["attention_mask"] = mask
        return self._run(inputs_embeds=tokens, **extra)

    def _run(self, **inputs: Any) -> Tensor:
        output = self.model(**inputs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
        return hidden

    def pool(self, hidden: Tensor) -> Tensor:
        """Hidden states B×T×D → features B×D by `pooling`.

        `mean` runs over image patches alone: class and register tokens of a vision model are left out.
        `last` is the last token, `cls` the first.
        """
        return pool(hidden, self.pooling, n_prefix=self.n_prefix(hidden.shape[1]))

    def n_prefix(self, n_tokens: int) -> int:
        """How many tokens before the patches (class token, registers); 0 for language backbones."""
        if self.modality == "language":
            return 0
        side = int(self.patch_size or 0)
        crop = self.preprocessing.crop or self.preprocessing.size if self.preprocessing else None
        if not side or crop is None:
            return 0
        return max(n_tokens - (crop[0] // side) * (crop[1] // side), 0)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels B×C×H×W → pooled features of the last hidden states, B×D."""
        return self.pool(self(pixels))

    def own_logits(self, pixels: Tensor) -> Tensor:
        """Logits B×classes of the classifier that the checkpoint itself brought."""
        if not self._with_head:
            raise UsageError(f"{self.name} brings no image classifier of its own; fine-tune or probe it")
        logits: Tensor = self._with_head[0](pixel_values=pixels.to(self.device, self.dtype)).logits
        return logits

    @torch.no_grad()
    def _is_causal(self, attention: str | None) -> bool:
        """Found by trying: does the first of three tokens change when the last one does?"""
        was_training = self.model.training
        self.model.eval()
        width = self._embedding_width()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(2, 3, width, generator=generator).to(self.device, self.dtype)
        tokens[1, :2] = tokens[0, :2]
        hidden = self._language(tokens, attention)
        self.model.train(was_training)
        return bool(torch.equal(hidden[0, 0], hidden[1, 0]))

    # -- what this is ------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Everything that decides the features, as plain values, for provenance and cache keys."""
        return {
            "model": self.name,
            "model_id": self.source.model_id,
            "revision": self.source.revision,
            "origin": self.source.origin,
            "init": self.init,
            "seed": self.seed,
            "modality": self.modality,
            "n_blocks": self.n_blocks,
            "hidden_size": self.hidden_size,
            "stem": self.stem_kind if self.modality == "language" else "own",
            "stem_hash": _stem_hash(self.stem),
            "patch_size": self.patch_size,
            "image_size": self.image_size,
            "attention": self.attention,
            "pooling": self.pooling,
            "dtype": str(self.dtype).removeprefix("torch."),
            "preprocessing": self.preprocessing.describe() if self.preprocessing else None,
        }


def pool(hidden: Tensor, pooling: str, *, n_prefix: int = 0) -> Tensor:
    """B×T×D → B×D: `mean` over tokens after the first `n_prefix`, `last` token, or `cls` (first token)."""
    if pooling == "mean":
        return hidden[:, n_prefix:].mean(dim=1)
    return hidden[:, -1] if pooling == "last" else hidden[:, 0]


def _mask(attention: str, tokens: Tensor) -> Tensor:
    """An additive B×1×T×T mask; transformers hands four-dimensional masks on as they are."""
    b, t, _ = tokens.shape
    mask = torch.zeros(t, t, dtype=tokens.dtype, device=tokens.device)
    if attention == "causal":
        later = torch.ones(t, t, dtype=torch.bool, device=tokens.device).triu(1)
        mask = mask.masked_fill(later, torch.finfo(tokens.dtype).min)
    return mask.expand(b, 1, t, t)


def _stem_hash(stem: PatchStem | None) -> str | None:
    if stem is None:
        return None
    digest = hashlib.sha256()
    for name, value in stem.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def check_choices(*, stem: str, attention: str | None, pooling: str | None) -> None:
    """UnknownNameError for a word that `Backbone` would not take, before anything is loaded."""
    _one_of("stem", stem, STEM_KINDS)
    _one_of("attention", attention or ATTENTIONS[0], ATTENTIONS)
    _one_of("pooling", pooling or POOLINGS[0], POOLINGS)


def no_attention_here(name: str) -> UsageError:
    """The error for attention chosen for a vision model, which has its own."""
    return UsageError(f"--attention is for language backbones; {name} is a vision model")


def refuse_blind_cls(pooling: str | None, attention: str | None, name: str) -> None:
    """UsageError for a first token that sees nothing but itself."""
    if pooling == "cls" and attention == "causal":
        raise UsageError(
            f"pooling 'cls' reads the first token, which under causal attention sees one patch alone; "
            f"use --pooling last, or --attention bidirectional for {name}"
        )


def refuse_too_many_patches(config: Any, size: int, patch_size: int, name: str) -> None:
    """UsageError where a language model has fewer positions than an image has patches."""
    n_tokens = (size // patch_size) ** 2
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and n_tokens > longest:
        raise UsageError(
            f"{n_tokens} patches do not fit: {name} has {longest} positions; use a larger "
            f"--patch-size (now {patch_size}) or a smaller --image-size (now {size})"
        )


def _one_of(what: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise UnknownNameError(f"unknown {what} '{value}'; choose one of: {', '.join(allowed)}")
    return value

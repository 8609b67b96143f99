"""A loaded backbone: the untouched Hugging Face model, its layout, and the way images enter it."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.backbones.controls import CONTROLS
from layerprobe.backbones.image_input import (
    STEM_KINDS,
    PatchStem,
    Preprocessing,
    count_patches,
    default_patch_size,
    for_language,
    for_vision,
)
from layerprobe.backbones.layout import find_layout, hidden_size, image_or_text_tower
from layerprobe.backbones.resolve import ModelSource
from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.files import tensor_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

INITS = ("pretrained", "random", *CONTROLS)
POOLINGS = ("mean", "last", "cls")
ATTENTIONS = ("causal", "bidirectional")
MIXED_SIZE = 224
"""Pixels per side to which a language backbone resizes images of several sizes, unless told otherwise."""
USUAL_TOKENS = 64
"""Tokens an image that dry runs assume where they cannot be counted; the default patch size aims at so many."""
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
    `n_parameters` counts the whole checkpoint, heads and a second tower included. On the meta device, where
    there are no values, `attention` is None unless it was chosen, and `run_device` is where the run would be.
    """

    model: PreTrainedModel
    stem: PatchStem | None

    def __init__(
        self,
        full: nn.Module,
        source: ModelSource,
        *,
        init: str = "pretrained",
        seed: int = 0,
        stem: str = "random",
        patch_size: int | None = None,
        image_size: int | None = None,
        attention: str | None = None,
        pooling: str | None = None,
    ) -> None:
        super().__init__()
        check_choices(init=init, stem=stem, attention=attention, pooling=pooling)
        self.model = image_or_text_tower(full)
        self.config: PretrainedConfig = self.model.config
        self.n_parameters = sum(parameter.numel() for parameter in full.parameters())
        self.source = source
        self.name = source.name
        self.run_device = self.device
        self.init = init
        self.seed = seed
        self.layout = find_layout(self.model, self.config)
        self.hidden_size = hidden_size(self.config)
        self.modality = "vision" if self.model.main_input_name == "pixel_values" else "language"
        self.stem_kind = stem
        self.pooling = pooling or "mean"
        self.patch_size = patch_size
        self.image_size = image_size
        self.stem = None
        self.preprocessing: Preprocessing | None = None
        # In a tuple, so that the wrapper's parameters are not registered a second time.
        self._with_head = (full,) if full is not self.model and hasattr(full, "classifier") else ()
        self._parameters_accepted = set(inspect.signature(self.model.forward).parameters)
        self.attention: str | None
        self._attention_override: str | None = None
        if self.modality == "vision":
            if attention is not None:
                raise UsageError(f"--attention is for language backbones; {self.name} is a vision model")
            self.attention = "bidirectional"
            self.preprocessing = for_vision(source.folder, self.config, image_size)
            self.patch_size = getattr(self.config, "patch_size", None)
        else:
            self._choose_attention(attention)
        if self.pooling == "cls" and self.attention == "causal":
            raise UsageError(
                f"pooling 'cls' reads the first token, which under causal attention sees one patch alone; "
                f"use --pooling last, or --attention bidirectional for {self.name}"
            )

    def _choose_attention(self, attention: str | None) -> None:
        if self.device.type == "meta":
            self.attention = attention
            return
        pretrained = "causal" if self._is_causal() else "bidirectional"
        self.attention = attention or pretrained
        if self.attention == pretrained:
            return
        self._attention_override = self.attention
        if self._is_causal() != (self.attention == "causal"):
            raise UsageError(
                f"attention '{self.attention}' cannot be had from {type(self.model).__name__}: "
                f"its {pretrained} mask is built into the blocks"
            )

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
    def weights_bytes(self) -> int:
        """Bytes that the whole checkpoint takes in `dtype`."""
        return self.n_parameters * self.dtype.itemsize

    def prepare(self, task: HasImages) -> Backbone:
        """Settle what depends on the images: their size, the patch size, and the stem. Idempotent.

        A language backbone gets its stem here; `pca` looks at up to 1,000 training images, never at labels.
        """
        if self.modality == "vision" or self.stem is not None:
            return self
        stem = self._make_stem(task.image_size)
        token_std = self.token_std()
        if self.stem_kind == "pca":
            first = np.arange(min(_PCA_IMAGES, len(task.train)))
            stem.init_pca(self.preprocess(task.train.images(first)), token_std)
        else:
            stem.init_random(token_std, seed=self.seed)
        self.stem = stem.to(self.device, self.dtype)
        return self

    def _make_stem(self, image_size: int | None) -> PatchStem:
        """A stem for images of this size (None: of several sizes), and the preprocessing that goes with it."""
        size = self.image_size or image_size or MIXED_SIZE
        patch_size = self.patch_size or default_patch_size(size)
        n_tokens = (size // patch_size) ** 2
        longest = getattr(self.config, "max_position_embeddings", None)
        if isinstance(longest, int) and n_tokens > longest:
            raise UsageError(
                f"{n_tokens} patches do not fit: {self.name} has {longest} positions; use a larger "
                f"--patch-size (now {patch_size}) or a smaller --image-size (now {size})"
            )
        count_patches(size, size, patch_size)
        channels = 3
        self.preprocessing = for_language(self.image_size or (None if image_size else size), channels)
        self.image_size, self.patch_size = size, patch_size
        return PatchStem(channels, patch_size, self.embedding_width)

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 images H×W or H×W×C → float32 pixels B×C×H×W on the CPU."""
        if self.preprocessing is None:
            raise UsageError("call prepare(task) first: image size and stem depend on the task")
        return self.preprocessing(images)

    @torch.no_grad()
    def token_std(self) -> float:
        """Standard deviation of what the embedding layer hands to the blocks, over the first 4,096 tokens."""
        embedding = self._embedding
        ids = torch.arange(min(4096, embedding.num_embeddings), device=self.device)
        return float(embedding(ids).double().std())

    @property
    def embedding_width(self) -> int:
        """Width of the token embeddings, which is what a stem writes."""
        return self._embedding.embedding_dim

    @property
    def _embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()  # type: ignore[return-value]

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
        extra: dict[str, Any] = {"use_cache": False} if "use_cache" in self._parameters_accepted else {}
        if self._attention_override is not None:
            extra["attention_mask"] = _mask(self._attention_override, tokens)
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
    def _is_causal(self) -> bool:
        """Found by trying: does the first of three tokens change when the last one does?"""
        was_training = self.model.training
        self.model.eval()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(2, 3, self.embedding_width, generator=generator).to(self.device, self.dtype)
        tokens[1, :2] = tokens[0, :2]
        hidden = self.forward_tokens(tokens)
        self.model.train(was_training)
        return bool(torch.equal(hidden[0, 0], hidden[1, 0]))

    def expect_images(self, size: int | None) -> None:
        """What `prepare` does for images of this size (None: of several sizes), without values."""
        if self.modality == "language" and self.stem is None:
            self.stem = self._make_stem(size).to(self.device, self.dtype)

    @torch.no_grad()
    def count_tokens(self) -> int | None:
        """Tokens an image; None where that depends on images not yet seen."""
        if self.modality == "language":
            side = self.image_size // self.stem.patch_size if self.stem and self.image_size else 0
            return side**2 or None
        recipe = self.preprocessing
        if recipe is None or recipe.output_size is None:
            return None
        try:
            return self(torch.zeros(1, recipe.channels, *recipe.output_size, device=self.device)).shape[1]
        except RuntimeError:  # the model looks at values, of which the meta device has none
            return None

    @property
    def tokens(self) -> int:
        """Tokens an image, counted or assumed."""
        return self.count_tokens() or USUAL_TOKENS

    @property
    def tokens_in_words(self) -> str:
        """The number of tokens, and that it is assumed where it is."""
        n_tokens = self.count_tokens()
        if n_tokens is not None:
            return str(n_tokens)
        return f"{USUAL_TOKENS}, assumed: how many there are is known once the images are read"

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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; on leaving every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def pool(hidden: Tensor, pooling: str, *, n_prefix: int = 0) -> Tensor:
    """B×T×D → B×D: `mean` over tokens after the first `n_prefix`, `last` token, or `cls` (first token)."""
    if pooling == "mean":
        return hidden[:, n_prefix:].mean(dim=1)
    return hidden[:, -1] if pooling == "last" else hidden[:, 0]


def check_choices(*, init: str, stem: str, attention: str | None, pooling: str | None) -> None:
    """UnknownNameError for a word that `Backbone` would not take, before anything is loaded."""
    for what, value, allowed in (
        ("init", init, INITS),
        ("stem", stem, STEM_KINDS),
        ("attention", attention, ATTENTIONS),
        ("pooling", pooling, POOLINGS),
    ):
        if value is not None and value not in allowed:
            raise UnknownNameError(f"unknown {what} '{value}'; choose one of: {', '.join(allowed)}")


def _mask(attention: str, tokens: Tensor) -> Tensor:
    """An additive B×1×T×T mask; transformers hands four-dimensional masks on as they are."""
    b, t, _ = tokens.shape
    mask = torch.zeros(t, t, dtype=tokens.dtype, device=tokens.device)
    if attention == "causal":
        later = torch.ones(t, t, dtype=torch.bool, device=tokens.device).triu(1)
        mask = mask.masked_fill(later, torch.finfo(tokens.dtype).min)
    return mask.expand(b, 1, t, t)


def _stem_hash(stem: PatchStem | None) -> str | None:
    if stem is None or stem.projection.weight.is_meta:
        return None
    digest = hashlib.sha256()
    for name, value in stem.state_dict().items():
        digest.update(name.encode())
        for piece in tensor_bytes(value.float()):
            digest.update(piece)
    return digest.hexdigest()[:12]

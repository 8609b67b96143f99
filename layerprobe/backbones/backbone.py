"""A loaded backbone: the untouched Hugging Face model, its layout, and the way images enter it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.backbones.attention import attention_mask, choose_attention
from layerprobe.backbones.image_input import (
    HasImages,
    HasRows,
    PatchStem,
    Preprocessing,
    count_patches,
    default_patch_size,
    for_language,
    for_vision,
    run_at_any_size,
)
from layerprobe.backbones.layout import (
    find_layout,
    hidden_size,
    image_or_text_tower,
    longest_sequence,
    sees_pixels,
    tied_names,
)
from layerprobe.backbones.own_head import is_image_classifier
from layerprobe.backbones.own_model import is_compiled, run_eagerly
from layerprobe.backbones.resolve import ModelIdentity, ModelSource
from layerprobe.backbones.self_check import N_IMAGES, SelfCheck, self_check
from layerprobe.backbones.sharding import run_whole
from layerprobe.backbones.shown import backbone_as_html, backbone_in_words
from layerprobe.choices import check_choices
from layerprobe.errors import UsageError
from layerprobe.files import dtype_name
from layerprobe.progress import note

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.image_processing_backends import PilBackend

MIXED_SIZE = 224
"""Pixels per side to which a language backbone resizes images of several sizes, unless told otherwise."""
USUAL_TOKENS = 64
"""Tokens an image where they cannot be counted; the default patch size aims at so many."""
_PCA_IMAGES = 1000


class Backbone(nn.Module):
    """A pretrained transformer that takes images. Made by `load_backbone`.

    Shapes: pixels B×C×H×W → hidden states B×T×D → features B×D. `model` is exactly what transformers built:
    nothing in it is rewritten, folded or centred, and parameter names in freeze plans are names within it.
    `n_parameters` counts the whole checkpoint, heads and a second tower included. On the meta device `attention` is
    None unless it was chosen, and `run_device` is where the run would be.
    """

    model: PreTrainedModel
    stem: PatchStem | None

    def __init__(
        self,
        full: nn.Module,
        source: ModelIdentity,
        *,
        processor: PilBackend | None = None,
        init: str = "pretrained",
        seed: int = 0,
        stem: str = "random",
        patch_size: int | None = None,
        image_size: int | None = None,
        attention: str | None = None,
        pooling: str | None = None,
        self_check: bool = True,
    ) -> None:
        super().__init__()
        check_choices(init=init, stem=stem, attention=attention, pooling=pooling)
        self.model = image_or_text_tower(full)
        if not hasattr(self.model, "main_input_name") or not hasattr(self.model, "config"):
            raise UsageError(
                f"{source.name}: {type(self.model).__name__}, which images would enter, is only a part of "
                f"{type(full).__name__} and does not run by itself"
            )
        self.config: PretrainedConfig = self.model.config
        self.n_parameters = sum(parameter.numel() for parameter in full.parameters())
        self.tied_names = tied_names(full, self.model)
        self.source = source
        self.processor = processor
        self._compiled = is_compiled(full)
        self.name = source.name
        self.run_device = self.device
        self.init, self.seed = init, seed
        self.layout = find_layout(self.model, self.config)
        self.hidden_size = hidden_size(self.config, self.model)
        self._parameters_accepted = set(inspect.signature(self.model.forward).parameters)
        self.modality = "vision" if sees_pixels(self.model) else "language"
        self.stem_kind = stem
        self.pooling = pooling or "mean"
        self.patch_size, self.image_size = patch_size, image_size
        self.stem = None
        self.output_width = self.hidden_size
        """Width of what `forward` returns, which some models project (OPT-350m)."""
        self.loaded_with: dict[str, Any] | None = None
        """Arguments by which `load_backbone` made it from files."""
        self.checks_itself = self_check
        self.checked: SelfCheck | None = None
        self.preprocessing: Preprocessing | None = None
        # In a tuple, so that the wrapper's parameters are not registered a second time.
        self._with_head = (cast("PreTrainedModel", full),) if is_image_classifier(full) else ()
        self.attention: str | None
        self.attention_override: str | None = None
        """The attention that a mask brings about, where it is not the model's own."""
        if self.modality == "vision":
            if attention is not None:
                raise UsageError(f"--attention is for language backbones; {self.name} is a vision model")
            self.attention = "bidirectional"
            recipe = source.folder if isinstance(source, ModelSource) else processor
            self.preprocessing = for_vision(recipe, self.config, image_size, name=self.name)
            self.patch_size = getattr(self.config, "patch_size", None)
        else:
            choose_attention(self, attention)
        if self.pooling == "cls" and self.attention == "causal":
            raise UsageError(
                f"pooling 'cls' reads the first token, which under causal attention sees one patch alone; "
                f"use --pooling last, or --attention bidirectional for {self.name}"
            )

    @property
    def patch_shape(self) -> tuple[int, int] | None:
        """Height and width of a patch; None where the configuration names none."""
        size = self.patch_size
        if isinstance(size, (list, tuple)):
            return int(size[0]), int(size[-1])
        return (size, size) if size else None

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
        The self-check (`layerprobe.backbones.self_check`) runs here, once.

        Raises
        ------
        UsageError
            The images do not fit, or the self-check found that the model's hidden states are not one token a
            patch, the same in every pass and every block.
        """
        if self.modality == "language" and self.stem is None:
            self._prepare_stem(task)
        if self.checks_itself and self.checked is None and self.device.type != "meta":
            indices = np.arange(N_IMAGES) % len(task.train)
            with evaluating(self):
                found, self.layout = self_check(self, self.preprocess_rows(task.train, indices))
            self.checked, self.output_width = found, found.output_width
        return self

    def _prepare_stem(self, task: HasImages) -> None:
        if task.image_size is None and self.image_size is None:
            note(
                f"images that are no squares of one size are resized to {MIXED_SIZE}×{MIXED_SIZE}; see image_size"
            )
        stem = self._make_stem(task.image_size)
        token_std = self.token_std()
        if self.stem_kind == "pca":
            first = np.arange(min(_PCA_IMAGES, len(task.train)))
            stem.init_pca(self.preprocess_rows(task.train, first), token_std)
        else:
            stem.init_random(token_std, seed=self.seed)
        self.stem = stem.to(self.device, self.dtype)

    def _make_stem(self, image_size: int | None) -> PatchStem:
        """A stem for images of this size (None: of several sizes), and the preprocessing that goes with it."""
        size = self.image_size or image_size or MIXED_SIZE
        patch_size = self.patch_size or default_patch_size(size)
        n_tokens = (size // patch_size) ** 2
        longest = longest_sequence(self.model, self.config)
        if longest is not None and n_tokens > longest:
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
        return self.recipe(images)

    def preprocess_rows(self, split: HasRows, indices: np.ndarray) -> Tensor:
        """`preprocess` of the images of a split at `indices`."""
        return self.recipe.scaled(split.resized(self.recipe, indices))

    @property
    def recipe(self) -> Preprocessing:
        """`preprocessing`; UsageError where it is not settled yet."""
        if self.preprocessing is None:
            raise UsageError("call prepare(task) first: image size and stem depend on the task")
        return self.preprocessing

    @torch.no_grad()
    def token_std(self) -> float:
        """Standard deviation of what the embedding layer hands to the blocks, over the first 4,096 tokens."""
        embedding = self._embedding
        ids = torch.arange(min(4096, embedding.num_embeddings), device=self.device)
        return float(run_whole(embedding, ids).double().std())

    @property
    def embedding_width(self) -> int:
        """Width of the token embeddings, which is what a stem writes."""
        return self._embedding.embedding_dim

    @property
    def _embedding(self) -> nn.Embedding:
        try:
            table = self.model.get_input_embeddings()
            table = getattr(table, "base_layer", table)  # under an adapter
        except (AttributeError, NotImplementedError):
            table = None
        if not hasattr(table, "embedding_dim"):
            raise UsageError(
                f"{self.name}: {type(self.model).__name__} has no table of token embeddings, whose width and scale "
                "a stem would take"
            )
        return table  # type: ignore[return-value]

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels B×C×H×W → the model's last hidden states B×T×D, after its final norm where it has one."""
        pixels = pixels.to(self.device, self.dtype, non_blocking=True)
        if self.modality == "vision":
            return run_at_any_size(self._run, pixels, self.model, name=self.name)
        if self.stem is None:
            raise UsageError("call prepare(task) first: the stem depends on the task's image size")
        return self.forward_tokens(self.stem(pixels))

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens B×T×D (what the stem makes) → the model's last hidden states B×T×D."""
        extra: dict[str, Any] = {"use_cache": False} if "use_cache" in self._parameters_accepted else {}
        if self.attention_override is not None:
            extra["attention_mask"] = attention_mask(self.attention_override, tokens)
        return self._run(inputs_embeds=tokens, **extra)

    def _run(self, **inputs: Any) -> Tensor:
        with run_eagerly(self._compiled):
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
        if self.checked is not None and n_tokens == self.checked.n_tokens:
            return self.checked.n_prefix
        size = self.preprocessing.output_size if self.preprocessing else None
        if self.patch_shape is None or size is None:
            return 0
        height, width = self.patch_shape
        return max(n_tokens - (size[0] // height) * (size[1] // width), 0)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels B×C×H×W → pooled features of the last hidden states, B×D."""
        return self.pool(self(pixels))

    @property
    def with_own_head(self) -> PreTrainedModel | None:
        """The whole model where the checkpoint is an image classifier; see `own_head.own_head`."""
        return self._with_head[0] if self._with_head else None

    def own_logits(self, pixels: Tensor) -> Tensor:
        """Logits B×outputs of the classifier that the checkpoint itself brought, in the checkpoint's order."""
        if self.with_own_head is None or self.modality == "language":
            raise UsageError(f"{self.name} brings no image classifier of its own; fine-tune or probe it")
        pixels = pixels.to(self.device, self.dtype)
        with run_eagerly(self._compiled):
            logits: Tensor = run_at_any_size(self.with_own_head, pixels, self.model, name=self.name).logits
        return logits

    def forget_own_head(self) -> None:
        """Be a tower alone: the checkpoint's classifier is not one that was trained."""
        self._with_head = ()

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
            "stem_hash": self.stem.content_hash() if self.stem else None,
            "patch_size": self.patch_size,
            "image_size": self.image_size,
            "attention": self.attention,
            "pooling": self.pooling,
            "dtype": dtype_name(self.dtype),
            "preprocessing": self.preprocessing.describe() if self.preprocessing else None,
        }

    __repr__ = backbone_in_words
    _repr_html_ = backbone_as_html

    def provenance(self) -> dict[str, Any]:
        """`describe`, and what the self-check found: None where it has not run."""
        return {**self.describe(), "self_check": self.checked.describe() if self.checked else None}


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

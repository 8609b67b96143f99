"""How images enter a backbone: preprocessing for every model, and the patch stem of language models.

Vision checkpoints bring a processor, which does the work (`layerprobe.backbones.processor`). Language backbones get
pixels of about unit variance at the task's own image size.

Axis letters: B images, C channels, H × W pixels, T patches, P = p·p·C pixel values of a patch, D model width.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor, nn

from layerprobe.backbones.processor import (
    SIZE_ALONE,
    byte_table,
    load_processor,
    made_of,
    output_size,
    read_recipe,
)
from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.files import tensor_bytes
from layerprobe.progress import note

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.image_processing_backends import PilBackend

PIXEL_MEAN = 0.5
PIXEL_STD = 0.25
"""Pixels in [0, 1] are shifted and divided by these, which brings natural images near unit variance."""

_Out = TypeVar("_Out")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What happens to an image: resize, centre crop, scale, normalise. Sizes are (height, width)."""

    channels: int
    size: tuple[int, int] | None
    """Resize to exactly this; None leaves the image as it is."""
    shortest_edge: int | None = None
    """Resize so that the shorter side has this length, keeping the aspect ratio."""
    crop: tuple[int, int] | None = None
    resample: int = int(Image.Resampling.BICUBIC)
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (PIXEL_MEAN,)
    std: tuple[float, ...] = (PIXEL_STD,)

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 arrays H×W or H×W×C → float32 B×C×H×W. All results must have one size."""
        return self.scaled(self.stacked([self.resized(image) for image in images]))

    def resized(self, image: np.ndarray) -> np.ndarray:
        """One image H×W or H×W×C → C×H×W: everything that looks at more than one pixel."""
        return self._one(_with_channels(image, self.channels))

    def stacked(self, images: Sequence[np.ndarray]) -> Tensor:
        """Resized images as one B×C×H×W; BrokenFileError where their sizes differ."""
        sizes = sorted({image.shape[1:] for image in images})
        if len(sizes) > 1:
            raise BrokenFileError(
                f"images of different sizes ({', '.join(f'{height}×{width}' for height, width in sizes[:3])}, …) "
                "make no batch; pass --image-size"
            )
        return torch.from_numpy(np.stack(images))

    def scaled(self, batch: Tensor) -> Tensor:
        """Resized images → what the model takes, pixel by pixel; both B×C×H×W, on their device."""
        mean = torch.tensor(self.mean, device=batch.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=batch.device).view(-1, 1, 1)
        return batch.to(torch.float32).mul_(self.rescale).sub_(mean).div_(std)

    @property
    def resize_key(self) -> str | None:
        """What decides the bytes of `resized`; None where it makes no bytes."""
        return json.dumps(["resize", self.channels, self.size, self.resample, PIL.__version__])

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of what comes out, whatever the image; None where that depends on it."""
        return self.size

    def _one(self, array: np.ndarray) -> np.ndarray:
        """One image H×W×C → C×H×W, resized."""
        if self.size is not None and array.shape[:2] != self.size:
            height, width = self.size
            picture = Image.fromarray(array.squeeze())
            array = np.asarray(picture.resize((width, height), Image.Resampling(self.resample)))
        return array.reshape(*array.shape[:2], self.channels).transpose(2, 0, 1)

    def describe(self) -> dict[str, Any]:
        """Plain values for provenance and cache keys."""
        return {known.name: getattr(self, known.name) for known in fields(Preprocessing)}


class HasRows(Protocol):
    """What is needed of a split of a task: its images, made ready by a `Preprocessing` or recalled."""

    def __len__(self) -> int: ...

    def resized(self, resizer: Preprocessing, indices: np.ndarray) -> Tensor: ...


class HasImages(Protocol):
    """What `Backbone.prepare` needs to know of a task."""

    @property
    def image_size(self) -> int | None: ...

    @property
    def train(self) -> HasRows: ...


@dataclass(frozen=True, kw_only=True)
class ProcessorPreprocessing(Preprocessing):
    """The processor that a checkpoint brings does it all; the fields above are what it says of itself."""

    processor: PilBackend = field(repr=False)
    made: tuple[int, int] | None
    """Height and width of what comes out, found by trying; None where that depends on the image."""
    table: Tensor | None = field(repr=False)
    """What the processor makes of each byte, C×256, once an image has its size; None where it cannot be asked."""

    @property
    def output_size(self) -> tuple[int, int] | None:
        return self.made

    def _one(self, array: np.ndarray) -> np.ndarray:
        return made_of(self.processor, array, **({} if self.table is None else SIZE_ALONE))

    def scaled(self, batch: Tensor) -> Tensor:
        if self.table is None:
            return batch
        table = self.table.to(batch.device)
        channels = [table[c].index_select(0, batch[:, c].flatten().int()) for c in range(batch.shape[1])]
        return torch.stack([c.view(batch[:, 0].shape) for c in channels], dim=1)

    @property
    def resize_key(self) -> str | None:
        if self.table is None:
            return None
        versions = importlib.metadata.version("transformers"), PIL.__version__
        return json.dumps([self.processor.to_json_string(), *versions])

    def describe(self) -> dict[str, Any]:
        settings = json.loads(self.processor.to_json_string())
        return {**super().describe(), "processor": settings}


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """H×W×channels; grey repeats into RGB, RGB becomes grey by Pillow's luma (ITU-R 601-2)."""
    array = image if image.ndim == 3 else image[:, :, None]
    if array.shape[2] == channels:
        return array
    if channels == 1:
        return np.asarray(Image.fromarray(array[:, :, :3]).convert("L"))[:, :, None]
    if array.shape[2] == 1:
        return np.repeat(array, channels, axis=2)
    if array.shape[2] < channels:
        raise UsageError(f"the model takes images of {channels} channels, these have {array.shape[2]}")
    return array[:, :, :channels]


def for_language(image_size: int | None, channels: int) -> Preprocessing:
    """Pixels near unit variance; resized (bicubic) only when `image_size` is given."""
    return Preprocessing(channels=channels, size=_pair(image_size or None))


def for_vision(
    recipe: Path | PilBackend | None,
    config: PretrainedConfig,
    image_size: int | None,
    *,
    name: str = "the model",
) -> Preprocessing:
    """What a vision checkpoint's own processor does; without a recipe, resize to the model's size, pixels to ±1.

    An `image_size` given by the user replaces the recipe's size and crop.

    Parameters
    ----------
    recipe : Path | PilBackend | None
        The checkpoint's folder, or a processor of transformers, which is followed as it is.
    name : str
        What the model is called in a remark.
    """
    channels = int(getattr(config, "num_channels", 3))
    wanted = _pair(image_size or None)
    if isinstance(recipe, Path) and read_recipe(recipe) is not None:
        return _of_processor(load_processor(recipe, config, wanted), channels)
    if recipe is not None and not isinstance(recipe, Path):
        if wanted is not None:
            raise UsageError("image_size and an image processor say two sizes; set the size in the processor")
        return _of_processor(recipe, channels)
    native = native_size(config) or (224, 224)
    half, size = (0.5,) * channels, wanted or native
    note(
        f"{name} holds no preprocessing recipe; its images are resized to {size[0]}×{size[1]}, "
        "their pixels mapped to ±1"
    )
    return Preprocessing(channels=channels, size=size, mean=half, std=half)


def _of_processor(processor: PilBackend, channels: int) -> ProcessorPreprocessing:
    """A processor's settings under our names, beside the processor itself."""
    made = output_size(processor, channels)  # first: it refuses what cannot be followed
    said = {name: getattr(processor, name, None) for name in _SETTINGS}
    size = said["size"] if said["do_resize"] else None
    crop = said["crop_size"] if said["do_center_crop"] else None
    return ProcessorPreprocessing(
        channels=channels,
        size=(size["height"], size["width"]) if size and size.get("height") and size.get("width") else None,
        shortest_edge=size.get("shortest_edge") if size else None,
        crop=(crop["height"], crop["width"]) if crop else None,
        resample=int(Image.Resampling.BILINEAR if said["resample"] is None else said["resample"]),
        rescale=float(said["rescale_factor"] or 1) if said["do_rescale"] else 1.0,
        mean=_channel_values(said["image_mean"]) if said["do_normalize"] else (0.0,),
        std=_channel_values(said["image_std"]) if said["do_normalize"] else (1.0,),
        processor=processor,
        made=made,
        table=byte_table(processor, channels),
    )


_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)


def _channel_values(given: float | Sequence[float] | None) -> tuple[float, ...]:
    if given is None:
        return ()
    return (float(given),) if isinstance(given, (int, float)) else tuple(map(float, given))


def _pair(value: int | Sequence[int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def native_size(config: PretrainedConfig) -> tuple[int, int] | None:
    """Height and width that a vision model was made for; a wrapped timm model says them in its own words."""
    made = (getattr(config, "model_args", None) or {}).get("img_size")
    trained = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    return _pair(getattr(config, "image_size", None) or made or (trained and trained[1:]))


def run_at_any_size(run: Callable[..., _Out], pixels: Tensor, model: PreTrainedModel, *, name: str) -> _Out:
    """Run a vision model on pixels of any size; what it cannot take of a size not its own is refused.

    Some stretch their positions over the image when asked to; others, such as DINOv2, always do.
    """
    own = native_size(model.config) or tuple(pixels.shape[-2:])
    if tuple(pixels.shape[-2:]) == own:
        return run(pixel_values=pixels)
    stretches = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    try:
        return run(pixel_values=pixels, **({"interpolate_pos_encoding": True} if stretches else {}))
    except (ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or (pixels.is_meta and isinstance(error, RuntimeError)):
            raise  # which says nothing of the size
        raise UsageError(
            f"{name} takes images of {own[0]}×{own[1]} only, not of {pixels.shape[-2]}×{pixels.shape[-1]}; "
            "leave out --image-size"
        ) from error


class PatchStem(nn.Module):
    """Patchify p×p×C, then one linear map to the width of the token embeddings.

    No positions are added: the language backbone adds its own (learned, rotary or relative).
    """

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.patch_size = patch_size
        self.projection = nn.Linear(channels * patch_size * patch_size, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels B×C×H×W → tokens B×T×D, patches in reading order."""
        weight = self.projection.weight
        tokens: Tensor = self.projection(patchify(pixels, self.patch_size).to(weight.dtype))
        return tokens

    def content_hash(self) -> str | None:
        """Hash of the weights; None on the meta device."""
        if self.projection.weight.is_meta:
            return None
        digest = hashlib.sha256()
        for name, value in self.state_dict().items():
            digest.update(name.encode())
            for piece in tensor_bytes(value.float()):
                digest.update(piece)
        return digest.hexdigest()[:12]

    @torch.no_grad()
    def init_random(self, token_std: float, *, seed: int) -> None:
        """Gaussian weights that turn patches of unit variance into tokens of deviation `token_std`."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(self.projection.weight.shape, generator=generator)
        fan_in = weight.shape[1]
        self.projection.weight.copy_(weight * (token_std / fan_in**0.5))
        self.projection.bias.zero_()

    @torch.no_grad()
    def init_pca(self, pixels: Tensor, token_std: float) -> None:
        """Whitened patch principal components in the first min(P, D) coordinates, the others zero.

        Deterministic and free of labels. Each component has deviation `token_std` times √(D / components),
        so that the token as a whole has the mean square of a token embedding. Components below a millionth of
        the largest variance are left at zero: whitening would only amplify rounding noise.
        """
        patches = patchify(pixels, self.patch_size).flatten(0, 1).double()
        mean = patches.mean(0)
        covariance = (patches - mean).T @ (patches - mean) / max(len(patches) - 1, 1)
        variances, vectors = torch.linalg.eigh(covariance)
        variances, vectors = variances.flip(0), vectors.flip(1)
        width = self.projection.weight.shape[0]
        kept = int((variances > variances[0].clamp_min(1e-30) * 1e-6).sum().clamp(max=width))
        if variances[0] <= 0:
            raise UsageError("stem 'pca' needs images that differ: all patches are equal; use --stem random")
        # A principal component has no sign of its own; the largest coefficient is made positive.
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign().squeeze(0)
        scale = token_std * (width / kept) ** 0.5
        rows = (vectors * signs)[:, :kept].T / variances[:kept, None].sqrt() * scale
        weight = torch.zeros(self.projection.weight.shape, dtype=torch.float64)
        weight[:kept] = rows
        self.projection.weight.copy_(weight)
        self.projection.bias.copy_(-(weight @ mean))


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """B×C×H×W → B×T×P, patches row by row, each flattened as rows × columns × channels.

    Raises
    ------
    UsageError
        Height or width is no multiple of `patch_size`.
    """
    b, c, h, w = pixels.shape
    p = patch_size
    count_patches(h, w, p)
    return pixels.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)


def count_patches(height: int, width: int, patch_size: int) -> int:
    """Patches of an image; UsageError where `patch_size` does not divide it."""
    if height % patch_size or width % patch_size:
        raise UsageError(
            f"patch size {patch_size} does not divide images of {height}×{width}; "
            "choose a divisor or --image-size"
        )
    return (height // patch_size) * (width // patch_size)


def default_patch_size(image_size: int) -> int:
    """The divisor of `image_size` that gives a grid nearest to 8 × 8, the finer one on a tie.

    >>> default_patch_size(32), default_patch_size(8), default_patch_size(224)
    (4, 1, 28)
    """
    divisors = [p for p in range(1, image_size + 1) if image_size % p == 0]
    return min(divisors, key=lambda p: (abs(image_size / p - 8), p))

"""How images enter a backbone: preprocessing for every model, and the patch stem of language models.

Vision checkpoints bring their recipe in `preprocessor_config.json`; a test holds these numbers equal to the
model's own preprocessor. Language backbones get pixels of about unit variance at the task's own image size.

Axis letters: B images, C channels, H × W pixels, T patches, P = p·p·C pixel values of a patch, D model width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.files import read_json, tensor_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PIXEL_MEAN = 0.5
PIXEL_STD = 0.25
"""Pixels in [0, 1] are shifted and divided by these, which brings natural images near unit variance."""

STEM_KINDS = ("random", "pca")


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
        arrays = [self._one(image) for image in images]
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1:
            raise BrokenFileError(
                f"images of different sizes ({', '.join(f'{a}×{b}' for a, b, *_ in sorted(shapes)[:3])}, …) "
                "make no batch; pass --image-size"
            )
        batch = torch.from_numpy(np.stack(arrays)).to(torch.float32).mul_(self.rescale)
        batch = batch.permute(0, 3, 1, 2)
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return ((batch - mean) / std).contiguous()

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of what comes out of square images; None where images keep their size."""
        edge = self.shortest_edge
        return self.crop or self.size or (None if edge is None else (edge, edge))

    def _one(self, image: np.ndarray) -> np.ndarray:
        array = _with_channels(image, self.channels)
        if self.output_size is None:
            return array
        picture = Image.fromarray(array.squeeze())
        if self.shortest_edge is not None:
            short, long = sorted(picture.size)
            longer = int(self.shortest_edge * long / short)
            wide = picture.width > picture.height
            new = (longer, self.shortest_edge) if wide else (self.shortest_edge, longer)
            picture = picture.resize(new, Image.Resampling(self.resample))
        elif self.size is not None and (picture.height, picture.width) != self.size:
            picture = picture.resize((self.size[1], self.size[0]), Image.Resampling(self.resample))
        array = np.asarray(picture)
        if array.ndim == 2:
            array = array[:, :, None]
        return array if self.crop is None else _centre_crop(array, self.crop)

    def describe(self) -> dict[str, Any]:
        """Plain values for provenance and cache keys."""
        return asdict(self)


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """H×W×channels; grey repeats into RGB, RGB becomes grey by Pillow's luma (ITU-R 601-2)."""
    array = image if image.ndim == 3 else image[:, :, None]
    if array.shape[2] == channels:
        return array
    if channels == 1:
        return np.asarray(Image.fromarray(array[:, :, :3]).convert("L"))[:, :, None]
    return np.repeat(array[:, :, :1], channels, axis=2) if array.shape[2] == 1 else array[:, :, :channels]


def _centre_crop(array: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    """The middle of `array`, padded with zeros where it is smaller than `crop`."""
    height, width = crop
    lacking = [max(wanted - there, 0) for wanted, there in zip(crop, array.shape, strict=False)]
    if any(lacking):
        array = np.pad(array, [(-(-lack // 2), lack // 2) for lack in lacking] + [(0, 0)])
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width]


def for_language(image_size: int | None, channels: int) -> Preprocessing:
    """Pixels near unit variance; resized (bicubic) only when `image_size` is given."""
    return Preprocessing(channels=channels, size=_pair(image_size or None))


def for_vision(folder: Path, config: PretrainedConfig, image_size: int | None) -> Preprocessing:
    """The recipe beside a vision checkpoint; without one, resize to the model's size and map pixels to ±1.

    An `image_size` given by the user replaces the recipe's size and crop.
    """
    channels = int(getattr(config, "num_channels", 3))
    native = _pair(getattr(config, "image_size", None)) or (224, 224)
    half = (0.5,) * channels
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Preprocessing(channels=channels, size=_pair(image_size or None) or native, mean=half, std=half)
    recipe = read_json(path, what="preprocessor configuration")
    if not isinstance(recipe, dict):
        raise BrokenFileError(f"{path} holds no preprocessing recipe")
    if image_size:
        size, edge, crop = _pair(image_size), None, None
    else:
        size, edge = _resize_target(recipe, native)
        crop = _pair(recipe.get("crop_size")) if recipe.get("do_center_crop") else None
    normalise = recipe.get("do_normalize", True)
    return Preprocessing(
        channels=channels,
        size=size,
        shortest_edge=edge,
        crop=crop,
        resample=int(recipe.get("resample", Image.Resampling.BILINEAR)),
        rescale=float(recipe.get("rescale_factor", 1 / 255)) if recipe.get("do_rescale", True) else 1.0,
        mean=tuple(map(float, recipe.get("image_mean", half))) if normalise else (0.0,),
        std=tuple(map(float, recipe.get("image_std", half))) if normalise else (1.0,),
    )


def _resize_target(
    recipe: dict[str, Any], native: tuple[int, int]
) -> tuple[tuple[int, int] | None, int | None]:
    """Exact size and shortest edge of a recipe; at most one of them is given."""
    if not recipe.get("do_resize", True):
        return None, None
    given = recipe.get("size") or native
    if isinstance(given, dict):
        return _pair(given), given.get("shortest_edge")
    by_edge = recipe.get("do_center_crop") and recipe.get("default_to_square") is not True
    if isinstance(given, int) and by_edge:
        return None, given
    return _pair(given), None


def _pair(value: int | Sequence[int] | dict[str, int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict):
        return (int(value["height"]), int(value["width"])) if "height" in value else None
    height, width = value
    return int(height), int(width)


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

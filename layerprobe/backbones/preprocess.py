"""From uint8 images to the tensor a backbone expects, with Pillow and torch alone.

Vision checkpoints bring their recipe in `preprocessor_config.json`; a test holds these numbers equal to the
model's own preprocessor. Language backbones get pixels of about unit variance at the task's own image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from layerprobe.backbones.stem import PIXEL_MEAN, PIXEL_STD
from layerprobe.errors import BrokenFileError
from layerprobe.files import read_json


@dataclass(frozen=True)
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

    def _one(self, image: np.ndarray) -> np.ndarray:
        if self.size is None and self.shortest_edge is None and self.crop is None:
            return _with_channels(image, self.channels)
        picture = Image.fromarray(_with_channels(image, self.channels).squeeze())
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
    height, width = crop
    padded = array
    if array.shape[0] < height or array.shape[1] < width:
        padded = np.zeros(
            (max(height, array.shape[0]), max(width, array.shape[1]), array.shape[2]), array.dtype
        )
        top = -(-(padded.shape[0] - array.shape[0]) // 2)
        left = -(-(padded.shape[1] - array.shape[1]) // 2)
        padded[top : top + array.shape[0], left : left + array.shape[1]] = array
    top = (padded.shape[0] - height) // 2
    left = (padded.shape[1] - width) // 2
    return padded[top : top + height, left : left + width]


def for_language(image_size: int | None, channels: int) -> Preprocessing:
    """Pixels near unit variance; resized (bicubic) only when `image_size` is given."""
    return Preprocessing(channels=channels, size=(image_size, image_size) if image_size else None)


def for_vision(folder: Path, config: Any, image_size: int | None) -> Preprocessing:
    """The recipe beside a vision checkpoint; without one, resize to the model's size and map pixels to ±1.

    An `image_size` given by the user replaces the recipe's size and crop.
    """
    channels = int(getattr(config, "num_channels", 3))
    native = _pair(getattr(config, "image_size", None)) or (224, 224)
    size = (image_size, image_size) if image_size else None
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        half = (0.5,) * channels
        return Preprocessing(channels, size or native, mean=half, std=half)
    recipe = read_json(path, what="preprocessor configuration")
    if not isinstance(recipe, dict):
        raise BrokenFileError(f"{path} holds no preprocessing recipe")
    exact, edge = None, None
    if recipe.get("do_resize", True):
        given = recipe.get("size") or native
        if isinstance(given, dict):
            exact = _pair((given["height"], given["width"])) if "height" in given else None
            edge = given.get("shortest_edge")
        elif (
            isinstance(given, int)
            and recipe.get("do_center_crop")
            and recipe.get("default_to_square") is not True
        ):
            edge = given
        else:
            exact = _pair(given)
    crop = _pair(recipe.get("crop_size")) if recipe.get("do_center_crop") else None
    if size:
        exact, edge, crop = size, None, None
    normalise = recipe.get("do_normalize", True)
    return Preprocessing(
        channels,
        exact,
        edge,
        crop,
        resample=int(recipe.get("resample", Image.Resampling.BILINEAR)),
        rescale=float(recipe.get("rescale_factor", 1 / 255)) if recipe.get("do_rescale", True) else 1.0,
        mean=tuple(map(float, recipe.get("image_mean", [0.5] * channels))) if normalise else (0.0,),
        std=tuple(map(float, recipe.get("image_std", [0.5] * channels))) if normalise else (1.0,),
    )


def _pair(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict):
        return (int(value["height"]), int(value["width"])) if "height" in value else None
    height, width = value
    return int(height), int(width)

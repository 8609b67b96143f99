"""The image processor that a vision checkpoint brings, loaded as transformers would load it.

A recipe means what its class says: whether a bare `size` is an edge or a square, what a key left out stands for, and
how cropping, padding and scaling follow one another. So the class is asked, never a table of ours.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from layerprobe.errors import BrokenFileError, UsageError, first_line
from layerprobe.files import read_json
from layerprobe.model_config import numbers_and_texts
from layerprobe.reading import is_there

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.image_processing_backends import PilBackend
    from transformers.image_utils import SizeDict

RECIPE_FILES = ("processor_config.json", "preprocessor_config.json")
"""Where a recipe may lie; the first may hold one under `image_processor`, and wins, as in transformers."""

MAX_EDGE = 4096
"""Pixels; an image of such a square takes 200 MB as numbers."""
_EDGES = ("height", "width", "shortest_edge", "size", "crop_size")

_UNUSABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, ArithmeticError,
    MemoryError,
)  # fmt: skip
"""What transformers raises for a recipe that it cannot follow."""

_TRIAL = ((224, 224), (320, 320), (320, 240))
"""Heights and widths of the images that tell what a processor makes of images."""


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The preprocessing recipe of a checkpoint, as it is written; None where there is none."""
    for name in RECIPE_FILES:
        path = folder / name
        if not is_there(path):
            continue
        recipe = read_json(path, what="preprocessor configuration", inside=folder)
        if name == RECIPE_FILES[0] and isinstance(recipe, dict):
            if "image_processor" not in recipe:
                continue
            recipe = recipe["image_processor"]
        if not isinstance(recipe, dict):
            raise BrokenFileError(f"{path} holds no preprocessing recipe")
        for key, value in numbers_and_texts(recipe):
            if isinstance(value, int) and key in _EDGES and not 0 < value <= MAX_EDGE:
                raise BrokenFileError(f"cannot read {path}: no image has {key} = {str(value)[:20]}")
        return recipe
    return None


def recipe_class(recipe: dict[str, Any]) -> str | None:
    """The name of the class that a recipe is for, as of transformers 5; None where it names none."""
    name = recipe.get("image_processor_type")
    if name is None and isinstance(old := recipe.get("feature_extractor_type"), str):
        name = old.replace("FeatureExtractor", "ImageProcessor")
    return name.removesuffix("Fast") if isinstance(name, str) else None


def load_processor(folder: Path, config: PretrainedConfig, image_size: tuple[int, int] | None) -> PilBackend:
    """The processor of a folder that holds a recipe; to `image_size`, where given, instead of its own size and crop.

    Raises
    ------
    BrokenFileError
        A recipe that transformers cannot follow here; the message says why.
    UsageError
        An `image_size` that the processor does not take.
    """
    if image_size is None:
        return _load(folder, config, {})
    height, width = image_size
    exact = {"height": height, "width": width}
    ways: list[dict[str, object]] = [{"size": exact, "do_center_crop": False}]
    if height == width:  # some classes take a shortest edge alone and crop by themselves
        ways.append({"size": {"shortest_edge": height}, "do_center_crop": True, "crop_size": exact})
    for way in ways:
        processor = _load(folder, config, {"do_resize": True, **way})
        try:
            fits = {made_of(processor, shape).shape[1:] for shape in _TRIAL} == {image_size}
        except BrokenFileError:
            continue
        if fits:
            return processor
    raise UsageError(
        f"{type(processor).__name__} of {folder} does not resize to {height}×{width}; leave out --image-size"
    )


def _load(folder: Path, config: PretrainedConfig, changes: dict[str, object]) -> PilBackend:
    from transformers import AutoImageProcessor

    recipe = read_recipe(folder) or {}
    errors: list[Exception] = []
    # Where the recipe names no class, the model's configuration tells it: that of the whole folder, or of the tower
    # in it. Where it names one that is not here, no other may stand in.
    for known in ({}, {"config": config}) if recipe_class(recipe) is None else ({},):
        try:
            # Pillow's backend, so that the numbers do not depend on whether torchvision is installed.
            made: PilBackend = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False, **known, **changes
            )
        except _UNUSABLE as error:
            errors.append(error)
        else:
            return made
    if (recipe_class(recipe) or type(config).__name__).startswith("DINOv3ViT"):
        return _scaling_first().from_dict({**recipe, **changes})
    reason = first_line(errors[-1])
    if lacking := re.search(r"Missing optional dependencies: ([\w, ]+)", str(errors[-1])):
        reason = f"{recipe_class(recipe) or 'its class'} needs {lacking[1]}, which is not installed"
    raise BrokenFileError(f"cannot follow the preprocessing recipe of {folder}: {reason}")


def _scaling_first() -> type[PilBackend]:
    """DINOv3's processor, which transformers has for torchvision alone: it scales pixels before it resizes them.

    Resizing fractions instead of bytes rounds nothing, and torch does it as torchvision would.
    """
    from transformers.image_processing_backends import PilBackend
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    class DINOv3ViTImageProcessor(PilBackend):
        resample = Image.Resampling.BILINEAR
        image_mean = IMAGENET_DEFAULT_MEAN
        image_std = IMAGENET_DEFAULT_STD
        size: ClassVar = {"height": 224, "width": 224}
        do_resize = do_rescale = do_normalize = True

        def resize(
            self,
            image: np.ndarray,
            size: SizeDict,
            resample: Image.Resampling | None = None,
            reducing_gap: int | None = None,
            **kwargs: object,
        ) -> np.ndarray:
            mode = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}.get(
                Image.Resampling(self.resample if resample is None else resample)
            )
            if mode is None or size.height is None or size.width is None:
                raise ValueError(
                    f"it resizes to a height and a width, bilinear or bicubic, not to {dict(size)}"
                )
            scaled = torch.tensor(image, dtype=torch.float32) * (
                self.rescale_factor if self.do_rescale else 1
            )
            to = (size.height, size.width)
            resized: np.ndarray = functional.interpolate(scaled[None], to, mode=mode, antialias=True)[
                0
            ].numpy()
            return resized

        def rescale(self, image: np.ndarray, scale: float, *args: object, **kwargs: object) -> np.ndarray:
            done = image.dtype == np.float32
            return image if done else super().rescale(image, scale)

    return DINOv3ViTImageProcessor


SIZE_ALONE: dict[str, bool] = {"do_rescale": False, "do_normalize": False}
"""How a processor is asked for the bytes of an image at its size."""

_VALUES_ALONE: dict[str, bool] = {"do_resize": False, "do_center_crop": False, "do_pad": False}


def byte_table(processor: PilBackend, channels: int) -> Tensor | None:
    """What a processor makes of each byte of each channel, float32 C×256; None where it does more than that.

    Most resize and crop first and then treat every pixel alone. Whether this one does is tried on images of noise:
    bytes at the model's size, looked up here, must give the very bits of the whole processor.
    """
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), channels, axis=2)
    draw = np.random.default_rng(0)
    try:
        table = made_of(processor, ramp, **_VALUES_ALONE).reshape(channels, 256)
        for shape in _TRIAL:
            image = draw.integers(0, 256, (*shape, channels), dtype=np.uint8)
            resized = made_of(processor, image, **SIZE_ALONE)
            looked_up = np.stack([table[c][resized[c]] for c in range(channels)])
            if resized.dtype != np.uint8 or not np.array_equal(looked_up, made_of(processor, image)):
                return None
    except (BrokenFileError, IndexError, ValueError):
        return None
    return torch.from_numpy(table)


def made_of(
    processor: PilBackend, image: tuple[int, int] | np.ndarray, channels: int = 3, **changes: bool
) -> np.ndarray:
    """What a processor makes of one image H×W×C (or of a black one of that size): C×H×W, float32.

    Asked for `SIZE_ALONE`, it may hand out bytes.

    One image at a time: some classes pad to the largest of a batch, and features must not depend on company.
    """
    given = image if isinstance(image, np.ndarray) else np.zeros((*image, channels), np.uint8)
    try:
        settings: dict[str, Any] = {"input_data_format": "channels_last", **changes}
        values = processor(images=[given], **settings)["pixel_values"]
        pixels = np.ascontiguousarray(values[0])
        if changes != SIZE_ALONE or pixels.dtype != np.uint8:
            pixels = pixels.astype(np.float32, copy=False)
    except _UNUSABLE as error:
        raise BrokenFileError(
            f"{type(processor).__name__} cannot prepare an image of {given.shape[0]}×{given.shape[1]}: "
            f"{first_line(error)}"
        ) from error
    if pixels.ndim != 3 or len(values) != 1:
        shape = "×".join(map(str, (len(values), *pixels.shape)))
        raise BrokenFileError(
            f"{type(processor).__name__} makes an array of {shape} of one image, not a picture of channels, height "
            "and width, so its model is no vision backbone here"
        )
    return pixels


def output_size(processor: PilBackend, channels: int) -> tuple[int, int] | None:
    """Height and width of what comes out, found by trying; None where that depends on the image."""
    shapes = {made_of(processor, shape, channels).shape for shape in _TRIAL}
    if len({shape[0] for shape in shapes} | {channels}) > 1:
        found = ", ".join(str(shape[0]) for shape in shapes)
        raise BrokenFileError(
            f"{type(processor).__name__} makes images of {found} channels, but the model takes {channels}"
        )
    if len(shapes) > 1:
        return None
    _, height, width = shapes.pop()
    return height, width

"""Probes of a backbone on a task, beside the controls that say what they are worth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from layerprobe.analyzers.features import extract_features
from layerprobe.analyzers.probes import LinearProbes, linear_probes
from layerprobe.backbones.backbone import Backbone
from layerprobe.layers import LayerRef
from layerprobe.metrics.probing.logistic import C_GRID
from layerprobe.tasks import Task
from layerprobe.tasks.task import ImageSplit

SPLITS = ("train", "validation", "test")

PIXEL_SIZE = 32
"""Raw pixels are probed at the images' own size, at most at this many pixels per side."""


def probe_backbone(
    backbone: Backbone,
    task: Task,
    *,
    twin: Backbone | None = None,
    pixels: bool = True,
    layers: Sequence[LayerRef] | None = None,
    pooling: str | None = None,
    extras: Sequence[str] = (),
    Cs: ArrayLike = C_GRID,
    refit: str = "train+validation",
    seed: int = 0,
    batch_size: int = 256,
    cache_dir: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> LinearProbes:
    """Linear probes of every layer, of a random twin's layers, and of the raw pixels.

    Parameters
    ----------
    backbone, task : what to probe, on what.
    twin : the same architecture before training (`load_backbone(..., init="random")`); its probes become the
        control "random", also with the layers' `extras`.
    pixels : probe the raw pixels, the mark to beat; the control "pixels".
    layers : default `embed` and every block's `resid_post`. pooling : default the backbone's.
    extras, Cs, refit, seed, device : see `linear_probes`. device is where probes are fitted.

    Returns
    -------
    LinearProbes with `.controls`.

    Raises
    ------
    UsageError, UnknownNameError, LayerprobeError : see `extract_features` and `linear_probes`.
    """
    options: dict[str, Any] = {
        "Cs": Cs,
        "refit": refit,
        "seed": seed,
        "extras": extras,
        "device": device,
        "quiet": quiet,
    }

    def probed(of: Backbone) -> LinearProbes:
        parts = [
            extract_features(
                of,
                task,
                split,
                layers=layers,
                pooling=pooling,
                batch_size=batch_size,
                cache_dir=cache_dir,
                quiet=quiet,
            )
            for split in SPLITS
        ]
        return linear_probes(parts[0], parts[1], parts[2], **options)

    record = probed(backbone)
    if pixels:
        record.controls["pixels"] = _probe_pixels(task, {**options, "extras": ()})
    if twin is not None:
        record.controls["random"] = probed(twin)
    return record


def pixel_features(split: ImageSplit, size: int) -> np.ndarray:
    """Images as rows of raw pixel values, float32 in 0 … 1, resized to size×size where they differ."""
    from PIL import Image

    def flat(image: np.ndarray) -> np.ndarray:
        if image.shape[:2] != (size, size):
            image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
        return image.reshape(-1)

    return np.stack([flat(image) for image in split.images()]).astype(np.float32) / 255


def _probe_pixels(task: Task, options: dict[str, Any]) -> LinearProbes:
    size = min(task.image_size or PIXEL_SIZE, PIXEL_SIZE)
    splits = [task.splits[name] for name in SPLITS]
    sides = [([pixel_features(split, size)], split.labels) for split in splits]
    probes = linear_probes(sides[0], sides[1], sides[2], **options)
    probes.layers = [LayerRef(None, "embed")]
    probes.facts = {"model": f"pixels {size}×{size}", "revision": None, "task": task.name}
    return probes

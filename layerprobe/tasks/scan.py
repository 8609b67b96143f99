"""One pass over all images: who is who, and which images are equal."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from layerprobe.progress import progress_bar
from layerprobe.tasks.images import ArrayImages, ImageStore, decode_all

KEEP_BYTES = 512 << 20
"""Decoded images are kept in memory when all of them together need less than this."""

DECODE_BYTES = 2 << 30
"""Up to this decoded size all images are decoded and compared by their pixels, beyond by their files."""

READ_BYTES = 16 << 30
"""Beyond this stored size images are not even read: ids rest on file names, duplicates stay unknown."""


@dataclass(frozen=True)
class Scan:
    """What the pass found, row by row.

    Attributes
    ----------
    digests : 16 hexadecimal digits over the stored bytes (`identity` "names": over the file name).
    groups : int64; rows with the same number show the same image.
    identity : "pixels", "files" or "names": what "the same image" was judged by.
    pixels : the decoded images where they are few enough to keep, else None.
    """

    digests: list[str]
    groups: np.ndarray
    identity: str
    pixels: ArrayImages | None
    channels: int
    image_size: int | None


def scan(images: ImageStore, official: Sequence[str], *, name: str) -> Scan:
    """Read every image once, decode it where that is affordable, and compare.

    The stored bytes give the ids, because they do not depend on the version of an image decoder;
    decoded pixels give the groups of equal images, because one picture may be stored in two ways.

    Raises
    ------
    BrokenFileError : the first image that cannot be read.
    """
    n_images = len(images)
    sample = decode_all(images, np.unique(np.linspace(0, n_images - 1, min(64, n_images)).astype(np.int64)))
    decoded_size = sum(image.nbytes for image in sample) / len(sample) * n_images
    if decoded_size > DECODE_BYTES and images.stored_size() > READ_BYTES:
        named = [f"{split}/{images.name(row)}" for row, split in enumerate(official)]
        if len(set(named)) == n_images:
            digests = [_hex(text.encode()) for text in named]
            return Scan(
                digests, np.arange(n_images), "names", None, *_form({image.shape for image in sample})
            )
    if decoded_size > DECODE_BYTES:
        rows = progress_bar(range(n_images), unit="image", desc=f"reading {name}")
        digests = [_hex(images.stored(row)) for row in rows]
        return Scan(digests, _group(digests), "files", None, *_form({image.shape for image in sample}))

    digests, pictures = [], []
    kept = _Kept(n_images, sample) if decoded_size <= KEEP_BYTES else None
    shapes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for row in progress_bar(range(n_images), unit="image", desc=f"reading {name}"):
            digests.append(_hex(images.stored(row)))
            pixels = images.pixels(row)
            picture = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
            picture.update(np.ascontiguousarray(pixels).data)
            pictures.append(picture.digest())
            shapes.add(pixels.shape)
            if kept is not None:
                kept.add(pixels)
    store = kept.store(name) if kept is not None else None
    return Scan(digests, _group(pictures), "pixels", store, *_form(shapes))


class _Kept:
    """Decoded images as one array for as long as they have one shape, then as a list."""

    def __init__(self, n_images: int, sample: Sequence[np.ndarray]) -> None:
        shape = sample[0].shape
        uniform = all(image.shape == shape for image in sample)
        self._block = np.empty((n_images, *shape), np.uint8) if uniform else None
        self._list: list[np.ndarray] = []
        self._count = 0

    def add(self, pixels: np.ndarray) -> None:
        if self._block is not None and pixels.shape != self._block.shape[1:]:
            self._list = list(self._block[: self._count])
            self._block = None
        if self._block is not None:
            self._block[self._count] = pixels
        else:
            self._list.append(pixels)
        self._count += 1

    def store(self, name: str) -> ArrayImages:
        return ArrayImages(self._list if self._block is None else self._block, name)


def _hex(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _group(keys: Sequence[object]) -> np.ndarray:
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _form(shapes: Iterable[tuple[int, ...]]) -> tuple[int, int | None]:
    """Channels (3 as soon as one image has colour) and pixels per side (None: not one square size)."""
    channels = 3 if any(len(shape) == 3 for shape in shapes) else 1
    sides = {side for shape in shapes for side in shape[:2]}
    return channels, sides.pop() if len(sides) == 1 else None

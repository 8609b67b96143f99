"""One pass over all images: who is who, and which images are equal."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from layerprobe.errors import LayerprobeError
from layerprobe.files import atomic_write, cache_root
from layerprobe.progress import progress_bar
from layerprobe.tasks.images import ArrayImages, ImageStore, decode_all

IDENTITIES = ("pixels", "files", "names")

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
    decoded_bytes : size of all images when decoded (estimated unless `identity` is "pixels").
    pixels : the decoded images, where this pass decoded them and they are few enough to keep.
    """

    digests: list[str]
    groups: np.ndarray
    identity: str
    channels: int
    image_size: int | None
    decoded_bytes: int
    pixels: ArrayImages | None = None


def scan(images: ImageStore, official: Sequence[str], *, name: str, fingerprint: str | None = None) -> Scan:
    """Read every image once, decode it where that is affordable, and compare; or recall an earlier pass.

    With a `fingerprint` of the files the findings (not the images) are kept in layerprobe's cache, so
    that the next command on the same files starts at once.

    The stored bytes give the ids, because they do not depend on the version of an image decoder;
    decoded pixels give the groups of equal images, because one picture may be stored in two ways.

    Raises
    ------
    BrokenFileError : the first image that cannot be read.
    """
    if fingerprint is None:
        return _look(images, official, name)
    key = f"{fingerprint}-{_hex(repr(list(Counter(official).items())).encode())}"
    if (found := _recall(key, len(images))) is None:
        found = _look(images, official, name)
        _remember(key, found)
    return found


def _look(images: ImageStore, official: Sequence[str], name: str) -> Scan:
    n_images = len(images)
    sample = decode_all(images, np.unique(np.linspace(0, n_images - 1, min(64, n_images)).astype(np.int64)))
    decoded_size = sum(image.nbytes for image in sample) * n_images // len(sample)
    form = _form({image.shape for image in sample})
    if decoded_size > DECODE_BYTES and images.stored_size() > READ_BYTES:
        named = [f"{split}/{images.name(row)}" for row, split in enumerate(official)]
        if len(set(named)) == n_images:
            digests = [_hex(text.encode()) for text in named]
            return Scan(digests, np.arange(n_images), "names", *form, decoded_size)
    if decoded_size > DECODE_BYTES:
        rows = progress_bar(range(n_images), unit="image", desc=f"reading {name}")
        digests = [_hex(images.stored(row)) for row in rows]
        return Scan(digests, _group(digests), "files", *form, decoded_size)

    digests, pictures = [], []
    kept = _Kept(n_images, sample) if decoded_size <= KEEP_BYTES else None
    shapes, decoded_bytes = set(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for row in progress_bar(range(n_images), unit="image", desc=f"reading {name}"):
            stored = images.stored(row)
            digests.append(_hex(stored))
            pixels = images.pixels(row, stored)
            picture = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
            picture.update(np.ascontiguousarray(pixels).data)
            pictures.append(picture.digest())
            shapes.add(pixels.shape)
            decoded_bytes += pixels.nbytes
            if decoded_bytes > KEEP_BYTES:
                kept = None  # the sample was not typical
            if kept is not None:
                kept.add(pixels)
    store = kept.store(name) if kept is not None else None
    return Scan(digests, _group(pictures), "pixels", *_form(shapes), decoded_bytes, store)


def _cache_file(key: str) -> Path:
    return cache_root() / "tasks" / f"{key}.npz"


def _remember(key: str, found: Scan) -> None:
    facts = [found.channels, found.image_size or 0, found.decoded_bytes, IDENTITIES.index(found.identity)]
    digests = np.array([int(digest, 16) for digest in found.digests], dtype=np.uint64)
    # A cache that cannot be written costs time at the next call, and nothing now.
    with (
        contextlib.suppress(LayerprobeError),
        atomic_write(_cache_file(key)) as aside,
        aside.open("wb") as stream,
    ):
        np.savez(stream, digests=digests, groups=found.groups, facts=np.array(facts, dtype=np.int64))


def _recall(key: str, n_images: int) -> Scan | None:
    try:
        with np.load(_cache_file(key), allow_pickle=False) as saved:
            digests, groups, facts = saved["digests"], saved["groups"], saved["facts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    shapes = (digests.shape, groups.shape, facts.shape)
    kinds = (digests.dtype, groups.dtype, facts.dtype)
    if shapes != ((n_images,), (n_images,), (4,)) or kinds != (np.uint64, np.int64, np.int64):
        return None
    channels, side, decoded_bytes, identity = facts.tolist()
    names = [f"{value:016x}" for value in digests.tolist()]
    return Scan(names, groups, IDENTITIES[identity], channels, side or None, decoded_bytes)


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

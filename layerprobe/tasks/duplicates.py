"""One pass over all images: their ids, and which of them are equal."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from layerprobe.choices import SPLITS
from layerprobe.errors import LayerprobeError
from layerprobe.files import atomic_write, cache_root
from layerprobe.progress import progress_bar
from layerprobe.reading import open_file
from layerprobe.tasks.images import ArrayImages, ImageStore, decode_all

if TYPE_CHECKING:
    import pyarrow as pa

IDENTITIES = ("pixels", "files", "names")

KEEP_BYTES = 32 << 20
"""Decoded images are kept in memory when all together need less than this; others are decoded as they are used."""

DECODE_BYTES = 2 << 30
"""Up to this decoded size all images are decoded and compared by their pixels, beyond by their files."""

READ_BYTES = 16 << 30
"""Beyond this stored size images are not even read: ids rest on file names, duplicates stay unknown."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What one pass over all images finds, row by row.

    Attributes
    ----------
    digests : list[str]
        16 hexadecimal digits over the stored bytes (`identity` "names": over the file name).
    groups : np.ndarray
        int64; rows with the same number show the same image.
    identity : str
        "pixels", "files" or "names": what "the same image" was judged by.
    decoded_bytes : int
        Size of all images when decoded (estimated unless `identity` is "pixels").
    pixels : ArrayImages | None
        The decoded images, where this pass decoded them and they are few enough to keep.
    """

    digests: list[str]
    groups: np.ndarray
    identity: str
    channels: int
    image_size: int | None
    decoded_bytes: int
    pixels: ArrayImages | None = None


def scan_images(
    images: ImageStore, official: Sequence[str], *, name: str, fingerprint: str | None = None
) -> Scan:
    """Read every image once, decode it where that is affordable, and compare; or recall an earlier pass.

    With a `fingerprint` of the files the findings (not the images) are kept in layerprobe's cache, so
    that the next command on the same files starts at once.

    The stored bytes give the ids, because they do not depend on the version of an image decoder;
    decoded pixels give the groups of equal images, because one picture may be stored in two ways.
    """
    if fingerprint is None:
        return _look(images, official, name)
    key = f"{fingerprint}-{_hex(repr(list(Counter(official).items())).encode())}"
    if (scan := _recall(key, len(images))) is None:
        scan = _look(images, official, name)
        _remember(key, scan)
    return scan


def _look(images: ImageStore, official: Sequence[str], name: str) -> Scan:
    n_images = len(images)
    sample = decode_all(images, np.unique(np.linspace(0, n_images - 1, min(64, n_images)).astype(np.int64)))
    decoded_bytes = sum(image.nbytes for image in sample) * n_images // len(sample)
    if decoded_bytes <= DECODE_BYTES:
        return _compare_pixels(images, name, keep=decoded_bytes <= KEEP_BYTES)
    by_name = images.stored_size() > READ_BYTES
    if by_name:
        digests = [_hex(f"{split}/{images.name(row)}".encode()) for row, split in enumerate(official)]
        by_name = len(set(digests)) == n_images
    if not by_name:
        rows = progress_bar(range(n_images), unit="image", desc=f"reading {name}")
        digests = [_hex(images.stored(row)) for row in rows]
    channels, image_size = _form({image.shape for image in sample})
    return Scan(
        digests=digests,
        groups=_group(digests),
        identity="names" if by_name else "files",
        channels=channels,
        image_size=image_size,
        decoded_bytes=decoded_bytes,
    )


def _compare_pixels(images: ImageStore, name: str, *, keep: bool) -> Scan:
    digests: list[str] = []
    pictures: list[bytes] = []
    kept: list[np.ndarray] = []
    shapes, decoded_bytes = set(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for row in progress_bar(range(len(images)), unit="image", desc=f"reading {name}"):
            stored = images.stored(row)
            digests.append(_hex(stored))
            pixels = images.pixels(row, stored)
            picture = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
            picture.update(np.ascontiguousarray(pixels).data)
            pictures.append(picture.digest())
            shapes.add(pixels.shape)
            decoded_bytes += pixels.nbytes
            keep = keep and decoded_bytes <= KEEP_BYTES  # the estimate rests on a sample
            if keep:
                kept.append(pixels)
            else:
                kept.clear()
    channels, image_size = _form(shapes)
    return Scan(
        digests=digests,
        groups=_group(pictures),
        identity="pixels",
        channels=channels,
        image_size=image_size,
        decoded_bytes=decoded_bytes,
        pixels=ArrayImages(kept, name) if keep else None,
    )


def _cache_file(key: str) -> Path:
    return cache_root() / "tasks" / f"{key}.npz"


def _remember(key: str, scan: Scan) -> None:
    facts = [scan.channels, scan.image_size or 0, scan.decoded_bytes, IDENTITIES.index(scan.identity)]
    digests = np.array([int(digest, 16) for digest in scan.digests], dtype=np.uint64)
    # A cache that cannot be written costs time at the next call, and nothing now.
    with (
        contextlib.suppress(LayerprobeError),
        atomic_write(_cache_file(key)) as aside,
        aside.open("wb") as stream,
    ):
        np.savez(stream, digests=digests, groups=scan.groups, facts=np.array(facts, dtype=np.int64))


def _recall(key: str, n_images: int) -> Scan | None:
    try:
        with (
            open_file(_cache_file(key), what="scan") as stream,
            np.load(stream, allow_pickle=False) as saved,
        ):
            digests, groups, facts = saved["digests"], saved["groups"], saved["facts"]
    except Exception:  # whatever is wrong with the file, the images are looked at again
        return None
    shapes = (digests.shape, groups.shape, facts.shape)
    kinds = (digests.dtype, groups.dtype, facts.dtype)
    if shapes != ((n_images,), (n_images,), (4,)) or kinds != (np.uint64, np.int64, np.int64):
        return None
    channels, side, decoded_bytes, identity = facts.tolist()
    if not 0 <= identity < len(IDENTITIES):
        return None
    return Scan(
        digests=[f"{value:016x}" for value in digests.tolist()],
        groups=groups,
        identity=IDENTITIES[identity],
        channels=channels,
        image_size=side or None,
        decoded_bytes=decoded_bytes,
    )


def _hex(data: bytes | pa.Buffer) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _group(keys: Iterable[object]) -> np.ndarray:
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _form(shapes: Iterable[tuple[int, ...]]) -> tuple[int, int | None]:
    """Channels (3 as soon as one image has colour) and pixels per side (None: not one square size)."""
    channels = 3 if any(len(shape) == 3 for shape in shapes) else 1
    sides = {side for shape in shapes for side in shape[:2]}
    return channels, sides.pop() if len(sides) == 1 else None


def sample_ids(
    digests: Sequence[str], official: Sequence[str], labels: np.ndarray, names: Mapping[int, str]
) -> np.ndarray:
    """Unique ids: the digest of what is stored, and "-2", "-3", … for further rows that store the same.

    Such rows are counted in the order of (official split, label, file name), so that neither row
    order nor the layout of files plays a part. `names` holds the rows that share a digest.
    """
    ids = list(digests)
    for rows in repeated(digests):
        rows.sort(key=lambda row: (official[row], int(labels[row]), names[row]))
        for number, row in enumerate(rows[1:], start=2):
            ids[row] = f"{ids[row]}-{number}"
    return np.array(ids)


def repeated(keys: Sequence[str | int]) -> list[list[int]]:
    """Lists of the rows that share a key, where more than one does."""
    first: dict[str | int, int] = {}
    more: dict[str | int, list[int]] = {}
    for row, key in enumerate(keys):
        if key not in first:
            first[key] = row
        else:
            more.setdefault(key, [first[key]]).append(row)
    return list(more.values())


def count_duplicates(
    split: np.ndarray, official: Sequence[str], labels: np.ndarray, groups: np.ndarray
) -> dict[str, Any]:
    """Counts of equal images: within and across the source's splits, dropped, and with two labels.

    `surplus` is rows minus distinct images. `across` counts distinct images.
    """
    source = np.array(official)
    names = sorted(set(source.tolist()), key=[*SPLITS, "all"].index)
    within = {name: int((source == name).sum() - len(np.unique(groups[source == name]))) for name in names}
    across = {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            shared = np.intersect1d(groups[source == first], groups[source == second])
            across[f"{first} and {second}"] = len(shared)
    several = repeated(groups.tolist())
    two_labels = sum(len({int(labels[row]) for row in rows}) > 1 for rows in several)
    dropped = Counter(source[split == ""].tolist())
    return {
        "surplus": within,
        "across": across,
        "distinct_images_with_several_labels": two_labels,
        "dropped": {name: dropped.get(name, 0) for name in names},
    }

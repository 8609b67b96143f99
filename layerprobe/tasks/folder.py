"""Local folders of images: parquet files, IDX files as of MNIST, or class folders. Nothing is cut here."""

from __future__ import annotations

import contextlib
import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from layerprobe.errors import BrokenFileError, UnknownNameError, UsageError
from layerprobe.reading import check_unpacked, is_folder, is_plain, is_there, open_file
from layerprobe.tasks.class_folders import read_class_folders
from layerprobe.tasks.images import ArrayImages
from layerprobe.tasks.parquet import ColumnChoice, first_parquet_image, read_parquet
from layerprobe.tasks.split import split_word
from layerprobe.tasks.task import Source, SourceSplit, labelled, refuse_one_class

_PIECE = 1 << 20
_UINT8 = 0x08
# Deflate cannot pack more than about 1032 bytes into one, which bounds what a gzip file may hold.
_MAX_DEFLATE_RATIO = 1040


def read_folder(folder: Path, choice: ColumnChoice) -> Source:
    """Read a folder of parquet files, of IDX files, or of class folders; whichever it holds."""
    kind, files = _list_folder(folder, choice)
    if kind == "parquet":
        return read_parquet(files, folder if folder.is_dir() else folder.parent, choice)
    return read_idx_folder(files) if kind == "idx" else read_class_folders(folder)


def peek_folder(name: str, folder: Path, choice: ColumnChoice) -> tuple[int | None, bool]:
    """What `layerprobe.tasks.load.peek_image_size` tells, by the heads of the files in a folder."""
    kind, files = _list_folder(folder, choice)
    if kind == "idx":
        sides: set[int] = set()
        for path in files:
            with _open_idx(_labels_beside(path), 1), _open_idx(path, 3) as (_, shape):
                sides.update(shape[1:])
        return sides.pop() if len(sides) == 1 else 0, True
    if kind == "parquet":
        image = first_parquet_image(files, folder if folder.is_dir() else folder.parent, choice)
    else:
        source = read_class_folders(folder)
        refuse_one_class(name, source)
        image = source.splits[0].images.pixels(0)
    if image is None:
        return None, True
    # By the first image alone, since reading the heads of all may take as long as reading them.
    height, width = image.shape[:2]
    return (height, False) if height == width else (0, True)


def _list_folder(folder: Path, choice: ColumnChoice) -> tuple[str, list[Path]]:
    """What a folder seems to hold, "parquet", "idx" or "classes", and the files of the first two."""
    if is_plain(folder) and folder.suffix == ".parquet":
        return "parquet", [folder]
    if not is_folder(folder):
        raise UnknownNameError(f"no folder {folder}; check the path, or see: layerprobe ls tasks")
    tables = (path for path in folder.rglob("*.parquet") if not is_folder(path))
    if parquet := sorted(path for path in tables if not _is_hidden(path.relative_to(folder))):
        return "parquet", parquet
    refuse_column(str(folder), choice)
    idx = sorted(path for path in folder.iterdir() if re.search(r"images[-.]idx3-ubyte", path.name))
    return ("idx", idx) if idx else ("classes", [])


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def refuse_column(place: str, choice: ColumnChoice) -> None:
    """UsageError for a label column chosen where labels come without columns."""
    if choice.wanted_label is not None:
        raise UsageError(f"{place} has no label columns, so '{choice.wanted_label}' cannot be chosen")


def read_idx_folder(images: Sequence[Path]) -> Source:
    """IDX files named as in MNIST: …-images-idx3-ubyte beside …-labels-idx1-ubyte, gzipped or not."""
    splits: dict[str, SourceSplit] = {}
    values = []
    for path in images:
        word = split_word(path.name) or "all"
        if word in splits:
            if path.with_suffix("") in images or path.with_name(path.name + ".gz") in images:
                continue  # the same file, packed and unpacked
            raise UsageError(
                f"{path.parent} holds several IDX files of split {word}; keep one data set a folder"
            )
        pixels = read_idx(path, ndim=3)
        labels_path = _labels_beside(path)
        labels = read_idx(labels_path, ndim=1)
        if len(labels) != len(pixels):
            raise BrokenFileError(
                f"{path} holds {len(pixels):,} images, {labels_path.name} {len(labels):,} labels"
            )
        splits[word] = SourceSplit(word, ArrayImages(pixels, path.name))
        values.append(labels.astype(np.int64))
    return labelled(list(splits.values()), values, None, str(images[0].parent))


def _labels_beside(path: Path) -> Path:
    """The labels of an IDX file of images; UsageError where there are none."""
    name = re.sub(r"images([-.])idx3", r"labels\1idx1", path.name)
    plain = name.removesuffix(".gz")
    for candidate in (name, plain, f"{plain}.gz"):
        if is_there(labels := path.with_name(candidate)):
            return labels
    raise UsageError(f"{path} has no labels beside it; {name} was looked for")


def read_idx(path: Path, *, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzipped.

    The header's claim is held against the size of the file before anything is allocated.

    Parameters
    ----------
    path : Path
        File; gzipped when its first bytes say so, whatever its name.
    ndim : int
        Number of dimensions it must have: 3 for images, 1 for labels.

    Returns
    -------
    np.ndarray
        uint8 array with the shape in the header.

    Raises
    ------
    BrokenFileError
        Another format, or fewer or more bytes than the header announces.
    """
    with _open_idx(path, ndim) as (stream, shape):
        size, expected = path.stat().st_size, math.prod(shape)
        announced = f"{path} announces {'×'.join(f'{extent:,}' for extent in shape)} = {expected:,} bytes"
        zipped = isinstance(stream, gzip.GzipFile)
        available = size * _MAX_DEFLATE_RATIO if zipped else size - 4 - 4 * ndim
        if expected > available or (not zipped and expected != available):
            raise BrokenFileError(f"{announced}, but the file has {size:,}; it is truncated or damaged")
        check_unpacked(expected, path)
        content, done = np.empty(expected, np.uint8), 0
        while done < expected and (piece := stream.read(min(expected - done, _PIECE))):
            content[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        surplus = stream.read(1)
    if done != expected or surplus:
        held = f"{done:,}" if done < expected else "more"
        raise BrokenFileError(f"{announced} but holds {held}; it is truncated or damaged")
    return content.reshape(shape)


@contextlib.contextmanager
def _open_idx(path: Path, ndim: int) -> Iterator[tuple[IO[bytes] | gzip.GzipFile, tuple[int, ...]]]:
    """The file behind its header, and the shape in the header."""
    try:
        with open_file(path, what="IDX file") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if zipped else raw
            header = stream.read(4 + 4 * ndim)
            if (
                len(header) < 4 + 4 * ndim
                or header[:2] != b"\0\0"
                or header[2] != _UINT8
                or header[3] != ndim
            ):
                raise BrokenFileError(
                    f"{path} is not an IDX file of unsigned bytes with {ndim} dimension{'s' * (ndim > 1)}"
                    f" (it starts with {header[:4].hex(' ') or 'nothing'})"
                )
            yield stream, struct.unpack(f">{ndim}I", header[4:])
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BrokenFileError(f"cannot read {path}: {reason}") from error

"""From stored bytes to pixels: one decoder, and the places where images may lie.

Pixels are uint8 throughout, H×W for grayscale and H×W×3 for colour.
"""

from __future__ import annotations

import bisect
import functools
import io
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from layerprobe.errors import BrokenFileError
from layerprobe.reading import check_plain, read_file

if TYPE_CHECKING:
    import pyarrow as pa

MAX_PIXELS = 1 << 26
"""Images of more pixels are refused unread: a few bytes of PNG can claim gigabytes."""

MAX_FILE_BYTES = 512 << 20
"""Image files of more bytes are refused; an uncompressed image of `MAX_PIXELS` has fewer."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What may be opened. Other formats Pillow knows start external programs or hold no photographs."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of `FORMATS`, lower case, as Pillow knows them: .jfif and .jpe are JPEG as well."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def decode_image(data: bytes | pa.Buffer, place: str) -> np.ndarray:
    """Decode one stored image.

    Palettes become colour, transparency is dropped, 16-bit grayscale is scaled to 8 bits, and the
    orientation noted by a camera is applied, as the Hugging Face `datasets` library does.

    Parameters
    ----------
    data : bytes | pa.Buffer
        An image file of one of `FORMATS`.
    place : str
        Where it lies, for the error message.

    Returns
    -------
    np.ndarray
        uint8 array, H×W or H×W×3, read-only.

    Raises
    ------
    BrokenFileError
        Not an image, truncated, or larger than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BrokenFileError(_too_large(place, f"{width}×{height} pixels"))
            pixels = image_pixels(image, place)
    except Image.DecompressionBombError as error:
        raise BrokenFileError(_too_large(place, str(error))) from error
    except BrokenFileError:
        raise
    except Exception as error:  # the decoders of seven formats, each with errors of its own
        reason = (
            "not an image in a known format" if isinstance(error, Image.UnidentifiedImageError) else error
        )
        raise BrokenFileError(f"cannot read the image {place}: {reason}") from error
    pixels.flags.writeable = False
    return pixels


def image_pixels(image: Image.Image, place: str) -> np.ndarray:
    """What `decode_image` makes of an opened image."""
    image.load()
    _refuse_wide_pixels(image, place)
    return _plain(ImageOps.exif_transpose(image) if _may_be_turned(image) else image, place)


def _may_be_turned(image: Image.Image) -> bool:
    """Whether an orientation may be noted: in EXIF, or in XMP alone, which Pillow's `getexif` reads as well."""
    return image.format == "TIFF" or any("exif" in str(key) or "xmp" in str(key) for key in image.info)


def _too_large(place: str, size: str) -> str:
    return f"the image {place} is refused: {size}; more than {MAX_PIXELS:,} pixels are not decoded"


def _plain(image: Image.Image, place: str) -> np.ndarray:
    if image.mode in ("L", "RGB"):
        return np.asarray(image)
    if image.mode in ("1", "LA", "La"):
        return np.asarray(image.convert("L"))
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise BrokenFileError(f"cannot read the image {place}: integer pixels outside 0 to 65535")
        return np.rint(values / 257).astype(np.uint8)
    if image.mode == "F":
        raise BrokenFileError(f"cannot read the image {place}: floating-point pixels have no stated range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _refuse_wide_pixels(image: Image.Image, place: str) -> None:
    """BrokenFileError for whole numbers of 32 bits, which a TIFF may hold: what is white is not written there."""
    bits = image.tag_v2.get(BITSPERSAMPLE, (1,)) if isinstance(image, TiffImageFile) else (1,)
    if image.mode == "I" and max(bits) > 16:
        raise BrokenFileError(f"cannot read the image {place}: 32-bit integer pixels have no stated range")


class ImageStore(ABC):
    """Images by row number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def stored(self, row: int) -> bytes | pa.Buffer:
        """What the row's identity rests on."""

    def pixels(self, row: int, stored: bytes | pa.Buffer | None = None) -> np.ndarray:
        """The decoded image; from `stored` where the caller has it already."""
        return decode_image(self.stored(row) if stored is None else stored, self.place(row))

    @abstractmethod
    def place(self, row: int) -> str:
        """Where the row lies, for messages."""

    def name(self, row: int) -> str:
        """The file name that came with the row, which tells equal images apart; may be ""."""
        return ""

    @abstractmethod
    def stored_size(self) -> int:
        """Bytes of all rows, without reading them."""


class ArrayImages(ImageStore):
    """Images that are pixels already: n×H×W or n×H×W×3 in one array, or a list where sizes differ."""

    def __init__(self, arrays: np.ndarray | Sequence[np.ndarray], origin: str) -> None:
        self._arrays = arrays
        self._origin = origin
        for array in [arrays] if isinstance(arrays, np.ndarray) else arrays:
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self._arrays)

    def stored(self, row: int) -> bytes:
        array = self._arrays[row]
        return repr(array.shape).encode() + array.tobytes()

    def pixels(self, row: int, stored: bytes | pa.Buffer | None = None) -> np.ndarray:
        return self._arrays[row]

    def place(self, row: int) -> str:
        return f"{self._origin}, row {row}"

    def stored_size(self) -> int:
        return sum(array.nbytes for array in self._arrays)


class FileImages(ImageStore):
    """One image file a row, read when asked for; `names` are the paths within the data set."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str]) -> None:
        self._paths = paths
        self._names = names

    def __len__(self) -> int:
        return len(self._paths)

    def stored(self, row: int) -> bytes:
        return _read(self._paths[row])

    def place(self, row: int) -> str:
        return str(self._paths[row])

    def name(self, row: int) -> str:
        return self._names[row]

    def stored_size(self) -> int:
        return sum(check_plain(path, what="the image").st_size for path in self._paths)


class ArrowImages(ImageStore):
    """A column of image files, in memory or memory-mapped: binary, or struct<bytes, path>.

    Parameters
    ----------
    column : pa.ChunkedArray
        The column.
    pieces : Sequence[tuple[str, int]]
        (name, number of rows) of the files that make up the column, for messages.
    follow_paths : bool
        Read a row without bytes from the file that its path names. Only where the paths were made on this
        machine: a downloaded table must not choose which local files are read.
    """

    def __init__(
        self, column: pa.ChunkedArray, pieces: Sequence[tuple[str, int]], *, follow_paths: bool = False
    ) -> None:
        self._follow_paths = follow_paths
        self._chunks: list[tuple[pa.Array, pa.Array | None]] = []
        for chunk in column.chunks:
            is_struct = hasattr(chunk, "field")
            has_path = is_struct and chunk.type.get_field_index("path") >= 0
            files = chunk.field("bytes") if is_struct else chunk
            self._chunks.append((files, chunk.field("path") if has_path else None))
        self._starts = _starts(column.chunks)
        self._pieces = list(pieces)

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, row: int) -> tuple[pa.Array, pa.Array | None, int]:
        """Files and paths of the row's chunk, and the row within it."""
        chunk = bisect.bisect_right(self._starts, row) - 1
        return *self._chunks[chunk], row - self._starts[chunk]

    def stored(self, row: int) -> bytes | pa.Buffer:
        files, _, offset = self._find(row)
        if (buffer := files[offset].as_buffer()) is not None:
            return buffer
        path = self._path(row)
        if not path or not self._follow_paths:
            raise BrokenFileError(f"no image bytes in {self.place(row)}")
        return _read(Path(path))

    def _path(self, row: int) -> str:
        _, paths, offset = self._find(row)
        name = None if paths is None else paths[offset]
        if name is None or not name.is_valid:  # a column of nothing else is of pyarrow's null type
            return ""
        return name.as_buffer().to_pybytes().decode(errors="replace")

    def place(self, row: int) -> str:
        for piece, n_rows in self._pieces:
            if row < n_rows:
                return f"{piece}, row {row}"
            row -= n_rows
        return f"row {row}"

    def name(self, row: int) -> str:
        return self._path(row).replace("\\", "/").rsplit("/", 1)[-1]

    def stored_size(self) -> int:
        return sum(files.nbytes for files, _ in self._chunks)


class ChosenImages(ImageStore):
    """Rows of another store, in another order."""

    def __init__(self, store: ImageStore, rows: np.ndarray) -> None:
        self._store = store
        self._rows = rows.tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def stored(self, row: int) -> bytes | pa.Buffer:
        return self._store.stored(self._rows[row])

    def place(self, row: int) -> str:
        return self._store.place(self._rows[row])

    def name(self, row: int) -> str:
        return self._store.name(self._rows[row])

    def stored_size(self) -> int:
        return self._store.stored_size() * len(self) // max(1, len(self._store))


class JoinedImages(ImageStore):
    """Several stores, counted through. With `remember` set, decoded images stay in memory."""

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        self._stores = stores
        self._starts = _starts(stores)
        self._decoded: dict[int, np.ndarray] = {}
        self.remember = False

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, row: int) -> tuple[ImageStore, int]:
        part = bisect.bisect_right(self._starts, row) - 1
        return self._stores[part], row - self._starts[part]

    def stored(self, row: int) -> bytes | pa.Buffer:
        store, local = self._find(row)
        return store.stored(local)

    def pixels(self, row: int, stored: bytes | pa.Buffer | None = None) -> np.ndarray:
        if row in self._decoded:
            return self._decoded[row]
        store, local = self._find(row)
        image = store.pixels(local, stored)
        if self.remember:
            self._decoded[row] = image
        return image

    def recall(self, pixels: ArrayImages | None, rows: np.ndarray) -> None:
        """Take over what is decoded already of the given rows; the memory of the others is given back."""
        if pixels is not None:
            self._decoded = {row: pixels.pixels(row) for row in rows.tolist()}

    def place(self, row: int) -> str:
        store, local = self._find(row)
        return store.place(local)

    def name(self, row: int) -> str:
        store, local = self._find(row)
        return store.name(local)

    def stored_size(self) -> int:
        return sum(store.stored_size() for store in self._stores)


def _starts(parts: Iterable[Sized]) -> list[int]:
    """The row at which each part begins, and the number of rows in all."""
    return list(itertools.accumulate(map(len, parts), initial=0))


def decode_all(store: ImageStore, rows: Iterable[int]) -> list[np.ndarray]:
    """Pixels of the given rows; a suspiciously large image is refused before Pillow warns of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return [store.pixels(int(row)) for row in rows]


def _read(path: Path) -> bytes:
    return read_file(path, what="the image", max_bytes=MAX_FILE_BYTES)

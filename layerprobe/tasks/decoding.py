"""From rows to resized images: worker processes that decode ahead, and images kept on disk between commands."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from layerprobe.errors import LayerprobeError, UsageError
from layerprobe.locks import usable_cores
from layerprobe.tasks.images import ImageStore, decode_all
from layerprobe.tasks.pixel_store import PixelStore, limit_bytes, pixel_key, pixels_root

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

PIECE_BYTES = 4 << 20
"""What a worker hands over at once; it travels through shared memory, of which containers may have 64 MiB in all."""

MOST_WORKERS = 8
WORTH_WORKERS = 512
"""Unless told otherwise, fewer images than this are decoded in this process: starting others takes longer."""


class Resizer(Protocol):
    """What makes one image ready; `layerprobe.backbones.image_input.Preprocessing` is one."""

    @property
    def resize_key(self) -> str | None:
        """What decides the bytes of `resized`; None where it makes no bytes."""
        ...

    def resized(self, image: np.ndarray) -> np.ndarray:
        """uint8 H×W or H×W×C → C×H×W."""
        ...

    def stacked(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images of one size as B×C×H×W; BrokenFileError for several sizes."""
        ...


class Decoding:
    """How the images of one task are decoded; all its splits and their subsets share one.

    Parameters
    ----------
    content : str | None
        A hash of all images, under which they are kept on disk at the size of each model. None keeps none: what is
        pixels already, what nothing identifies, or what the user does not want to keep.
    workers : int | None
        Processes that decode ahead; 0 for none. None: as many as there are cores, at most 8, where so many images are
        to be decoded that it pays.
    """

    def __init__(
        self, store: ImageStore, *, channels: int, content: str | None, workers: int | None = None
    ) -> None:
        if workers is not None and workers < 0:
            raise UsageError(f"decode_workers must be at least 0, got {workers}")
        self.store, self.channels = store, channels
        self._content, self._workers = content, workers
        self._kept: dict[str, PixelStore] = {}
        self._loader: tuple[tuple[Resizer, bool], DataLoader, _Order] | None = None
        self._in_use = False

    def __getstate__(self) -> dict[str, object]:
        """Open files and workers stay with the process that has them."""
        return {**self.__dict__, "_kept": {}, "_loader": None, "_in_use": False}

    def image(self, row: int) -> np.ndarray:
        """A decoded image: H×W where the whole task is grayscale, else H×W×3."""
        (image,) = decode_all(self.store, [row])
        return image if self.channels == 1 or image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)

    def resized(self, row: int, resizer: Resizer) -> np.ndarray:
        """An image as `resizer` makes it, C×H×W: from disk, else decoded, and kept."""
        kept = self._kept_for(resizer)
        if kept is not None and (found := kept.read(row)) is not None:
            return found
        made = resizer.resized(self.image(row))
        if kept is not None:
            kept.write(row, made)
        return made

    def batches(
        self, rows: np.ndarray, batch_size: int, resizer: Resizer, *, pin: bool = False
    ) -> Iterator[Tensor]:
        """Resized images B×C×H×W in the order of `rows`, whoever decodes them.

        Parameters
        ----------
        pin : bool
            Into page-locked memory, from where a GPU copies while it computes.
        """
        import torch

        kept = self._kept_for(resizer)
        waiting = [row for row in rows.tolist() if kept is None or not kept.has(row)]
        workers = self._workers_for(len(rows) if pin else len(waiting))
        image_bytes = self.resized(int(rows[0]), resizer).nbytes if kept or workers else 0
        if kept is not None and waiting:
            kept.make_room(len(waiting), image_bytes)
        if workers == 0:
            for start in range(0, len(rows), batch_size):
                yield resizer.stacked(
                    [self.resized(row, resizer) for row in rows[start : start + batch_size].tolist()]
                )
            return
        step = min(batch_size, max(1, PIECE_BYTES // image_bytes))
        pieces = [
            [
                rows[at : min(at + step, start + batch_size)]
                for at in range(start, min(start + batch_size, len(rows)), step)
            ]
            for start in range(0, len(rows), batch_size)
        ]
        self._in_use = True
        try:
            ready = iter(self._ahead([piece for batch in pieces for piece in batch], resizer, workers))
            for batch in pieces:
                parts = [_raised(next(ready)) for _ in batch]
                if len({part.shape[1:] for part in parts}) > 1:
                    resizer.stacked([part[0].numpy() for part in parts])  # says which sizes
                shape = sum(map(len, parts)), *parts[0].shape[1:]
                yield torch.cat(parts, out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=pin))
        finally:
            self._in_use = False

    def _workers_for(self, n_images: int) -> int:
        """How many workers decode so many images; none beside a reader who has them already."""
        # Elsewhere processes cannot be copied safely, and a worker of a search may not start others.
        if self._in_use or sys.platform != "linux" or multiprocessing.current_process().daemon:
            return 0
        if self._workers is not None:
            return self._workers
        return _cores() if self._content is not None and n_images >= WORTH_WORKERS else 0

    def _kept_for(self, resizer: Resizer) -> PixelStore | None:
        key = resizer.resize_key
        if key is None or self._content is None or limit_bytes() == 0:
            return None
        if key not in self._kept:
            self._kept[key] = PixelStore(pixels_root(), pixel_key(self._content, self.channels, key))
        return self._kept[key]

    def _ahead(
        self, pieces: list[np.ndarray], resizer: Resizer, workers: int
    ) -> Iterable[Tensor | LayerprobeError]:
        """What the workers make of the pieces, in their order; the workers stay for the next call."""
        from torch.utils.data import DataLoader

        kept = self._kept_for(resizer)
        known = resizer, kept is not None and kept.full  # workers must know what may be written
        if self._loader is None or self._loader[0] != known:
            order = _Order()
            loader: DataLoader[Tensor] = DataLoader(
                _Pieces(self, resizer),  # type: ignore[arg-type]
                batch_size=None,
                sampler=order,
                num_workers=workers,
                persistent_workers=True,
                collate_fn=_as_it_is,
                # The images may lie in this process alone, so the workers must be copies of it.
                multiprocessing_context="fork",
            )
            self._loader = known, loader, order
        _, loader, order = self._loader
        order.pieces = pieces
        return loader


class _Order:
    """The pieces that the workers make next."""

    def __init__(self) -> None:
        self.pieces: list[np.ndarray] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


class _Pieces:
    """What a worker does with the rows of a piece."""

    def __init__(self, decoding: Decoding, resizer: Resizer) -> None:
        self._decoding, self._resizer = decoding, resizer

    def __getitem__(self, rows: np.ndarray) -> Tensor | LayerprobeError:
        try:
            return self._resizer.stacked(
                [self._decoding.resized(row, self._resizer) for row in rows.tolist()]
            )
        except LayerprobeError as error:  # to be raised over there as it is, without a worker's traceback
            return error


def _as_it_is(made: object) -> object:
    return made


def _raised(made: Tensor | LayerprobeError) -> Tensor:
    if isinstance(made, LayerprobeError):
        raise made
    return made


def _cores() -> int:
    """Workers of one process, of the cores that it may use; several processes of one launch share them."""
    return max(1, min(MOST_WORKERS, usable_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))

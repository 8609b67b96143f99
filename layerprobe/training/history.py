"""The course of a run: one row per optimizer step, in memory and as CSV."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from layerprobe.errors import BrokenFileError
from layerprobe.tables import write_frame
from layerprobe.training.loop import Step

COLUMNS = ("step", "epoch", "loss", "accuracy", "lr", "grad_norm", "images_per_second")


class History:
    """Rows of a run, written with every checkpoint, so that file and checkpoint never disagree for long.

    Parameters
    ----------
    folder : where history.csv lies, or None for memory alone.
    keep : steps already taken by an earlier part of the run; later rows of its file are dropped.
    """

    def __init__(self, folder: Path | None, *, keep: int = 0) -> None:
        self._path = folder / "history.csv" if folder is not None else None
        self._rows: list[tuple[float, ...]] = []
        if keep and self._path is not None and self._path.exists():
            try:
                # The default parser of floats is off by a last bit now and then.
                earlier = pd.read_csv(self._path, float_precision="round_trip")[list(COLUMNS)]
            except (ValueError, KeyError, OSError) as error:
                raise BrokenFileError(f"cannot read {self._path}: {error}") from error
            earlier = earlier[earlier["step"] <= keep]
            self._rows = list(earlier.itertuples(index=False, name=None))

    def add(self, step: Step, batch_size: int, n_images: int) -> None:
        """Append a step; `step` counts from 1 in the table, `epoch` in passes over the images."""
        taken = step.index + 1
        self._rows.append(
            (
                taken,
                taken * batch_size / n_images,
                step.loss,
                step.accuracy,
                step.lr,
                step.grad_norm,
                batch_size / step.seconds,
            )
        )

    def frame(self) -> pd.DataFrame:
        """The rows so far."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS)).astype({"step": "int64"})

    def write(self) -> None:
        """Write history.csv."""
        if self._path is not None:
            write_frame(self.frame(), self._path)

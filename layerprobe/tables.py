"""Tidy tables: one row per measurement, the same column names everywhere, strict JSON and CSV."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.errors import UsageError
from layerprobe.files import atomic_write

if TYPE_CHECKING:
    # Loaded by the functions that need it: a command that only prints a short table stays small.
    import pandas as pd

COLUMNS: dict[str, str] = {
    "model": "alias, hub id or folder of the backbone",
    "revision": "commit of the hub repository, or a hash of the local weights",
    "task": "alias, hub id or folder of the images",
    "split": "train, validation or test",
    "block": "transformer block, from 0; empty for what lies outside the blocks",
    "site": "place in the block: resid_pre, attn_out, mlp_out, resid_post; or embed",
    "metric": "name of the quantity; the definition is in the docstring of the function of that name",
    "value": "the number; empty when undefined, then `reason` says why",
    "stderr": "standard error of `value`, where one is estimated",
    "n": "how many entries (weights, images, runs) the value rests on",
    "seed": "seed of the run; empty when nothing was random",
    "reason": "why `value` is empty",
}
"""The columns every long table starts with, in this order; a study appends its own."""


def tidy(rows: Iterable[Mapping[str, Any]], **constants: Any) -> pd.DataFrame:
    """A frame with the columns of `COLUMNS` first, missing ones filled with None.

    `constants` (for example model="gpt2") fill rows that do not set that column themselves.

    >>> tidy([{"metric": "kurtosis", "value": 3.0}], model="gpt2")[["model", "metric", "value"]].values.tolist()
    [['gpt2', 'kurtosis', 3.0]]
    """
    import pandas as pd

    frame = pd.DataFrame([{**constants, **row} for row in rows])
    for column in COLUMNS:
        if column not in frame:
            frame[column] = None
    extra = [column for column in frame.columns if column not in COLUMNS]
    frame = frame[[*COLUMNS, *extra]]
    for column in ("block", "n", "seed"):
        if frame[column].map(lambda v: v is None or v is pd.NA or _is_whole(v)).all():
            frame[column] = frame[column].astype("Int64")
    return frame


def _is_whole(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return bool(math.isnan(value) or float(value).is_integer())


def strict_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values that strict JSON can hold; NaN, NA and infinities become None."""
    columns = [str(column) for column in frame.columns]
    return [
        dict(zip(columns, map(strict_value, row), strict=True))
        for row in frame.itertuples(index=False, name=None)
    ]


def strict_value(value: Any) -> Any:
    """`value` with numpy scalars, arrays, paths and non-finite floats turned into strict JSON."""
    import pandas as pd

    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return [strict_value(item) for item in value.tolist()]
    if isinstance(value, Mapping):
        return {str(key): strict_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [strict_value(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def envelope(command: str, frame: pd.DataFrame, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The one JSON object that `--json` prints and that a record saves."""
    return {
        "schema": f"layerprobe.{command}/v1",
        "provenance": strict_value(provenance),
        "rows": strict_rows(frame),
    }


def write_frame(frame: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write a frame as .csv or .parquet, by the ending; aside first, then renamed."""
    target = Path(path)
    if target.suffix not in (".csv", ".parquet"):
        raise UsageError(f"cannot tell the table format of {target}: end it with .csv or .parquet")
    with atomic_write(target) as aside:
        if target.suffix == ".csv":
            frame.to_csv(aside, index=False)
        else:
            frame.to_parquet(aside, index=False)
    return target


def read_frame(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a table that `write_frame` wrote."""
    import pandas as pd

    source = Path(path)
    return pd.read_parquet(source) if source.suffix == ".parquet" else pd.read_csv(source)

"""Small image data sets on disk, for the tests of this folder."""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(number: int, *, side: int = 6, gray: bool = False) -> np.ndarray:
    """An image that no other number has."""
    shape = (side, side) if gray else (side, side, 3)
    return np.random.default_rng(number).integers(0, 256, shape).astype(np.uint8)


def png(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def write_parquet(
    path: Path,
    files: Sequence[bytes | None],
    labels: dict[str, Sequence[object]],
    *,
    class_names: dict[str, list[str]] | None = None,
    names: Sequence[str] | None = None,
    image: str = "img",
) -> Path:
    """A parquet file in the hub's schema; `class_names` go into the metadata as `datasets` writes them."""
    stored = [
        {"bytes": content, "path": name}
        for content, name in zip(files, names or [f"{i}.png" for i in range(len(files))], strict=True)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(stored, kind), **{name: pa.array(v) for name, v in labels.items()}})
    if class_names is not None:
        features: dict[str, object] = {image: {"_type": "Image"}}
        features |= {n: {"names": names, "_type": "ClassLabel"} for n, names in class_names.items()}
        noted = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": noted})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def write_idx(path: Path, array: np.ndarray) -> Path:
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_class_folders(root: Path, counts: dict[str, int], *, first: int = 0) -> Path:
    number = first
    for name, count in counts.items():
        for _ in range(count):
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(picture(number)))
            number += 1
    return root

"""Parquet files beyond the memory limit are mapped from the Arrow cache of `datasets`; nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from task_files import picture, png, write_parquet

from layerprobe.errors import BrokenFileError
from layerprobe.tasks import load_task, parquet


def test_mapped_and_read_are_the_same(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(2):
        numbers = range(shard * 30, shard * 30 + 30)
        write_parquet(
            tmp_path / "x" / f"train-{shard:05d}-of-00002.parquet",
            [png(picture(i)) for i in numbers],
            {"label": [i % 3 for i in numbers], "other": [0] * 30},
            class_names={"label": ["a", "b", "c"]},
        )
    read = load_task(str(tmp_path / "x"))
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    monkeypatch.setenv("LAYERPROBE_CACHE", str(tmp_path / "cache"))
    mapped = load_task(str(tmp_path / "x"))
    assert list((hub_cache.parent / "datasets").rglob("*.arrow"))
    assert mapped.split_hash == read.split_hash
    assert mapped.classes == ["a", "b", "c"]
    for x, y in zip(mapped.train.images(), read.train.images(), strict=True):
        assert np.array_equal(x, y)


def test_a_broken_file_is_named_there_too(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(
        tmp_path / "x.parquet", [png(picture(i)) for i in range(9)], {"label": [0, 1, 2] * 3}
    )
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    with pytest.raises(BrokenFileError, match=r"x\.parquet"):
        load_task(str(tmp_path))

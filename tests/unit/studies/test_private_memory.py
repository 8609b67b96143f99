"""The memory test of `benchmarks/features.py` counts what the process holds itself, not the pages of its files."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from features import private_memory

SIZE = 48 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon stands in Linux's /proc/self/status")
def test_private_memory_counts_arrays_and_no_mapped_files(tmp_path: Path) -> None:
    file = tmp_path / "mapped.bin"
    file.write_bytes(b"\1" * SIZE)
    peaks = []
    for make in (lambda: None, lambda: np.memmap(file, np.uint8, "r").sum(), lambda: np.ones(SIZE, np.uint8)):
        with private_memory() as seen:
            kept = make()
            time.sleep(0.05)
        del kept
        peaks.append(max(seen))
    idle, mapped, held = peaks
    assert mapped - idle < 12
    assert 40 < held - idle < 60

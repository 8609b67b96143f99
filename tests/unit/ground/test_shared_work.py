"""Pieces that several processes share: each is computed, whoever dies."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from layerprobe.errors import UsageError
from layerprobe.shared_work import SharedWork


def _die_at_three(folder: str) -> None:
    def compute(number: int) -> int:
        if number == 3:
            os._exit(9)
        return number * number

    SharedWork(Path(folder)).results(8, compute, unit="piece", what="squares", quiet=True)


def test_a_piece_whose_process_died_is_computed_by_another(tmp_path: Path) -> None:
    other = multiprocessing.get_context("fork").Process(target=_die_at_three, args=(str(tmp_path),))
    other.start()
    other.join()
    assert other.exitcode == 9
    done: list[int] = []

    def compute(number: int) -> int:
        done.append(number)
        return number * number

    work = SharedWork(tmp_path)
    found = work.results(8, compute, unit="piece", what="squares", quiet=True)
    assert found == [number * number for number in range(8)]
    assert done == [3, 4, 5, 6, 7]
    assert work.results(2, lambda n: -n, unit="piece", what="another question", quiet=True) == [0, -1]


def test_a_folder_that_others_may_write_into_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError, match="others may write into"):
        SharedWork(tmp_path)


def test_an_error_leaves_the_piece_to_others(tmp_path: Path) -> None:
    def fail(number: int) -> int:
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        SharedWork(tmp_path).results(1, fail, unit="piece", what="errors", quiet=True)
    assert SharedWork(tmp_path).results(1, lambda n: n, unit="piece", what="none", quiet=True) == [0]

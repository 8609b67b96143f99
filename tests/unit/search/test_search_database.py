"""The database of a search, damaged or written by somebody else: its rows are data, checked as they are read."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from small_search import ABOUT, make_study

from layerprobe.errors import BrokenFileError
from layerprobe.search.status import search_status
from layerprobe.search.trials import TrialStore


def rewrite(path: Path, key: str, value: object, *, table: str = "trial") -> None:
    """Another value for an attribute, in the first row that has it."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            f"UPDATE {table}_user_attributes SET value_json = ? WHERE rowid = "
            f"(SELECT min(rowid) FROM {table}_user_attributes WHERE key = ?)",
            (json.dumps(value), key),
        )


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("lr", 2e-3, "calls the trial ###/lr0.002/r0/f1 '###/lr0.001/r0/f1'"),
        ("mask", [False, True, True], "calls the trial .##"),
        ("repeat", None, "'repeat' must be a whole number, not null"),
        ("outcome", {"validation_accuracy": 7.5}, "'validation_accuracy' must be in [0, 1], not 7.5"),
        ("outcome", {"validation_accuracy": float("nan")}, "must be in [0, 1], not nan"),
        ("outcome", [1], "it holds a list, not an object"),
        ("outcome", {"test_correct": "zz", "n_test": 8}, "are not those of 8 images"),
        ("outcome", {"test_correct": "ff", "n_test": 20}, "are not those of 20 images"),
    ],
)
def test_a_trial_of_another_form_is_one_line(tmp_path: Path, key: str, value: object, told: str) -> None:
    path = tmp_path / "study.db"
    make_study(path)
    rewrite(path, key, value)
    with closing(TrialStore.open(path, ABOUT)) as store, pytest.raises(BrokenFileError) as caught:
        store.records()
    assert told in str(caught.value)
    with pytest.raises(BrokenFileError):
        search_status(path)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("value", {"length": 1.0}, "it has no 'lrs'"), ("value", None, "it holds"), ("fact", [], "it holds")],
)
def test_a_pilot_of_another_form_is_one_line(tmp_path: Path, key: str, value: object, told: str) -> None:
    path = tmp_path / "study.db"
    make_study(path)
    rewrite(path, key, value)
    if key == "fact":  # no fact of that name, so the pilot seems to run
        assert search_status(path).pilot is None
        return
    with pytest.raises(BrokenFileError) as caught:
        search_status(path)
    assert told in str(caught.value)


def test_names_from_a_database_do_not_move_the_cursor(tmp_path: Path, run_cli: Callable) -> None:
    make_study(tmp_path / "study.db")
    rewrite(tmp_path / "study.db", "arguments", {**ABOUT, "model": "\x1b[2Jgone"}, table="study")
    shown = run_cli("watch", tmp_path, "--once")
    assert shown.code == 0 and "\x1b" not in shown.out and "\\x1b[2Jgone on digits" in shown.out

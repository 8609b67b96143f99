"""The program starts at once and explains itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

COMMANDS = [
    "outliers", "compare", "features", "cka", "probe", "transfer", "attribute", "freeze-search", "bridge",
    "evaluate", "plan", "report", "ls", "env",
]  # fmt: skip


def test_help_answers_within_a_second_of_processor_time() -> None:
    """CPU time, best of three: the wall clock of a busy machine says nothing about the program."""
    best = float("inf")
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "layerprobe", "--help"], capture_output=True, text=True, check=True
        )
        after = os.times()
        best = min(
            best, after.children_user + after.children_system - before.children_user - before.children_system
        )
        assert all(command in done.stdout for command in COMMANDS)
    assert best < 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run_cli: Callable, command: str) -> None:
    result = run_cli(command, "--help")
    assert result.code == 0
    if command not in ("plan", "ls"):
        assert f"layerprobe {command}" in result.out


def test_help_of_the_search_says_its_defaults_and_what_the_preset_sets(
    run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerprobe.search.baselines import standard_baselines
    from layerprobe.search.settings import DEFAULT_BASELINES, PRESET_LOADING, PRESETS, Settings, in_words
    from layerprobe.search.space import Space

    monkeypatch.setenv("COLUMNS", "500")
    told = run_cli("freeze-search", "--help").out
    rows = [row.strip("│ ") for row in told.splitlines()]
    settings = Settings().to_dict()
    for name in (
        "strategy", "objective", "seeds", "bridge_steps", "batch_size", "precision", "head",
    ):  # fmt: skip
        line = next(row for row in rows if row.startswith(f"--{name.replace('_', '-')} "))
        assert f"default: {in_words(settings[name])}." in line
    for name in ("lrs", "finetune-steps"):
        assert "found by the pilot" in next(row for row in rows if row.startswith(f"--{name} "))
    known = [arm.name for arm in standard_baselines(Space((1,) * 6))]
    assert f"default: {', '.join(DEFAULT_BASELINES)}." in told and set(DEFAULT_BASELINES) <= set(known)
    line = next(row for row in rows if row.startswith("--preset "))
    for key, value in {**PRESETS["quickstart"], **PRESET_LOADING["quickstart"]}.items():
        shown = "--no-scores" if key == "use_scores" else in_words(value)
        assert shown in line, key


def test_version(run_cli: Callable) -> None:
    import layerprobe

    assert run_cli("--version").out == f"layerprobe {layerprobe.__version__}\n"

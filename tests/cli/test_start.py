"""The program starts at once and explains itself."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_search import make_study

REPOSITORY = Path(__file__).resolve().parents[2]

COMMANDS = [
    "demo", "outliers", "compare", "features", "cka", "probe", "transfer", "attribute", "freeze-search", "watch",
    "bridge", "evaluate", "plan", "report", "ls", "env",
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
    rows = [" ".join(row.split()) for row in re.split(r"\n  (?=-)", told)]
    told = " ".join(told.split())
    settings = Settings().to_dict()
    for name in (
        "strategy", "objective", "seeds", "bridge_steps", "batch_size", "precision", "head",
    ):  # fmt: skip
        line = next(row for row in rows if row.startswith(f"--{name.replace('_', '-')} "))
        assert f"default: {in_words(settings[name])}." in line
    for name in ("lrs", "steps"):
        assert "found by the pilot" in next(row for row in rows if row.startswith(f"--{name} "))
    known = [arm.name for arm in standard_baselines(Space((1,) * 6))]
    assert f"default: {', '.join(DEFAULT_BASELINES)}." in told
    assert set(DEFAULT_BASELINES) <= {*known, "attention", "mlp"}
    line = next(row for row in rows if row.startswith("--preset "))
    for key, value in {**PRESETS["quickstart"], **PRESET_LOADING["quickstart"]}.items():
        shown = "--no-scores" if key == "use_scores" else in_words(value)
        assert shown in line, key


def test_alone_it_shows_the_road(run_cli: Callable) -> None:
    result = run_cli()
    assert (result.code, result.err) == (0, "")
    steps = [line.split()[1] for line in result.out.splitlines() if line.startswith("  layerprobe ")]
    assert steps == ["demo", "probe", "freeze-search", "evaluate", "report"]
    assert max(map(len, result.out.splitlines())) <= 80


def all_commands() -> dict[str, Any]:
    import typer

    from layerprobe.cli import main

    main._register()
    found = {}

    def walk(command: Any, name: str) -> None:
        for word, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {word}".strip())
        if not hasattr(command, "commands"):
            found[name] = command

    walk(typer.main.get_command(main.app), "")
    return found


NOT_HERE = {"plan push", "plan pull", "compare", "demo"}
"""Commands that need a hub, and one that has a test of its own."""


@pytest.fixture(scope="module")
def some_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of MiniLM that trains something and freezes something."""
    import layerprobe as lp
    from layerprobe.training import block_plan

    path = tmp_path_factory.mktemp("plan") / "plan.json"
    block_plan(lp.load_backbone("minilm", patch_size=4), [2, 3]).save(path)
    return path


@pytest.mark.parametrize("name", sorted(all_commands()))
def test_every_help_ends_in_one_example_that_runs(
    run_cli: Callable, name: str, tmp_path: Path, some_plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --dry-run where the command has it, in a folder with a run, a plan and a trainer's configuration."""
    command = all_commands()[name]
    *_, last = inspect.getdoc(command.callback).splitlines()
    examples = re.findall(r"^Example: layerprobe (.+)$", inspect.getdoc(command.callback), re.MULTILINE)
    assert len(examples) == 1 and last == f"Example: layerprobe {examples[0]}"
    shutil.copytree(REPOSITORY / "results" / "quickstart", tmp_path / "quickstart")
    shutil.copy(some_plan, tmp_path)
    (tmp_path / "train.yaml").write_text(
        "freeze_layers: 3\nfinetuning_type: freeze\nfreeze_trainable_layers: 2\n"
    )
    if name == "watch":
        make_study(tmp_path / "quickstart" / "study.db")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(examples[0])
    assert words[: len(name.split())] == name.split()
    if name in NOT_HERE:
        return
    dry = ["--dry-run"] if any("--dry-run" in one.opts for one in command.params) else []
    result = run_cli(*words, *dry)
    assert result.code in (0, 1 if name == "plan lint" else 0), result.err


def test_watch_shows_what_a_search_knows(run_cli: Callable, tmp_path: Path) -> None:
    make_study(tmp_path / "study.db")
    before = (tmp_path / "study.db").read_bytes()
    shown = run_cli("watch", tmp_path, "--once")
    assert shown.code == 0, shown.err
    assert "tiny on digits, bayes" in shown.out and "best so far ■" in shown.out
    assert "4.9 of 10 full trainings" in shown.out  # 2 × 1 + 2 × 2/3 + 2 × 7/9
    assert max(map(len, shown.out.splitlines())) <= 80
    body = json.loads(run_cli("watch", "--storage", tmp_path / "study.db", "--json").out)
    assert body["schema"] == "layerprobe.watch/v1" and body["best"][0] == "0" and not body["finished"]
    gains = [row["gain"] for row in body["rows"]]
    assert gains[0] > max(gains[1:]) and body["spent"] == pytest.approx(2 + 4 / 3 + 14 / 9)
    assert (tmp_path / "study.db").read_bytes() == before  # a look writes nothing
    for arguments, line in (
        ([tmp_path / "nowhere"], "no search in"),
        ([], "name the folder of a search"),
        (["--storage", tmp_path / "none.db"], "holds no search yet"),
    ):
        result = run_cli("watch", *arguments, "--once")
        assert result.code in (1, 2) and line in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "none.db").exists()


def test_demo_probes_and_searches_and_keeps_nothing(
    run_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from families import save

    from layerprobe.cli import demo

    pytest.importorskip(demo.PACKAGE)
    monkeypatch.setattr(demo, "MODEL", str(save("llama", tmp_path / "llama")))
    monkeypatch.chdir(tmp_path)
    shown = run_cli("demo")
    assert shown.code == 0, shown.err
    assert shown.err.startswith("demo: what ")
    for words in ("The layer read best is", "Plan: ", "a search this short", "--preset quickstart"):
        assert words in shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_shells_complete_commands_and_choices(tmp_path: Path) -> None:
    def complete(line: str) -> str:
        environment = {
            **os.environ, "_LAYERPROBE_COMPLETE": "complete_bash", "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - (not line.endswith(" "))),
        }  # fmt: skip
        program = [sys.executable, "-m", "layerprobe"]
        return subprocess.run(program, env=environment, capture_output=True, text=True, check=False).stdout

    assert complete("layerprobe free").split() == ["freeze-search"]
    assert complete("layerprobe probe --pooling ").split() == ["mean", "last", "cls"]
    assert (
        "--install-completion"
        in subprocess.run(
            [sys.executable, "-m", "layerprobe", "--help"], capture_output=True, text=True, check=True
        ).stdout
    )


def test_version(run_cli: Callable) -> None:
    import layerprobe

    assert run_cli("--version").out == f"layerprobe {layerprobe.__version__}\n"

"""A password or token that a command was given stands nowhere afterwards: run folder, log, database, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerprobe.provenance import command_line, without_secrets
from layerprobe.report import write_report

CANARY = "kanarie-7391"
TINY = ("--task", "digits", "--limit", "60", "--patch-size", "4")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from families import save

    return save("llama", tmp_path_factory.mktemp("llama"))


def assert_no_canary(folder: Path, *texts: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path
    for text in texts:
        assert CANARY not in text


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://me:{CANARY}@host/db",
        f"postgresql://me:{CANARY}%40@host:5432/db?sslmode=require",
        f"postgresql://me:a@{CANARY}@host/db",
        f"postgresql://me:it's {CANARY}@host/db",
        f"--storage=postgresql://me:{CANARY}@host/db",
        f"could not parse 'postgresql://me:{CANARY}@host/db'",
        f"postgresql://host/db?user=me&password={CANARY}",
        f"host=x Password='{CANARY}' user=me",
        f"https://{CANARY}@hub.example/model",
        f"no folder https:/me:{CANARY}@hub.example/set",
        f"https://hub.example/model?access_token={CANARY}",
        f"MY_API_KEY={CANARY}",
        "hf_" + CANARY.replace("-", "x") * 3,
    ],
)
def test_what_is_shown_of_a_secret(text: str) -> None:
    assert CANARY not in without_secrets(text)
    assert CANARY not in json.dumps(without_secrets({"arguments": [{"storage": text}]}))


def test_what_is_no_secret_stays() -> None:
    for text in (
        "--tokens",
        "tokens=16",
        "sqlite:////a/b.db",
        "me@host",
        "postgresql://me@host/db?sslmode=require",
    ):
        assert without_secrets(text) == text


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(
        sys, "argv", ["layerprobe", "freeze-search", "--storage", f"postgresql://u:{CANARY}@h/d"]
    )
    assert CANARY not in without_secrets(f"401 for {CANARY}")
    assert command_line() == "layerprobe freeze-search --storage postgresql://u@h/d"


def test_no_command_keeps_a_password(
    llama: Path, tmp_path: Path, run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search with a password in its storage's URL, and every record of it afterwards."""
    monkeypatch.setenv("HF_TOKEN", f"hf_{CANARY}")
    storage = f"sqlite:///file:{tmp_path}/study.db?uri=true&password={CANARY}"
    tiny = (
        "--budget",
        5,
        "--bridge-steps",
        1,
        "--steps",
        1,
        "--batch-size",
        8,
        "--seeds",
        2,
        "--no-scores",
    )
    run = run_cli(
        "freeze-search", "--model", llama, *TINY, *tiny, "--storage", storage, "-o", tmp_path / "run"
    )
    assert run.code == 0, run.err
    again = run_cli("report", tmp_path / "run")
    shown = run_cli("plan", "show", tmp_path / "run")
    assert_no_canary(tmp_path, run.out, run.err, again.out, shown.out)
    assert (
        "--storage"
        in json.loads((tmp_path / "run" / "search.json").read_text())["provenance"]["command_line"]
    )


@pytest.mark.parametrize(
    "url", ["postgresql://me:{}@127.0.0.1:1/db", "nosuch://me:{}@x/db", "sqlite:///nowhere/x.db?password={}"]
)
@pytest.mark.parametrize("command", [["watch", "--once"], ["worker"]])
def test_looking_and_joining_show_no_password(
    tmp_path: Path, run_cli: Callable, url: str, command: list[str]
) -> None:
    run = run_cli(*command, "--storage", url.format(CANARY))
    assert run.code == 1 and run.err.splitlines()[-1].startswith("error: ")
    assert_no_canary(tmp_path, run.out, run.err)


@pytest.mark.parametrize("command", ["freeze-search"])
@pytest.mark.parametrize(
    "url", ["postgresql://me:{}@127.0.0.1:1/db", "nosuch://me:{}@x/db", "postgresql://me:{}@[x/db"]
)
def test_no_error_shows_a_password(
    llama: Path, tmp_path: Path, run_cli: Callable, command: str, url: str
) -> None:
    storage = url.format(CANARY)
    run = run_cli(
        command, "--model", llama, *TINY, "--storage", storage, "-o", tmp_path / "run", "--no-scores"
    )
    assert run.code == 1 and run.err.splitlines()[-1].startswith("error: storage ")
    assert_no_canary(tmp_path, run.out, run.err)


def test_commands_that_take_an_address_or_a_token() -> None:
    """Whoever adds an option for one adds it here, and a run of the command above."""
    from layerprobe.cli.main import _register, app

    _register()
    import typer

    def leaves(
        group: typer.core.TyperGroup, before: str = ""
    ) -> Iterator[tuple[str, typer.core.TyperCommand]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from leaves(command, f"{before}{name} ")
            else:
                yield before + name, command

    found = {
        (name, option)
        for name, command in leaves(typer.main.get_command(app))
        for parameter in getattr(command, "params", [])
        for option in parameter.opts
        if any(word in option for word in ("storage", "token-", "password", "secret", "key", "url"))
    }
    assert found == {(command, "--storage") for command in ("freeze-search", "watch", "worker")}


@pytest.mark.parametrize(
    "command",
    [
        ("plan", "push", "{plan}", "me/plans"),
        ("plan", "pull", "me/plans"),
        ("features", "--model", f"https://me:{CANARY}@hub.example/model", "--task", "digits"),
        ("features", "--model", f"me/x?token={CANARY}", "--task", "digits"),
        ("probe", "--model", "minilm", "--task", f"https://me:{CANARY}@hub.example/set"),
    ],
    ids=" ".join,
)
def test_commands_that_reach_the_hub_show_no_token(
    command: tuple[str, ...], tmp_path: Path, run_cli: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"hf_{CANARY}")
    monkeypatch.setenv("LAYERPROBE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "plan.json").write_text("{}")
    run = run_cli(*(word.format(plan=tmp_path / "plan.json") for word in command))
    assert run.code in (1, 2) and "Traceback" not in run.err
    assert_no_canary(tmp_path, run.out, run.err)


def test_a_report_of_an_earlier_record_hides_its_password(tmp_path: Path) -> None:
    record = {
        "schema": "layerprobe.probe/v1",
        "provenance": {
            "command": "probe",
            "command_line": f"layerprobe probe --storage postgresql://u:{CANARY}@h/d",
            "arguments": {"storage": f"postgresql://u:{CANARY}@h/d"},
        },
        "rows": [{"metric": "x", "value": 1}],
    }
    (tmp_path / "probe.json").write_text(json.dumps(record))
    assert CANARY not in write_report(tmp_path).read_text()

"""The commands bridge and evaluate: what they print, what they write, and their one-line errors."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from layerprobe.cli.main import Program


@pytest.fixture(scope="module")
def program() -> typer.Typer:
    from layerprobe.cli import bridge, evaluate

    app = typer.Typer(cls=Program, pretty_exceptions_enable=False)
    app.command("bridge")(bridge.bridge)
    app.command("evaluate")(evaluate.evaluate)
    return app


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch) -> None:
    """Commands without -o make runs/ here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    import torch
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=40, bos_token_id=0, eos_token_id=0
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        transformers.GPT2Model(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run_folder(program, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    found = CliRunner().invoke(program, [*common("bridge", model), "--steps", "4", "-o", str(folder)])
    assert found.exit_code == 0, found.stderr
    assert "of the random labels are recalled (a guess: 10.0 % of 10)" in found.stdout
    return folder


def common(command: str, model: str) -> list[str]:
    small = ["--batch-size", "16", "--limit", "60", "--patch-size", "4", "--device", "cpu", "--offline", "-q"]
    return [command, "--model", model, "--task", "digits", *small]


def test_a_run_folder_holds_table_plan_curve_and_model(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {
        "bridge.csv", "bridge.json", "history.csv", "labels.csv", "plan.json", "curve.png", "drift.png", "final",
        "layerprobe_run.json",
    }  # fmt: skip
    about = json.loads((run_folder / "layerprobe_run.json").read_text())
    assert about["schema"] == "layerprobe.bridge-run/v1"
    assert about["finished"] is True


def test_the_run_folder_serves_as_model_and_brings_its_plan(program, run_folder):
    arguments = [
        *common("evaluate", str(run_folder)),
        "--steps",
        "3",
        "--lrs",
        "1e-3",
        "--seeds",
        "2",
        "--json",
    ]
    found = CliRunner().invoke(program, arguments)
    assert found.exit_code == 0, found.stderr
    body = json.loads(found.stdout)
    assert body["schema"] == "layerprobe.evaluate/v1"
    assert body["provenance"]["backbone"]["origin"] == "bridge"
    assert body["provenance"]["plan"] is not None
    mean = next(row for row in body["rows"] if row["metric"] == "test_accuracy_mean")
    assert mean["interval"].startswith("95 % over 2 seeds and ")
    assert mean["low"] <= mean["value"] <= mean["high"]


def test_arms_in_one_table(program, run_folder, model, tmp_path):
    plan = ["--plan", str(run_folder / "plan.json"), "--arms", "language,bridge,random", "--seeds", "2"]
    arguments = [
        *common("evaluate", model),
        *plan,
        "--steps",
        "2",
        "--lrs",
        "1e-3",
        "-o",
        str(tmp_path / "arms"),
    ]
    found = CliRunner().invoke(program, arguments)
    assert found.exit_code == 0, found.stderr
    assert "language − random" in found.stdout
    names = {path.name for path in (tmp_path / "arms").iterdir()}
    assert names == {
        "accuracy_cost.png",
        "accuracy_parameters.png",
        "evaluate.csv",
        "evaluate.json",
        "settings.yaml",
        "trials.json",
    }


def test_dry_run_counts_trainings_and_memory_without_loading(program, model):
    arguments = [
        *common("evaluate", model),
        "--arms",
        "language,random",
        "--seeds",
        "3",
        "--dry-run",
        "--json",
    ]
    found = CliRunner().invoke(program, arguments)
    assert found.exit_code == 0, found.stderr
    body = json.loads(found.stdout)
    assert body["dry_run"] is True
    assert body["trainings"] == 2 * (3 + 3 - 1)
    assert re.fullmatch(r"about [\d.]+ [MG]iB for the process", body["memory"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bridge", "--random-classes", "1000"], "1000 random classes are more than the"),
        (["bridge", "--random-classes", "1"], "random_classes must be at least 2, not 1"),
        (["bridge", "--lrs", "-1"], "lr must be a positive number, not -1.0"),
        (["bridge", "--lrs", "fast"], "'fast' is no list of learning rates"),
        (
            ["bridge", "--plan", "nowhere.json"],
            "there is no plan nowhere.json: name a plan file, or a run folder",
        ),
        (
            ["bridge", "--precision", "float8"],
            "unknown precision 'float8'. Did you mean",
        ),
        (["bridge", "--device", "cuda:77"], "cuda:77"),
        (["evaluate", "--seeds", "none"], "'none' is no number of seeds"),
        (["evaluate", "--arms", "langage"], "unknown arm 'langage'. Did you mean 'language'?"),
        (["evaluate", "--arms", "bridge"], "the arm 'bridge' trains a freeze plan; give one with --plan"),
        (["evaluate", "--mode", "guess"], "unknown mode 'guess'"),
        (["evaluate", "--mode", "own-head"], "brings no image classifier of its own"),
        (["evaluate", "--mode", "probe", "--arms", "language"], "--arms compares trainings"),
        (["evaluate", "--arms", "language", "--shard"], "--arms trains in one process"),
    ],
)
def test_mistakes_are_one_line_on_stderr(program, model, arguments, line):
    command, *rest = arguments
    found = CliRunner().invoke(program, [*common(command, model), *rest])
    assert found.exit_code in (1, 2)
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert line in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_named_folder_holds_one_run(program, run_folder, model):
    """The same command reads the finished run; another is refused in one line that says what differs."""
    same = [*common("bridge", model), "-o", str(run_folder)]
    before = (run_folder / "final" / "state.json").read_bytes()
    found = CliRunner().invoke(program, [*same, "--steps", "4"])
    assert found.exit_code == 0 and "After 4 steps" in found.stdout, found.stderr
    assert (run_folder / "final" / "state.json").read_bytes() == before
    found = CliRunner().invoke(program, [*same, "--steps", "5"])
    assert (found.exit_code, found.stdout) == (2, "")
    line = (
        f"error: the run in {run_folder} was begun with steps=4, not 5; name another folder with --output\n"
    )
    assert found.stderr == line


@pytest.mark.parametrize("command", ["bridge", "evaluate"])
def test_without_a_folder_the_run_is_kept_and_found_again(program, model, tmp_path, monkeypatch, command):
    """The same command again trains nothing; other settings get a folder with a number."""
    monkeypatch.chdir(tmp_path)
    small = ["--lrs", "1e-3"] if command == "evaluate" else []
    arguments = [*common(command, model)[:-1], *small, "--steps", "3"]
    first = CliRunner().invoke(program, arguments)
    assert first.exit_code == 0, first.stderr
    folder = f"runs/{command}-tiny-digits"
    opening, *_, closing = first.stderr.splitlines()
    assert opening.startswith(f"{command}: ") and opening.endswith(f"; kept in {folder}")
    assert closing == f"saved: {folder}"
    monkeypatch.setattr("layerprobe.training.loop.make_optimizer", None)  # whoever trains needs one
    again = CliRunner().invoke(
        program, [*arguments, "--checkpoint-every", "2"][: None if command == "bridge" else -2]
    )
    assert again.exit_code == 0, again.stderr
    assert again.stderr.splitlines()[0].endswith(f"; continues in {folder}")
    assert again.stdout == first.stdout
    other = CliRunner().invoke(program, [*arguments[:-1], "2", "--dry-run"])
    assert f"{folder}-2" in other.stdout and not (tmp_path / f"{folder}-2").exists()


def test_a_run_is_repeated_from_its_file_of_settings(program, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*common("bridge", model), "--steps", "3", "--head-lr", "2"]
    first = CliRunner().invoke(program, arguments)
    assert first.exit_code == 0, first.stderr
    settings = tmp_path / "runs" / "bridge-tiny-digits" / "settings.yaml"
    assert "head-lr: 2.0\n" in settings.read_text() and f"model: {model}\n" in settings.read_text()
    file = ["--config", str(settings), "-q"]
    again = CliRunner().invoke(program, ["bridge", *file])
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    shown = CliRunner().invoke(program, ["bridge", *file, "--steps", "7", "--dry-run"])
    assert "runs/bridge-tiny-digits-2" in shown.stdout
    for text, line in (
        ("command: probe\n", "holds the settings of 'probe', not of 'bridge'"),
        ("stpes: 3\n", "'bridge' has no option 'stpes'. Did you mean 'steps'"),
        ("steps: {a: 1}\n", "holds no settings"),
        ("steps: [\n", "cannot read"),
        ("precision: float8\n", "unknown precision 'float8'"),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        found = CliRunner().invoke(program, ["bridge", "--config", str(tmp_path / "wrong.yaml")])
        assert found.exit_code in (1, 2) and found.stderr.count("\n") == 1 and line in found.stderr
    found = CliRunner().invoke(program, ["bridge", "--config", "nowhere.yaml"])
    assert found.exit_code == 2 and "there is no file of settings nowhere.yaml" in found.stderr


def test_a_run_folder_serves_as_plan(program, run_folder, model):
    for command in (["bridge", model, "--plan", str(run_folder)], ["evaluate", str(run_folder)]):
        arguments = [*common(*command[:2]), *command[2:], "--dry-run"]
        found = CliRunner().invoke(program, arguments)
        assert found.exit_code == 0, found.stderr
        assert "trains 2 of 2 blocks" in found.stdout


def test_a_dry_run_refuses_a_plan_of_another_model(program, run_folder, model, tmp_path):
    import transformers

    config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=32, vocab_size=40)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    line = "plan.json was made for 2 blocks"
    plan = ["--plan", str(run_folder), "--dry-run"]
    for arguments in (
        common("bridge", str(tmp_path)),
        [*common("evaluate", str(tmp_path)), "--arms", "partial"],
    ):
        found = CliRunner().invoke(program, [*arguments, *plan])
        assert (found.exit_code, found.stdout) == (2, "")
        assert line in found.stderr and "this model has 3" in found.stderr
    # Where no stage trains the plan, the run would not look at it either.
    found = CliRunner().invoke(program, [*common("evaluate", str(tmp_path)), "--arms", "language", *plan])
    assert found.exit_code == 0, found.stderr


def test_a_run_folder_is_evidence_for_the_other_commands(run_folder, model):
    import layerprobe as lp

    task = lp.load_task("digits", limit=60, offline=True)
    backbone = lp.load_backbone(str(run_folder), device="cpu", offline=True).prepare(task)
    features = lp.extract_features(backbone, task, "test", quiet=True)
    original = lp.load_backbone(model, device="cpu", patch_size=4, offline=True).prepare(task)
    before = lp.extract_features(original, task, "test", quiet=True)
    assert (features[1] != before[1]).any()
    assert lp.cka_matrix(before, features).values.shape == (3, 3)  # embed and two blocks
    report = lp.outlier_report(str(run_folder))
    assert set(report.to_frame()["block"].dropna()) == {0, 1}


ONE_COMMAND = """
import sys, typer
from layerprobe.cli.bridge import bridge
from layerprobe.cli.main import Program
app = typer.Typer(cls=Program, pretty_exceptions_enable=False)
app.command("bridge")(bridge)
app.command("other")(lambda: None)
sys.argv[0] = "layerprobe"
app()
"""


def test_ctrl_c_saves_and_leaves_with_130(model, tmp_path):
    """In a process of its own, as a terminal would do it: SIGINT in the middle of training."""
    folder = tmp_path / "run"
    arguments = [*common("bridge", model), "--steps", "1000000", "--checkpoint-every", "5", "-o", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-c", ONE_COMMAND, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (folder / "layerprobe_run.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr == f"interrupted; finished work is kept in {folder}; the same command continues there\n"
    run = json.loads((folder / "layerprobe_run.json").read_text())
    assert run["finished"] is False
    state = json.loads((folder / run["checkpoint"] / "state.json").read_text())
    assert state["step"] == run["step"] >= 5

"""`layerprobe freeze-search` as a user meets it: a tiny model, a real task, exit codes and files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

FAST = [
    "--task", "digits", "--limit", "60", "--patch-size", "4", "--budget", "5", "--bridge-steps", "1",
    "--steps", "2", "--batch-size", "8", "--lrs", "1e-3,3e-3", "--seeds", "2", "--no-scores",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaModel

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaModel(config).save_pretrained(folder)
    return folder


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "layerprobe", "freeze-search", *map(str, arguments)]


def test_a_search_leaves_a_run_folder_and_says_the_plan(run_cli, tiny_model: Path, tmp_path: Path) -> None:
    done = run_cli("freeze-search", "--model", tiny_model, *FAST, "-o", tmp_path / "run")
    assert done.code == 0, done.err
    assert "Plan: " in done.out and "report.html" in done.out
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "plan.json", "search.json", "trials.csv", "layers.csv", "baselines.csv", "plans.csv",
        "pareto.png", "ranking.png", "plans.png", "study.db", "report.html",
    } <= files  # fmt: skip

    again = run_cli("freeze-search", "--model", tiny_model, *FAST, "-o", tmp_path / "run", "--json")
    assert again.code == 0, again.err
    printed = json.loads(again.out)
    assert printed["schema"] == "layerprobe.freeze-search/v1"
    assert len(printed["rows"])

    other = run_cli("freeze-search", "--model", tiny_model, *FAST, "--seed", "1", "-o", tmp_path / "run")
    assert other.code == 2
    *before, error = other.err.splitlines()
    assert len(before) == 1 and error.startswith("error: ") and "holds another search" in error


def test_dry_run_loads_nothing_and_tells_cost_and_memory(run_cli, tiny_model: Path) -> None:
    done = run_cli("freeze-search", "--model", tiny_model, *FAST, "--dry-run", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["dry_run"] and facts["blocks"] == 2 and facts["budget"] == "5 full trainings"
    assert "MiB" in facts["memory"]


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--budget", "0.5"], 2, "budget 0.5 is too small"),
        (["--must-train", "0", "--must-freeze", "0"], 2, "block 0 is in both must-freeze and must-train"),
        (["--must-train", "9"], 2, "block 9 does not exist"),
        (["--strategy", "anneal"], 2, "unknown strategy 'anneal'"),
        (["--storage", "postgresql://nobody@127.0.0.1:1/none"], 1, "storage postgresql"),
    ],
)
def test_mistakes_are_one_line(run_cli, tiny_model: Path, extra: list[str], code: int, message: str) -> None:
    done = run_cli("freeze-search", "--model", tiny_model, *FAST, *extra, "--quiet")
    assert done.code == code, done.err
    assert message in done.err and "Traceback" not in done.err
    assert done.out == ""


def interrupt(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C, and again where nothing happens; returns what was still written.

    Python drops an interrupt that falls into a destructor ("Exception ignored in"), and nobody can help that.
    """
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=30)[1]
    process.kill()
    return process.communicate()[1]


def test_ctrl_c_without_a_folder_keeps_what_is_finished_and_says_how_to_continue(
    tiny_model: Path, tmp_path: Path
) -> None:
    long = [*FAST, "--steps", "120", "--budget", "200"]
    process = subprocess.Popen(
        command("--model", tiny_model, *long), cwd=tmp_path,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    seen = ""
    deadline = time.time() + 300
    while "bayes over" not in seen and time.time() < deadline:  # the pilot is done
        seen += process.stderr.readline()
    rest = interrupt(process)
    assert process.returncode == 130, seen + rest
    (folder,) = (tmp_path / "runs").iterdir()
    where = folder.relative_to(tmp_path)
    assert f"kept in {where}\n" in seen
    told = f"interrupted; finished work is kept in {where}; the same command continues there"
    assert rest.rstrip().endswith(told)
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as database:
        states = dict(database.execute("select state, count(*) from trials group by state").fetchall())
    assert states.get("COMPLETE", 0) > 0 and "RUNNING" not in states

    again = subprocess.Popen(
        command("--model", tiny_model, *long), cwd=tmp_path,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    line = again.stderr.readline()
    assert line.rstrip().endswith(f"continues in {where}")
    while trained(folder / "study.db") <= states["COMPLETE"]:  # the finished ones are there, and more come
        assert again.poll() is None, again.stderr.read()
        time.sleep(0.05)
    interrupt(again)
    assert [one.name for one in (tmp_path / "runs").iterdir()] == [folder.name]


def trained(database: Path) -> int:
    """How many trainings are finished."""
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection:
        return connection.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]


LONGER = ["--task", "digits", "--limit", "60", "--patch-size", "4", "--budget", "6", "--steps", "400",
          "--batch-size", "8", "--lrs", "1e-3,3e-3", "--seeds", "2", "--max-seeds", "2", "--no-scores",
          "--workers", "1"]  # fmt: skip


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "layerprobe", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def trained_by(database: Path, pid: int) -> int:
    """How many trials a process has claimed so far."""
    query = "SELECT count(*) FROM trial_user_attributes WHERE key = 'worker' AND value_json LIKE ?"
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection:
        return connection.execute(query, (f"%:{pid}:%",)).fetchone()[0]


@pytest.mark.slow
def test_a_worker_joins_is_stopped_and_replaced_and_the_plan_is_the_same(
    tiny_model: Path, tmp_path: Path
) -> None:
    """From the database alone; a trial that SIGTERM ended is trained by another process."""
    alone, shared, database = tmp_path / "alone", tmp_path / "shared", tmp_path / "trials.db"
    search = ("freeze-search", "--model", tiny_model, *LONGER)
    assert started(*search, "-o", alone).wait(300) == 0
    first = started(*search, "--storage", database, "-o", shared)
    while not database.exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    worker = started("worker", "--storage", database, "--workers", "1")
    while not trained_by(database, worker.pid):
        assert worker.poll() is None, worker.stderr.read()
        time.sleep(0.02)
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    _, said = worker.communicate(timeout=30)
    assert worker.returncode == 143 and said.strip().endswith("finished work is kept")
    assert time.monotonic() - began < 30
    second = started("worker", "--storage", database, "--workers", "1")
    _, said = first.communicate(timeout=300)
    assert first.returncode == 0, said
    answer, said = second.communicate(timeout=60)
    assert second.returncode == 0 and "has its answer" in answer, said
    assert (shared / "plan.json").read_bytes() == (alone / "plan.json").read_bytes()
    for table in ("plans.csv", "baselines.csv"):
        one, two = (pd.read_csv(run / table) for run in (alone, shared))
        timed = [name for name in one.columns if "seconds" in name]
        pd.testing.assert_frame_equal(one.drop(columns=timed), two.drop(columns=timed), check_exact=True)


def test_a_worker_without_a_search(run_cli, tmp_path: Path) -> None:
    done = run_cli("worker", "--storage", tmp_path / "none.db")
    assert done.code == 1 and "there is no search at" in done.err
    assert not (tmp_path / "none.db").exists()

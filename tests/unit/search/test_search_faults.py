"""A search that is killed, or meets a full disk, at every write, rename, sync and change of its database.

A kill leaves what lies on the disk at that moment. So one search is stopped before each operation, its folder is
copied, and each copy that differs from those before is continued.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from families import save
from faults import FAILED, KILLED, every_state, run_with_fault

import layerprobe as lp
from layerprobe.training import Outcome

SMALL = {"budget": 5.0, "bridge_steps": 1, "finetune_steps": 2, "batch_size": 8, "lrs": (1e-3, 3e-3),
         "seeds": 2, "quiet": True, "use_scores": False}  # fmt: skip
COMMAND = ("--patch-size", "4", "--budget", "5", "--bridge-steps", "1", "--steps", "2", "--batch-size", "8",
           "--seeds", "2", "--lrs", "1e-3,3e-3", "--no-scores", "--workers", "1", "--quiet")  # fmt: skip
TOLD = ["plan", "lr", "repeat", "fidelity", "validation_accuracy", "test_accuracy"]


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Search into a folder, or continue there; a formula stands for training."""

    def train_and_score(backbone, tensors, plan, *, bridge, finetune, test, **_):
        lr, seed = finetune.lr, finetune.seed
        noise = 1e-3 * np.random.default_rng([seed, *map(int, plan.blocks)]).standard_normal()
        accuracy = 0.5 + 0.1 * plan.blocks[1] + 0.01 * sum(plan.blocks) - (0.2 if lr > 2e-3 else 0.0) + noise
        return Outcome(
            validation_accuracy=accuracy, test_accuracy=accuracy if test else None, bridge_accuracy=0.2,
            train_seconds=1.0, train_flops=1e9, steps=3, trainable_parameters=plan.counts["trainable_parameters"],
            n_validation=20, n_test=20, lr=lr, seed=seed,
        )  # fmt: skip

    monkeypatch.setattr("layerprobe.search.evaluator.train_and_score", train_and_score)
    # A process that died between its claim and its name is found out by its heartbeat alone.
    monkeypatch.setattr("layerprobe.search.trials.GRACE_SECONDS", 0.5)
    model = save("llama", tmp_path / "llama")
    task = lp.load_task("digits", limit=60)

    def run(folder: Path) -> None:
        lp.freeze_search(
            lp.load_backbone(str(model), patch_size=4, device="cpu"), task, output=folder, **SMALL
        )

    return run


@pytest.fixture
def command(
    search: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], None]:
    """The same by the command line, which adds figures and a report."""
    from layerprobe.cli.main import main

    def run(folder: Path) -> None:
        words = [
            "--model",
            str(tmp_path / "llama"),
            "--task",
            "digits",
            "--limit",
            "60",
            *COMMAND,
            "-o",
            str(folder),
        ]
        monkeypatch.setattr(sys, "argv", ["layerprobe", "freeze-search", *words])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code in (0, None)

    return run


def contents(folder: Path) -> dict[str, object]:
    """Names of all files, and what the search found in them."""
    found: dict[str, object] = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        found[path.relative_to(folder).as_posix()] = path.read_text() if path.suffix == ".csv" else None
    trials = pd.read_csv(folder / "trials.csv")[TOLD].sort_values(TOLD)
    plan = lp.FreezePlan.load(folder / "plan.json")
    answer = json.loads((folder / "search.json").read_text())["answer"]
    return {
        **found,
        "trials.csv": trials.to_csv(index=False),
        "plan.json": plan.blocks,
        "search.json": answer,
    }


@pytest.fixture
def expected(search: Callable[[Path], None], tmp_path: Path) -> dict[str, object]:
    search(tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("action", ["kill", "full"])
def test_a_fault_here_and_there(search, expected, tmp_path: Path, action: str) -> None:
    for at in (9, 90):
        root = tmp_path / f"run-{at}"
        root.mkdir()
        code = run_with_fault(lambda root=root: search(root), root, at, action)
        assert code == (KILLED if action == "kill" else FAILED), f"operation {at}: exit code {code}"
        search(root)
        assert contents(root) == expected, f"operation {at}"


def test_a_copied_state_is_what_a_kill_leaves(search, tmp_path: Path) -> None:
    for count in (1, 20, 60):
        root, kept = tmp_path / f"run-{count}", tmp_path / f"kept-{count}"
        root.mkdir()
        states = every_state(lambda root=root: search(root), root, kept, [])
        copy = [next(states) for _ in range(count)][-1]
        states.close()  # by SIGKILL
        same = filecmp.dircmp(root, copy)
        assert not same.left_only and not same.right_only and not same.diff_files
        assert count == 1 or (root / "study.db").stat().st_size


def continue_every_state(run: Callable[[Path], None], expected: dict, root: Path, kept: Path) -> None:
    """Stop `run` at each operation in `root`, continue from each state, compare; figures: $LAYERPROBE_FAULTS_LOG."""
    places: list[str] = []
    for state in list(every_state(lambda: run(root), root, kept, places)):
        run(state)
        assert contents(state) == expected, state.name
        shutil.rmtree(state)
    if target := os.environ.get("LAYERPROBE_FAULTS_LOG"):
        with Path(target).open("a") as stream:
            facts = {"run": root.name, "places": len(places), "states": len(set(places))}
            stream.write(json.dumps(facts) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_kill_at_every_operation(search, expected, tmp_path: Path) -> None:
    root = tmp_path / "search"
    root.mkdir()
    continue_every_state(search, expected, root, tmp_path / "kept")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_at_every_operation_of_the_end(command, tmp_path: Path) -> None:
    """Of the command, once every training is there: tables, figures, settings, report."""
    command(tmp_path / "whole")
    root = tmp_path / "end"
    root.mkdir()
    shutil.copy(tmp_path / "whole" / "study.db", root)
    continue_every_state(command, contents(tmp_path / "whole"), root, tmp_path / "kept")

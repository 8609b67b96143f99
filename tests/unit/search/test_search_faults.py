"""A search that is killed, or meets a full disk, at every write, rename, sync and change of its database."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from families import save
from faults import KILLED, run_with_fault

import layerprobe as lp
from layerprobe.training import Outcome

SMALL = {"budget": 5.0, "bridge_steps": 1, "finetune_steps": 2, "batch_size": 8, "lrs": (1e-3, 3e-3),
         "seeds": 2, "quiet": True, "use_scores": False}  # fmt: skip
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
    model = save("llama", tmp_path / "llama")
    task = lp.load_task("digits", limit=60)

    def run(folder: Path) -> None:
        lp.freeze_search(
            lp.load_backbone(str(model), patch_size=4, device="cpu"), task, output=folder, **SMALL
        )

    return run


def contents(folder: Path) -> dict[str, object]:
    """Names of all files, and what the search found in them."""
    found: dict[str, object] = {
        path.relative_to(folder).as_posix(): None for path in folder.rglob("*") if path.is_file()
    }
    trials = pd.read_csv(folder / "trials.csv")[TOLD].sort_values(TOLD)
    plan = lp.FreezePlan.load(folder / "plan.json")
    return {**found, "trials.csv": trials.to_csv(index=False), "plan.json": plan.blocks}


def check_resumed(search: Callable[[Path], None], expected: dict, root: Path, at: int, action: str) -> int:
    root.mkdir()
    code = run_with_fault(lambda: search(root), root, at, action)
    assert code in (0, KILLED, 98), f"operation {at}: exit code {code}"
    if code:
        search(root)
    assert contents(root) == expected, f"operation {at}"
    shutil.rmtree(root)
    return code


@pytest.fixture
def expected(search: Callable[[Path], None], tmp_path: Path) -> dict[str, object]:
    search(tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("action", ["kill", "full"])
def test_a_fault_here_and_there(search, expected, tmp_path: Path, action: str) -> None:
    for at in (9, 90):
        assert check_resumed(search, expected, tmp_path / "run", at, action)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", range(1, 9))  # a quarter of an hour each
def test_a_kill_at_every_operation(search, expected, tmp_path: Path, first: int) -> None:
    at = first
    while check_resumed(search, expected, tmp_path / "run", at, "kill"):
        at += 8
    assert at > 100

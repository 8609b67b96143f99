"""Two processes hold one model together: features, bridge and evaluation are those of one process that holds all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import save

WORKER = Path(__file__).with_name("sharded_worker.py")
BRIDGE = {
    "steps": 4,
    "batch_size": 16,
    "micro_batch": 4,
    "lr": 3e-3,
    "random_classes": 5,
    "checkpoint_every": 2,
}


def run(world: int, output: Path, **settings: Any) -> list[dict[str, Any]]:
    """What each of `world` processes found."""
    settings = {"output": str(output), "what": ["features", "evaluate", "bridge"], "blocks": [1], **settings}
    file = output.with_suffix(".settings")
    file.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if world > 1:
        shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(file)],
            env={**os.environ, **shared, **({"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    try:
        for child in children:
            _, said = child.communicate(timeout=240)
            assert child.returncode == 0, said[-3000:]
    finally:
        for child in children:
            child.kill()
    return [json.loads(Path(f"{output}.rank{r}.json").read_text()) for r in range(world)]


@pytest.mark.parametrize(
    "family",
    ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("bert", marks=pytest.mark.slow)],
)
def test_two_processes_that_share_a_model_find_what_one_finds(family: str, tmp_path: Path) -> None:
    """Features to the bit, losses and accuracies to rounding; each process holds half of the weights."""
    model = str(save(family, tmp_path / family))
    common = {"model": model, "evaluate": {"steps": 4, "batch_size": 16}}
    (one,) = run(1, tmp_path / "one", bridge=BRIDGE, run=str(tmp_path / "run-1"), **common)
    two = run(
        2, tmp_path / "two", bridge={**BRIDGE, "save": "trained"}, run=str(tmp_path / "run-2"), **common
    )
    assert sum(process["held"] for process in two) == one["held"]
    assert max(process["held"] for process in two) < 0.55 * one["held"]
    for process in two:
        assert process["features"] == one["features"]
        assert process["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert process["verified"] == one["verified"] and "bit-identical" in one["verified"]
        assert process["evaluate"] == pytest.approx(one["evaluate"], rel=1e-4, nan_ok=True)
    assert two[0]["drift"] == pytest.approx(one["drift"], rel=1e-3, abs=1e-6, nan_ok=True)

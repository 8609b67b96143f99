"""Bridge training in several processes, and with processes that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("bridge_worker.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GPT-2 with dropout."""
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, n_positions=8, vocab_size=40, bos_token_id=0, eos_token_id=0
    )
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformers.GPT2Model(config).save_pretrained(folder)
    # The same without dropout, whose draws cannot be the same on another number of processes.
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.save_pretrained(folder.with_name("plain"))
    (folder.with_name("plain") / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return str(folder)


def run_worker(**settings: Any) -> dict[str, Any]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    found = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(settings)],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    answer = json.loads(found.stdout.splitlines()[-1])
    assert set(answer["codes"]) == {0}, found.stderr[-3000:]
    return answer


def read(output: str, rank: int = 0) -> dict[str, Any]:
    return json.loads(Path(f"{output}.rank{rank}.json").read_text())


CONFIG = {
    "steps": 6,
    "batch_size": 16,
    "micro_batch": 3,
    "lr": 3e-3,
    "random_classes": 5,
    "checkpoint_every": 2,
}


def test_two_processes_take_the_steps_of_one(model, tmp_path):
    """Same labels, same losses to rounding, same plan check, and equal weights on both processes."""
    plain = str(Path(model).with_name("plain"))
    for processes in (1, 2):
        run_worker(
            model=plain,
            output=str(tmp_path / f"p{processes}"),
            processes=processes,
            images=50,
            blocks=[1],
            config=CONFIG,
        )
    one, two, other = read(str(tmp_path / "p1")), read(str(tmp_path / "p2")), read(str(tmp_path / "p2"), 1)
    assert one["labels"] == two["labels"] == other["labels"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["loss"] == other["loss"]
    assert two["digests"] == other["digests"]
    assert two["verified"] == one["verified"]
    assert "bit-identical" in one["verified"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_twenty_times_and_still_the_same_bits(model, tmp_path, processes):
    output = str(tmp_path / "run")
    answer = run_worker(
        model=model,
        output=output,
        processes=processes,
        images=60,
        blocks=[0, 2],
        config={**CONFIG, "steps": 400, "checkpoint_every": 7},
        kills=20,
    )
    assert answer["killed"] >= 3
    killed, whole = read(output), read(output + "-whole")
    assert killed["digests"] == whole["digests"]
    assert killed["loss"] == whole["loss"]

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
        timeout=1700,
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


@pytest.fixture(scope="module")
def plain_run(model, tmp_path_factory):
    """Train without dropout in so many processes; the folder. One process is run once for all tests."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, processes: int, **config: Any) -> str:
        output = str(folder / name)
        if not Path(f"{output}.rank0.json").exists():
            plain = str(Path(model).with_name("plain"))
            run_worker(
                model=plain,
                output=output,
                processes=processes,
                images=50,
                blocks=[1],
                config={**CONFIG, **config},
            )
        return output

    return run


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_take_the_steps_of_one(plain_run, processes):
    """Same labels, same losses to rounding, same plan check, and equal weights on all processes."""
    one, output = read(plain_run("one", 1)), plain_run(f"{processes}", processes)
    first, *others = (read(output, rank) for rank in range(processes))
    assert len(others) == processes - 1
    assert first["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert first["labels"] == one["labels"]
    assert first["verified"] == one["verified"]
    assert "bit-identical" in one["verified"]
    for other in others:
        assert other["labels"] == one["labels"]
        assert other["loss"] == first["loss"]
        assert other["digests"] == first["digests"]


def test_a_model_spread_over_two_processes_trains_as_a_whole_one(plain_run):
    """FSDP: the loss curve and the plan check of one process; the model saved is whole and loads as any other."""
    from transformers import AutoModel

    single, spread = plain_run("one", 1), plain_run("spread", 2, shard=True)
    one, two, other = read(single), read(spread), read(spread, 1)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["digests"] == other["digests"]
    frozen = [name for name in one["digests"] if ".h.0." in name or ".h.2." in name]
    assert len(frozen) == 24
    assert all(one["digests"][name] == two["digests"][name] for name in frozen)
    assert "bit-identical" in two["verified"]
    whole = AutoModel.from_pretrained(f"{spread}/final/backbone")
    alone = AutoModel.from_pretrained(f"{single}/final/backbone")
    for (name, a), (_, b) in zip(whole.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_twenty_times_and_still_the_same_bits(model, tmp_path, processes):
    output = str(tmp_path / "run")
    answer = run_worker(
        model=model,
        output=output,
        processes=processes,
        images=60,
        blocks=[0, 2],
        config={**CONFIG, "steps": 130, "checkpoint_every": 2},
        kills=20,
    )
    assert answer["killed"] == 20
    killed, whole = read(output), read(output + "-whole")
    assert killed["digests"] == whole["digests"]
    assert killed["loss"] == whole["loss"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_read_in_parts_is_continued_after_kills(model, tmp_path):
    output = str(tmp_path / "run")
    answer = run_worker(
        model=model,
        output=output,
        processes=2,
        images=60,
        blocks=[0, 2],
        config={**CONFIG, "steps": 40, "checkpoint_every": 2, "shard": True},
        loading={"shard": True},
        kills=3,
    )
    assert answer["killed"] == 3
    killed, whole = read(output), read(output + "-whole")
    assert killed["digests"] == whole["digests"]
    assert killed["loss"] == whole["loss"]

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
import torch
from families import save
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel

WORKER = Path(__file__).with_name("sharded_worker.py")
BRIDGE = {
    "steps": 4,
    "batch_size": 16,
    "micro_batch": 4,
    "lr": 3e-3,
    "random_classes": 5,
    "checkpoint_every": 2,
}

SMALL_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}


def run(world: int, output: Path, **settings: Any) -> list[dict[str, Any]]:
    """What each of `world` processes found."""
    settings = {
        "output": str(output),
        "what": ["features", "gradient", "evaluate", "bridge"],
        "blocks": [1],
        **settings,
    }
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "without_dropout"),  # whose draws are others on another number of processes
    [
        ("llama", ()),
        ("gpt2", ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
        ("bert", ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    ],
)
def test_two_processes_that_share_a_model_find_what_one_finds(
    family: str, without_dropout: tuple[str, ...], tmp_path: Path
) -> None:
    """Features to the bit, gradients, losses and accuracies to rounding; each process keeps half of the weights."""
    model = str(save(family, tmp_path / family, **dict.fromkeys(without_dropout, 0.0)))
    common = {"model": model, "evaluate": {"steps": 4, "batch_size": 16, "lrs": [1e-3, 3e-3]}}
    (one,) = run(1, tmp_path / "one", bridge=BRIDGE, run=str(tmp_path / "run-1"), **common)
    save_as = "full" if family == "llama" else "trained"
    two = run(2, tmp_path / "two", bridge={**BRIDGE, "save": save_as}, run=str(tmp_path / "run-2"), **common)
    if save_as == "full":
        weights = [load_file(tmp_path / r / "final/backbone/model.safetensors") for r in ("run-1", "run-2")]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)
    assert sum(process["held"] for process in two) == one["held"]
    assert max(process["held"] for process in two) < 0.55 * one["held"]
    for process in two:
        assert process["features"] == one["features"]
        assert process["stem_gradient"] == pytest.approx(one["stem_gradient"], rel=1e-4, abs=1e-7)
        assert process["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert process["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert process["verified"] == one["verified"] and "bit-identical" in one["verified"]
        assert process["evaluate"] == pytest.approx(one["evaluate"], rel=1e-4, nan_ok=True)
    assert two[0]["drift"] == pytest.approx(one["drift"], rel=1e-3, abs=1e-6, nan_ok=True)


@pytest.mark.slow
def test_a_shared_bridge_in_bfloat16(tmp_path: Path) -> None:
    """Autocast over float32 parts, as in one process: losses agree to bfloat16's rounding."""
    bridge = {**BRIDGE, "precision": "bfloat16"}
    settings = {"model": str(save("llama", tmp_path / "llama")), "what": ["bridge"], "bridge": bridge}
    (one,) = run(1, tmp_path / "one", **settings)
    for process in run(2, tmp_path / "two", **settings):
        assert process["loss"] == pytest.approx(one["loss"], rel=2e-2)
        assert "bit-identical" in process["verified"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from Linux's /proc")
def test_no_process_holds_the_whole_model(tmp_path: Path) -> None:
    """From the first byte read, own part and private memory together are less than the model.

    The own part is mapped from the file, so that private memory is what is gathered and computed beside it.
    """
    wide = {**SMALL_LLAMA, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24}
    LlamaModel(LlamaConfig(**wide)).save_pretrained(tmp_path / "wide")
    LlamaModel(LlamaConfig(**SMALL_LLAMA)).save_pretrained(tmp_path / "small")
    whole = (tmp_path / "wide" / "model.safetensors").stat().st_size
    for what, bar in (("features", 0.75), ("evaluate", 1.0), ("bridge", 1.0)):
        two = run(
            2,
            tmp_path / what,
            model=str(tmp_path / "wide"),
            first=str(tmp_path / "small"),
            what=[what],
            evaluate={"steps": 2, "batch_size": 16, "lrs": [1e-3]},
            bridge={**BRIDGE, "save": "trained"},
            run=str(tmp_path / "run"),
        )
        held = [1 / 2 + process["peak"] / whole for process in two]
        assert max(held) < bar, f"{what}: {held} of {whole / 2**20:.0f} MiB"


@pytest.mark.slow
def test_a_model_that_cannot_be_read_in_parts_is_refused(tmp_path: Path) -> None:
    model = str(save("gemma", tmp_path / "gemma"))
    with pytest.raises(
        AssertionError, match=r"NotAvailableError: '.*' cannot be read in parts: .*leave --shard away"
    ):
        run(2, tmp_path / "two", model=model)


@pytest.mark.slow
def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = save("llama", tmp_path / "llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        AssertionError, match=r"BrokenFileError: cannot load the weights in .*model.safetensors"
    ):
        run(2, tmp_path / "two", model=str(file.parent))


@pytest.mark.slow
def test_a_search_of_a_shared_model_gives_the_plan_of_one_process(tmp_path: Path) -> None:
    model = tmp_path / "llama"
    LlamaModel(LlamaConfig(**SMALL_LLAMA)).save_pretrained(model)
    arguments = (
        f"-m layerprobe freeze-search --model {model} --task digits --limit 120 --patch-size 4 --budget 4 --steps 6 "
        "--bridge-steps 2 --batch-size 16 --lrs 3e-3,1e-2 --seeds 2 --max-seeds 2 --no-scores"
    ).split()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher, more in (("one", [], ["--workers", "1"]), ("two", torchrun, ["--shard"])):
        command = [sys.executable, *launcher, *arguments, *more, "-o", str(tmp_path / name)]
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("one", "two"))
    assert two["recommended"] == one["recommended"]
    assert two["searched_plan"] == one["searched_plan"]
    found = [{row["arm"]: row["test_accuracy"] for row in result["baselines"]} for result in (one, two)]
    assert found[1] == pytest.approx(found[0], abs=0.02)

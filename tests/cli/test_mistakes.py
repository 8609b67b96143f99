"""Mistakes people make: each is one line on stderr, nothing on stdout, and exit code 1 or 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build, save
from PIL import Image

from layerprobe.backbones.layout import find_layout
from layerprobe.plans import FreezePlan, parameter_table


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


def assert_one_line(result, code: int, *words: str) -> None:
    __tracebackhide__ = True
    assert result.code == code, result.err
    assert result.out == ""
    *before, error = result.err.splitlines()
    assert error.startswith("error: "), result.err
    assert len(before) <= 1, result.err  # what will be done, said before anything is loaded
    assert not any(line.startswith(("error", "Traceback")) for line in before)
    for word in words:
        assert word in error


def test_unknown_model(run_cli: Callable) -> None:
    result = run_cli("features", "--model", "lama-7b", "--task", "digits")
    assert_one_line(result, 2, "unknown model 'lama-7b'", "Did you mean 'llama-7b'", "layerprobe ls models")


def test_unknown_task(run_cli: Callable, llama: Path) -> None:
    result = run_cli("features", "--model", llama, "--task", "cifar1OO")
    assert_one_line(result, 2, "unknown task 'cifar1OO'", "'cifar100'", "layerprobe ls tasks")


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_not_in_the_cache_while_offline(
    run_cli: Callable, hub_cache: Path, llama: Path, json_flag: list[str]
) -> None:
    result = run_cli("outliers", "--model", "llama-7b", *json_flag)
    assert_one_line(result, 1, "'llama-7b' (huggyllama/llama-7b) is not cached and offline mode is on")
    result = run_cli("features", "--model", llama, "--task", "cifar100", *json_flag)
    assert_one_line(result, 1, "cifar100", "offline")


def test_folder_without_weights(run_cli: Callable, tmp_path: Path, llama: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    for command in (["features", "--task", "digits"], ["outliers"]):
        assert_one_line(run_cli(*command, "--model", tmp_path), 1, str(tmp_path), "holds no weights")


@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
def test_broken_safetensors(run_cli: Callable, tmp_path: Path, llama: Path, damage: str) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1000] if damage == "truncated" else b"\xff" * 8 + data[8:])
    for command in (["features", "--task", "digits"], ["outliers"]):
        assert_one_line(run_cli(*command, "--model", folder), 1, "model")


def test_plan_for_another_model(run_cli: Callable, tmp_path: Path, llama: Path) -> None:
    model = build("llama", num_hidden_layers=5).base_model
    groups = find_layout(model, model.config).parameter_groups
    plan = FreezePlan.from_blocks(parameter_table(model), groups, [0], model_id="llama-7b", revision="r")
    plan.save(tmp_path / "plan.json")
    result = run_cli("bridge", "--model", llama, "--task", "digits", "--plan", tmp_path / "plan.json", "--steps", 1,
                     "--patch-size", 2, "-o", tmp_path / "run")  # fmt: skip
    assert_one_line(
        result, 2, "plan.json was made for 5 blocks (llama-7b); this model has 3", "freeze-search"
    )


def test_layer_that_does_not_exist(run_cli: Callable, llama: Path) -> None:
    result = run_cli("features", "--model", llama, "--task", "digits", "--blocks", "40")
    assert_one_line(result, 2, "block 40 does not exist", "has 3 blocks (0 to 2; -1 is the last)")
    result = run_cli("features", "--model", llama, "--task", "digits", "--sites", "mlp_ou")
    assert_one_line(result, 2, "unknown site 'mlp_ou'", "Did you mean 'mlp_out'")


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(path)


def test_image_folder_with_one_class(run_cli: Callable, tmp_path: Path, llama: Path) -> None:
    for index in range(12):
        picture(tmp_path / "cats" / f"{index}.png", index)
    result = run_cli("features", "--model", llama, "--task", tmp_path)
    assert_one_line(result, 2, "one class", "cats")


def test_image_folder_with_unreadable_images(run_cli: Callable, tmp_path: Path, llama: Path) -> None:
    for index in range(12):
        picture(tmp_path / "cats" / f"{index}.png", index)
        picture(tmp_path / "dogs" / f"{index}.png", 100 + index)
    (tmp_path / "dogs" / "3.png").write_bytes(b"\x89PNG no picture")
    result = run_cli("features", "--model", llama, "--task", tmp_path)
    assert_one_line(result, 1, "3.png")


def test_too_little_memory(run_cli: Callable, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERPROBE_MEMORY_LIMIT", "20000")
    dry = run_cli("features", "--model", llama, "--task", "digits", "--dry-run", "--json")
    assert dry.code == 0
    facts = json.loads(dry.out)
    assert facts["dry_run"] is True
    assert facts["fits"] == "no"
    result = run_cli("features", "--model", llama, "--task", "digits")
    assert_one_line(result, 1, "GiB for its weights in float32", "try --dtype bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test wants missing")
def test_no_gpu_where_one_was_asked_for(run_cli: Callable, llama: Path) -> None:
    result = run_cli("features", "--model", llama, "--task", "digits", "--device", "cuda")
    assert_one_line(result, 1, "device 'cuda' was asked for", "use --device cpu")


def test_output_folder_that_cannot_be_written(run_cli: Callable, tmp_path: Path, llama: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run_cli("features", "--model", llama, "--task", "digits", "-o", tmp_path / "file")
    assert_one_line(result, 2, "is a file")
    result = run_cli("features", "--model", llama, "--task", "digits", "-o", "/proc/no/such/place")
    assert_one_line(result, 2, "is not writable")


def test_bad_usage_is_exit_code_two(run_cli: Callable) -> None:
    assert run_cli("features", "--modle", "gpt2").code == 2
    assert run_cli("no-such-command").code == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …"
        ),
    ],
)
def test_memory_that_cannot_be_had(
    run_cli: Callable, llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import layerprobe.analyzers.features as module

    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr(module, "extract_features", fail)
    result = run_cli("features", "--model", llama, "--task", "digits")
    assert_one_line(result, 1, "not enough memory", "--batch-size")


def test_a_bug_keeps_its_traceback(run_cli: Callable, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import layerprobe.analyzers.features as module

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "extract_features", broken)
    monkeypatch.setattr(sys, "argv", ["layerprobe", "features", "--model", str(llama), "--task", "digits"])
    from layerprobe.cli.main import main

    with pytest.raises(ZeroDivisionError, match="a bug"):
        main()


def test_ctrl_c_keeps_finished_work(llama: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of features: exit code 130, and the next call continues where this one stopped."""
    command = [sys.executable, "-m", "layerprobe", "features", "--model", str(llama), "--task", "digits",
               "--patch-size", "2", "--batch-size", "1", "--split", "train", "--cache-dir", str(tmp_path)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/*.npy.part")):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.002)
    time.sleep(0.2)  # some rows are there, and most are not
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert err.strip().endswith("interrupted; finished work is kept")
    (found,) = tmp_path.glob("*/progress.json")
    rows = json.loads(found.read_text())["rows"]
    assert rows >= 1
    first = np.lib.format.open_memmap(found.parent / "embed.npy.part", mode="r")[:rows].copy()
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    assert np.array_equal(np.load(found.parent / "embed.npy")[:rows], first)

"""SIGTERM, as Slurm and Kubernetes send it, is as good as Ctrl-C: what can be saved is saved; exit code 143."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from families import save


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "layerprobe", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def stop_when(
    folder: Path, pattern: str, child: subprocess.Popen[str], number: int, after: float = 0.0
) -> tuple[int, str]:
    """Send a signal `after` seconds from when a file is there; exit code and what was said. It has thirty seconds."""
    while not list(folder.glob(pattern)):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.005)
    time.sleep(after)
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    return child.returncode, said


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_bridge_saves_and_continues(llama: Path, tmp_path: Path, number: int, code: int, word: str) -> None:
    arguments = ("bridge", "--model", llama, "--task", "digits", "--limit", 60, "--patch-size", 4, "--steps", 400,
                 "--batch-size", 8, "--checkpoint-every", 5)  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    found, said = stop_when(stopped, "layerprobe_run.json", start(*arguments, "-o", stopped), number)
    told = f"{word}; finished work is kept in {stopped}; the same command continues there"
    assert found == code and said.strip().endswith(told)
    assert not (stopped / ".layerprobe.lock").exists()
    again = start(*arguments, "-o", stopped)
    undisturbed = start(*arguments, "-o", whole)
    assert again.wait(120) == 0 and undisturbed.wait(120) == 0
    for name in ("backbone/model.safetensors", "stem.safetensors", "head.safetensors"):
        assert (stopped / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()
    assert sorted(p.name for p in stopped.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_features_stop_and_continue(llama: Path, tmp_path: Path) -> None:
    arguments = ("features", "--model", llama, "--task", "digits", "--patch-size", 2, "--batch-size", 1,
                 "--split", "train", "--cache-dir", tmp_path)  # fmt: skip
    code, said = stop_when(tmp_path, "*/*.npy.part", start(*arguments), signal.SIGTERM, after=0.2)
    assert code == 143 and said.strip().endswith("terminated; finished work is kept")
    (progress,) = tmp_path.glob("*/progress.json")
    assert json.loads(progress.read_text())["rows"] >= 1
    assert start(*arguments).wait(120) == 0


@pytest.mark.slow
def test_a_search_ends_with_its_helpers(llama: Path, tmp_path: Path) -> None:
    """Also where the search itself is killed: no helper outlives it by more than fifteen seconds."""
    arguments = ("freeze-search", "--model", llama, "--task", "digits", "--limit", 60, "--patch-size", 4,
                 "--budget", 30, "--bridge-steps", 30, "--steps", 60, "--no-scores",
                 "--workers", 2)  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGKILL):
        child = start(*arguments, "-o", tmp_path / str(number))
        while not (helpers := _children(child.pid)):
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.02)
        time.sleep(3)
        child.send_signal(number)
        child.communicate(timeout=30)
        assert child.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
        deadline = time.monotonic() + 15
        while any(map(_lives, helpers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(_lives, helpers))


def _children(parent: int) -> list[int]:
    """Processes that a process started to train, multiprocessing's own aside."""
    found = []
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(int(pid))
    return found


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_while_commands_are_imported(run_cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layerprobe.cli.main._register", stop)
    result = run_cli("env")
    assert (result.code, result.err) == (130, "interrupted; finished work is kept\n")

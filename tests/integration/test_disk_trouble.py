"""Real disks that are full or read-only, and a real clock that jumps: one line, and the same command goes on after."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import save

TASK = ("--task", "digits", "--limit", "60", "--patch-size", "4", "--quiet")
COMMANDS = {
    "features": ("features", "--cache-dir", "{}/store"),
    "bridge": ("bridge", "--steps", "3", "--batch-size", "8", "--checkpoint-every", "1", "-o", "{}/run"),
    "evaluate": ("evaluate", "--steps", "2", "--batch-size", "8", "--seeds", "1", "--lrs", "1e-3", "-o", "{}/run"),
    "freeze-search": ("freeze-search", "--budget", "5", "--bridge-steps", "1", "--steps", "1",
                      "--batch-size", "8", "--seeds", "2", "--no-scores", "-o", "{}/run"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory, of 16 KiB; only the superuser may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "layerprobe-test", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def layerprobe(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "layerprobe", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], words: tuple[str, ...]) -> None:
    assert done.returncode not in (0, 130, 143) and done.returncode > 0, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and any(word in last.lower() for word in words), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_is_full_and_then_read_only(command: str, model: Path, small_disk: Path) -> None:
    arguments = [word.format(small_disk) for word in COMMANDS[command]] + ["--model", str(model), *TASK]
    assert_one_line(layerprobe(*arguments), ("disk is full", "no space"))
    remount(small_disk, "size=100m,ro")
    assert_one_line(layerprobe(*arguments), ("read-only", "readonly", "cannot write", "cannot be written"))
    remount(small_disk, "size=100m,rw")
    done = layerprobe(*arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("speed", ["-2d", "+2d"])
def test_a_search_under_a_clock_that_is_elsewhere(speed: str, model: Path, tmp_path: Path) -> None:
    """Begun today, continued two days ago or ahead."""
    library = ctypes.util.find_library("faketime") or next(
        (str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None
    )
    if library is None:
        pytest.skip("needs libfaketime")
    arguments = [word.format(tmp_path) for word in COMMANDS["freeze-search"]]
    arguments += ["--model", str(model), *TASK, "--workers", "2"]
    done = layerprobe(*arguments, LD_PRELOAD=library, FAKETIME=speed, DONT_FAKE_MONOTONIC="1")
    assert done.returncode == 0, done.stderr
    again = layerprobe(*arguments)
    assert again.returncode == 0, again.stderr

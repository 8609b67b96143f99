"""A bridge that is killed, or meets a full disk, at every write, rename and sync: resumed, it ends as a whole one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from faults import KILLED, run_with_fault

from layerprobe.errors import UsageError
from layerprobe.files import write_text
from layerprobe.locks import LOCK_FILE, folder_lock
from layerprobe.training import BridgeConfig, bridge_train

SHORT = BridgeConfig(steps=3, batch_size=16, lr=3e-3, random_classes=4, checkpoint_every=1)
TIMES = "images_per_second"


@pytest.fixture
def train(make_backbone, task):
    """Train into a folder, or continue there; figures are stood for by a file."""

    def run(folder: Path) -> None:
        bridge_train(
            make_backbone(),
            task,
            config=SHORT,
            output=folder,
            finish=lambda run: write_text(folder / "curve.png", run.summary().partition(" Model:")[0]),
        )

    return run


def contents(folder: Path) -> dict[str, object]:
    """Every file below `folder`, without what tells times and folders."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in ("bridge.csv", "history.csv"):
            frame = pd.read_csv(path)
            frame = frame[frame["metric"] != TIMES] if "metric" in frame else frame.drop(columns=TIMES)
            found[name] = frame.to_csv(index=False)
        else:
            found[name] = None if name == "bridge.json" else path.read_bytes()
    return found


def check_resumed(train, expected: dict[str, object], root: Path, at: int, action: str) -> int:
    """Meet the fault, resume, compare; the exit code of the first part."""
    root.mkdir()
    code = run_with_fault(lambda: train(root), root, at, action)
    if code:
        try:
            train(root)
        except UsageError as error:
            assert "holds a finished run" in str(error)
    assert contents(root) == expected
    shutil.rmtree(root)
    return code


@pytest.fixture
def undisturbed(train, tmp_path):
    train(tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("action", ["kill", "loss", "full"])
def test_a_fault_in_the_last_operations(train, undisturbed, tmp_path, action):
    """Between the last step and the word that the run is finished."""
    assert "curve.png" in undisturbed and not any(LOCK_FILE in name for name in undisturbed)
    last = count_operations(train, tmp_path / "count")
    for at in (last, last - 3, last - 9, last - 15, last - 21):
        assert check_resumed(train, undisturbed, tmp_path / "run", at, action) != 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("action", ["kill", "loss"])
def test_a_fault_at_every_operation(train, undisturbed, tmp_path, action):
    at = 1
    while check_resumed(train, undisturbed, tmp_path / "run", at, action):
        at += 1
    assert at > 60


def count_operations(train, root: Path) -> int:
    """How many operations an undisturbed run takes."""
    root.mkdir()
    low, high = 1, 512
    while low < high:  # the first number at which nothing is met any more
        shutil.rmtree(root)
        root.mkdir()
        middle = (low + high) // 2
        low, high = (
            (middle + 1, high)
            if run_with_fault(lambda: train(root), root, middle) == KILLED
            else (low, middle)
        )
    shutil.rmtree(root)
    return low - 1


HOLD = """
import sys, time
from pathlib import Path
from layerprobe.locks import folder_lock
with folder_lock(Path(sys.argv[1]), "layerprobe bridge"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_and_one_folder(train, tmp_path):
    """The second says who works there; a dead process holds nothing."""
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=rf"run is in use by layerprobe bridge, process {first.pid} on "):
        train(folder)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    train(folder)
    assert not (folder / LOCK_FILE).exists()
    with folder_lock(folder, "layerprobe evaluate"), folder_lock(folder, "layerprobe bridge"):
        pass  # a function that is called within


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "other")
    with pytest.raises(Exception, match="cannot write"), folder_lock(tmp_path / "run", "x"):
        pass
    assert (tmp_path / "other").read_text() == "precious"

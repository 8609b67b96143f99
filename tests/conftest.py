"""Shared fixtures: where real data and weights lie, if anywhere, and a quiet, offline environment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

# Tests prove that nothing needs the network, and one thread keeps small models fast and reproducible.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C switched off, which children inherit; the tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images and trained weights; skips where it is absent."""
    folder = Path(os.environ.get("LAYERPROBE_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"needs real data and weights in {folder} (or $LAYERPROBE_SHARED)")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's layerprobe cache."""
    monkeypatch.setenv("LAYERPROBE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face hub cache, in this process and its children, with the network switched off.

    Fill it with `hub_cache.put_model` and `hub_cache.put_dataset` (tests/hub_cache.py).
    """
    import datasets
    import huggingface_hub.constants

    home = tmp_path / "huggingface"
    hub = home / "hub"
    hub.mkdir(parents=True)
    for variable, value in {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(hub),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(variable, value)
    # Both libraries read the environment when they are imported, which may have happened already.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return hub


class CommandResult(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_cli(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., CommandResult]:
    """Run `layerprobe ...` in this process, as the console script does, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)  # where commands without -o make runs/

    def run(*arguments: object) -> CommandResult:
        from layerprobe.cli.main import main

        monkeypatch.setattr(sys, "argv", ["layerprobe", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as leave:
            main()
        code = leave.value.code
        out, err = capfd.readouterr()
        return CommandResult(code if isinstance(code, int) else int(code is not None), out, err)

    return run

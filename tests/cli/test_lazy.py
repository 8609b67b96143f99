"""What a command loads before its first line of work: nothing that it needs only later, or never."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("optuna", "captum", "seaborn", "matplotlib", "datasets", "peft", "sqlalchemy")

# Runs a command up to the first call of a function, and prints what was loaded by then.
UNTIL = """
import importlib, os, sys
module, name = sys.argv[1].split(":")
heavy, sys.argv = sys.argv[2].split(","), ["layerprobe", *sys.argv[3:]]

def stop(*arguments, **options):
    print(*[one for one in heavy if one in sys.modules], flush=True)
    os._exit(0)

class Finder:
    def find_spec(self, wanted, path=None, target=None):
        if wanted != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(wanted)
        run = spec.loader.exec_module
        def execute(made):
            run(made)
            setattr(made, name, stop)
        spec.loader.exec_module = execute
        return spec

import importlib.util
sys.meta_path.insert(0, Finder())
from layerprobe.cli.main import main
main()
"""


def loaded(until: str, *command: str, also: tuple[str, ...] = ()) -> list[str]:
    names = ",".join((*HEAVY, *also))
    done = subprocess.run(
        [sys.executable, "-c", UNTIL, until, names, *command], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    "command", ["features", "probe", "cka", "transfer", "attribute", "bridge", "evaluate"]
)
def test_images_are_read_before_figures_searches_and_peers_are_loaded(command: str) -> None:
    until = "layerprobe.tasks.load:load_task"
    assert loaded(until, command, "--model", "minilm", "--task", "digits") == []


def test_outliers_reads_weights_before_torch_and_tables_are_loaded(tmp_path: object) -> None:
    until = "layerprobe.analyzers.outlier_scan:open_model"
    assert loaded(until, "outliers", "--model", str(tmp_path), also=("torch", "pandas", "transformers")) == []


TELL = """
import sys
from pathlib import Path
from layerprobe.cli.main import main
sys.argv = ["layerprobe", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print(end.code, *[name for name in ("torch", "transformers", "datasets", "pandas") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["features", "lama-7b", "--task", "digits"], "unknown model 'lama-7b'"),
        (["probe", "minilm", "--task", "cifar1OO"], "unknown task 'cifar1OO'"),
        (["cka", "minilm", "--task", "cifar100"], "not cached and offline mode is on"),
        (["transfer", "gpt2", "--task", "digits"], "not cached and offline mode is on"),
        (
            ["freeze-search", "minilm", "--task", "no/such", "-o", "{run}"],
            "not cached and offline mode is on",
        ),
        (["bridge", "{broken}", "--task", "digits", "-o", "{run}"], "its header claims"),
        (["evaluate", "minilm", "--task", "digits", "--arms", "nothing"], "unknown arm 'nothing'"),
        (["evaluate", "minilm", "--task", "digits", "--plan", "{run}/plan.json"], "there is no plan"),
        (["features", "minilm", "--task", "digits", "--blocks", "40"], "block 40 does not exist"),
        (["probe", "minilm", "--task", "digits", "--C", "0"], "C values are positive"),
    ],
)
def test_mistakes_are_told_before_torch_is_loaded(tmp_path: Path, command: list[str], told: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    (broken / "model.safetensors").write_bytes(b"\xff" * 64)
    empty = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    words = [word.format(broken=broken, run=tmp_path / "run") for word in command]
    done = subprocess.run(
        [sys.executable, "-c", TELL, *words],
        capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, **empty},
    )  # fmt: skip
    assert told in done.stderr
    assert done.stdout.split() in (["1"], ["2"])

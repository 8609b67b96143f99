"""What a command loads before its first line of work: nothing that it needs only later, or never."""

from __future__ import annotations

import subprocess
import sys

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

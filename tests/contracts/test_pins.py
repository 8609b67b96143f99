"""What users rely on, recorded: public names, options, JSON keys, table columns, run folders, numbers.

    python tests/contracts/test_pins.py     # record anew, after a change that is meant

A name or option may be added, and an old spelling may become a hidden one; none may vanish unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PINS = Path(__file__).with_name("pins.json")

SMALL = ["--task", "digits", "--limit", "60", "--patch-size", "4", "--device", "cpu", "--offline", "-q"]
TRAIN = ["--batch-size", "16"]
COMMANDS: dict[str, list[str]] = {
    "outliers": ["outliers", "--model", "MODEL", "-q"],
    "compare": ["compare", "MODEL", "OTHER", "-q"],
    "features": ["features", "--model", "MODEL", *SMALL],
    "cka": ["cka", "--model", "MODEL", "--model-b", "OTHER", *SMALL],
    "probe": ["probe", "--model", "MODEL", *SMALL],
    "transfer": ["transfer", "--model", "MODEL", *SMALL, "--batch-size", "8"],
    "attribute": ["attribute", "--model", "MODEL", *SMALL],
    "bridge": ["bridge", "--model", "MODEL", *SMALL, *TRAIN, "--steps", "4", "-o", "OUT/bridge"],
    "evaluate": [
        "evaluate", "--model", "MODEL", *SMALL, *TRAIN, "--steps", "3", "--lrs", "1e-3", "--seeds", "2",
        "--arms", "language,random", "-o", "OUT/evaluate",
    ],
    "freeze-search": [
        "freeze-search", "--model", "MODEL", *SMALL, "--budget", "5", "--bridge-steps", "1", "--steps",
        "2", "--batch-size", "8", "--lrs", "1e-3,3e-3", "--seeds", "2", "-o", "OUT/search",
    ],
    "plan show": ["plan", "show", "OUT/search/plan.json"],
    "plan check": ["plan", "check", "OUT/search/plan.json", "--model", "MODEL"],
    "ls models": ["ls", "models"],
    "ls tasks": ["ls", "tasks"],
    "env": ["env"],
}  # fmt: skip
TRAINED = {"bridge", "evaluate", "freeze-search"}
"""Their values differ between processors; what they are called does not."""
UNPINNED_METRICS = {"train_seconds"}


def public_names() -> dict[str, Any]:
    import layerprobe
    from layerprobe import metrics

    names: dict[str, Any] = {"layerprobe": sorted(layerprobe.__all__), "metrics": sorted(metrics.__all__)}
    plotting = REPOSITORY / "layerprobe" / "plotting"
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(plotting.glob("*.py")))
    names["plotting"] = sorted(
        line.split("(")[0].removeprefix("def ") for line in text.splitlines() if line.startswith("def plot_")
    )
    for name in layerprobe.__all__:
        value = getattr(layerprobe, name)
        if inspect.isfunction(value):
            names[f"layerprobe.{name}"] = sorted(inspect.signature(value).parameters)
        elif inspect.isclass(value):
            names[f"layerprobe.{name}"] = sorted(attr for attr in dir(value) if not attr.startswith("_"))
    for name in metrics.__all__:
        value = getattr(metrics, name)
        if inspect.isfunction(value):
            names[f"metrics.{name}"] = sorted(inspect.signature(value).parameters)
    return names


def command_options() -> dict[str, list[str]]:
    import click
    import typer.main

    from layerprobe.cli import main

    found: dict[str, list[str]] = {}

    def walk(command: Any, name: str) -> None:
        if hasattr(command, "commands"):
            context = click.Context(command)
            for child in command.list_commands(context):
                walk(command.get_command(context, child), f"{name} {child}".strip())
            return
        found[name] = sorted(
            option
            for p in command.params
            for option in [*p.opts, *p.secondary_opts]
            if option.startswith("-")
        )

    main._register()
    walk(typer.main.get_command(main.app), "")
    return found


def study_tables() -> dict[str, str]:
    tables = sorted((REPOSITORY / "results").glob("*/quick/table.csv"))
    return {
        path.relative_to(REPOSITORY).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tables
    }


def make_models(folder: Path) -> dict[str, str]:
    import torch
    from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    llama = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    gpt2 = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=40, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaModel(llama).save_pretrained(folder / "llama")
        GPT2Model(gpt2).save_pretrained(folder / "gpt2")
    return {"MODEL": str(folder / "llama"), "OTHER": str(folder / "gpt2"), "OUT": str(folder)}


def run_command(arguments: list[str]) -> dict[str, Any]:
    from layerprobe.cli.main import main

    out = io.StringIO()
    before = sys.argv
    sys.argv = ["layerprobe", *arguments, "--json"]
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main()
    finally:
        sys.argv = before
    body: dict[str, Any] = json.loads(out.getvalue())
    return body


def summarize(name: str, body: dict[str, Any]) -> dict[str, Any]:
    rows = body.get("rows", [])
    pin: dict[str, Any] = {
        "keys": sorted(body),
        "schema": body.get("schema"),
        "provenance": sorted(body.get("provenance", {})),
        "columns": sorted({key for row in rows for key in row}),
        "metrics": sorted({str(row["metric"]) for row in rows if "metric" in row}),
    }
    if name not in TRAINED:
        values = [
            (row["metric"], row.get("value"), row.get("stderr"))
            for row in rows
            if "metric" in row and row["metric"] not in UNPINNED_METRICS
        ]
        pin["values"] = sorted(
            ([m, *(None if v is None else float(f"{v:.6g}") for v in vs)] for m, *vs in values),
            key=lambda row: (row[0], *(math.inf if v is None else v for v in row[1:])),
        )
    return pin


def run_folders(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for run in ("bridge", "evaluate", "search"):
        for path in sorted((folder / run).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if (
                not path.is_file()
                or "checkpoint" in name
                or path.name.startswith(".")
                or "-wal" in name
                or "-shm" in name
            ):
                continue
            if path.suffix == ".csv":
                found[name] = path.read_text(encoding="utf-8").splitlines()[0].split(",")
            elif path.suffix == ".json":
                body = json.loads(path.read_text(encoding="utf-8"))
                found[name] = sorted(body) if isinstance(body, dict) else type(body).__name__
            else:
                found[name] = None
    return found


def collect(folder: Path) -> dict[str, Any]:
    words = make_models(folder)
    pins: dict[str, Any] = {
        "names": public_names(), "options": command_options(), "studies": study_tables(), "json": {}
    }  # fmt: skip
    for name, arguments in COMMANDS.items():
        filled = [word.replace("OUT/", words["OUT"] + "/") for word in (words.get(a, a) for a in arguments)]
        pins["json"][name] = summarize(name, run_command(filled))
    pins["folders"] = run_folders(folder)
    return pins


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return collect(tmp_path_factory.mktemp("pins"))


@pytest.fixture(scope="module")
def pinned() -> dict[str, Any]:
    pins: dict[str, Any] = json.loads(PINS.read_text(encoding="utf-8"))
    return pins


@pytest.mark.parametrize("part", ["names", "options"])
def test_no_public_name_or_option_has_vanished(now, pinned, part):
    missing = {
        name: sorted(set(known) - set(now[part].get(name, []))) for name, known in pinned[part].items()
    }
    assert {name: gone for name, gone in missing.items() if gone} == {}


def test_the_quick_tables_of_the_studies_are_those_recorded(now, pinned):
    assert now["studies"] == pinned["studies"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_the_recorded_object(now, pinned, name):
    new, old = now["json"][name], pinned["json"][name]
    assert {key: new[key] for key in new if key != "values"} == {k: old[k] for k in old if k != "values"}
    assert len(new.get("values", [])) == len(old.get("values", []))
    for row, expected in zip(new.get("values", []), old.get("values", []), strict=True):
        assert row[0] == expected[0]
        assert row[1:] == [v if v is None else pytest.approx(v, rel=2e-3, abs=2e-5) for v in expected[1:]]


def test_run_folders_hold_the_recorded_files_and_columns(now, pinned):
    assert now["folders"] == pinned["folders"]


def test_a_lost_option_would_be_noticed(now, pinned):
    options = {**now["options"], "cka": [o for o in now["options"]["cka"] if o != "--limit"]}
    with pytest.raises(AssertionError, match="--limit"):
        test_no_public_name_or_option_has_vanished({**now, "options": options}, pinned, "options")


if __name__ == "__main__":
    import tempfile

    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LAYERPROBE_CACHE"] = str(Path(scratch) / "cache")
        recorded = collect(Path(scratch))
    PINS.write_text(json.dumps(recorded) + "\n", encoding="utf-8")

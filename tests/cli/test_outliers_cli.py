"""The commands `outliers` and `compare` as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "layerprobe", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, df in (("heavy", 4), ("light", 60)):
        rng = np.random.default_rng(df)
        (folder / name).mkdir()
        weights = {
            f"model.layers.{i}.{part}.weight": torch.from_numpy(rng.standard_t(df, (40, 40))).bfloat16()
            for i in range(4)
            for part in ("self_attn.q_proj", "mlp.up_proj")
        }
        save_file(weights, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    return folder


def test_outliers_prints_a_table_and_the_answer(models: Path) -> None:
    done = run("outliers", "--model", str(models / "heavy"))
    assert done.returncode == 0, done.stderr
    answer, _, *lines = done.stdout.splitlines()
    assert "a Gaussian has 0.27 %" in answer
    assert lines[0].split()[:2] == ["block", "weights"]
    assert [line.split()[0] for line in lines[1:5]] == ["0", "1", "2", "3"]
    assert all(len(line) <= 80 for line in lines[:6])


def test_json_is_strict_and_alone_on_stdout(models: Path) -> None:
    done = run("outliers", "--model", str(models / "heavy"), "--json", "--sigmas", "2.5")
    body = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert body["schema"] == "layerprobe.outliers/v1"
    assert set(body) == {"schema", "provenance", "rows", "summary", "table"}
    model = [
        row for row in body["rows"] if row["level"] == "model" and row["metric"] == "outlier_ratio_2.5sigma"
    ]
    assert len(model) == 1
    assert model[0]["n"] == 8 * 1600
    assert all(row["value"] is not None or row["reason"] for row in body["rows"])


def test_a_folder_gets_tables_and_figures(models: Path, tmp_path: Path) -> None:
    done = run("outliers", "--model", str(models / "heavy"), "-o", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "outliers.csv",
        "outliers.json",
        "outlier_depth.png",
        "outlier_heatmap.png",
        "outlier_tails.png",
        "settings.yaml",
    }


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_one_file_in_the_form_of_its_ending(ending: str, models: Path, tmp_path: Path) -> None:
    target = tmp_path / f"table.{ending}"
    done = run("outliers", "--model", str(models / "light"), "-o", str(target))
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size > 1000
    assert "saved" in done.stderr


def test_dry_run_reads_headers_alone(models: Path) -> None:
    done = run("outliers", "--model", str(models / "heavy"), "--dry-run", "--json")
    body = json.loads(done.stdout)
    assert (body["tensors"], body["bytes"], body["dry_run"]) == (8, 8 * 3200, True)


def test_compare_answers_in_a_sentence(models: Path, tmp_path: Path) -> None:
    done = run("compare", "heavy", "light", "-o", str(tmp_path), cwd=models)
    assert done.returncode == 0, done.stderr
    assert "heavy and light differ" in done.stdout
    assert (tmp_path / "compare.png").stat().st_size > 5000
    body = json.loads((tmp_path / "compare.json").read_text())
    assert body["schema"] == "layerprobe.compare/v1"


def test_groups_from_the_command_line(models: Path) -> None:
    done = run("compare", "--group", "a=heavy", "--group", "b=light", "--json", cwd=models)
    rows = json.loads(done.stdout)["rows"]
    main = next(
        row for row in rows if row["level"] == "group" and row["part"] == "all" and row["depth"] == "all"
    )
    assert main["pvalue"] == 1.0
    assert "no interval" in main["reason"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["outliers", "--model", "nowhere/at/all"], 2, "nowhere/at/all"),
        (["outliers", "--model", "heavy", "--sigmas", "3;6"], 2, "--sigmas takes comma-separated numbers"),
        (["outliers", "--model", "heavy", "--engine", "cuda"], 2, "unknown engine 'cuda'"),
        (["outliers", "--model", "heavy", "--include", "x"], 2, "names look like"),
        (["compare", "heavy"], 2, "at least two different models"),
        (["compare", "--group", "a", "--group", "b=light"], 2, "NAME=MODEL"),
        (["compare", "--group", "a=heavy", "--group", "a=light"], 2, "names 'a' twice"),
        (["outliers", "--model", "llama-7b", "--offline"], 1, "not cached"),
    ],
)
def test_errors_are_one_line_with_the_right_code(
    arguments: list[str], code: int, message: str, models: Path, tmp_path: Path
) -> None:
    done = run(*arguments, cwd=models, HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == code
    *before, error = done.stderr.splitlines()
    assert message in error and len(before) <= 1
    assert done.stdout == ""


def test_the_users_own_line_works_from_the_hub_cache(models: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--huggyllama--llama-7b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "blobs").mkdir()
    for file in (models / "heavy").iterdir():
        blob = repository / "blobs" / file.name
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    done = run("outliers", "--model", "llama-7b", HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "llama-7b: " in done.stdout


def test_the_command_needs_no_torch_when_numba_counts(models: Path) -> None:
    pytest.importorskip("numba", reason="the extra [fast] is not installed")
    code = (
        "import sys; from layerprobe.analyzers.outliers import outlier_report as r; "
        f"r({str(models / 'heavy')!r}, engine='numba').table(); "
        "sys.exit(', '.join(m for m in ('torch', 'transformers', 'pandas') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_of_which_nothing_is_measured_is_answered_with_files_too(tmp_path: Path) -> None:
    torch.save({"layers.0.mlp.up_proj.weight": torch.ones(3, 3, dtype=torch.bool)}, tmp_path / "codes.bin")
    done = run("outliers", "--model", str(tmp_path / "codes.bin"), "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "no weight could be measured" in done.stdout
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["outliers.csv", "outliers.json", "settings.yaml"]

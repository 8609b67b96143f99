"""`layerprobe probe` from the outside: strict JSON, files, dry run, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from transformers import ViTConfig, ViTModel
from typer.testing import CliRunner, Result

from layerprobe.cli.main import Program
from layerprobe.cli.probe import probe

program = typer.Typer(cls=Program)
program.command("probe")(probe)
program.command("other")(lambda: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    ViTModel(config).save_pretrained(folder)
    return folder


def run(model: Path, *arguments: str) -> Result:
    common = ["probe", "--model", str(model), "--task", "digits", "--device", "cpu", "--limit", "200"]
    return CliRunner().invoke(program, [*common, *arguments])


def test_json_and_files(model: Path, tmp_path: Path) -> None:
    result = run(model, "--json", "--C", "1e-3,1e-1", "--extras", "knn,few-shot", "-o", str(tmp_path / "run"))
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout, parse_constant=pytest.fail)
    assert printed["schema"] == "layerprobe.probe/v1"
    tested = [r for r in printed["rows"] if r["metric"] == "probe_accuracy" and r["split"] == "test"]
    assert [r["block"] for r in tested if r["control"] is None] == [None, 0, 1]
    assert {r["control"] for r in tested} == {None, "chance", "pixels", "random"}
    assert {r["C"] for r in tested} <= {None, 1e-3, 1e-1}
    assert printed["provenance"]["arguments"]["Cs"] == [1e-3, 1e-1]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    figures = {"probe.png", "probe_strength.png", "probe_few_shot.png"}
    assert names == {"probe.csv", "probe.json", "settings.yaml", *figures}


def test_blocks_and_controls_can_be_left_out(model: Path) -> None:
    result = run(model, "--controls", "none", "--blocks", "-1", "--C", "0.01", "-q")
    assert result.exit_code == 0, result.stderr
    assert "block.1.resid_post" in result.stdout
    assert "block.0" not in result.stdout
    assert "chance" in result.stdout
    assert result.stderr == ""


def test_dry_run_computes_nothing(model: Path, tmp_path: Path) -> None:
    result = run(model, "--dry-run", "--json", "-o", str(tmp_path / "run"))
    facts = json.loads(result.stdout)
    assert facts["dry_run"] is True
    assert facts["controls"] == "chance, pixels, random, labels"
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--controls", "pixel"], "unknown control 'pixel'. Did you mean 'pixels'?"),
        (["--extras", "mdlx"], "unknown extra 'mdlx'. Did you mean 'mdl'?"),
        (["--C", "big"], "--C takes numbers such as"),
        (["--C", "-1"], "C values are positive numbers"),
        (["--refit", "test"], "unknown refit 'test'. Choose from: train+validation, train"),
        (["--blocks", "7"], "block 7 does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(model: Path, arguments: list[str], message: str) -> None:
    result = run(model, *arguments)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert result.stdout == ""

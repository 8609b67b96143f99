"""`layerprobe transfer` and `layerprobe attribute` from the outside: strict JSON, files, dry run, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner, Result

from layerprobe.cli.attribute import attribute
from layerprobe.cli.main import Program
from layerprobe.cli.transfer import transfer

program = typer.Typer(cls=Program)
program.command("transfer")(transfer)
program.command("attribute")(attribute)


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
        num_labels=10,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def run(command: str, model: Path, *arguments: str) -> Result:
    common = [command, "--model", str(model), "--task", "digits", "--device", "cpu", "--limit", "150"]
    return CliRunner().invoke(program, [*common, *arguments])


def test_transfer_prints_json_and_saves_one_table_and_one_figure(model: Path, tmp_path: Path) -> None:
    result = run(
        "transfer", model, "--json", "--replicates", "3", "--batch-size", "8", "-o", str(tmp_path / "run")
    )
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout, parse_constant=pytest.fail)
    assert printed["schema"] == "layerprobe.transfer/v1"
    assert {row["family"] for row in printed["rows"]} == {"readable", "trainable"}
    assert len(printed["rows"]) == 3 * 7 + 2 * 4
    assert all((row["value"] is None) == (row["reason"] is not None) for row in printed["rows"])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "settings.yaml",
        "transfer.csv",
        "transfer.json",
        "transfer.png",
    }


def test_transfer_prints_one_row_a_layer(model: Path) -> None:
    result = run("transfer", model, "--family", "readable", "--no-knn", "--replicates", "0", "-q")
    assert result.exit_code == 0, result.stderr
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[3:6]] == [
        "embed",
        "block 0",
        "block 1",
    ]
    assert "rgn" not in result.stdout and "knn" not in result.stdout


def test_attribute_prints_json_and_saves_maps(model: Path, tmp_path: Path) -> None:
    result = run(
        "attribute", model, "--json", "--head", "own", "--images", "8", "--maps", "2", "--max-steps", "2048",
        "-o", str(tmp_path / "run"),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout, parse_constant=pytest.fail)
    assert printed["schema"] == "layerprobe.attribute/v1"
    assert printed["provenance"]["prediction"]["head"] == "own"
    errors = [row["value"] for row in printed["rows"] if row["metric"] == "attribution_completeness_error"]
    assert len(errors) == 3 and max(errors) <= 0.02
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "attribute.csv", "attribute.json", "attribution.png", "attribution_maps.csv", "attribution_maps.png",
        "settings.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("command", ["transfer", "attribute"])
def test_dry_runs_say_what_it_takes(command: str, model: Path) -> None:
    result = run(command, model, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["dry_run"] is True and printed["blocks"] == 2


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("transfer", ["--family", "readible"], "unknown family 'readible'"),
        ("transfer", ["--head", "mine"], "unknown head 'mine'"),
        ("attribute", ["--methods", "deeplift"], "'deeplift' is not valid for transformer blocks"),
        ("attribute", ["--methods", "skipp"], "unknown attribution method 'skipp'"),
        ("attribute", ["--split", "dev"], "unknown split 'dev'"),
        ("attribute", ["--tolerance", "0"], "a tolerance between 0 and 1"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(
    command: str, arguments: list[str], message: str, model: Path
) -> None:
    result = run(command, model, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""

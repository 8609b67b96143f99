"""`layerprobe plan show|check|export` on real files: what they print, what they refuse, and how they leave."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
import typer
import yaml
from typer.testing import CliRunner, Result

from layerprobe.cli.main import Program
from layerprobe.cli.plan import app
from layerprobe.plans import FreezePlan, parameter_table

program = typer.Typer(cls=Program)
program.add_typer(app, name="plan")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(program, ["plan", *map(str, arguments)])


def llama(n_blocks: int, folder: Path) -> transformers.LlamaModel:
    configuration = transformers.LlamaConfig(
        num_hidden_layers=n_blocks,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=24,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(configuration)
    model.save_pretrained(folder)
    return model.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 12 and 22 blocks on disk, and a plan for the first, in a run folder."""
    root = tmp_path_factory.mktemp("plans")
    table = parameter_table(llama(12, root / "model"))
    llama(22, root / "larger")
    groups = {
        name: f"block.{match[1]}"
        if (match := re.match(r"layers\.(\d+)\.", name))
        else ("norm" if name.startswith("norm") else "embeddings")
        for name in table
    }
    plan = FreezePlan.from_blocks(
        table, groups, [1, 10, 11], model_id="llama-7b", found={"task": "cifar100", "accuracy": 0.5}
    )
    plan.save(root / "run" / "plan.json")
    return root


def test_show_prints_strip_numbers_and_sentence(folder: Path) -> None:
    result = run("show", folder / "run" / "plan.json")
    assert result.exit_code == 0, result.output
    ruler, strip, legend = result.stdout.splitlines()[:3]
    assert ruler.split() == [str(i) for i in range(12)]
    assert strip.split() == ["■" if i in (1, 10, 11) else "·" for i in range(12)]
    assert legend == "· frozen  ▪ partial  ■ trainable"
    share = "25 % of the blocks' parameters train (7,776 of 31,104)"
    assert f"llama-7b: trains 3 of 12 blocks (1, 10 and 11); {share}" in result.stdout
    assert re.search(r"task\s+cifar100", result.stdout)


def test_show_takes_a_run_folder_and_saves_table_and_figure(folder: Path, tmp_path: Path) -> None:
    result = run("show", folder / "run", "--json", "-o", tmp_path / "out")
    body = json.loads(result.stdout)
    assert body["schema"] == "layerprobe.plan-show/v1"
    assert body["plan"]["states"]["norms"] == "frozen"
    assert [row["block"] for row in body["rows"]][:12] == list(range(12))
    assert sum(row["value"] for row in body["rows"]) == body["plan"]["counts"]["trainable_parameters"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"plan-show.csv", "plan-show.json", "plan.png"}


def test_check_says_that_the_plan_fits(folder: Path) -> None:
    result = run("check", folder / "run" / "plan.json", "--model", folder / "model")
    assert result.exit_code == 0, result.output
    assert "fits: all 110 names and shapes of plan.json" in result.stdout
    body = json.loads(run("check", folder / "run", "--model", folder / "model", "--json").stdout)
    assert body["fits"] is True and body["tensors"] == 110


def test_check_of_another_model_is_one_line_and_exit_two(folder: Path) -> None:
    result = run("check", folder / "run" / "plan.json", "--model", folder / "larger")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: plan.json was made for 12 blocks (llama-7b); this backbone has 22. "
        "Make one with: layerprobe freeze-search\n"
    )


def test_export_to_stdout_and_to_files(folder: Path, tmp_path: Path) -> None:
    plan = folder / "run" / "plan.json"
    result = run("export", plan, "--to", "axolotl", "--prefix", "model.", "--train", "lm_head.weight")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout) == {
        "unfrozen_parameters": [
            "^model.layers.1.",
            "^model.layers.10.",
            "^model.layers.11.",
            "^lm_head.weight$",
        ]
    }
    run(
        "export",
        plan,
        "--to",
        "axolotl",
        "--prefix",
        "model.",
        "--train",
        "lm_head.weight",
        "-o",
        tmp_path / "a",
    )
    assert (tmp_path / "a" / "axolotl.yaml").read_text() == result.stdout
    run("export", plan, "--to", "regex", "-o", tmp_path / "mine.txt")
    assert re.fullmatch((tmp_path / "mine.txt").read_text().strip(), "layers.10.mlp.up_proj.weight")
    body = json.loads(run("export", plan, "--to", "peft", "--json", "-q").stdout)
    assert body["target"] == "peft" and json.loads(body["text"])["modules_to_save"][0].startswith("layers.1.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "llama-factory"], "error: LLaMA-Factory knows only the first or the last N layers, or every k-th "
         "up to the last, and this plan trains blocks 1,10:12 of 12\n"),
        (["--to", "axolot"], "error: unknown target 'axolot'. Did you mean 'axolotl'? Targets: axolotl, "
         "llama-factory, ms-swift, peft, finetuning-scheduler, hf-trainer, trl, unsloth, torchtune, regex\n"),
        (["--to", "regex", "--train", "a", "--freeze", "a"],
         "error: a is named with --train and with --freeze; choose one\n"),
        (["--to", "regex", "--without", "pooler"], "error: without='pooler': the plan has no such module\n"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_one_line_and_exit_two(
    folder: Path, arguments: list[str], message: str
) -> None:
    result = run("export", folder / "run", *arguments)
    assert (result.exit_code, result.stderr, result.stdout) == (2, message, "")


def test_a_plan_of_another_schema_and_a_missing_one(folder: Path, tmp_path: Path) -> None:
    later = tmp_path / "plan.json"
    raw = json.loads((folder / "run" / "plan.json").read_text())
    later.write_text(json.dumps({**raw, "schema": "freeze-plan/v3"}))
    result = run("show", later)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: plan.json is no valid freeze-plan/v1: its schema is 'freeze-plan/v3'; this version of layerprobe "
        "reads 'freeze-plan/v1' and 'freeze-plan/v2'\n"
    )


@pytest.mark.parametrize("command", [["show"], ["check", "--model", "gpt2"], ["export", "--to", "regex"]])
def test_where_no_plan_is_the_line_says_what_to_name(tmp_path: Path, command: list[str]) -> None:
    advice = "name a plan file, or a run folder of freeze-search\n"
    verb, *options = command
    missing = tmp_path / "nope.json"
    result = run(verb, missing, *options)
    assert (result.exit_code, result.stderr) == (2, f"error: there is no plan {missing}: {advice}")
    result = run(verb, tmp_path, *options)
    assert (result.exit_code, result.stderr) == (2, f"error: no plan in {tmp_path}: {advice}")


def test_a_misspelt_module_is_answered_with_the_nearest(folder: Path) -> None:
    result = run("export", folder / "run", "--to", "regex", "--without", "embed_token")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: without='embed_token': the plan has no such module. Did you mean 'embed_tokens'?\n"
    )


def test_lint_follows_the_trainers_rule(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(
        'unfrozen_parameters:\n  - "^model.layers.1."\n  - "^model.layers.10."\n  - "^model.layers.11."\n'
    )
    result = run("lint", config, "--model", folder / "model", "--plan", folder / "run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        "axolotl: trains 27 tensors, 7,776 of 32,400 parameters (24.0 %)",
        "layers whose weights train: 1,10:12",
        "trains exactly the plan",
    ]
    config.write_text('unfrozen_parameters: ["^model.layers.1", "^model.layer.10."]\n')
    result = run("lint", config, "--model", folder / "model", "--plan", folder / "run", "--json")
    body = json.loads(result.stdout)
    assert result.exit_code == 1 and body["holds"] is False and body["schema"] == "layerprobe.plan-lint/v1"
    assert body["problems"] == [
        "'^model.layers.1' takes layer 10, 11 along; end it with a dot: '^model.layers.1.'",
        "'^model.layer.10.' matches nothing",
    ]
    assert body["differences"] == []
    result = run("lint", tmp_path / "none.yaml", "--model", folder / "model")
    assert result.exit_code == 2 and result.stderr.startswith("error: there is no configuration")

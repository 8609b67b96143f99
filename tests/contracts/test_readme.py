"""The README names what exists. Its blocks of code are run by test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import transformers

import layerprobe as lp
from layerprobe.plans import parameter_table
from layerprobe.plans.lint import lint_config, read_config
from layerprobe.plans.lint.rules import ModelNames

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert named
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_the_test_command_of_the_readme_is_what_ci_runs() -> None:
    assert "$ make test" in README
    assert re.search(r"^make test$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)


def test_what_the_table_of_neighbours_says_of_layerprobe_runs(tmp_path: Path) -> None:
    """Every name in code type in the last column is a function, an option or a command of ours: each is used here."""
    table = (REPOSITORY / "docs" / "neighbours.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| [")]
    assert len(rows) >= 13 and all(len(row) == 4 for row in rows)
    assert all(re.search(r"\) (\d+\.\d|[0-9a-f]{7})", row[0]) for row in rows), (
        "a version or commit stands at each"
    )
    model = transformers.GPT2Model(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=8))
    backbone = lp.load_backbone(model, patch_size=4)
    task = lp.make_task(
        list(np.random.default_rng(0).integers(0, 255, (60, 8, 8, 3), np.uint8)), list(range(3)) * 20
    )
    tiny = {"budget": 4, "lrs": [1e-3], "finetune_steps": 2, "batch_size": 8, "seeds": 2, "use_scores": False}
    found = lp.freeze_search(backbone, task, strategy="greedy", baselines=("all",), quiet=True, **tiny)
    assert found.facts["strategy"] == "greedy"
    plan = lp.FreezePlan.from_blocks(
        parameter_table(model), backbone.layout.parameter_groups, [1], model_id="own"
    )
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    names = ModelNames(sizes=sizes, linear=frozenset(), n_layers=2)
    for target in ("axolotl", "ms-swift"):
        (tmp_path / "config.yaml").write_text(plan.export(target))
        verdict = lint_config(read_config(tmp_path / "config.yaml"), names, trainer=target, plan=plan)
        assert verdict.holds and verdict.trained == plan.trainable
    used = {"load_backbone(model)", "make_task(images, labels)", "--strategy greedy", "export", "plan lint"}
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row[3])} == used

"""The plan as data: what it trains, its file, its sentence, and the mistakes in making one."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from freeze_plan_examples import FAMILIES, N_BLOCKS, bare_model, example_plan, groups_of

import layerprobe
from layerprobe.errors import PlanError
from layerprobe.plans import FreezePlan, model_hash, parameter_table

TABLE = {
    "wte.weight": ((10, 4), "float32"),
    "wpe.weight": ((6, 4), "float32"),
    "h.0.w": ((4, 4), "float32"),
    "h.0.b": ((4,), "float32"),
    "h.1.w": ((4, 4), "float32"),
    "h.1.b": ((4,), "float32"),
    "ln_f.weight": ((4,), "float32"),
}
GROUPS = {
    "wte.weight": "embeddings",
    "wpe.weight": "positions",
    "h.0.w": "block.0",
    "h.0.b": "block.0",
    "h.1.w": "block.1",
    "h.1.b": "block.1",
    "ln_f.weight": "norm",
}


def small_plan(*blocks: int, **options: object) -> FreezePlan:
    return FreezePlan.from_blocks(TABLE, GROUPS, blocks, model_id="tiny", **options)  # type: ignore[arg-type]


def test_blocks_are_split_by_exact_name() -> None:
    plan = small_plan(1)
    assert plan.trainable == ("h.1.w", "h.1.b")
    assert plan.frozen == ("wte.weight", "wpe.weight", "h.0.w", "h.0.b", "ln_f.weight")
    assert plan.blocks == (False, True)
    assert plan.states == {
        "stem": "trainable",
        "embeddings": "frozen",
        "positions": "frozen",
        "norms": "frozen",
        "other": "absent",
        "head": "trainable",
    }
    assert plan.counts == {
        "trainable_parameters": 20,
        "frozen_parameters": 40 + 24 + 20 + 4,
        "trainable_tensors": 2,
        "frozen_tensors": 5,
        "trainable_blocks": 1,
        "blocks": 2,
    }


@pytest.mark.parametrize(
    ("keyword", "name"), [("norms", "ln_f.weight"), ("positions", "wpe.weight"), ("embeddings", "wte.weight")]
)
def test_each_keyword_frees_its_group_alone(keyword: str, name: str) -> None:
    assert small_plan(**{keyword: "trainable"}).trainable == (name,)


def test_single_names_make_a_block_partial() -> None:
    plan = small_plan(0, also_trainable=["h.1.b"])
    assert plan.block_states == ("trainable", "partial")
    assert plan.blocks == (True, False)
    assert "and part of 1 (1)" in plan.summary()


def test_the_sentence_carries_the_numbers() -> None:
    assert small_plan(0, norms="trainable").summary() == (
        "tiny: trains 1 of 2 blocks (0), with norms; 50 % of the blocks' parameters train (20 of 40, "
        "and 4 outside them)"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_and_trainable_are_the_whole_model(family: str) -> None:
    plan = example_plan(family, [0, 2, 10])
    names = [name for name, _ in bare_model(family).named_parameters()]
    assert sorted(plan.frozen + plan.trainable) == sorted(names)
    total = sum(p.numel() for p in bare_model(family).parameters())
    assert plan.counts["frozen_parameters"] + plan.counts["trainable_parameters"] == total
    assert plan.trainable_blocks == [0, 2, 10] and plan.n_blocks == N_BLOCKS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_plan_is_the_same_plan(family: str, tmp_path: Path) -> None:
    plan = example_plan(family, [1], found={"task": "digits", "seeds": [0, 1], "accuracy": 0.5, "note": "é"})
    path = plan.save(tmp_path / "plan.json")
    again = FreezePlan.load(path)
    assert again == plan
    assert again.source == "plan.json"
    assert again.save(tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_the_file_is_plain_json_with_the_names_in_lists(tmp_path: Path) -> None:
    raw = json.loads(small_plan(1).save(tmp_path / "plan.json").read_text())
    assert raw["schema"] == "freeze-plan/v1"
    assert raw["trainable"] == ["h.1.w", "h.1.b"]
    assert raw["blocks"] == [False, True]
    assert raw["model_id"] == "tiny" and raw["revision"] is None


def test_undefined_numbers_are_saved_as_null(tmp_path: Path) -> None:
    plan = small_plan(1, found={"stderr": math.nan})
    assert json.loads(plan.save(tmp_path / "plan.json").read_text())["found"] == {"stderr": None}


def test_the_hash_follows_name_shape_and_dtype_but_not_order_or_values() -> None:
    model = bare_model("gpt2")
    table = parameter_table(model)
    base = model_hash(table)
    assert model_hash(dict(reversed(list(table.items())))) == base
    assert model_hash(parameter_table(bare_model("gpt2", seed=1))) == base
    assert model_hash(parameter_table(bare_model("gpt2", 11))) != base
    assert model_hash(parameter_table(bare_model("gpt2", width=32))) != base
    assert model_hash(parameter_table(bare_model("gpt2").half())) != base


def test_the_content_hash_tells_what_a_plan_does_and_not_how_it_was_found() -> None:
    plan = small_plan(1)
    assert plan.content_hash() == small_plan(1, found={"task": "digits"}).content_hash()
    others = [small_plan(0), small_plan(1, norms="trainable"), small_plan(1, head="frozen")]
    assert len({plan.content_hash(), *(other.content_hash() for other in others)}) == 4
    # Kept in the runs of `evaluate`: another value would make them start anew.
    assert plan.content_hash() == "2c873baca4496b48b68c93ac6dced992"


def test_methods_show_their_parameters() -> None:
    for method, parameters in {
        "apply": ["plan", "model", "outside", "without", "prefix", "remember", "seed"],
        "verify": ["plan", "model", "before", "prefix", "without"],
        "fingerprint": ["plan", "model", "prefix", "without"],
        "export": ["plan", "target", "prefix", "outside", "without"],
    }.items():
        assert list(inspect.signature(getattr(FreezePlan, method)).parameters) == parameters


def test_found_can_be_added_to_without_changing_the_plan() -> None:
    plan = small_plan(1, found={"task": "digits"})
    more = plan.with_found(accuracy=0.9)
    assert more.found == {"task": "digits", "accuracy": 0.9}
    assert plan.found == {"task": "digits"} and more.trainable == plan.trainable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable_blocks": [2]}, "block 2 does not exist: tiny has 2 blocks"),
        ({"trainable_blocks": [-1]}, "block -1 does not exist"),
        ({"groups": {**GROUPS, "h.0.w": "block.x"}}, "no known group for h.0.w; groups: block.<i>"),
        ({"groups": {k: v for k, v in GROUPS.items() if k != "h.0.b"}}, "no known group for h.0.b"),
        ({"norms": "thawed"}, "'thawed' is no state; choose 'frozen' or 'trainable'"),
        ({"also_trainable": ["h.7.w"]}, "tiny has no parameter h.7.w"),
    ],
)
def test_mistakes_in_making_a_plan(change: dict[str, object], message: str) -> None:
    arguments = {"parameters": TABLE, "groups": GROUPS, "trainable_blocks": [], "model_id": "tiny", **change}
    with pytest.raises(PlanError, match=message.replace("(", r"\(")):
        FreezePlan.from_blocks(**arguments)  # type: ignore[arg-type]


def test_plans_load_without_torch() -> None:
    code = "import sys, layerprobe.plans; sys.exit('torch' in sys.modules)"
    folder = Path(layerprobe.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, check=False).returncode == 0


def test_groups_cover_every_example() -> None:
    for family in FAMILIES:
        table = parameter_table(bare_model(family))
        blocks = {g for g in groups_of(family, table).values() if g.startswith("block.")}
        assert len(blocks) == N_BLOCKS

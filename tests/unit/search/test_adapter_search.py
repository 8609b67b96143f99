"""Units of blocks, plans of them, and a search for where adapters go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import NAMED_FAMILIES

import layerprobe as lp
from layerprobe.backbones.layout import linear_modules, parameter_units
from layerprobe.errors import PlanError, UnknownNameError, UsageError
from layerprobe.plans.adapters import has_adapters, present_ranks
from layerprobe.plans.names import clean_name, is_adapter
from layerprobe.plotting.search import plot_strips
from layerprobe.search.baselines import chosen_baselines, equal_baselines
from layerprobe.search.evaluator import Evaluator
from layerprobe.search.settings import make_settings
from layerprobe.search.space import Space, Trial
from layerprobe.training import block_plan, finetune, unit_plan

pytest.importorskip("peft", reason="the extra [peft] is not installed")

SMALL = {
    "bridge_steps": 1,
    "finetune_steps": 3,
    "batch_size": 8,
    "seeds": 2,
    "lrs": (1e-3,),
    "use_scores": False,
}


def backbone(family: str) -> Any:
    kind, config, arguments = NAMED_FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**arguments))
    return lp.load_backbone(model, **({} if family == "vit" else {"patch_size": 4}))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit"])
def test_the_halves_of_a_block_are_all_of_it(family: str) -> None:
    found = backbone(family)
    whole, halves = parameter_units(found), parameter_units(found, "attention,mlp")
    assert list(whole) == ["0", "1", "2"] and list(halves)[:3] == ["0.attention", "0.mlp", "1.attention"]
    for index in range(3):
        parts = [set(halves[f"{index}.{part}"]) for part in ("attention", "mlp")]
        assert parts[0] | parts[1] == set(whole[str(index)]) and not parts[0] & parts[1]
        # Four matrices of attention (one or two of them fused in GPT-2), two or three of the MLP.
        counts = [len(linear_modules(found, names)) for names in parts]
        assert counts[0] in (2, 4) and counts[1] in (2, 3)
    names = [name for unit in whole.values() for name in unit]
    assert set(names) == {n for n, g in found.layout.parameter_groups.items() if g.startswith("block.")}


def test_plans_of_units() -> None:
    found = backbone("gpt2")
    half = unit_plan(found, ["1.attention", "2"])
    assert half.block_states == ("frozen", "partial", "trainable")
    assert set(half.trainable) == {n for n in half.parameters if n.startswith(("h.1.attn.", "h.2."))}
    assert unit_plan(found, ["0", "2"]).trainable == block_plan(found, [0, 2]).trainable
    adapted = unit_plan(found, ["1.mlp"], rank=3)
    assert adapted.adapters == {"h.1.mlp.c_fc": 3, "h.1.mlp.c_proj": 3}
    with pytest.raises(UnknownNameError, match=r"has no unit '1.atention'. Did you mean '1.attention'"):
        unit_plan(found, ["1.atention"])
    with pytest.raises(PlanError, match=r"rank 33 on h.1.mlp.c_fc is larger than its matrix of 32×128"):
        unit_plan(found, ["1.mlp"], rank=33)


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_a_search_for_where_adapters_go(family: str, tmp_path: Path) -> None:
    found, task = backbone(family), lp.load_task("digits", limit=60)
    before = {n: p.clone() for n, p in found.model.named_parameters()}
    result = lp.freeze_search(
        found,
        task,
        budget=6,
        train="lora:2",
        must_train=(1,),
        min_frozen=1,
        output=tmp_path / "run",
        quiet=True,
        **SMALL,
    )
    plan = result.plan
    assert plan.adapters and set(plan.adapters.values()) == {2} and not plan.trainable
    assert "Place adapters of rank 2 on block" in result.answer
    assert lp.FreezePlan.load(tmp_path / "run").adapters == plan.adapters
    page = tmp_path / "run" / "report.html"
    lp.write_report(tmp_path / "run")
    assert "Adapters hold" in page.read_text()
    # Every arm of equal size trains equally many parameters: those of its adapters.
    arms = result.baselines.set_index("arm")
    per_block = unit_plan(found, ["0"], rank=2).trained_parameters
    for arm in ("all", "none", "first-half", "last-half"):
        assert arms.loc[arm, "trainable_parameters"] == per_block * arms.loc[arm, "trained_blocks"]
    assert not has_adapters(found) and all(
        torch.equal(before[n], p) for n, p in found.model.named_parameters()
    )
    again = lp.freeze_search(
        found,
        task,
        budget=6,
        train="lora:2",
        must_train=(1,),
        min_frozen=1,
        output=tmp_path / "run",
        quiet=True,
        **SMALL,
    )
    assert np.array_equal(again.baselines["test_accuracy"], result.baselines["test_accuracy"], equal_nan=True)


@pytest.mark.parametrize("train", ["weights", "lora:2"])
def test_a_search_over_halves_of_blocks(train: str, tmp_path: Path) -> None:
    found, task = backbone("llama"), lp.load_task("digits", limit=60)
    halves = parameter_units(found, "attention,mlp")
    arms = ["all", "none", "attention", "mlp"]
    result = lp.freeze_search(
        found,
        task,
        budget=9,
        train=train,
        units="attention,mlp",
        must_train=(0,),
        min_frozen=1,
        baselines=arms,
        output=tmp_path / "run",
        quiet=True,
        **SMALL,
    )
    rows = result.baselines.set_index("arm")
    assert set(rows.index) == {"plan", *arms, "probe", "pixels"}
    assert rows.loc["attention", "plan"] == "#.#.#." and rows.loc["mlp", "trained_blocks"] == 1.5
    # What a unit's parameters add up to is what the optimizer was given in every training of a plan.
    sizes = dict(zip(halves, result.table["parameters"], strict=True))
    for row in result.trials[~result.trials["plan"].str.contains(r"\+")].itertuples():
        wanted = sum(size for size, mark in zip(sizes.values(), row.plan, strict=True) if mark == "#")
        assert row.trainable_parameters == wanted
    # The plan is an ordinary one, with exact names.
    mask = result.facts["plan"]["strip"]
    chosen = [name for unit, mark in zip(halves, mask, strict=True) if mark == "#" for name in halves[unit]]
    plan = lp.FreezePlan.load(tmp_path / "run" / "plan.json")
    names = set(plan.trainable) if train == "weights" else {f"{m}.weight" for m in plan.adapters}
    assert names == {name for name in chosen if train == "weights" or "norm" not in name}
    assert list(result.table["part"]) == ["attention", "mlp"] * 3 and list(result.table["block"]) == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert mask.startswith("##") and ".." in (mask[2:4], mask[4:])  # the constraints are about blocks
    lp.write_report(tmp_path / "run")
    assert "attention of every block" in (tmp_path / "run" / "report.html").read_text()
    plot_strips(result.plans, parts=2)
    assert "◧" in result.summary() and result.to_frame()["site"].isin(["attention", "mlp"]).sum() == 12


def test_baselines_as_large_as_the_plan() -> None:
    names = ("first-equal", "last-equal", "random-equal", "everywhere-equal")
    space = Space((10, 30) * 4, parts=("attention", "mlp"))
    settings = make_settings(baselines=names, train="lora:4", units="attention,mlp")
    waiting = chosen_baselines(settings, space)
    plan = (False, False, True, True) + (False,) * 4
    made = {one.name: one for one in equal_baselines(waiting, plan, space, settings)}
    assert made["first-equal"].mask == (True, True) + (False,) * 6
    assert made["last-equal"].mask == (False,) * 6 + (True, True)
    assert 20 <= space.params(made["random-equal"].mask) <= 60
    assert (made["everywhere-equal"].rank, made["everywhere-equal"].mask) == (1, space.all)
    assert made["everywhere-equal"].trial(1e-3).name == "########+rank1"
    # What stands in the report already is left out; weights have no rank to lower.
    for known in (space.all, space.none):
        assert {one.name for one in equal_baselines(waiting, known, space, settings)} == {"all", "none"}
    assert "first-equal" not in {
        one.name for one in equal_baselines(waiting, made["first-equal"].mask, space, settings)
    }
    assert "everywhere-equal" not in {
        one.name for one in chosen_baselines(make_settings(baselines=names), space)
    }


@pytest.mark.parametrize(("rank", "changing"), [(None, "h.0.mlp h.0.ln_ h.1.attn"), (2, "")])
def test_a_mask_with_half_a_block_changes_that_half(
    rank: int | None, changing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, task = backbone("gpt2"), lp.load_task("digits", limit=60)
    found.prepare(task)
    before = {n: p.clone() for n, p in found.model.named_parameters()}
    changed: set[str] = set()

    def look(*arguments: Any) -> Any:
        now = {clean_name(n): p for n, p in found.model.named_parameters() if not is_adapter(n)}
        changed.update(n for n, p in now.items() if not torch.equal(before[n], p))
        assert rank is None or set(present_ranks(dict(found.model.named_parameters()))) == set(plan.adapters)
        return correct(*arguments)

    correct = finetune.correct
    monkeypatch.setattr(finetune, "correct", look)
    train = {} if rank is None else {"train": f"lora:{rank}"}
    settings = make_settings(units="attention,mlp", finetune_steps=3, batch_size=8, **train)
    value = Evaluator(found, task, settings)
    mask = (False, True, True, False, False, False)
    plan = value.plan(mask)
    outcome = value(Trial(mask=mask, lr=1e-2))
    assert changed == set(plan.trainable)
    assert changed == {n for n in before if n.startswith(tuple(changing.split()))}
    assert outcome.trainable_parameters == plan.trained_parameters > 0
    assert all(torch.equal(before[n], p) for n, p in found.model.named_parameters())  # restored


def test_searches_of_weights_and_adapters_are_not_mixed(tmp_path: Path) -> None:
    found, task = backbone("gpt2"), lp.load_task("digits", limit=60)
    lp.freeze_search(found, task, budget=5, output=tmp_path / "run", quiet=True, **SMALL)
    with pytest.raises(UsageError, match="another search"):
        lp.freeze_search(found, task, budget=5, train="lora", output=tmp_path / "run", quiet=True, **SMALL)


@pytest.mark.parametrize("word", ["lora:0", "lora:x", "adapters", "lora:"])
def test_what_is_no_way_to_train_is_refused(word: str, run_cli: Callable[..., Any]) -> None:
    result = run_cli("freeze-search", "--model", "minilm", "--task", "digits", "--train", word, "--dry-run")
    assert result.code == 2
    assert result.err.startswith(f"error: train is weights, lora or lora:RANK, not '{word}'")


def test_unknown_units_are_refused(run_cli: Callable[..., Any]) -> None:
    result = run_cli("freeze-search", "--model", "minilm", "--task", "digits", "--units", "mlp", "--dry-run")
    assert result.code == 2
    assert result.err.startswith("error: units is block or attention,mlp, not 'mlp'")

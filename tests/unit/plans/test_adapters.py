"""Plans that place adapters: placed, trained, proven, merged, written and read, and through PEFT's own classes."""

from __future__ import annotations

import copy
import json
import sys
import types
from typing import Any

import pytest
import torch
import yaml
from freeze_plan_examples import (
    FAMILIES,
    N_BLOCKS,
    WRAPPED,
    bare_model,
    example_plan,
    one_step,
    wrapped_model,
)
from torch import nn

from layerprobe.errors import BrokenFileError, PlanError
from layerprobe.plans import FreezePlan
from layerprobe.plans.adapters import remove_adapters
from layerprobe.plans.names import clean_name

peft = pytest.importorskip("peft", reason="the extra [peft] is not installed")

HEADED = {"gpt2": "gpt2-lm", "llama": "llama-lm", "bert": "bert-tokens", "vit": "vit-classifier"}


def matrices(plan: FreezePlan, blocks: Any) -> list[str]:
    """The linear maps of some blocks."""
    return [
        n[: -len(".weight")] for n, p in plan.parameters.items() if p.block in blocks and len(p.shape) == 2
    ]


def adapter_plans(family: str) -> dict[str, FreezePlan]:
    """Adapters on all matrices of scattered blocks, of several ranks, on single modules, and beside trained blocks."""
    frozen = example_plan(family, [])
    one, two = matrices(frozen, [1]), matrices(frozen, [1, 2, 10])
    mixed = example_plan(family, [3, 11])
    return {
        "blocks": frozen.with_adapters(dict.fromkeys(two, 4), scale=2.0),
        "ranks": frozen.with_adapters({m: 1 + i % 4 for i, m in enumerate(two)}, scale=0.5),
        "one module": frozen.with_adapters({one[0]: 3}),
        "several modules": frozen.with_adapters({one[0]: 3, matrices(frozen, [10])[-1]: 2}),
        "beside trained blocks": mixed.with_adapters(dict.fromkeys(matrices(mixed, [0, 1, 10]), 2)),
    }


KINDS = tuple(adapter_plans("gpt2"))


def trained(model: nn.Module, prefix: str) -> set[str]:
    """What trains, in the plan's words."""
    names = {clean_name(n) for n, p in model.named_parameters() if p.requires_grad}
    return {n.removeprefix(prefix).removesuffix(".weight").replace(".layerprobe", "").replace(".default", "")
            if "lora_" in n else n.removeprefix(prefix) for n in names}  # fmt: skip


def wanted(plan: FreezePlan) -> set[str]:
    return {*plan.trainable, *(f"{m}.{part}" for m in plan.adapters for part in ("lora_A", "lora_B"))}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors under their own names; of a module that PEFT copied, the copy."""
    return {
        clean_name(n): p.detach().clone()
        for n, p in model.named_parameters()
        if "lora_" not in n and "original_module" not in n
    }


def output(model: nn.Module, family: str) -> torch.Tensor:
    model.eval()
    torch.manual_seed(3)
    inputs = (
        {"pixel_values": torch.randn(2, 3, 8, 8)}
        if family == "vit"
        else {"input_ids": torch.randint(3, 40, (2, 9))}
    )
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_placed_trained_and_proven(family: str, kind: str) -> None:
    plan, model = adapter_plans(family)[kind], bare_model(family)
    before, answer = values(model), output(model, family)
    done = plan.apply(model)
    assert done.trainable == len(plan.trainable) and trained(model, "") == wanted(plan)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert n_trained == plan.trained_parameters
    assert torch.equal(output(model, family), answer)  # the second factors are zero
    model.train()
    for _ in range(3):
        one_step(model, family)
    found = plan.verify(model)
    after = values(model)
    assert {n for n in before if not before[n].equal(after[n])} <= set(plan.trainable)
    assert found.frozen == len(plan.frozen) and {n for n in found.changed if "lora" in n} == {
        n for n in wanted(plan) if "lora" in n
    }
    unmerged = output(model, family)
    assert not torch.equal(unmerged, answer)
    assert set(remove_adapters(model, merge=True)) == set(plan.adapters)
    assert model.state_dict().keys() == bare_model(family).state_dict().keys()
    torch.testing.assert_close(output(model, family), unmerged, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_to_peft_trains_exactly_the_plan(family: str, kind: str) -> None:
    plan = adapter_plans(family)[kind]
    model, prefix = wrapped_model(HEADED[family])
    config = peft.LoraConfig(**json.loads(plan.export("peft", prefix=prefix)))
    before = values(model)
    tuned = peft.get_peft_model(model, config)
    full = "base_model.model." + prefix
    assert trained(tuned, full) == wanted(plan)
    scales = {
        layer.scaling["default"]
        for layer in tuned.modules()
        if hasattr(layer, "scaling") and hasattr(layer, "lora_A")
    }
    assert scales == {plan.adapter_scale}
    tuned.train()
    for _ in range(3):
        one_step(tuned, family)
    after = values(tuned)
    moved = {n for n, tensor in before.items() if not tensor.equal(after[f"base_model.model.{n}"])}
    assert moved <= {prefix + n for n in plan.trainable}
    unmerged = output(tuned, family)
    torch.testing.assert_close(output(tuned.merge_and_unload(), family), unmerged, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recipe_for_trl_trains_exactly_the_plan(family: str, kind: str) -> None:
    plan = adapter_plans(family)[kind]
    model, prefix = wrapped_model(HEADED[family])
    recipe: dict[str, Any] = {}
    exec(plan.export("trl", prefix=prefix), recipe)
    # trl 1.16.0, sft_trainer.py: a PeftModel without peft_config is trained as it comes.
    assert trained(recipe["place"](model), "base_model.model." + prefix) == wanted(plan)


def test_the_recipe_for_unsloth_trains_exactly_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_peft_model(model: nn.Module, r: int, target_modules: list[str], **others: Any) -> nn.Module:
        """unsloth 2026.10.9, llama.py, and unsloth_zoo's `prepare_model_for_training`: all to LoraConfig, then
        nothing but adapters trains."""
        assert isinstance(target_modules, list) and isinstance(r, int) and "modules_to_save" not in others
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules=target_modules, **others))
        for name, parameter in tuned.named_parameters():
            parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
        return tuned

    unsloth = types.ModuleType("unsloth")
    unsloth.FastLanguageModel = types.SimpleNamespace(get_peft_model=get_peft_model)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    said = 0
    for plan in adapter_plans("llama").values():
        model, prefix = wrapped_model(HEADED["llama"])
        if plan.trainable:
            with pytest.raises(PlanError, match="unsloth trains no weights beside adapters"):
                plan.export("unsloth", prefix=prefix)
            continue
        recipe: dict[str, Any] = {}
        exec(plan.export("unsloth", prefix=prefix), recipe)
        assert trained(recipe["place"](model), "base_model.model." + prefix) == wanted(plan)
        said += 1
    assert said


def test_torchtune_says_what_its_lora_recipes_can() -> None:
    """torchtune 0.6.1, torchtune/models/llama3/_component_builders.py, `lora_llama3`: every layer is built with
    adapters on `lora_attn_modules` and, with `apply_lora_to_mlp`, on w1, w2 and w3."""
    base = adapter_plans("llama")["blocks"]
    hf = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
    attention = [f"self_attn.{name}" for name in ("q_proj", "v_proj", "o_proj")]
    for parts in (attention, [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]):
        plan = base.with_adapters({f"layers.{i}.{m}": 4 for i in range(12) for m in parts}, scale=2.0)
        model = yaml.safe_load(plan.export("torchtune", prefix="model."))["model"]
        placed = {f"self_attn.{hf[name]}" for name in model["lora_attn_modules"]}
        placed |= (
            {f"mlp.{name}_proj" for name in ("gate", "up", "down")} if model["apply_lora_to_mlp"] else set()
        )
        assert placed == set(parts) and (model["lora_rank"], model["lora_alpha"]) == (4, 8.0)
    for kind in KINDS:
        with pytest.raises(
            PlanError, match="torchtune places adapters of one rank on the same modules of every"
        ):
            adapter_plans("llama")[kind].export("torchtune")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_peft_has_prepared_takes_the_plan_as_it_is(family: str) -> None:
    plan = adapter_plans(family)["blocks"]
    model, prefix = wrapped_model(HEADED[family])
    tuned = peft.get_peft_model(model, peft.LoraConfig(**json.loads(plan.export("peft", prefix=prefix))))
    done = plan.apply(tuned, outside="frozen")
    assert done.prefix == "base_model.model." + prefix and trained(tuned, done.prefix) == wanted(plan)
    for _ in range(2):
        one_step(tuned, family)
    assert len(plan.verify(tuned).changed) == 2 * len(plan.adapters)


def test_the_export_says_blocks_where_it_can() -> None:
    plan = adapter_plans("llama")["blocks"]
    said = json.loads(plan.export("peft", prefix="model."))
    assert said["layers_to_transform"] == [1, 2, 10] and said["layers_pattern"] == "layers"
    assert "mlp.down_proj" in said["target_modules"] and said["r"] == 4 and said["lora_alpha"] == 8
    ranks = json.loads(adapter_plans("llama")["ranks"].export("peft", prefix="model."))
    assert set(ranks["rank_pattern"].values()) == {1, 2, 3} and ranks["r"] == 4
    mixed = json.loads(adapter_plans("llama")["beside trained blocks"].export("peft", prefix="model."))
    assert "model.layers.11.mlp.down_proj" in mixed["modules_to_save"]


@pytest.mark.parametrize(
    "target", ["axolotl", "llama-factory", "finetuning-scheduler", "hf-trainer", "regex"]
)
def test_a_trainer_that_places_no_adapters_is_refused_in_one_sentence(target: str) -> None:
    with pytest.raises(
        PlanError, match=f"^{target} trains weights and places no adapters, but the plan has 12 of them; "
    ):
        adapter_plans("gpt2")["blocks"].export(target)


@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_again(kind: str, tmp_path: Any) -> None:
    plan = adapter_plans("gpt2")[kind]
    again = FreezePlan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan and again.content_hash() == plan.content_hash()
    assert json.loads((tmp_path / "plan.json").read_text())["schema"] == "freeze-plan/v2"
    assert plan.content_hash() != example_plan("gpt2", plan.trainable_blocks).content_hash()


def test_a_plan_without_adapters_is_version_1_as_ever(tmp_path: Any) -> None:
    plan = example_plan("gpt2", [1])
    raw = plan.to_dict()
    assert (
        raw["schema"] == "freeze-plan/v1"
        and "adapters" not in raw
        and "adapter_parameters" not in raw["counts"]
    )
    assert FreezePlan.from_dict(raw) == plan


def test_readers_of_version_1_refuse_version_2_in_one_sentence() -> None:
    """As version 1's reader put it: it looks at the schema before anything else."""

    def reader_of_version_1(raw: dict[str, Any]) -> str:
        assert raw["schema"] != "freeze-plan/v1"
        return f"its schema is {raw['schema']!r}; this version of layerprobe reads 'freeze-plan/v1'"

    raw = adapter_plans("gpt2")["blocks"].to_dict()
    assert "freeze-plan/v2" in reader_of_version_1(raw)
    raw["schema"] = "freeze-plan/v1"
    with pytest.raises(BrokenFileError, match="'adapters' is no field of freeze-plan/v1"):
        FreezePlan.from_dict(raw)


BROKEN = {
    "kind": (lambda a: a.update(kind="ia3"), "adapters of kind 'ia3' are not known here"),
    "scale": (lambda a: a.update(scale="2"), "the scale of adapters must be a number, not '2'"),
    "no ranks": (lambda a: a.update(ranks={}), "must be an object of modules, not empty"),
    "rank 0": (lambda a: a["ranks"].update({"h.1.attn.c_attn": 0}), "a rank must be a whole number from 1"),
    "large rank": (
        lambda a: a["ranks"].update({"h.1.attn.c_attn": 17}),
        r"rank 17 .* larger than its matrix of 16×48",
    ),
    "unknown module": (
        lambda a: a["ranks"].update({"h.1.mlp.c_gate": 1}),
        "no parameter h.1.mlp.c_gate.weight",
    ),
    "a norm": (lambda a: a["ranks"].update({"h.1.ln_1": 1}), "no matrix h.1.ln_1.weight"),
    "more keys": (lambda a: a.update(dropout=0.1), "needs exactly kind, scale and ranks"),
    "counts": (
        lambda a: a["ranks"].update({"h.5.attn.c_attn": 1}),
        "'counts' is not what the parameters add up to",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_mistakes_in_a_file_are_named(kind: str) -> None:
    raw = copy.deepcopy(adapter_plans("gpt2")["blocks"].to_dict())
    change, message = BROKEN[kind]
    change(raw["adapters"])
    with pytest.raises(BrokenFileError, match=message):
        FreezePlan.from_dict(raw)


def test_adapters_that_cannot_be_are_refused() -> None:
    plan = example_plan("gpt2", [3])
    for ranks, message in (
        ({"h.1.attn.c_attn": 17}, r"^gpt2: rank 17 on h.1.attn.c_attn is larger than its matrix of 16×48$"),
        ({"h.1.attn.c_attn": 0}, "rank 0 on h.1.attn.c_attn is no whole number from 1"),
        ({"h.3.attn.c_attn": 1}, "has an adapter and is trained itself; choose one"),
        ({"h.1.attn": 1, "h.2.attn": 1}, r"no parameter h.1.attn.weight \(and 1 more\)"),
    ):
        with pytest.raises(PlanError, match=message):
            plan.with_adapters(ranks)


def test_other_adapters_in_the_model_are_refused_before_anything_is_changed() -> None:
    plan = adapter_plans("gpt2")["blocks"]
    model = peft.get_peft_model(
        bare_model("gpt2"), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(PlanError, match="carries adapters on 12 modules already, and the plan places others"):
        plan.apply(model)
    assert before == {n: p.requires_grad for n, p in model.named_parameters()}


def test_a_plan_of_weights_leaves_adapters_to_the_caller() -> None:
    plan = example_plan("gpt2", [3])
    model = peft.get_peft_model(
        bare_model("gpt2"), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    with pytest.raises(PlanError, match="24 parameters lie outside the plan's model"):
        plan.apply(model)
    done = plan.apply(model, outside="frozen")
    assert trained(model, done.prefix) == set(plan.trainable)


def test_a_failure_while_placing_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = adapter_plans("gpt2")["ranks"], bare_model("gpt2")
    names, flags = set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    monkeypatch.setattr("layerprobe.plans.adapters.present_ranks", lambda *_: {"h.1.attn.c_attn": 1})
    with pytest.raises(PlanError, match=r"PEFT cannot place the plan's adapters: .* differ from the plan"):
        plan.apply(model)
    assert set(model.state_dict()) == names and [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "peft_config")


def test_seeds_make_the_first_factors() -> None:
    plan = adapter_plans("llama")["blocks"]

    def factors(seed: int) -> dict[str, torch.Tensor]:
        model = bare_model("llama")
        plan.apply(model, seed=seed)
        return {n: p.detach() for n, p in model.named_parameters() if "lora_A" in n}

    one, again, other = factors(1), factors(1), factors(2)
    assert all(one[n].equal(again[n]) and not one[n].equal(other[n]) for n in one)


def test_blocks_with_adapters_have_a_mark_of_their_own() -> None:
    from layerprobe.plans.table import block_strip

    plan = adapter_plans("gpt2")["beside trained blocks"]
    assert [plan.block_states[i] for i in (0, 3, 4)] == ["adapter", "trainable", "frozen"]
    strip = block_strip(plan).splitlines()[1].split()
    assert "".join(strip) == "◇◇·■······◇■" and len(strip) == N_BLOCKS
    assert "adapters of rank 2 on 12 modules (blocks 0, 1 and 10)" in plan.summary()
    assert all(word in WRAPPED for word in HEADED.values())

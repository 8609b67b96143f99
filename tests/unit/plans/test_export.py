"""Exported plans, each read by its target's own rule on real names: exactly the plan is trained, or it is refused.

The rules are written out here from their sources, in our own words, independently of the exporters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import yaml
from freeze_plan_examples import (
    BARE,
    N_BLOCKS,
    WRAPPED,
    bare_model,
    baseline_plans,
    build,
    config,
    example_plan,
    groups_of,
    one_step,
    wrapped_model,
)
from torch import nn

from layerprobe.errors import PlanError, UnknownNameError
from layerprobe.plans import FreezePlan, norm_parameter_names, parameter_table
from layerprobe.plans.export import TARGETS, export_plan

MODELS = (*BARE, *WRAPPED)
"""Bare base models and models with heads: GPT-2, Llama, BERT and ViT, twelve blocks each."""

HEADS = ("lm_head.", "score.", "classifier.", "cls.")


def model_and_prefix(name: str) -> tuple[Any, str]:
    return (bare_model(name), "") if name in BARE else wrapped_model(name)


def plans_for(name: str) -> dict[str, FreezePlan]:
    """The standard plans, a scattered one in which 1 and 10, 11 must not be confused, and single parts."""
    return family_plans(name.split("-")[0])


@cache
def family_plans(family: str) -> dict[str, FreezePlan]:
    base = bare_model(family)
    table = parameter_table(base)
    groups = groups_of(family, table)
    plans = baseline_plans(table, groups, norm_parameter_names(base), model_id=family)

    def plan(blocks: Iterable[int], **options: Any) -> FreezePlan:
        return FreezePlan.from_blocks(table, groups, blocks, model_id=family, **options)

    return {
        **plans,
        "only 1": plan([1]),
        "only 0": plan([0]),
        "only the last": plan([N_BLOCKS - 1]),
        "scattered": plan([1, 2, 10], norms="trainable"),
        "last three and norm": plan([9, 10, 11], norms="trainable"),
        "with embeddings": plan([0, 1], embeddings="trainable"),
        "with positions": plan([0, 1], positions="trainable"),
        "half a norm": plan([], also_trainable=[next(n for n in table if "norm" in n.lower() or "ln_" in n)]),
    }


PLANS = tuple(plans_for("gpt2"))


def around(model: nn.Module, state: str = "trainable") -> dict[str, str]:
    return {n: state for n, _ in model.named_parameters() if n.startswith(HEADS)}


def wanted_names(plan: FreezePlan, prefix: str, outside: dict[str, str]) -> set[str]:
    return {prefix + n for n in plan.trainable} | {n for n, state in outside.items() if state == "trainable"}


# --- the targets' rules -------------------------------------------------------------------------------------------


def axolotl_trains(text: str, model: nn.Module) -> set[str]:
    """axolotl-ai-cloud/axolotl, src/axolotl/utils/freeze.py (LayerNamePattern, freeze_layers_except), and
    src/axolotl/train.py, which calls it only `if cfg.unfrozen_parameters`."""
    entries = yaml.safe_load(text)["unfrozen_parameters"]
    names = [n for n, _ in model.named_parameters()]
    if not entries:
        return set(names)
    trained = set()
    for entry in entries:
        ranged = re.match(r"^(.+)\[([0-9]*)(?::([0-9]*))?\]$", entry)
        body = ranged[1] if ranged else entry
        escaped = "".join("\\." if c == "." and body[i + 1 : i + 2] != "+" else c for i, c in enumerate(body))
        trained |= {n for n in names if re.match(escaped, n)}
    return trained


def llama_factory_trains(text: str, model: nn.Module) -> set[str]:
    """hiyouga/LLaMA-Factory, src/llamafactory/model/adapter.py (_setup_freeze_tuning); options are
    comma-separated strings, src/llamafactory/hparams/finetuning_args.py."""
    options = yaml.safe_load(text)
    assert options["finetuning_type"] == "freeze"
    settings: Any = model.config
    depth = settings.num_hidden_layers
    count = options["freeze_trainable_layers"]
    layers = range(max(0, depth - count), depth) if count > 0 else range(min(-count, depth))
    if options.get("use_llama_pro"):
        assert depth % count == 0, "`num_layers` should be divisible by `num_layer_trainable`"
        stride = depth // count
        layers = range(stride - 1, depth + stride - 1, stride)
    names = [n for n, _ in model.named_parameters()]
    inside = set()
    for name in names:
        for mark in (".0.", ".1."):
            if mark in name:
                inside.add(name.split(mark)[-1].split(".")[0])
                break
    marks = []
    for module in options["freeze_trainable_modules"].split(","):
        module = module.strip()
        assert module == "all" or module in inside, f"Module {module} is not found"
        marks += [f".{layer}.{'' if module == 'all' else module}" for layer in layers]
    if "freeze_extra_modules" in options:
        outside = {n.split(".")[-2] for n in names if not re.search(r"\.\d+\.", n)}
        for module in options["freeze_extra_modules"].split(","):
            assert module.strip() in outside, f"Module {module} is not found"
            marks.append(module.strip())
    return {n for n in names if any(mark in n for mark in marks)}


def finetuning_scheduler_trains(text: str, model: nn.Module) -> set[str]:
    """speediedan/finetuning-scheduler, src/finetuning_scheduler/fts_supporters.py (_validate_schedule_keys,
    _parse_phase, _validate_phases_disjoint), 2.14.1: everything frozen, then the phases thaw."""
    schedule = yaml.safe_load(text)
    assert sorted(schedule) == list(range(len(schedule)))
    names = [n for n, _ in model.named_parameters()]
    thawed: list[str] = []
    for phase in schedule.values():
        for entry in phase["params"]:
            found = [entry] if entry in names else [n for n in names if re.match(entry, n)]
            assert found, f"'{entry}' did not match any named parameter"
            thawed += found
    assert len(thawed) == len(set(thawed)), "phases are not disjoint"
    return set(thawed)


def ms_swift_trains(text: str, model: nn.Module) -> set[str]:
    """modelscope/ms-swift, swift/utils/transformers_utils.py (freeze_parameters, activate_parameters) and
    swift/pipelines/train/tuner.py (prepare_model: everything trains, then these two), at 006938b."""
    options = yaml.safe_load(text)
    assert options["tuner_type"] == "full"
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    budget, used, trains = int(total * options.get("freeze_parameters_ratio", 0.0)), 0, {}
    for name, parameter in parameters.items():
        used += parameter.numel()
        trains[name] = used > budget
    for name in parameters:
        if any(name.startswith(start) for start in options.get("freeze_parameters", [])):
            trains[name] = False
        if (found := options.get("freeze_parameters_regex")) and re.search(found, name):
            trains[name] = False
    for name in parameters:
        if any(name.startswith(start) for start in options.get("trainable_parameters", [])):
            trains[name] = True
        if (found := options.get("trainable_parameters_regex")) and re.search(found, name):
            trains[name] = True
    return {name for name, flag in trains.items() if flag}


def hf_trainer_trains(text: str, model: nn.Module) -> set[str]:
    """transformers.Trainer builds its optimizer from what requires a gradient: run the exported file."""
    namespace: dict[str, Any] = {}
    exec(compile(text, "freeze.py", "exec"), namespace)
    namespace["freeze"](model)
    return {n for n, p in model.named_parameters() if p.requires_grad}


def unsloth_trains(text: str, model: nn.Module) -> set[str]:
    """unsloth_zoo 2026.10.9, training_utils.py, `prepare_model_for_training`: `full_finetuning` makes everything train
    on loading; the file is used after that."""
    model.requires_grad_(True)
    return hf_trainer_trains(text, model)


TORCHTUNE_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{}.attn.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attn.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attn.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attn.output_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mlp.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.mlp.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.mlp.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.sa_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.{}.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "norm.scale": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Its names -> those of the checkpoint (torchtune 0.6.1, torchtune/models/convert_weights.py, `_FROM_HF`)."""


class Named(nn.Module):
    """A model as torchtune names it, holding the very parameters of a Hugging Face model of Llama's layout."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        theirs = dict(model.named_parameters())
        blocks = range(model.config.num_hidden_layers)
        self.pairs = {
            ours.format(i): theirs[name.format(i)]
            for ours, name in TORCHTUNE_NAMES.items()
            for i in (blocks if "{}" in ours else [""])
            if name.format(i) in theirs
        }
        assert len(self.pairs) == len(theirs)

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.pairs.items())


def torchtune_trains(text: str, model: nn.Module) -> set[str]:
    """torchtune 0.6.1, recipes/full_finetune_single_device.py: every parameter goes to the optimizer, which changes
    those that have a gradient."""
    hf_trainer_trains(text, Named(model))
    return {n for n, p in model.named_parameters() if p.requires_grad}


def regex_trains(text: str, model: nn.Module) -> set[str]:
    """Our own statement in the exporter: re.fullmatch of the one line."""
    (pattern,) = text.splitlines()
    return {n for n, _ in model.named_parameters() if re.fullmatch(pattern, n)}


def peft_trains(text: str, model: nn.Module) -> set[str]:
    """The installed PEFT itself; a trained copy carries `modules_to_save.<adapter>` in its name."""
    peft = pytest.importorskip("peft", reason="the extra [dev] is not installed")
    tuned = peft.get_peft_model(model, peft.LoraConfig(**json.loads(text)))
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert all(".modules_to_save.default." in n for n in trained)
    return {n.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for n in trained}


RULES: dict[str, Callable[[str, nn.Module], set[str]]] = {
    "axolotl": axolotl_trains,
    "llama-factory": llama_factory_trains,
    "finetuning-scheduler": finetuning_scheduler_trains,
    "ms-swift": ms_swift_trains,
    "hf-trainer": hf_trainer_trains,
    "trl": hf_trainer_trains,  # trl 1.16.0, sft_trainer.py: a model object without peft_config is left as it comes
    "unsloth": unsloth_trains,
    "torchtune": torchtune_trains,
    "regex": regex_trains,
    "peft": peft_trains,
}


# --- exactly the plan ---------------------------------------------------------------------------------------------


def test_every_target_has_its_rule_here() -> None:
    assert RULES.keys() == TARGETS.keys()


@pytest.mark.parametrize(
    "target", ["axolotl", "finetuning-scheduler", "hf-trainer", "ms-swift", "trl", "unsloth", "regex"]
)
@pytest.mark.parametrize("name", MODELS)
def test_targets_that_take_names_say_every_plan_exactly(name: str, target: str) -> None:
    model, prefix = model_and_prefix(name)
    outside = around(model)
    for kind, plan in plans_for(name).items():
        wanted = wanted_names(plan, prefix, outside)
        if not wanted and target in ("axolotl", "finetuning-scheduler", "ms-swift"):
            with pytest.raises(PlanError, match="cannot be told to train nothing"):
                plan.export(target, prefix=prefix, outside=outside)
            continue
        text = plan.export(target, prefix=prefix, outside=outside)
        assert RULES[target](text, model) == wanted, (name, kind)


def test_torchtune_says_every_plan_of_llama_and_refuses_other_layouts() -> None:
    model, prefix = wrapped_model("llama-lm")
    for kind, plan in plans_for("llama").items():
        text = plan.export("torchtune", prefix=prefix, outside={"lm_head.weight": "frozen"})
        assert torchtune_trains(text, model) == {prefix + n for n in plan.trainable}, kind
    with pytest.raises(PlanError, match=r"knows the names of Llama's layout, and h.0"):
        plans_for("gpt2")["only 0"].export("torchtune")


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_head_stays_frozen(name: str) -> None:
    plan = plans_for(name)["scattered"]
    model, prefix = model_and_prefix(name)
    for target in ("axolotl", "finetuning-scheduler", "hf-trainer", "ms-swift", "regex"):
        text = plan.export(target, prefix=prefix, outside=around(model, "frozen"))
        assert RULES[target](text, model) == {prefix + n for n in plan.trainable}


@pytest.mark.parametrize("name", MODELS)
def test_llama_factory_is_exact_or_refuses(name: str) -> None:
    said, refused = set(), set()
    model, prefix = model_and_prefix(name)
    # The masked-language head holds a LayerNorm, a name that all blocks contain.
    outside = {} if name == "bert-masked" else around(model)
    for kind, plan in plans_for(name).items():
        try:
            text = plan.export("llama-factory", prefix=prefix, outside=outside)
        except PlanError:
            refused.add(kind)
            continue
        said.add(kind)
        assert llama_factory_trains(text, model) == wanted_names(plan, prefix, outside), (name, kind)
    # Whole blocks from either end can be said for every model, blocks in the middle for none.
    assert {"first-5", "last-5", "first-half", "last-half", "only 0", "only the last"} <= said
    assert {"only 1", "scattered", "random-0"} <= refused


def test_llama_factory_refuses_the_middle_in_one_sentence() -> None:
    with pytest.raises(PlanError) as caught:
        plans_for("llama")["only 1"].export("llama-factory", prefix="model.")
    assert str(caught.value) == (
        "LLaMA-Factory knows only the first or the last N layers, or every k-th up to the last, and this plan trains "
        "blocks 1 of 12"
    )


@pytest.mark.parametrize("blocks", [[5, 11], [3, 7, 11], [1, 3, 5, 7, 9, 11]])
@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_llama_factory_says_every_kth_layer(name: str, blocks: list[int]) -> None:
    model, prefix = wrapped_model(name)
    plan = example_plan(name.split("-")[0], blocks)
    text = plan.export("llama-factory", prefix=prefix)
    assert "use_llama_pro: true" in text
    assert llama_factory_trains(text, model) == {prefix + n for n in plan.trainable}
    with pytest.raises(PlanError, match="every k-th up to the last"):
        example_plan(name.split("-")[0], [index - 1 for index in blocks]).export(
            "llama-factory", prefix=prefix
        )


def test_llama_factory_and_a_name_that_others_contain() -> None:
    """`norm` as an extra module would take `input_layernorm` of every layer along; `ln_f` is taken by nothing."""
    with pytest.raises(PlanError, match=r"would also train .*input_layernorm"):
        plans_for("llama")["last three and norm"].export("llama-factory", prefix="model.")
    plan = plans_for("gpt2")["last three and norm"]
    model, prefix = wrapped_model("gpt2-lm")
    text = plan.export("llama-factory", prefix=prefix)
    assert yaml.safe_load(text)["freeze_extra_modules"] == "ln_f"
    assert llama_factory_trains(text, model) == {prefix + n for n in plan.trainable}


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-lm"])
def test_llama_factory_says_norms_inside_layers_by_their_module(name: str) -> None:
    model, prefix = wrapped_model(name)
    family = name.split("-")[0]
    base = bare_model(family)
    inside = [n for n in norm_parameter_names(base) if re.search(r"\d", n.split("ln_")[0])]
    plan = example_plan(family, [], also_trainable=inside)
    text = plan.export("llama-factory", prefix=prefix)
    assert llama_factory_trains(text, model) == {prefix + n for n in inside}


def peft_can_say(plan: FreezePlan, model: nn.Module, prefix: str) -> bool:
    """PEFT trains whole modules: each that holds a trained parameter holds no frozen one and no other module."""
    trained = {prefix + n for n in plan.trainable}
    for module_name, module in model.named_modules():
        own = {f"{module_name}.{n}" for n, _ in module.named_parameters(recurse=False)}
        if own & trained:
            every = {f"{module_name}.{n}" for n, _ in module.named_parameters()}
            if every != own or not own <= trained:
                return False
    return True


@pytest.mark.parametrize("name", WRAPPED)
def test_peft_is_exact_or_refuses(name: str) -> None:
    kinds = ["random-0", "norms", "none", "last three and norm", "with embeddings", "half a norm"]
    for kind in kinds:
        plan = plans_for(name)[kind]
        model, prefix = wrapped_model(name)
        outside = {} if "masked" in name else around(model)
        possible = peft_can_say(plan, model, prefix) and bool(plan.trainable or outside)
        try:
            text = plan.export("peft", prefix=prefix, outside=outside)
        except PlanError:
            assert not possible, (name, kind)
            continue
        assert possible, (name, kind)
        assert peft_trains(text, model) == wanted_names(plan, prefix, outside), (name, kind)


@pytest.mark.parametrize("name", BARE)
def test_peft_on_bare_models(name: str) -> None:
    plan = plans_for(name)["random-0"]
    assert peft_trains(plan.export("peft"), bare_model(name)) == set(plan.trainable)


def test_peft_trains_and_leaves_the_rest_alone() -> None:
    peft = pytest.importorskip("peft", reason="the extra [dev] is not installed")
    plan = plans_for("llama")["only 1"]
    model, prefix = wrapped_model("llama-lm")
    tuned = peft.get_peft_model(model, peft.LoraConfig(**json.loads(plan.export("peft", prefix=prefix))))
    before = {n: p.detach().clone() for n, p in tuned.named_parameters()}
    one_step(tuned, "llama")
    moved = {n for n, p in tuned.named_parameters() if not p.equal(before[n])}
    assert {n.replace("base_model.model.", "").replace(".modules_to_save.default", "") for n in moved} == {
        prefix + n for n in plan.trainable
    }
    merged = tuned.merge_and_unload()
    assert {n for n, _ in merged.named_parameters()} == {
        n for n, _ in wrapped_model("llama-lm")[0].named_parameters()
    }


def test_peft_compares_ends_of_names() -> None:
    """A bare Llama's final `norm` is the end of every `…layernorm`, so PEFT would train them all."""
    with pytest.raises(PlanError, match=r"would also train layers\.0\.input_layernorm.*ends of module names"):
        plans_for("llama")["scattered"].export("peft")
    assert "model.norm" in plans_for("llama")["scattered"].export("peft", prefix="model.")


def test_peft_refuses_parameters_that_lie_directly_in_a_larger_module() -> None:
    with pytest.raises(PlanError, match=r"embeddings\.position_embeddings|embeddings\.cls_token"):
        plans_for("vit")["with embeddings"].export("peft", prefix="vit.")


def test_adapters_in_chosen_layers_unfreeze_nothing() -> None:
    """Why `layers_to_transform` is no export of a plan: the weights of those layers stay frozen."""
    peft = pytest.importorskip("peft", reason="the extra [dev] is not installed")
    model, _ = wrapped_model("llama-lm")
    adapters = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    tuned = peft.get_peft_model(model, adapters)
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n for n in trained)


# --- the traps ----------------------------------------------------------------------------------------------------


def test_axolotl_without_the_trailing_dot_takes_ten_along() -> None:
    model, _ = wrapped_model("gpt2-lm")
    short = axolotl_trains('unfrozen_parameters: ["^transformer.h.1"]', model)
    exact = axolotl_trains(plans_for("gpt2")["only 1"].export("axolotl", prefix="transformer."), model)
    assert any(n.startswith("transformer.h.10.") for n in short - exact)
    assert exact == {n for n in short if n.startswith("transformer.h.1.")}


@pytest.mark.parametrize("name", MODELS)
def test_axolotl_patterns_are_anchored_and_end_in_no_range(name: str) -> None:
    for plan in plans_for(name).values():
        if plan.trainable:
            entries = yaml.safe_load(plan.export("axolotl"))["unfrozen_parameters"]
            assert all(entry.startswith("^") and entry[-1] in ".$" and "\\" not in entry for entry in entries)


def test_axolotl_reads_an_empty_list_as_everything() -> None:
    plan = plans_for("gpt2")["none"]
    assert len(axolotl_trains("unfrozen_parameters: []", bare_model("gpt2"))) == len(plan.parameters)
    with pytest.raises(
        PlanError, match="axolotl cannot be told to train nothing of the model: name the head"
    ):
        plan.export("axolotl", prefix="transformer.")


def test_a_regex_for_nothing_matches_nothing() -> None:
    assert regex_trains(plans_for("gpt2")["none"].export("regex"), bare_model("gpt2")) == set()


def test_the_python_file_refuses_another_model() -> None:
    text = plans_for("gpt2")["only 1"].export("hf-trainer")
    with pytest.raises(ValueError, match="lacks 148 parameters of the plan"):
        hf_trainer_trains(text, wrapped_model("gpt2-lm")[0])
    with pytest.raises(ValueError, match="the plan says nothing about 120 parameters"):
        hf_trainer_trains(text, bare_model("gpt2", 22))


def test_modules_that_the_other_model_lacks_can_be_left_out() -> None:
    import transformers

    table = parameter_table(build(transformers.BertModel, config("bert")))
    plan = FreezePlan.from_blocks(table, groups_of("bert", table), [1], model_id="bert", other="trainable")
    _, prefix = wrapped_model("bert-tokens")
    wanted = {n for n in {prefix + n for n in plan.trainable} if "pooler" not in n}
    for target in ("axolotl", "finetuning-scheduler", "regex", "peft"):
        text = plan.export(target, prefix=prefix, without=["pooler"])
        assert RULES[target](text, wrapped_model("bert-tokens")[0]) == wanted


@pytest.mark.parametrize("target", TARGETS)
def test_text_of_a_plan_stays_text(target: str) -> None:
    """Names and ids from somebody else can break out of no comment, string or pattern."""
    evil = 'x"\n- "^.*'
    table = {"h.0.w": ((2, 2), "float32"), "h.1.w": ((2, 2), "float32")}
    groups = {"h.0.w": "block.0", "h.1.w": "block.1"}
    plan = FreezePlan.from_blocks(table, groups, [1], model_id=evil)
    if target == "torchtune":
        with pytest.raises(PlanError, match="Llama's layout"):
            plan.export(target)
        return
    text = plan.export(target)
    assert text.isascii()
    model = nn.Module()
    model.h = nn.ModuleList([nn.Module(), nn.Module()])
    for block in model.h:
        block.w = nn.Parameter(build(lambda _: nn.Linear(2, 2), None).weight.detach())
    if target == "llama-factory":
        model.config = type("Config", (), {"num_hidden_layers": 2})
    if target != "peft":
        assert RULES[target](text, model) == {"h.1.w"}
    odd = {f"h.{i}.(w|.*)": ((2,), "float32") for i in range(2)}
    strange = FreezePlan.from_blocks(odd, dict(zip(odd, groups.values(), strict=True)), [1], model_id="m")
    if target == "axolotl":
        with pytest.raises(PlanError, match="reads names as patterns and would misread"):
            strange.export(target)
    if target == "regex":
        pattern = strange.export(target).strip()
        assert re.fullmatch(pattern, "h.1.(w|.*)") and not re.fullmatch(pattern, "h.0.(w|.*)")


def test_unknown_targets_get_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown target 'axolot'\. Did you mean 'axolotl'"):
        export_plan(plans_for("gpt2")["all"], "axolot")


def test_outside_names_are_checked() -> None:
    plan = plans_for("gpt2")["all"]
    with pytest.raises(PlanError, match=r"the state of lm_head\.weight must be"):
        plan.export("regex", outside={"lm_head.weight": "warm"})
    with pytest.raises(PlanError, match=r"outside: wte\.weight belongs to the plan itself"):
        plan.export("regex", outside={"wte.weight": "trainable"})


def test_a_prefix_may_come_without_its_dot() -> None:
    plan = plans_for("gpt2")["only 1"]
    assert plan.export("regex", prefix="transformer") == plan.export("regex", prefix="transformer.")

"""Reports on other trainers' configurations, each checked against the trainer's own rule.

The rules of axolotl, LLaMA-Factory, ms-swift and finetuning-scheduler are those written out in `test_export` with
their sources; PEFT is the installed one. The configurations follow the trainers' documentation; the wrong ones go wrong
as in public issues (named at each).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from freeze_plan_examples import example_plan, wrapped_model
from test_export import RULES
from torch import nn

from layerprobe.errors import BrokenFileError, UnknownNameError, UsageError
from layerprobe.plans.lint import LintReport, lint_config, read_config
from layerprobe.plans.lint.rules import ModelNames

peft = pytest.importorskip("peft", reason="the extra [peft] is not installed")


def model() -> nn.Module:
    """A Llama of twelve layers with a head of its own."""
    return wrapped_model("llama-lm", tie_word_embeddings=False)[0]


def names_of(module: Any) -> ModelNames:
    return ModelNames(
        sizes={n: p.numel() for n, p in module.named_parameters()},
        linear=frozenset(n for n, m in module.named_modules() if isinstance(m, nn.Linear)),
        n_layers=module.config.num_hidden_layers,
        head="lm_head",
    )


def verdict(config: dict[Any, Any], **options: Any) -> LintReport:
    return lint_config(config, names_of(model()), **options)


def blocks(*indices: int, under: str = "model.layers.") -> set[str]:
    starts = tuple(f"{under}{index}." for index in indices)
    return {n for n, _ in model().named_parameters() if n.startswith(starts)}


EVERY = {n for n, _ in model().named_parameters()}

# name: (trainer, configuration, whether nothing is wrong, a word of the problem or None)
WEIGHTS: dict[str, tuple[str, dict[Any, Any], str | None]] = {
    # axolotl, docs/config-reference: unfrozen_parameters
    "axolotl: two blocks and the head": (
        "axolotl",
        {"base_model": "m", "unfrozen_parameters": ["^model.layers.1.", "^model.layers.10.", "^lm_head.weight$"]},
        None,
    ),
    # Spectrum's output, as axolotl's documentation shows it
    "axolotl: modules of Spectrum": (
        "axolotl",
        {"unfrozen_parameters": ["^lm_head.weight$", "^model.embed_tokens.weight$", "model.layers.3.mlp.down_proj"]},
        None,
    ),
    "axolotl: a number that others begin with": (
        "axolotl",
        {"unfrozen_parameters": ["^model.layers.1"]},
        r"takes layer 10, 11 along; end it with a dot: '\^model.layers.1.'",
    ),
    # LLaMA-Factory #8834, #6731: the names of another architecture
    "axolotl: names of another model": (
        "axolotl",
        {"unfrozen_parameters": ["^transformer.h.3."]},
        "it trains nothing",
    ),
    "axolotl: an empty list": ("axolotl", {"base_model": "m", "unfrozen_parameters": []}, "it trains everything"),
    # LLaMA-Factory, examples/extras/…: freeze tuning and LLaMA Pro
    "llama-factory: the last two": (
        "llama-factory",
        {"finetuning_type": "freeze", "freeze_trainable_layers": 2, "freeze_trainable_modules": "all"},
        None,
    ),
    "llama-factory: every third": (
        "llama-factory",
        {"finetuning_type": "freeze", "freeze_trainable_layers": 4, "freeze_trainable_modules": "all",
         "use_llama_pro": True},
        None,
    ),
    "llama-factory: attention of the first three": (
        "llama-factory",
        {"finetuning_type": "freeze", "freeze_trainable_layers": -3, "freeze_trainable_modules": "self_attn"},
        None,
    ),
    # LLaMA-Factory #3072: an extra module whose name is part of others
    "llama-factory: norm takes layernorms along": (
        "llama-factory",
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_trainable_modules": "all",
         "freeze_extra_modules": "norm"},
        "'norm' is part of other names, and trains",
    ),
    # ms-swift, docs: freeze_parameters and trainable_parameters
    "ms-swift: freeze all, open two": (
        "ms-swift",
        {"tuner_type": "full", "freeze_parameters_ratio": 1.0,
         "trainable_parameters": ["model.layers.10.", "model.layers.11."]},
        None,
    ),
    "ms-swift: freeze the embeddings": (
        "ms-swift",
        {"tuner_type": "full", "freeze_parameters": ["model.embed_tokens", "lm_head"]},
        None,
    ),
    # ms-swift #7226: a freeze setting that quietly did nothing
    "ms-swift: a prefix of another model": (
        "ms-swift",
        {"tuner_type": "full", "freeze_parameters": ["language_model.model.layers.0."]},
        "it trains everything",
    ),
    "ms-swift: opens what is open": (
        "ms-swift",
        {"tuner_type": "full", "trainable_parameters": ["model.layers.10."]},
        "do nothing: everything trains already",
    ),
    # finetuning-scheduler, docs: a schedule by expressions
    "finetuning-scheduler: two phases": (
        "finetuning-scheduler",
        {0: {"params": ["lm_head.weight"]}, 1: {"params": [r"model.layers.(10|11)\..*"]}},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_trains_is_what_the_trainers_own_rule_trains(kind: str) -> None:
    trainer, config, problem = WEIGHTS[kind]
    found = verdict(config)
    assert found.trainer == trainer
    assert set(found.trained) == RULES[trainer](yaml.safe_dump(config), model())
    assert found.holds == (problem is None), found.problems
    if problem is not None:
        assert any(re.search(problem, text) for text in found.problems), found.problems


ADAPTERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "attention of three layers": (
        {
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": [1, 10, 11],
            "layers_pattern": "layers",
            "r": 4,
        },
        None,
    ),
    "ranks by pattern": (
        {
            "target_modules": ["q_proj", "down_proj"],
            "r": 8,
            "rank_pattern": {r"layers\.1\.mlp\.down_proj": 2},
        },
        None,
    ),
    "an expression": ({"target_modules": r".*\.layers\.[0-3]\.mlp\..*_proj", "r": 8}, None),
    "all linear maps": ({"target_modules": "all-linear", "r": 8}, None),
    # peft #2165, #752: modules of another architecture
    "modules of another model": ({"target_modules": ["c_attn"], "r": 8}, "'c_attn' matches nothing"),
    # peft #3203: one of several entries is never found
    "one name of three": ({"target_modules": ["q_proj", "v_proj", "w2"], "r": 8}, "'w2' matches nothing"),
    # unsloth #2630: layers that do not exist
    "layers beyond the last": (
        {"target_modules": ["q_proj"], "layers_to_transform": [12, 13], "r": 8},
        "'q_proj' matches nothing in those layers",
    ),
    "an expression beside layers": (
        {"target_modules": ".*q_proj", "layers_to_transform": [3], "r": 8},
        "layers_to_transform does nothing beside target_modules as one expression",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_where_adapters_go_is_where_peft_puts_them(kind: str) -> None:
    config, problem = ADAPTERS[kind]
    found = verdict({"peft_type": "LORA", **config})
    assert found.trainer == "peft" and found.holds == (problem is None), found.problems
    if problem is not None:
        assert any(problem in text for text in found.problems)
    try:
        tuned = peft.get_peft_model(model(), peft.LoraConfig(**config))
    except ValueError:
        assert not found.adapters or problem
        return
    layers = {n: m for n, m in tuned.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert found.adapters == {n.removeprefix("base_model.model."): m.r["default"] for n, m in layers.items()}


def test_a_freeze_setting_beside_adapters_does_nothing() -> None:
    for config, words in (
        ({"finetuning_type": "lora", "freeze_trainable_layers": 4}, "they need finetuning_type: freeze"),
        ({"tuner_type": "lora", "freeze_parameters": ["model.layers.0."]}, "they need tuner_type: full"),
        ({"base_model": "m", "adapter": "lora", "lora_target_modules": ["q_proj"],
          "unfrozen_parameters": ["^model.layers.1."]}, "unfrozen_parameters does nothing beside adapter: lora"),
    ):  # fmt: skip
        found = verdict(config)
        assert found.adapters and not found.trained and not found.holds
        assert any(words in text for text in found.problems)


def test_llama_pro_that_does_not_divide_stops() -> None:
    found = verdict({"finetuning_type": "freeze", "freeze_trainable_layers": 5, "use_llama_pro": True})
    assert (
        "12 layers are not divisible by 5" in " ".join(found.problems)
        and "it trains nothing" in found.problems
    )


def test_phases_that_overlap_or_leave_gaps_are_named() -> None:
    found = verdict({0: {"params": ["lm_head.weight"]}, 2: {"params": ["lm_head.weight", "nothing"]}})
    told = " ".join(found.problems)
    assert "without gaps, these are 0, 2" in told and "lm_head.weight is in an earlier entry" in told
    assert "'nothing' matches nothing" in told


def test_a_key_that_is_nearly_right_is_named() -> None:
    found = verdict({"finetuning_type": "freeze", "freeze_trainable_layer": 4})
    assert found.problems == (
        "'freeze_trainable_layer' is no key of llama-factory, so it does nothing; 'freeze_trainable_layers' was meant",
    )


def test_compared_with_a_plan() -> None:
    plan = example_plan("llama", [10, 11])
    config = {"finetuning_type": "freeze", "freeze_trainable_layers": 2}
    assert verdict(config, plan=plan).differences == () and verdict(config, plan=plan).holds
    assert verdict(config, plan=plan).lines()[-1] == "trains exactly the plan"
    other = verdict({"finetuning_type": "freeze", "freeze_trainable_layers": 3}, plan=plan)
    assert not other.holds and "also trains 9: model.layers.9." in other.differences[0]
    fewer = verdict({"finetuning_type": "freeze", "freeze_trainable_layers": 1}, plan=plan)
    assert "leaves out 9: model.layers.10." in fewer.differences[0]
    frozen = example_plan("llama", [])
    adapted = frozen.with_adapters({f"layers.{i}.self_attn.q_proj": 4 for i in (1, 10)})
    exported = json.loads(adapted.export("peft", prefix="model."))
    assert verdict({"peft_type": "LORA", **exported}, plan=adapted).holds
    exported["layers_to_transform"] = [1]
    assert (
        "other adapters at 1 modules"
        in verdict({"peft_type": "LORA", **exported}, plan=adapted).differences[0]
    )


@pytest.mark.parametrize("target", ["axolotl", "llama-factory", "ms-swift", "finetuning-scheduler"])
def test_what_is_exported_is_found_to_be_the_plan(target: str, tmp_path: Path) -> None:
    plan = example_plan("llama", [10, 11])
    path = tmp_path / "config.yaml"
    path.write_text(plan.export(target, prefix="model."))
    found = verdict(read_config(path), plan=plan, trainer=target)
    assert found.holds and set(found.trained) == blocks(10, 11)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="there is no configuration"):
        read_config(tmp_path / "none.yaml")
    for text, words in (
        ("[1, 2]", "holds no configuration"),
        ("a: [", "cannot read"),
        ("", "holds no configuration"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(BrokenFileError, match=words):
            read_config(tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match="the keys do not tell whose configuration this is"):
        verdict({"learning_rate": 1e-3})
    with pytest.raises(UnknownNameError, match=r"unknown trainer 'axolotol'. Did you mean 'axolotl'"):
        verdict({"unfrozen_parameters": ["a"]}, trainer="axolotol")

"""Tensors with several names: exports name them as the model they are for lists them."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as tf
from test_export import RULES
from torch import nn

from layerprobe.backbones.layout import find_layout, image_or_text_tower, tied_names
from layerprobe.errors import BrokenFileError, PlanError
from layerprobe.plans import FreezePlan, parameter_table

_BART = {
    "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
    "max_position_embeddings": 80, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 99}

# Name: (class, configuration, what the model puts before the encoder's names, its name for the shared embedding)
MODELS: dict[str, tuple[Any, Any, str, str]] = {
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config(**_T5), "encoder", "shared.weight"),
    "t5 bare": (tf.T5Model, tf.T5Config(**_T5), "encoder", "shared.weight"),
    "t5 encoder": (tf.T5EncoderModel, tf.T5Config(**_T5), "encoder", "shared.weight"),
    "mt5": (tf.MT5ForConditionalGeneration, tf.MT5Config(**_T5), "encoder", "shared.weight"),
    "bart": (tf.BartForConditionalGeneration, tf.BartConfig(**_BART), "model.encoder", "model.shared.weight"),
    "bart bare": (tf.BartModel, tf.BartConfig(**_BART), "encoder", "shared.weight"),
    "pegasus": (
        tf.PegasusForConditionalGeneration,
        tf.PegasusConfig(**_BART),
        "model.encoder",
        "model.shared.weight",
    ),
}
NAMED = ("axolotl", "finetuning-scheduler", "hf-trainer", "regex")


def plan_of(name: str, state: str) -> tuple[FreezePlan, nn.Module, str]:
    kind, config, prefix, _ = MODELS[name]
    full = kind(config)
    tower = image_or_text_tower(full)
    plan = FreezePlan.from_blocks(
        parameter_table(tower),
        find_layout(tower, tower.config).parameter_groups,
        [2],
        model_id=name,
        embeddings=state,
        tied=tied_names(full, tower),
    )
    return FreezePlan.from_dict(plan.to_dict()), full, prefix


def others(model: nn.Module, prefix: str, shared: str) -> dict[str, str]:
    return {
        n: "frozen" for n, _ in model.named_parameters() if not n.startswith(prefix + ".") and n != shared
    }


@pytest.mark.parametrize("state", ["trainable", "frozen"])
@pytest.mark.parametrize("target", NAMED)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "t5 encoder"])
def test_a_shared_embedding_follows_the_plan_in_every_target(name: str, target: str, state: str) -> None:
    plan, model, prefix = plan_of(name, state)
    shared = MODELS[name][3]
    text = plan.export(target, prefix=prefix, outside=others(model, prefix, shared))
    got = RULES[target](text, model)
    # The truth is the plan on the model itself.
    plan.apply(model, outside="frozen", prefix=prefix + ".")
    assert got == {n for n, p in model.named_parameters() if p.requires_grad}
    assert (shared in got) == (state == "trainable")


@pytest.mark.parametrize(
    "plan_from, into", [("t5", "t5 encoder"), ("bart", "bart bare"), ("bart bare", "bart")]
)
def test_a_plan_from_one_class_is_exported_for_another(plan_from: str, into: str) -> None:
    plan, _, _ = plan_of(plan_from, "trainable")
    _, model, prefix = plan_of(into, "trainable")
    shared = MODELS[into][3]
    for target in NAMED:
        text = plan.export(target, prefix=prefix, outside=others(model, prefix, shared))
        assert shared in RULES[target](text, model)


def test_the_encoder_alone_keeps_its_own_name() -> None:
    plan, model, _ = plan_of("t5", "trainable")
    tower = image_or_text_tower(model)
    for target in NAMED:
        assert RULES[target](plan.export(target), tower) == set(plan.trainable)


def test_what_is_said_about_another_name_must_agree() -> None:
    plan, model, prefix = plan_of("t5", "trainable")
    outside = others(model, prefix, "shared.weight")
    agreed = plan.export("regex", prefix=prefix, outside=outside | {"shared.weight": "trainable"})
    assert agreed == plan.export("regex", prefix=prefix, outside=outside)
    for name in ("shared.weight", "decoder.embed_tokens.weight"):
        with pytest.raises(PlanError, match=f"{name} cannot be frozen: it is a tensor of the plan"):
            plan.export("regex", prefix=prefix, outside=outside | {name: "frozen"})


def test_peft_would_train_a_copy_and_says_so() -> None:
    plan, _, prefix = plan_of("bart", "trainable")
    with pytest.raises(
        PlanError, match=r"one tensor with model\.\w+\.embed_tokens\.weight.*export to hf-trainer"
    ):
        plan.export("peft", prefix=prefix)


def test_models_without_other_names_have_plans_as_before() -> None:
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99))
    assert tied_names(model, image_or_text_tower(model)) == {}
    base = image_or_text_tower(model)
    groups = find_layout(base, base.config).parameter_groups
    assert "tied" not in FreezePlan.from_blocks(parameter_table(base), groups, [1], model_id="gpt2").to_dict()


@pytest.mark.parametrize(
    "tied, reason",
    [
        ([], r"'tied' must be an object, not \[\]"),
        (
            {"embed_tokens.weight": "shared.weight"},
            "'tied' needs at least two names for 'embed_tokens.weight'",
        ),
        ({"nowhere.weight": ["a.weight", "b.weight"]}, "not among the parameters: 'nowhere.weight'"),
    ],
)
def test_a_broken_field_is_named(tied: object, reason: str) -> None:
    plan, _, _ = plan_of("t5", "frozen")
    with pytest.raises(BrokenFileError, match=reason):
        FreezePlan.from_dict({**plan.to_dict(), "tied": tied})


def test_a_file_for_the_trainer_refuses_to_split_a_tensor() -> None:
    """Without the names (an old plan file) the exported code still looks at the tensors themselves."""
    plan, model, prefix = plan_of("t5", "trainable")
    raw = plan.to_dict()
    del raw["tied"]
    old = FreezePlan.from_dict(raw)
    outside = others(model, prefix, "shared.weight")
    assert "shared.weight" in RULES["hf-trainer"](
        old.export("hf-trainer", prefix=prefix, outside=outside), model
    )
    text = old.export("hf-trainer", prefix=prefix, outside=outside | {"shared.weight": "frozen"})
    with pytest.raises(ValueError, match="is one tensor with what it freezes"):
        RULES["hf-trainer"](text, model)

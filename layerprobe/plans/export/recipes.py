"""Trainers that are written as a script around a model object: TRL, unsloth, torchtune."""

from __future__ import annotations

import json
import re

from layerprobe.errors import PlanError
from layerprobe.plans.export.modules import write_peft
from layerprobe.plans.export.names import ExportNames, write_hf_trainer
from layerprobe.plans.plan import few

_PLACE = '''
LORA = {arguments}


def place(model):
    """The model with exactly the plan's adapters; all its own weights are frozen but those of modules_to_save."""
    {imported}

    return {call}
'''


def write_trl(names: ExportNames) -> str:
    """A Python module with `freeze(model)`, or with `place(model)` where the plan has adapters.

    Its rule (trl 1.16.0, trl/trainer/sft_trainer.py, and `transformers.Trainer`, whose optimizer takes what requires a
    gradient): `SFTTrainer` loads a model that is named by a string anew, with everything trainable, and places adapters
    of its own where `peft_config` is given; a model object without it is trained as it comes.
    """
    if not names.adapters:
        return write_hf_trainer(names, "trl: freeze(model), then SFTTrainer(model=model) without peft_config")
    head = names.comment("trl: SFTTrainer(model=place(model)) without peft_config")
    imported = "from peft import LoraConfig, get_peft_model"
    return head + _place(json.loads(write_peft(names)), imported, "get_peft_model(model, LoraConfig(**LORA))")


def write_unsloth(names: ExportNames) -> str:
    """A Python module with `freeze(model)`, or with `place(model)` where the plan has adapters.

    Its rule (unsloth 2026.10.9, unsloth/models/llama.py, `FastLlamaModel.get_peft_model`, and unsloth_zoo 2026.10.9,
    training_utils.py, `prepare_model_for_training`): loading with `full_finetuning=True` makes every parameter
    trainable, and `get_peft_model` then does nothing; else `get_peft_model` passes its arguments on to
    `peft.LoraConfig` and trains adapters alone, but for `lm_head` and `embed_tokens` in `modules_to_save`.
    """
    if not names.adapters:
        use = "unsloth: from_pretrained(..., full_finetuning=True), then freeze(model), then SFTTrainer(model=model)"
        return write_hf_trainer(names, use)
    if names.trainable:
        raise PlanError(
            f"unsloth trains no weights beside adapters, and the plan trains {few(names.trainable)}; export to trl"
        )
    head = names.comment("unsloth: SFTTrainer(model=place(model)) without peft_config")
    imported = "from unsloth import FastLanguageModel"
    return head + _place(
        json.loads(write_peft(names)), imported, "FastLanguageModel.get_peft_model(model, **LORA)"
    )


def _place(arguments: dict[str, object], imported: str, call: str) -> str:
    lines = "".join(f"    {key!a}: {value!a},\n" for key, value in arguments.items())
    return _PLACE.format(arguments="{\n" + lines + "}", imported=imported, call=call)


_TORCHTUNE_PARTS = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "mlp_norm",
}
_TORCHTUNE_OUTSIDE = {
    "embed_tokens.weight": "tok_embeddings.weight",
    "norm.weight": "norm.scale",
    "lm_head.weight": "output.weight",
}


def write_torchtune(names: ExportNames) -> str:
    """A Python module with `freeze(model)` in torchtune's names; YAML for its LoRA recipes where the plan has adapters.

    Its rule (torchtune 0.6.1): checkpoints of Llama's layout are renamed on loading (torchtune/models/
    convert_weights.py); the full recipes freeze nothing and hand all parameters to the optimizer (recipes/
    full_finetune_single_device.py, `_setup_optimizer`), which skips those without a gradient, so `freeze` belongs at
    the end of `_setup_model` in a copy (`tune cp`). The LoRA recipes place adapters of one rank on the same modules of
    *every* layer, one of attention at least, and on all of the MLP or nothing of it.
    """
    if not names.adapters:
        return write_hf_trainer(names, "torchtune: freeze(model) at the end of _setup_model", _torchtune_name)
    layers: dict[str, set[str]] = {block: set() for block in names.blocks}
    for module in names.adapters:
        block = next((block for block in names.blocks if module.startswith(f"{block}.")), "")
        part = _torchtune_name(f"{module}.weight").removesuffix(".weight").split(".", 2)[-1]
        layers.setdefault(block, set()).add(part)
    parts = next(iter(layers.values()))
    attention = sorted(part.removeprefix("attn.") for part in parts if part.startswith("attn."))
    mlp = parts & {"mlp.w1", "mlp.w2", "mlp.w3"}
    ranks = set(names.adapters.values())
    same = all(found == parts for found in layers.values()) and len(ranks) == 1
    if names.trainable or not same or not attention or len(mlp) not in (0, 3):
        raise PlanError(
            "torchtune places adapters of one rank on the same modules of every layer, one of attention at least and "
            "the MLP's together, and trains nothing else; this plan places others; export to peft"
        )
    rank = ranks.pop()
    return names.comment("torchtune") + (
        f"model:\n  lora_attn_modules: {json.dumps(attention)}\n  apply_lora_to_mlp: {json.dumps(bool(mlp))}\n"
        f"  lora_rank: {rank}\n  lora_alpha: {json.dumps(names.plan.adapter_scale * rank)}\n  lora_dropout: 0.0\n"
    )


def _torchtune_name(name: str) -> str:
    """A parameter of Llama's layout as torchtune names it; PlanError for any other."""
    bare = name.removeprefix("model.")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", bare)
    part = _TORCHTUNE_PARTS.get(match[2]) if match else None
    if match and part:
        return f"layers.{match[1]}.{part}.{'scale' if part.endswith('norm') else 'weight'}"
    if bare not in _TORCHTUNE_OUTSIDE:
        raise PlanError(f"torchtune knows the names of Llama's layout, and {few([name])} is none of them")
    return _TORCHTUNE_OUTSIDE[bare]

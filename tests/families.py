"""Tiny models, built from configurations, of every family the README names. 3 blocks, width 32."""

from __future__ import annotations

from pathlib import Path

import transformers
from torch import nn

_C = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_LM = {**_C, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GQA = {**_LM, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
_IMAGE = {**_C, "image_size": 32, "patch_size": 8}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}

# name: (class that saved the checkpoint, configuration class, its arguments)
NAMED_FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT, "n_positions": 128}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GQA),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _LM),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_LM, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GQA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GQA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GQA),
    "bert": ("BertForMaskedLM", "BertConfig", _LM),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _LM),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _IMAGE),
    "dinov2": ("Dinov2Model", "Dinov2Config", _IMAGE),
    "clip-vision": ("CLIPVisionModel", "CLIPVisionConfig", _IMAGE),
}
"""The 13 families that users are promised (MiniLM is BERT's)."""

TUPLE_FAMILIES = {
    "deberta-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", _LM),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "vocab_size": 99,
            "attention_types": [[["global", "local"], 2]],
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt-j": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4, "n_positions": 128}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 99},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_LM, "bos_token_id": 1, "eos_token_id": 2}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 99},
    ),
}
"""Families whose blocks still return tuples in transformers 5."""

OTHER_FAMILIES = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GQA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GQA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GQA),
}

FAMILIES = {**NAMED_FAMILIES, **TUPLE_FAMILIES, **OTHER_FAMILIES}

# resid_post = resid_pre + attn_out + mlp_out holds where nothing scales or normalises what is added.
ADDITIVE = [
    "gpt2", "llama", "gpt-neox", "opt", "qwen2", "gemma", "mistral", "vit", "deit", "clip-vision",
    "gpt-neo", "gpt-j", "bloom", "falcon", "t5", "qwen3",
]  # fmt: skip


def build(family: str, **overrides: object) -> nn.Module:
    """A randomly initialised model of the family, as its checkpoints are saved."""
    model_class, config_class, arguments = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**arguments, **overrides})
    transformers.set_seed(0)
    made: nn.Module = getattr(transformers, model_class)(config)
    return made.eval()


def save(family: str, folder: Path, **overrides: object) -> Path:
    """Save a tiny checkpoint of the family into `folder`."""
    build(family, **overrides).save_pretrained(folder)  # type: ignore[operator]
    return folder

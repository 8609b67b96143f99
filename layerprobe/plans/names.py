"""Names of parameters in a model, without what torch and PEFT put into them."""

from __future__ import annotations

import re

_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|modules_to_save\.[^.]+)\."
)
"""Segments that torch.compile, FSDP, activation checkpointing and PEFT put anywhere into a name."""

_ADAPTERS = re.compile(
    r"(?:^|\.)(?:(?:adamss|boft|c3a|delora|fourierft|hada|hira|hra|ia3|ln_tuning|lokr|lora|miss|oft|randlora|road"
    r"|shira|trainable_tokens|vblora|vera)_\w*|original_module)(?:\.|$)"
)
"""What PEFT adds beside a layer's own weights, by its prefixes (peft 0.21.2, `PEFT_TYPE_TO_PREFIX_MAPPING`)."""


def clean_name(name: str) -> str:
    """`name` without the segments of wrappers: what the parameter is called in the model that was wrapped.

    >>> clean_name("_orig_mod.layers.0._checkpoint_wrapped_module.mlp.weight")
    'layers.0.mlp.weight'
    >>> clean_name("h.0.attn.c_attn.base_layer.weight")
    'h.0.attn.c_attn.weight'
    """
    return _WRAPPERS.sub("", name)


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to the experts that a router chooses from, each alone or all stacked in one.

    >>> is_expert("layers.0.mlp.experts.gate_up_proj"), is_expert("layers.0.mlp.shared_experts.up_proj.weight")
    (True, False)
    """
    return ".experts." in name


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter of PEFT, or is the original beside a copy that PEFT trains.

    >>> is_adapter("h.0.attn.c_attn.lora_A.default.weight"), is_adapter("h.0.attn.c_attn.base_layer.weight")
    (True, False)
    """
    return _ADAPTERS.search(name) is not None


def is_original(name: str) -> bool:
    """Whether it is what PEFT keeps of a module that it trains a copy of (`modules_to_save`)."""
    return "original_module" in name.split(".")


def adapter_part(name: str) -> tuple[str, str] | None:
    """Module and part of a weight of LoRA on a linear map, None for any other parameter.

    >>> adapter_part("h.0.attn.c_attn.lora_A.default.weight")
    ('h.0.attn.c_attn', 'lora_A')
    """
    match = re.fullmatch(r"(.+)\.(lora_[AB])\.[^.]+\.weight", name)
    return (match[1], match[2]) if match else None

"""Tiny real transformers models with twelve blocks, bare and under task heads, for the tests of freeze plans."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from layerprobe.plans import FreezePlan, parameter_table, standard_blocks

N_BLOCKS = 12

BLOCK_PATTERN = {
    "gpt2": r"h\.(\d+)\.",
    "llama": r"layers\.(\d+)\.",
    "bert": r"encoder\.layer\.(\d+)\.",
    "vit": r"(?:encoder\.)?layers?\.(\d+)\.",
}

FAMILIES = tuple(BLOCK_PATTERN)


def config(family: str, n_blocks: int = N_BLOCKS, width: int = 16, **changes: Any) -> Any:
    """A configuration with `n_blocks` blocks that builds in milliseconds."""
    if family == "gpt2":
        made: dict[str, Any] = {
            "n_layer": n_blocks,
            "n_embd": width,
            "n_head": 2,
            "vocab_size": 40,
            "n_positions": 24,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return transformers.GPT2Config(**{**made, **changes})
    made = {
        "num_hidden_layers": n_blocks,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 2,
    }
    if family == "vit":
        return transformers.ViTConfig(**{**made, "image_size": 8, "patch_size": 4, **changes})
    made |= {"vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": 0}
    kinds = {"llama": transformers.LlamaConfig, "bert": transformers.BertConfig}
    return kinds[family](**{**made, **changes})


def build(kind: Callable[[Any], nn.Module], configuration: Any, seed: int = 0) -> Any:
    """A model of class `kind`, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(configuration)


BARE: dict[str, Callable[[Any], nn.Module]] = {
    "gpt2": transformers.GPT2Model,
    "llama": transformers.LlamaModel,
    "bert": partial(transformers.BertModel, add_pooling_layer=False),
    "vit": partial(transformers.ViTModel, add_pooling_layer=False),
}

WRAPPED: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "gpt2-lm": (transformers.GPT2LMHeadModel, "transformer."),
    "gpt2-classifier": (transformers.GPT2ForSequenceClassification, "transformer."),
    "llama-lm": (transformers.LlamaForCausalLM, "model."),
    "llama-classifier": (transformers.LlamaForSequenceClassification, "model."),
    "bert-masked": (transformers.BertForMaskedLM, "bert."),
    "bert-tokens": (transformers.BertForTokenClassification, "bert."),
    "vit-classifier": (transformers.ViTForImageClassification, "vit."),
}


def bare_model(family: str, n_blocks: int = N_BLOCKS, seed: int = 0, **changes: Any) -> Any:
    """The base model of a family."""
    return build(BARE[family], config(family, n_blocks, **changes), seed)


def wrapped_model(name: str, seed: int = 0, **changes: Any) -> tuple[Any, str]:
    """A base model under a task head, and the prefix that the head's class puts before its names."""
    kind, prefix = WRAPPED[name]
    return build(kind, config(name.split("-")[0], **changes), seed), prefix


def groups_of(family: str, names: Any) -> dict[str, str]:
    """Name -> group, by what these four families call things."""

    def group(name: str) -> str:
        if match := re.match(BLOCK_PATTERN[family], name):
            return f"block.{match[1]}"
        if "wpe" in name or "position" in name:
            return "positions"
        if re.match(r"(ln_f|norm|layernorm)\.", name):
            return "norm"
        return "other" if name.startswith("pooler") else "embeddings"

    return {name: group(name) for name in names}


def example_plan(family: str, blocks: Any, *, n_blocks: int = N_BLOCKS, **options: Any) -> FreezePlan:
    """A plan for the bare model of a family."""
    table = parameter_table(bare_model(family, n_blocks))
    return FreezePlan.from_blocks(
        table,
        groups_of(family, table),
        blocks,
        model_id=options.pop("model_id", family),
        revision=options.pop("revision", "abc123"),
        **options,
    )


def trained_names(model: nn.Module) -> set[str]:
    """What would be trained, by every name it has."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def one_step(model: nn.Module, family: str, **call: Any) -> None:
    """A step of Adam with everything that requires a gradient."""
    torch.manual_seed(1)
    if family == "vit":
        call["pixel_values"] = torch.randn(4, 3, 8, 8)
    else:
        call["input_ids"] = torch.randint(3, 40, (4, 10))
    out = model(**call)
    value = out.loss if getattr(out, "loss", None) is not None else out[0].square().mean()
    value.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()


def baseline_plans(
    table: Any, groups: Mapping[str, str], norm_names: Iterable[str], *, model_id: str, first: int = 5
) -> dict[str, FreezePlan]:
    """Plans of whole blocks by name, `all` with what lies outside them but the embeddings, and `norms` only."""
    n_blocks = len({group for group in groups.values() if group.startswith("block.")})
    outside = dict.fromkeys(("norms", "positions", "other"), "trainable")
    plans = {
        name: FreezePlan.from_blocks(
            table, groups, blocks, model_id=model_id, **(outside if name == "all" else {})
        )
        for name, blocks in standard_blocks(n_blocks, first=first).items()
    }
    norms = FreezePlan.from_blocks(table, groups, (), model_id=model_id, also_trainable=norm_names)
    return {**plans, "norms": norms}

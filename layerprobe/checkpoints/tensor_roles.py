"""From a tensor's name to its role: which block, which module kind, which way the matrix lies.

The names are those of the transformers library's families; an unknown name is kind "other", never an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from layerprobe.checkpoints.safetensors import StoredTensor

KINDS = (
    "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "fc", "down", "router",
    "norm", "bias", "embedding", "head", "other", "buffer",
)  # fmt: skip
"""Module kinds. `fc` is the first layer of an MLP without a gate, `down` the last layer of any MLP;
`buffer` is no weight at all (causal masks, rotary tables)."""

GROUPS = ("blocks", "norms_biases", "embeddings", "head", "other")
"""Kept apart in every roll-up; `blocks` are the weight matrices inside blocks."""

_BLOCK = re.compile(
    r"^(?P<stack>(?:.*?\.)?)(?:layers?|h|blocks?|resblocks|transformer_blocks)\.(?P<outer>\d+)\."
    r"(?:blocks\.(?P<inner>\d+)\.)?(?P<rest>.+)$"
)
_BUFFER = re.compile(
    r"(?:attn|attention)\.(?:masked_bias|bias)$|(?:^|\.)(?:inv_freq|position_ids|token_type_ids|attn_mask"
    r"|relative_position_index|num_batches_tracked|running_mean|running_var|freqs_cis)$"
)
_CONV1D = re.compile(r"\.c_(?:attn|proj|fc)\.weight$")
_SIDE_BY_SIDE = re.compile(r"(?:^|\.)(?:c_attn|qkv|to_qkv|qkv_proj|in_proj|in_proj_weight)(?:\.weight)?$")
# `query_key_value` (GPT-NeoX, BLOOM, Falcon) interleaves q, k and v head by head and is left whole.
_BIAS = re.compile(r"(?:^|[._])(?:bias|\w*_bias)$")
_RULES = tuple(
    (kind, re.compile(rf"(?:^|\.)(?:{pattern})(?:\.weight)?$", re.I))
    for kind, pattern in (
        ("norm", r"(?:\w*norm\w*|ln|ln_?\d|ln_\w+|\w+_ln)(?:\.(?:gamma|beta|scale|bias))?"),
        ("router", r"router|(?:mlp|block_sparse_moe|feed_forward)\.gate|router\.(?:classifier|layer)"),
        ("qkv", r"c_attn|qkv|to_qkv|qkv_proj|query_key_value|wqkv|attn_qkv|in_proj|in_proj_weight"),
        ("gate_up", r"gate_up_proj|gate_and_up_proj"),
        ("gate", r"gate_proj|w1|wi_0"),
        ("up", r"up_proj|w3|wi_1"),
        ("q", r"q_proj|query(?:_proj)?|q_lin|wq|to_q|\w*(?:attn|attention)\.q"),
        ("k", r"k_proj|key(?:_proj)?|k_lin|wk|to_k|\w*(?:attn|attention)\.k"),
        ("v", r"v_proj|value(?:_proj)?|v_lin|wv|to_v|\w*(?:attn|attention)\.v"),
        (
            "o",
            r"o_proj|out_proj|out_lin|to_out\.0|attention\.wo|\w*(?:attn|attention)\.(?:c_proj|proj|o|dense)"
            r"|(?:attn|attention)\.output(?:\.dense)?",
        ),
        ("fc", r"c_fc|fc1|fc_in|lin1|linear1|intermediate\.dense|dense_h_to_4h|wi|mlp\.0"),
        ("down", r"down_proj|w2|wo|mlp\.c_proj|fc2|fc_out|lin2|linear2|output\.dense|dense_4h_to_h|mlp\.2"),
        (
            "embedding",
            r"wte|wpe|\w*embed\w*(?:\.\w+)*|cls_token|dist\w*_token|mask_token|reg\w*_tokens?|shared"
            r"|relative_attention_bias|\w*visual\.conv1",
        ),
        (
            "head",
            r"lm_head(?:\.decoder)?|embed_out|classifier|score|head|predictions\.decoder|output_projection"
            r"|visual_projection|text_projection|qa_outputs",
        ),
    )
)


@dataclass(frozen=True, kw_only=True)
class TensorRole:
    """Where a tensor belongs and what it does there.

    `block` counts from 0 within its `stack` (the name before the list of blocks: a model with an encoder
    and a decoder has two); both are None outside the blocks. `transposed` is true for the Conv1D matrices
    of GPT-2, stored inputs × outputs instead of outputs × inputs.
    """

    block: int | None
    stack: str | None
    kind: str
    group: str
    transposed: bool = False


def tensor_roles(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorRole]:
    """The role of every tensor of a checkpoint, from names and shapes.

    All are needed at once: where blocks are nested (Swin: `layers.1.blocks.0`) their count runs through,
    and whether `c_proj` is transposed shows only at its siblings.

    >>> tensor_roles({"h.3.mlp.c_fc.weight": (8, 32)})["h.3.mlp.c_fc.weight"]
    TensorRole(block=3, stack='', kind='fc', group='blocks', transposed=True)
    """
    matches = {name: _BLOCK.match(name) for name in shapes}
    nested: dict[str, set[tuple[int, int]]] = {}
    for match in matches.values():
        if match is not None and match["inner"] is not None:
            nested.setdefault(match["stack"], set()).add((int(match["outer"]), int(match["inner"])))
    running = {stack: {key: i for i, key in enumerate(sorted(keys))} for stack, keys in nested.items()}
    conv1d = any(_is_conv1d(name, shape) for name, shape in shapes.items())
    roles = {}
    for name, shape in shapes.items():
        match = matches[name]
        block: int | None = None
        if match is not None:
            block = int(match["outer"])
            if match["stack"] in running:
                # What a stage holds beside its blocks (a down-sampling layer) is outside the blocks.
                inner = match["inner"]
                block = None if inner is None else running[match["stack"]][block, int(inner)]
        kind = module_kind(match["rest"] if match is not None else name, shape)
        roles[name] = TensorRole(
            block=block,
            stack=match["stack"].rstrip(".") if match is not None and block is not None else None,
            kind=kind,
            group=_group(kind, block, shape),
            transposed=conv1d and len(shape) == 2 and _CONV1D.search(name) is not None,
        )
    return roles


def module_kind(name: str, shape: tuple[int, ...]) -> str:
    """One of `KINDS` for a name (without its block prefix).

    >>> module_kind("self_attn.q_proj.weight", (8, 8)), module_kind("mlp.c_proj.weight", (32, 8))
    ('q', 'down')
    """
    if _BUFFER.search(name) and (not name.endswith(".bias") or len(shape) == 4):
        return "buffer"
    rules = iter(_RULES)
    if next(rules)[1].search(name):
        return "norm"
    if _BIAS.search(name) and "relative_attention_bias" not in name:
        return "bias"
    return next((kind for kind, rule in rules if rule.search(name)), "other")


def _is_conv1d(name: str, shape: tuple[int, ...]) -> bool:
    if len(shape) != 2:
        return False
    return (name.endswith("c_attn.weight") and shape[1] == 3 * shape[0]) or (
        name.endswith("c_fc.weight") and shape[1] > shape[0]
    )


def _group(kind: str, block: int | None, shape: tuple[int, ...]) -> str:
    if kind in ("norm", "bias"):
        return "norms_biases"
    if kind in ("embedding", "head"):
        return "embeddings" if kind == "embedding" else "head"
    if block is not None and kind != "buffer":
        return "blocks" if len(shape) >= 2 else "norms_biases"
    return "other"


def fused_parts(tensor: StoredTensor, role: TensorRole) -> list[tuple[str, StoredTensor]]:
    """(kind, part) for a matrix that holds several modules side by side (GPT-2's c_attn); else an empty list.

    A part is named like its matrix with the kind in brackets. Grouped-query matrices (more columns than
    thirds) are cut by q having as many outputs as inputs, k and v sharing the rest.
    """
    if len(tensor.shape) != 2 or tensor.skip is not None or tensor.alias_of is not None:
        return []
    outputs, inputs = reversed(tensor.shape) if role.transposed else tensor.shape
    kinds: tuple[str, ...]
    if role.kind == "gate_up" and outputs % 2 == 0:
        kinds, sizes = ("gate", "up"), [outputs // 2] * 2
    elif role.kind == "qkv" and _SIDE_BY_SIDE.search(tensor.name) and inputs < outputs <= 3 * inputs:
        rest = outputs - inputs
        if rest % 2:
            return []
        kinds, sizes = ("q", "k", "v"), [inputs, rest // 2, rest // 2]
    else:
        return []
    parts, start = [], 0
    for kind, size in zip(kinds, sizes, strict=True):
        parts.append((kind, tensor.part(kind, start, start + size, columns=role.transposed)))
        start += size
    return parts

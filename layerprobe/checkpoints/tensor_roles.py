"""From a tensor's name to its role: which block, which module kind, which way the matrix lies.

Names are places in the module tree: a matrix inside attention, inside an MLP or inside a mixer that is neither is
judged by the words that are used there. An unknown name is kind "other", never an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from layerprobe.checkpoints.parameters import is_buffer

KINDS = (
    "q", "k", "v", "kv", "qkv", "o", "gate", "up", "gate_up", "fc", "down", "router", "mixer",
    "norm", "bias", "embedding", "head", "other", "buffer",
)  # fmt: skip
"""Module kinds. `fc` is the first layer of an MLP without a gate, `down` the last layer of any MLP; `mixer` is any
matrix of what mixes tokens without attention (Mamba, RWKV, convolutions); `buffer` is no weight at all."""

GROUPS = ("blocks", "norms_biases", "embeddings", "head", "other")
"""Kept apart in every roll-up; `blocks` are the weight matrices inside blocks."""

_BLOCK = re.compile(
    r"^(?P<stack>(?:.*?\.)?)(?:layers?|h|blocks?|resblocks|transformer_blocks)\.(?P<outer>\d+)\."
    r"(?:blocks\.(?P<inner>\d+)\.)?(?P<rest>.+)$"
)
_CONV1D = re.compile(r"\.(?:c_(?:attn|proj|fc)|q_attn)\.weight$")
_BIAS = re.compile(r"(?:^|[._])(?:bias|\w*_bias)$")

_STATE = re.compile(r"^(.*)\.(?:A_log|D|dt_bias|x_proj|(\w*conv_?1d)|time_decay|time_first|rg_lru)(?:\.|$)")
"""What only a recurrence or a convolution over tokens has: the module that holds it is a mixer, whatever its name."""

_PLACES = (
    ("attention", re.compile(r"attn|attention|^mha$|^att$", re.I)),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|^ff(?:_|$)|densereludense|moe|expert|intermediate", re.I)),
    (
        "mixer",
        re.compile(r"^(?:(?:short_?)?conv(?:_module)?|mamba\w*|ssm|time_mix\w*|hyena|[ms]lstm\w*)$", re.I),
    ),
)
"""Place → the module names that mean it; in a name the outermost module that means anything decides."""

_NORM = r"(?:\w*norm\w*|ln|ln_?\d|ln_\w+|\w+_ln)(?:\.(?:gamma|beta|scale|bias))?"
_EMBEDDING = (
    r"wte|wpe|\w*embed\w*(?:\.\w+)*|cls_token|dist\w*_token|mask_token|reg\w*_tokens?|shared"
    r"|relative_attention_bias|\w*visual\.conv1"
)
_Q = r"q_proj|query(?:_proj|_global)?|q_lin|linear_q|wq|to_q"
_K = r"k_proj|key(?:_proj|_global)?|k_lin|linear_k|wk|to_k"
_V = r"v_proj|value(?:_proj|_global)?|v_lin|linear_v|wv|to_v"
_O = r"o_proj|out_proj|out_lin|linear_out|output_proj|projection_layer|to_out(?:\.0)?"
_QKV = r"qkv|to_qkv|qkv_proj|query_key_value|wqkv|attn_qkv|in_proj_weight"
_GATE_UP, _GATE, _UP = r"gate_up_proj|gate_and_up_proj|up_gate_proj", r"gate_proj|w1|wi_0", r"up_proj|w3|wi_1"
_FC = r"c_fc|fc1|fc_in|lin1|linear1|dense_h_to_4h|wi"
_DOWN = r"down_proj|w2|wo|fc2|fc_out|lin2|linear2|output\.dense|dense_4h_to_h"


_ASIDE = re.compile(r"(?:^|\.)(?:rel(?:ative)?_(?:pos|logits)\w*|indexer|compressor)\.")
"""Modules inside attention that make a bias or choose tokens, with projections of their own."""


def _rules(*rules: tuple[str, str]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((kind, re.compile(rf"(?:^|\.)(?:{pattern})(?:\.weight)?$", re.I)) for kind, pattern in rules)


_RULES = {
    "attention": _rules(
        ("qkv", rf"c_attn|{_QKV}|in_proj|att_proj|qkv_linear|w_pack"),
        ("kv", r"kv|kv_proj|to_kv|kv_[ab]_proj(?:_with_mqa)?"),
        ("q", rf"{_Q}|q|q_attn|q_[ab]_proj|input_linear"),
        ("k", rf"{_K}|k"),
        ("v", rf"{_V}|v"),
        ("o", rf"{_O}|wo|c_proj|proj|projection|o|dense|output(?:\.dense)?|output_linear"),
        ("router", r"router(?:\.layer)?"),
        ("embedding", _EMBEDDING),
    ),
    "mlp": _rules(
        ("router", r"router(?:\.(?:classifier|layer))?|gate"),
        ("gate_up", rf"{_GATE_UP}"),
        ("gate", rf"{_GATE}|receptance"),
        ("up", rf"{_UP}|v1"),
        (
            "fc",
            rf"{_FC}|intermediate[._]dense|in_proj|input_linear|weights_in|layer_1|linear_fc1|proj_in|intermediate|key|0",
        ),
        (
            "down",
            rf"{_DOWN}|output_dense|c_proj|out_proj|output_linear|weights_out|layer_2|linear_fc2|proj_out|output|value|2",
        ),
        ("embedding", _EMBEDDING),
    ),
    "": _rules(
        ("router", r"router|mixer\.gate"),
        ("mixer", r"mixer\.(?:in_proj|out_proj)"),
        ("qkv", _QKV),
        ("gate_up", _GATE_UP),
        ("gate", _GATE),
        ("up", _UP),
        ("q", _Q),
        ("k", _K),
        ("v", _V),
        ("o", _O),
        ("fc", rf"{_FC}|intermediate\.dense"),
        ("down", _DOWN),
        ("embedding", _EMBEDDING),
        (
            "head",
            r"lm_head(?:\.decoder)?|embed_out|classifier|score|head|predictions\.decoder|output_projection"
            r"|visual_projection|text_projection|qa_outputs",
        ),
    ),
}
"""Place → module kind → what the end of the name says there."""
_IS_NORM = _rules(("norm", _NORM))[0][1]

_SECOND = {
    "wi": "Wo", "input_linear": "output_linear", "weights_in": "weights_out", "fc1": "fc2",
    "dense_h_to_4h": "dense_4h_to_h",
}  # fmt: skip
"""First layer of an MLP → the layer behind it. Where the first has twice its entries, it is gate and up in one."""


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
    mixers = {
        match[1]
        for name, shape in shapes.items()
        # A convolution of width 1 mixes no tokens (SqueezeBERT).
        if (match := _STATE.match(name)) is not None
        and (match[2] is None or (len(shape) == 3 and shape[-1] > 1))
    }
    roles = {}
    known: dict[TensorRole, TensorRole] = {}  # one object for all that have the same role
    for name, shape in shapes.items():
        match = matches[name]
        block: int | None = None
        if match is not None:
            block = int(match["outer"])
            if match["stack"] in running:
                # What a stage holds beside its blocks (a down-sampling layer) is outside the blocks.
                inner = match["inner"]
                block = None if inner is None else running[match["stack"]][block, int(inner)]
        rest = match["rest"] if match is not None else name
        kind = module_kind(rest, shape, mixer=block is not None and _is_inside(name, mixers))
        if kind == "fc" and _is_doubled(name, shapes):
            kind = "gate_up"
        role = TensorRole(
            block=block,
            stack=match["stack"].rstrip(".") if match is not None and block is not None else None,
            kind=kind,
            group=_group(kind, block, shape),
            transposed=conv1d and len(shape) == 2 and _CONV1D.search(name) is not None,
        )
        roles[name] = known.setdefault(role, role)
    return roles


def module_kind(name: str, shape: tuple[int, ...], *, mixer: bool = False) -> str:
    """One of `KINDS` for a name (without its block prefix); `mixer` where its module is known to be one.

    >>> module_kind("self_attn.q_proj.weight", (8, 8)), module_kind("mlp.c_proj.weight", (32, 8))
    ('q', 'down')
    """
    if is_buffer(name, shape):
        return "buffer"
    if _IS_NORM.search(name):
        return "norm"
    if _BIAS.search(name) and "relative_attention_bias" not in name:
        return "bias"
    place = "mixer" if mixer else _place(name)
    if place == "mixer":
        return "mixer"
    if place == "attention" and _ASIDE.search(name):
        return "other"
    # Quantised and clipped layers keep their matrix one module deeper.
    own = name.replace(".linear.weight", ".weight")
    kind = next((kind for kind, rule in _RULES[place] if rule.search(own)), "other")
    is_cross = kind == "qkv" and len(shape) == 2 and max(shape) == 2 * min(shape) and "cross" in name.lower()
    return "kv" if is_cross else kind


def _place(name: str) -> str:
    """The place that the modules of a name tell: attention, mlp, mixer, or "" where they tell none."""
    *modules, leaf = name.removesuffix(".weight").split(".")
    for module in modules:
        for place, words in _PLACES:
            if words.search(module):
                return place
    # A module that is named like a convolution and holds nothing else is an ordinary one.
    return next((place for place, words in _PLACES[:1] if words.search(leaf)), "")


def _is_inside(name: str, modules: Collection[str]) -> bool:
    ends = [position for position, character in enumerate(name) if character == "."]
    return any(name[:end] in modules for end in ends)


def _is_doubled(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether this first layer of an MLP holds two: twice the entries of the layer behind it."""
    module, _, leaf = name.removesuffix(".weight").rpartition(".")
    second = _SECOND.get(leaf.lower(), "")
    behind = shapes.get(f"{module}.{second}{name[len(module) + 1 + len(leaf) :]}")
    return behind is not None and math.prod(shapes[name]) == 2 * math.prod(behind)


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
        # A vector stored as 1 × 1 × n (RWKV's time_mix_key) is no matrix.
        return "blocks" if math.prod(shape[:-1]) > 1 else "norms_biases"
    return "other"

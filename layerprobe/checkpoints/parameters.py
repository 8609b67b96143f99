"""What is stored and no parameter: tables, masks, averages. The model's class decides where known, else names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_ALWAYS = (
    r"(?:attn|attention)\.(?:masked_bias|bias)|(?:^|\.)(?:inv_freq|position_ids|token_type_ids|relative_position_index"
    r"|num_batches_tracked|running_mean|running_var|final_logits_bias)"
)
_TABLES = (
    r"(?:^|\.)(?:rotary|rope)\w*\.(?!weight$|bias$)[^.]+"
    r"|(?:^|\.)(?:\w*freqs(?:_(?:cis|cos|sin|complex))?|(?:cos|sin)(?:_cached?|_table)?|tril|triu|(?:\w+_)?mask"
    r"|slopes|\w*alibi\w*|relative_coords(?:_table)?|rel(?:ative)?_(?:pos(?:ition)?_)?ind(?:ex|ices)|attention_bias_idxs"
    r"|pe|queue|sinusoid\w*|_float_tensor|(?:pixel|image)_(?:mean|std)|\w+_ema)"
    r"|(?:attn|attention)\.embed_positions"
)
_SURE = re.compile(rf"(?:{_ALWAYS})$")
_BUFFER = re.compile(rf"(?:{_ALWAYS}|{_TABLES})$")
_AVERAGE = re.compile(r"(?:^|_)(?:ema|momentum|target|teacher|shadow)(?:_|$)|_(?:k|m)$")
"""Modules that follow another one: moving averages, the key encoder of MoCo, `text_encoder_m` of ALBEF."""


@dataclass(frozen=True, kw_only=True)
class DeclaredNames:
    """The names that a model's class gives to its parameters and buffers.

    `once` are the parameters without the second names of tied ones. `whole` is false for a class that may lack the
    checkpoint's head.
    """

    model: str
    parameters: frozenset[str]
    once: frozenset[str]
    buffers: frozenset[str]
    whole: bool


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a name is one that tables, masks and counters have.

    >>> is_buffer("self_attn.rotary_emb.cos_cached", (1, 1, 9, 8)), is_buffer("self_attn.q_proj.bias", (8,))
    (True, False)
    """
    # `attn.bias` is the causal mask of GPT-2 where it has four axes, else the bias of an attention.
    return _BUFFER.search(name) is not None and (not name.endswith(".bias") or len(shape) == 4)


def in_doubt(name: str, kind: str) -> bool:
    """Whether a name leaves open what the tensor is, so that the model's class should be asked."""
    leaf = name.rpartition(".")[2]
    return (
        leaf not in ("weight", "bias") and kind in ("other", "embedding", "buffer") and not _SURE.search(name)
    )


def no_parameters(
    shapes: Mapping[str, tuple[int, ...]], blocks: Mapping[str, bool], declared: DeclaredNames | None
) -> dict[str, str]:
    """Name → why it is no weight. `blocks` says of each tensor whether it lies in a block.

    A name that the class declares is what the class says. Of the others, those with the name of a table are none, and
    where the file holds every parameter of the class no other is one.
    """
    found = _averages(shapes)
    if declared is None:
        return found | {
            name: "a buffer, not a weight" for name, shape in shapes.items() if is_buffer(name, shape)
        }
    parameters, buffers = set(map(_key, declared.parameters)), set(map(_key, declared.buffers))
    stored = {name: _key(name) for name in shapes}
    complete = set(map(_key, declared.once)) <= set(stored.values())
    for name, key in stored.items():
        if key in parameters or name in found:
            continue
        left_over = complete and (declared.whole or blocks[name]) and not name.endswith((".weight", ".bias"))
        if key in buffers:
            found[name] = f"a buffer of {declared.model}, not a weight"
        elif is_buffer(name, shapes[name]):
            found[name] = "a buffer, not a weight"
        elif left_over:
            found[name] = f"no parameter of {declared.model}"
    return found


def _key(name: str) -> str:
    """A name from its list of blocks on, numbers left out; outside of lists its last two parts."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    kept = parts[-2:] if first is None else parts[max(first - 1, 0) :]
    return ".".join("*" if part.isdigit() else part for part in kept)


def _averages(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Exponential averages of other tensors: `model_ema.…` beside `model.…`, tensor by tensor of one shape."""
    followers: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:3]) if _AVERAGE.search(part)), None)
        if at is not None:
            followers.setdefault(".".join(parts[: at + 1]), []).append(name)
    if not followers:
        return {}
    others: set[tuple[str, tuple[int, ...]]] = set()
    for name, shape in shapes.items():
        if not any(name.startswith(f"{module}.") for module in followers):
            parts = name.split(".")
            others |= {("".join(parts[first:]), shape) for first in range(4)}
    return {
        name: "an average (EMA) of other tensors"
        for module, names in followers.items()
        for name in names
        if (tail := name.removeprefix(module).replace(".", "")) and (tail, shapes[name]) in others
    }

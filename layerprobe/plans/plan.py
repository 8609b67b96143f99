"""The freeze plan as data: which parameters of a backbone stay frozen, by exact name.

Nothing here knows a model library. A plan is made from two mappings that the caller takes from a model:
parameter name -> (shape, dtype), and parameter name -> group (`block.3`, `embeddings`, `positions`, `norm`,
`other`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from layerprobe.errors import PlanError
from layerprobe.layers import format_blocks
from layerprobe.plans.names import clean_name, is_adapter

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA = "freeze-plan/v1"
FROZEN = "frozen"
TRAINABLE = "trainable"
PARTIAL = "partial"
ABSENT = "absent"

GROUPS = ("embeddings", "positions", "norm", "other")
"""Groups of parameters outside the blocks."""

_STATE_NAMES = {"embeddings": "embeddings", "positions": "positions", "norm": "norms", "other": "other"}

ParameterTable = Mapping[str, tuple[tuple[int, ...], str]]
"""Parameter name -> (shape, dtype), as `parameter_table` makes it."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of the backbone as the plan knows it: where it belongs, and how large it is."""

    group: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def block(self) -> int | None:
        """Index of the block it belongs to, or None outside the blocks."""
        return int(self.group[6:]) if self.group.startswith("block.") else None


@dataclass(frozen=True, kw_only=True)
class PlanData:
    """The contents of a plan; `FreezePlan` describes them and adds what is done with a plan."""

    model_id: str
    revision: str | None
    weights_hash: str
    frozen: tuple[str, ...]
    trainable: tuple[str, ...]
    blocks: tuple[bool, ...]
    states: dict[str, str]
    counts: dict[str, int]
    parameters: dict[str, Parameter]
    found: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    source: str = field(default="the plan", compare=False)

    @classmethod
    def from_blocks(
        cls,
        parameters: ParameterTable,
        groups: Mapping[str, str],
        trainable_blocks: Iterable[int],
        *,
        model_id: str,
        revision: str | None = None,
        norms: str = FROZEN,
        positions: str = FROZEN,
        embeddings: str = FROZEN,
        other: str = FROZEN,
        stem: str = TRAINABLE,
        head: str = TRAINABLE,
        also_trainable: Iterable[str] = (),
        found: Mapping[str, Any] | None = None,
        tied: Mapping[str, Iterable[str]] | None = None,
    ) -> Self:
        """The plan that trains whole blocks, and outside them what the keywords say.

        Parameters
        ----------
        parameters : ParameterTable
            Name -> (shape, dtype), see `parameter_table`; the model's own, without wrappers and adapters of PEFT.
        groups : Mapping[str, str]
            Name -> `block.<i>`, `embeddings`, `positions`, `norm` or `other`, for every name.
        trainable_blocks : Iterable[int]
            Indices from 0.
        norms : str
            `frozen` or `trainable`, for the norms outside the blocks (group `norm`).
        positions, embeddings, other : str
            The same for their groups.
        stem, head : str
            The same for what stands around the backbone; a statement for the trainer.
        also_trainable : Iterable[str]
            Exact names trained whatever their group says (for example the norms in frozen blocks).
        tied : Mapping[str, Iterable[str]] | None
            Name -> its names in the model around the base model, where that lists the tensor under another
            (`shared.weight` of T5): first the tensor's own, then the others in the model's order.

        Raises
        ------
        PlanError
            a block that does not exist, a name without a group, an unknown group or state.
        """
        table = {
            clean_name(name): Parameter(groups.get(name, ""), tuple(int(n) for n in shape), dtype_name(dtype))
            for name, (shape, dtype) in parameters.items()
            if not is_adapter(name)
        }
        if ungrouped := [name for name, p in table.items() if not is_group(p.group)]:
            raise PlanError(f"no known group for {few(ungrouped)}; groups: block.<i>, {', '.join(GROUPS)}")
        n_blocks = 1 + max((p.block for p in table.values() if p.block is not None), default=-1)
        chosen = set(trainable_blocks)
        if wrong := sorted(index for index in chosen if not 0 <= index < n_blocks):
            raise PlanError(f"block {wrong[0]} does not exist: {model_id} has {n_blocks} blocks")
        outside = {"norm": norms, "positions": positions, "embeddings": embeddings, "other": other}
        for word in (*outside.values(), stem, head):
            if word not in (FROZEN, TRAINABLE):
                raise PlanError(f"'{word}' is no state; choose '{FROZEN}' or '{TRAINABLE}'")
        also = {clean_name(name) for name in also_trainable if not is_adapter(name)}
        if unknown := sorted(also - table.keys()):
            raise PlanError(f"{model_id} has no parameter {few(unknown)}")

        def is_trained(name: str, parameter: Parameter) -> bool:
            if name in also:
                return True
            if parameter.block is not None:
                return parameter.block in chosen
            return outside[parameter.group] == TRAINABLE

        trained = {name for name, parameter in table.items() if is_trained(name, parameter)}
        return cls(
            model_id=model_id,
            revision=revision,
            parameters=table,
            found=dict(found or {}),
            tied={clean_name(name): tuple(map(clean_name, others)) for name, others in (tied or {}).items()},
            **derived_fields(table, trained, stem=stem, head=head),
        )

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def trainable_blocks(self) -> list[int]:
        """Indices of the blocks that are trained as a whole."""
        return [index for index, trained in enumerate(self.blocks) if trained]

    @property
    def block_states(self) -> tuple[str, ...]:
        """One of `frozen`, `partial`, `trainable` per block."""
        states = group_states(self.parameters, set(self.trainable))
        return tuple(states[f"block.{index}"] for index in range(self.n_blocks))

    def with_found(self, **found: Any) -> Self:
        """The same plan with more about how it was found; later keys win."""
        return replace(self, found={**self.found, **found})

    def summary(self) -> str:
        """One sentence: what is trained, and how much of the model that is."""
        states = self.block_states
        partly = [index for index, state in enumerate(states) if state == PARTIAL]
        trained, frozen = self.counts["trainable_parameters"], self.counts["frozen_parameters"]
        text = f"{self.model_id}: trains {len(self.trainable_blocks)} of {self.n_blocks} blocks"
        if self.trainable_blocks:
            text += f" ({format_blocks(self.trainable_blocks)})"
        if partly:
            text += f" and part of {len(partly)} ({format_blocks(partly)})"
        outside = [name for name in _STATE_NAMES.values() if self.states[name] in (TRAINABLE, PARTIAL)]
        if outside:
            text += f", with {', '.join(outside)}"
        share = trained / (trained + frozen) if trained + frozen else 0.0
        return f"{text}; {trained:,} of {trained + frozen:,} parameters ({share:.1%})"

    def content_hash(self) -> str:
        """32 hexadecimal digits over the states and the trainable names: what the plan does, not how it was found."""
        states = json.dumps(self.states, sort_keys=True)
        return hashlib.blake2b("\n".join([states, *self.trainable]).encode(), digest_size=16).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "schema": SCHEMA,
            "model_id": self.model_id,
            "revision": self.revision,
            "weights_hash": self.weights_hash,
            "blocks": list(self.blocks),
            "states": dict(self.states),
            "counts": dict(self.counts),
            "found": self.found,
            "frozen": list(self.frozen),
            "trainable": list(self.trainable),
            "parameters": {
                name: {"group": p.group, "shape": list(p.shape), "dtype": p.dtype}
                for name, p in self.parameters.items()
            },
            **({"tied": {name: list(others) for name, others in self.tied.items()}} if self.tied else {}),
        }


def derived_fields(
    table: Mapping[str, Parameter], trained: set[str], *, stem: str, head: str
) -> dict[str, Any]:
    """The fields of a plan that follow from its parameters and the names trained."""
    frozen = tuple(name for name in table if name not in trained)
    trainable = tuple(name for name in table if name in trained)
    states = group_states(table, trained)
    n_blocks = sum(group.startswith("block.") for group in states)
    blocks = tuple(states[f"block.{index}"] == TRAINABLE for index in range(n_blocks))
    return {
        "weights_hash": model_hash({name: (p.shape, p.dtype) for name, p in table.items()}),
        "frozen": frozen,
        "trainable": trainable,
        "blocks": blocks,
        "states": {
            "stem": stem,
            **{_STATE_NAMES[group]: states.get(group, ABSENT) for group in GROUPS},
            "head": head,
        },
        "counts": {
            "trainable_parameters": sum(table[name].size for name in trainable),
            "frozen_parameters": sum(table[name].size for name in frozen),
            "trainable_tensors": len(trainable),
            "frozen_tensors": len(frozen),
            "trainable_blocks": sum(blocks),
            "blocks": n_blocks,
        },
    }


def parameter_table(module: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Parameter name -> (shape, dtype), in the module's order; a tied tensor under its first name alone."""
    return {name: (tuple(p.shape), dtype_name(p.dtype)) for name, p in module.named_parameters()}


def dtype_name(dtype: torch.dtype | str) -> str:
    """`float32` for torch.float32, "torch.float32" and "float32"."""
    return str(dtype).removeprefix("torch.")


def model_hash(parameters: ParameterTable) -> str:
    """`sha256:` and the digest of the compact JSON of the sorted [name, shape, dtype] triples.

    >>> model_hash({"w": ((2, 3), "float32")})[:15]
    'sha256:f55ebc11'
    """
    triples = sorted([name, list(shape), dtype_name(dtype)] for name, (shape, dtype) in parameters.items())
    text = json.dumps(triples, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()


def group_states(table: Mapping[str, Parameter], trained: set[str]) -> dict[str, str]:
    """Group -> `frozen`, `partial` or `trainable`, for the groups that have parameters."""
    seen: dict[str, set[bool]] = {}
    for name, parameter in table.items():
        seen.setdefault(parameter.group, set()).add(name in trained)
    words = {frozenset({True}): TRAINABLE, frozenset({False}): FROZEN}
    return {group: words.get(frozenset(flags), PARTIAL) for group, flags in seen.items()}


def is_group(group: str) -> bool:
    return group in GROUPS or re.fullmatch(r"block\.(0|[1-9][0-9]{0,5})", group) is not None


def few(names: Iterable[str], n: int = 3) -> str:
    """The first `n` names and the number of the others, for error messages."""
    listed = list(names)
    return ", ".join(listed[:n]) + (f" and {len(listed) - n} more" if len(listed) > n else "")

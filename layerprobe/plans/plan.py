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
from layerprobe.files import dtype_name
from layerprobe.layers import name_blocks
from layerprobe.plans.names import clean_name, is_adapter
from layerprobe.tables import percent, share_text

if TYPE_CHECKING:
    from torch import nn

SCHEMA = "freeze-plan/v1"
SCHEMA_WITH_ADAPTERS = "freeze-plan/v2"
"""Written only where a plan places adapters: any other is the plan that version 1 could say."""
FROZEN = "frozen"
TRAINABLE = "trainable"
PARTIAL = "partial"
ADAPTER = "adapter"
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


@dataclass(frozen=True, kw_only=True, repr=False)
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
    adapters: dict[str, int] = field(default_factory=dict)
    adapter_scale: float = 1.0
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
        norms, positions, embeddings, other : str
            `frozen` or `trainable`, for what lies outside the blocks, by group.
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
            A block that does not exist, a name without a group, an unknown group or state.
        """
        groups = {clean_name(name): group for name, group in groups.items()}
        own = {clean_name(name): entry for name, entry in parameters.items() if not is_adapter(name)}
        table = {
            name: Parameter(groups.get(name, ""), tuple(map(int, shape)), dtype_name(dtype))
            for name, (shape, dtype) in own.items()
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

    def other_depth(self, n_blocks: int, *, name: str = "this model") -> str:
        """What to say of a model that has another number of blocks."""
        return (
            f"{self.source} was made for {self.n_blocks} blocks ({self.model_id}); {name} has {n_blocks}. "
            "Make one with: layerprobe freeze-search"
        )

    @property
    def trainable_blocks(self) -> list[int]:
        """Indices of the blocks that are trained as a whole."""
        return [index for index, trained in enumerate(self.blocks) if trained]

    @property
    def block_states(self) -> tuple[str, ...]:
        """One of `frozen`, `adapter`, `partial`, `trainable` per block; weights beside an adapter make it `partial`."""
        states = group_states(self.parameters, set(self.trainable))
        adapted = {self.parameters[f"{module}.weight"].group for module in self.adapters}
        words = {FROZEN: ADAPTER}
        return tuple(
            words.get(state, state) if group in adapted else state
            for index in range(self.n_blocks)
            for group, state in [(f"block.{index}", states[f"block.{index}"])]
        )

    def with_adapters(self, ranks: Mapping[str, int], *, scale: float = 1.0) -> Self:
        """The same plan with low-rank adapters (LoRA) on linear maps that stay frozen, instead of those it had.

        Parameters
        ----------
        ranks : Mapping[str, int]
            Module (`h.3.attn.c_attn`) -> rank, at least 1.
        scale : float
            What the product of the factors is multiplied by: alpha / rank of PEFT, the same for all.

        Raises
        ------
        PlanError
            A module that is no linear map of the model or is trained itself, a rank above its matrix.
        """
        shapes = {name: p.shape for name, p in self.parameters.items()}
        mistakes = [
            f"rank {rank} on {module} is no whole number from 1" for module, rank in ranks.items() if rank < 1
        ]
        if mistakes := mistakes + wrong_adapters(ranks, shapes, self.trainable):
            raise PlanError(f"{self.model_id}: {mistakes[0]}" + _others(mistakes))
        order = {name: place for place, name in enumerate(self.parameters)}
        sorted_ranks = dict(sorted(ranks.items(), key=lambda item: order[f"{item[0]}.weight"]))
        counts = derived_counts(self.parameters, set(self.trainable), sorted_ranks)
        return replace(self, adapters=sorted_ranks, adapter_scale=float(scale), counts=counts)

    @property
    def chosen_blocks(self) -> tuple[bool, ...]:
        """Per block, whether it is trained as a whole or has adapters."""
        return tuple(state in (TRAINABLE, ADAPTER) for state in self.block_states)

    @property
    def trained_parameters(self) -> int:
        """Entries that an optimizer changes: of the model's own tensors, and of adapters."""
        return self.counts["trainable_parameters"] + self.counts.get("adapter_parameters", 0)

    @property
    def block_counts(self) -> tuple[int, int]:
        """Parameters in the blocks: those that train, adapters apart, and all."""
        sizes = {name: p.size for name, p in self.parameters.items() if p.block is not None}
        return sum(sizes.get(name, 0) for name in self.trainable), sum(sizes.values())

    def with_found(self, **found: Any) -> Self:
        """The same plan with more about how it was found; later keys win."""
        return replace(self, found={**self.found, **found})

    def summary(self) -> str:
        """One sentence: what is trained, and how much of the blocks that is."""
        states = self.block_states
        partly = [index for index, state in enumerate(states) if state == PARTIAL]
        trained, frozen = self.counts["trainable_parameters"], self.counts["frozen_parameters"]
        text = f"{self.model_id}: trains {len(self.trainable_blocks)} of {self.n_blocks} blocks"
        if self.trainable_blocks:
            text += f" ({name_blocks(self.trainable_blocks)})"
        if partly:
            text += f" and part of {len(partly)} ({name_blocks(partly)})"
        outside = [name for name in _STATE_NAMES.values() if self.states[name] in (TRAINABLE, PARTIAL)]
        if outside:
            text += f", with {', '.join(outside)}"
        if self.adapters:
            ranks = sorted(set(self.adapters.values()))
            named = f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"
            blocks = [index for index, state in enumerate(states) if state == ADAPTER]
            text += f", adapters of {named} on {len(self.adapters)} modules"
            text += f" (blocks {name_blocks(blocks)})" if blocks else ""
        if self.adapters:
            n, total = self.trained_parameters, trained + frozen
            return f"{text}; {n:,} of {total:,} parameters ({percent(n / total)})"
        inside, in_blocks = self.block_counts
        text += f"; {share_text(inside / max(1, in_blocks))} of the blocks' parameters train"
        more = f", and {trained - inside:,} outside them" if trained > inside else ""
        return f"{text} ({inside:,} of {in_blocks:,}{more})"

    def content_hash(self) -> str:
        """32 hexadecimal digits over the states and the trainable names: what the plan does, not how it was found."""
        states = json.dumps(self.states, sort_keys=True)
        if self.adapters:
            states += json.dumps([self.adapter_scale, self.adapters], sort_keys=True)
        return hashlib.blake2b("\n".join([states, *self.trainable]).encode(), digest_size=16).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "schema": SCHEMA_WITH_ADAPTERS if self.adapters else SCHEMA,
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
            **(
                {"adapters": {"kind": "lora", "scale": self.adapter_scale, "ranks": dict(self.adapters)}}
                if self.adapters
                else {}
            ),
        }


def derived_fields(
    table: Mapping[str, Parameter],
    trained: set[str],
    *,
    stem: str,
    head: str,
    adapters: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The fields of a plan that follow from its parameters, the names trained and the adapters."""
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
        "counts": derived_counts(table, trained, adapters or {}),
    }


def derived_counts(
    table: Mapping[str, Parameter], trained: set[str], adapters: Mapping[str, int]
) -> dict[str, int]:
    """The counts of a plan; those of adapters only where it has some."""
    states = group_states(table, trained)
    blocks = [state for group, state in states.items() if group.startswith("block.")]
    shapes = [(table[f"{module}.weight"].shape, rank) for module, rank in adapters.items()]
    return {
        "trainable_parameters": sum(p.size for name, p in table.items() if name in trained),
        "frozen_parameters": sum(p.size for name, p in table.items() if name not in trained),
        "trainable_tensors": sum(name in trained for name in table),
        "frozen_tensors": sum(name not in trained for name in table),
        "trainable_blocks": blocks.count(TRAINABLE),
        "blocks": len(blocks),
        **({"adapter_parameters": sum(rank * sum(shape) for shape, rank in shapes)} if adapters else {}),
    }


def parameter_table(module: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Parameter name -> (shape, dtype), in the module's order; a tied tensor under its first name alone."""
    return {name: (tuple(p.shape), dtype_name(p.dtype)) for name, p in module.named_parameters()}


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


def wrong_adapters(
    ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], trainable: Iterable[str]
) -> list[str]:
    """What is wrong with adapters of `ranks` on modules whose parameters have `shapes`."""
    trained = set(trainable)
    mistakes = []
    for module, rank in ranks.items():
        shape = shapes.get(f"{module}.weight")
        if shape is None or len(shape) != 2:
            what = "no parameter" if shape is None else "no matrix"
            mistakes.append(f"{module} takes no adapter: the model has {what} {module}.weight")
        elif rank > min(shape):
            mistakes.append(f"rank {rank} on {module} is larger than its matrix of {shape[0]}×{shape[1]}")
        elif f"{module}.weight" in trained:
            mistakes.append(f"{module} has an adapter and is trained itself; choose one")
    return mistakes


def _others(mistakes: list[str]) -> str:
    return f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""


def is_group(group: str) -> bool:
    return group in GROUPS or re.fullmatch(r"block\.(0|[1-9][0-9]{0,5})", group) is not None


def few(names: Iterable[str], n: int = 3) -> str:
    """The first `n` names and the number of the others, for error messages."""
    listed = list(names)
    return ", ".join(listed[:n]) + (f" and {len(listed) - n} more" if len(listed) > n else "")

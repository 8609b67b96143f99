"""The freeze plan: which parameters of a backbone stay frozen, by exact name. Data, file format, checks.

Nothing here knows a model library. A plan is made from two mappings that the caller takes from a model:
parameter name -> (shape, dtype), and parameter name -> group (`block.3`, `embeddings`, `positions`, `norm`,
`other`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.errors import BrokenFileError, PlanError, UnknownNameError
from layerprobe.files import read_json, write_text
from layerprobe.layers import format_blocks

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from layerprobe.plans.apply import Applied, Fingerprint, Verification

SCHEMA = "freeze-plan/v1"
PLAN_FILE = "plan.json"
"""The plan's name in a run folder."""
FROZEN = "frozen"
TRAINABLE = "trainable"
PARTIAL = "partial"
ABSENT = "absent"
MAX_BYTES = 64 << 20
"""A plan file larger than this is not read; a model of 100,000 tensors needs about 12 MB."""

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


@dataclass(frozen=True)
class FreezePlan:
    """Which parameters of one backbone are trained and which stay as they are, by exact name.

    Names are those of the base model (`h.0.attn.c_attn.weight`), without the prefix that a task head adds
    (`transformer.`); `apply` finds that prefix. What stands before and behind the backbone, the image stem
    and the head, is no part of the base model and appears only in `states`.

    Attributes
    ----------
    model_id, revision : what the plan was made for.
    weights_hash : sha256 over the sorted (name, shape, dtype); see `model_hash`.
    frozen, trainable : exact parameter names, in the model's order; together they are the whole model.
    blocks : one flag a block, True where every parameter of the block is trained.
    states : of stem, embeddings, positions, norms (the norms outside the blocks), other and head:
        `frozen`, `trainable`, `partial`, or `absent` where the backbone has no such parameter.
    counts : entries and tensors on either side.
    found : how the plan was found: task, split hash, seeds, budget, scores, accuracy with interval …
    parameters : name -> `Parameter`.
    source : file the plan was read from, for error messages.

    Examples
    --------
    Hugging Face `Trainer`, two lines before it is built, and again when training is resumed, because
    `from_pretrained` makes every parameter trainable::

        plan = FreezePlan.load("plan.json")
        plan.apply(model, outside="trainable")      # outside: the task head
        Trainer(model=model, args=args, train_dataset=data).train()
        plan.verify(model)                          # frozen tensors are bit-identical, or an error

    Plain PyTorch, before the optimizer is built::

        FreezePlan.load("plan.json").apply(model, outside="trainable")
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    """

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
    ) -> FreezePlan:
        """The plan that trains whole blocks, and outside them what the keywords say.

        Parameters
        ----------
        parameters : name -> (shape, dtype), see `parameter_table`.
        groups : name -> `block.<i>`, `embeddings`, `positions`, `norm` or `other`, for every name.
        trainable_blocks : indices from 0.
        norms : `frozen` or `trainable`, for the norms outside the blocks (group `norm`).
        positions, embeddings, other : the same for their groups.
        stem, head : the same for what stands around the backbone; a statement for the trainer.
        also_trainable : exact names trained whatever their group says (for example the norms in frozen
            blocks).

        Raises
        ------
        PlanError : a block that does not exist, a name without a group, an unknown group or state.
        """
        table = {
            name: Parameter(groups.get(name, ""), tuple(int(n) for n in shape), dtype_name(dtype))
            for name, (shape, dtype) in parameters.items()
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
        also = set(also_trainable)
        if unknown := sorted(also - table.keys()):
            raise PlanError(f"{model_id} has no parameter {few(unknown)}")

        def is_trained(name: str, parameter: Parameter) -> bool:
            if name in also:
                return True
            if parameter.block is not None:
                return parameter.block in chosen
            return outside[parameter.group] == TRAINABLE

        trained = {name for name, parameter in table.items() if is_trained(name, parameter)}
        return cls._assemble(
            table,
            trained,
            model_id=model_id,
            revision=revision,
            stem=stem,
            head=head,
            found=dict(found or {}),
        )

    @classmethod
    def _assemble(
        cls,
        table: dict[str, Parameter],
        trained: set[str],
        *,
        model_id: str,
        revision: str | None,
        stem: str,
        head: str,
        found: dict[str, Any],
        source: str = "the plan",
    ) -> FreezePlan:
        frozen = tuple(name for name in table if name not in trained)
        trainable = tuple(name for name in table if name in trained)
        states = group_states(table, trained)
        n_blocks = sum(group.startswith("block.") for group in states)
        blocks = tuple(states[f"block.{index}"] == TRAINABLE for index in range(n_blocks))
        return cls(
            model_id=model_id,
            revision=revision,
            weights_hash=model_hash({name: (p.shape, p.dtype) for name, p in table.items()}),
            frozen=frozen,
            trainable=trainable,
            blocks=blocks,
            states={
                "stem": stem,
                **{_STATE_NAMES[group]: states.get(group, ABSENT) for group in GROUPS},
                "head": head,
            },
            counts={
                "trainable_parameters": sum(table[name].size for name in trainable),
                "frozen_parameters": sum(table[name].size for name in frozen),
                "trainable_tensors": len(trainable),
                "frozen_tensors": len(frozen),
                "trainable_blocks": sum(blocks),
                "blocks": n_blocks,
            },
            parameters=table,
            found=found,
            source=source,
        )

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the backbone."""
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

    def with_found(self, **found: Any) -> FreezePlan:
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

    def check(self, parameters: ParameterTable, *, name: str = "this backbone") -> None:
        """Raise PlanError unless `parameters`, of a bare base model, are the ones the plan was made for.

        Names and shapes must agree. The dtype may differ: a plan found in float32 holds in bfloat16.
        """
        from layerprobe.plans.matching import check_table

        check_table(self, parameters, name=name)

    def apply(self, model: nn.Module, **options: Any) -> Applied:
        """Set `requires_grad` of every parameter exactly; see `layerprobe.plans.apply.apply_plan`."""
        from layerprobe.plans.apply import apply_plan

        return apply_plan(self, model, **options)

    def fingerprint(self, model: nn.Module, **options: Any) -> Fingerprint:
        """Digests of the plan's tensors as they are now; see `layerprobe.plans.apply.take_fingerprint`."""
        from layerprobe.plans.apply import take_fingerprint

        return take_fingerprint(self, model, **options)

    def verify(self, model: nn.Module, before: Fingerprint | None = None, **options: Any) -> Verification:
        """Prove that frozen tensors are bit-identical; see `layerprobe.plans.apply.verify_plan`."""
        from layerprobe.plans.apply import verify_plan

        return verify_plan(self, model, before, **options)

    def export(self, target: str, **options: Any) -> str:
        """The plan as text for another trainer; see `layerprobe.plans.export.export_plan`."""
        from layerprobe.plans.export import export_plan

        return export_plan(self, target, **options)

    def to_frame(self, *, name: str | None = None) -> pd.DataFrame:
        """What is trained in each block and around them; see `layerprobe.plans.table.plan_frame`."""
        from layerprobe.plans.table import plan_frame

        return plan_frame(self, name=name)

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
        }

    @classmethod
    def from_dict(cls, raw: Any, *, source: str = "the plan") -> FreezePlan:
        """Read plain JSON values that somebody else may have written.

        Raises
        ------
        BrokenFileError : all mistakes found, in one line.
        """
        from layerprobe.plans.validation import find_mistakes

        if mistakes := find_mistakes(raw):
            shown = "; ".join(mistakes[:20]) + (
                f"; and {len(mistakes) - 20} more" if len(mistakes) > 20 else ""
            )
            raise BrokenFileError(f"{source} is no valid {SCHEMA}: {shown}")
        table = {
            name: Parameter(entry["group"], tuple(entry["shape"]), entry["dtype"])
            for name, entry in raw["parameters"].items()
        }
        return cls._assemble(
            table,
            set(raw["trainable"]),
            model_id=raw["model_id"],
            revision=raw["revision"],
            stem=raw["states"]["stem"],
            head=raw["states"]["head"],
            found=raw["found"],
            source=source,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, one name a line; the file is whole or not there."""
        from layerprobe.tables import strict_value

        return write_text(path, _pretty(strict_value(self.to_dict())))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FreezePlan:
        """Read a plan file, or the `plan.json` of a run folder.

        Raises
        ------
        UnknownNameError : no such file, or a folder without one.
        BrokenFileError : too large, not JSON, another schema, or inconsistent.
        """
        file = Path(path) / PLAN_FILE if Path(path).is_dir() else Path(path)
        if not file.exists():
            what = f"no plan in {path}" if file != Path(path) else f"there is no plan {path}"
            raise UnknownNameError(f"{what}: name a plan file, or a run folder of freeze-search")
        return cls.from_dict(read_json(file, what="freeze plan", max_bytes=MAX_BYTES), source=file.name)

    def _repr_html_(self) -> str:
        text = self.summary().replace("&", "&amp;").replace("<", "&lt;")
        marks = {FROZEN: "□", PARTIAL: "▪", TRAINABLE: "■"}
        return f"<p>{text}</p><code>{''.join(marks[state] for state in self.block_states)}</code>"


GROUPS = ("embeddings", "positions", "norm", "other")
"""Groups of parameters outside the blocks."""

_STATE_NAMES = {"embeddings": "embeddings", "positions": "positions", "norm": "norms", "other": "other"}


def parameter_table(module: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Parameter name -> (shape, dtype), in the module's order; a tied tensor under its first name alone."""
    return {name: (tuple(p.shape), dtype_name(p.dtype)) for name, p in module.named_parameters()}


def dtype_name(dtype: Any) -> str:
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
    listed = list(names)
    return ", ".join(listed[:n]) + (f" and {len(listed) - n} more" if len(listed) > n else "")


def _pretty(value: dict[str, Any]) -> str:
    """JSON with one name a line, so that two plans can be compared line by line."""

    def dump(item: Any) -> str:
        return json.dumps(item, allow_nan=False, ensure_ascii=False)

    lines = []
    for key, item in value.items():
        if key in ("frozen", "trainable") and item:
            text = "[\n" + ",\n".join(f"  {dump(name)}" for name in item) + "\n ]"
        elif key == "parameters" and item:
            text = "{\n" + ",\n".join(f"  {dump(k)}: {dump(v)}" for k, v in item.items()) + "\n }"
        else:
            text = dump(item)
        lines.append(f" {dump(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"

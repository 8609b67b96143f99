"""A plan as a table: how much of each block, and of what lies around the blocks, is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from layerprobe.layers import name_blocks
from layerprobe.plans.plan import ADAPTER, FROZEN, GROUPS, PARTIAL, TRAINABLE, PlanData, group_states
from layerprobe.records import Record
from layerprobe.tables import tidy

if TYPE_CHECKING:
    import pandas as pd

MARKS = {FROZEN: "·", ADAPTER: "◇", PARTIAL: "▪", TRAINABLE: "■"}
"""How a block looks in a line of text."""


@dataclass(frozen=True, repr=False)
class PlanTable(Record):
    """What a plan trains, group by group."""

    command: ClassVar[str] = "plan-show"

    plan: PlanData
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One row a group: `value` parameters of its `n` are trained; `group` and `state` say which and how."""
        return plan_frame(self.plan)

    def summary(self) -> str:
        """The plan in a sentence, and how it was found as far as the plan says."""
        facts = {k: v for k, v in self.plan.found.items() if isinstance(v, (str, int, float, bool))}
        width = max(map(len, facts), default=0)
        return "\n".join([self.plan.summary(), *(f"  {key:<{width}}  {facts[key]}" for key in facts)])

    def table(self) -> list[dict[str, Any]]:
        """Runs of equal blocks together, then the groups around them, stem and head."""
        parts: list[tuple[str, str, int | None, int | None]] = []
        groups = _group_sizes(self.plan)
        blocks, around = groups[: self.plan.n_blocks], groups[self.plan.n_blocks :]
        for state in (TRAINABLE, PARTIAL, FROZEN):
            if indices := [index for index, block in enumerate(blocks) if block[1] == state]:
                n_trained, n_all = (
                    sum(sizes) for sizes in zip(*(blocks[i][2:] for i in indices), strict=True)
                )
                parts.append((f"blocks {name_blocks(indices)}", state, n_trained, n_all))
        parts += around
        parts += [(part, self.plan.states[part], None, None) for part in ("stem", "head")]
        return [dict(zip(("part", "state", "trained", "parameters"), part, strict=True)) for part in parts]

    def to_json(self) -> dict[str, Any]:
        """The table's object, and the plan's own facts beside the rows."""
        body = super().to_json()
        facts = self.plan.to_dict()
        for long in ("frozen", "trainable", "parameters"):
            del facts[long]
        return {**body, "plan": facts}


def plan_frame(plan: PlanData, *, name: str | None = None) -> pd.DataFrame:
    """Long table of a plan: blocks from 0, then the groups around them.

    Columns beyond `tables.COLUMNS`: `plan` (its name), `group`, `state`. The metric is
    `trainable_parameters`, out of `n`.
    """
    return tidy(
        {
            "block": int(group[6:]) if group.startswith("block.") else None,
            "metric": "trainable_parameters",
            "value": float(n_trained),
            "n": n_all,
            "plan": name or plan.source,
            "group": group,
            "state": state,
        }
        for group, state, n_trained, n_all in _group_sizes(plan)
    ).assign(model=plan.model_id, revision=plan.revision)


def _group_sizes(plan: PlanData) -> list[tuple[str, str, int, int]]:
    """Group, state, and its parameters: trained and all; blocks from 0, then the groups around them."""
    trained = set(plan.trainable)
    states = group_states(plan.parameters, trained)
    order = [f"block.{index}" for index in range(plan.n_blocks)] + [g for g in GROUPS if g in states]
    n_all, n_trained = dict.fromkeys(order, 0), dict.fromkeys(order, 0)
    for name, parameter in plan.parameters.items():
        n_all[parameter.group] += parameter.size
        n_trained[parameter.group] += parameter.size * (name in trained)
    return [(group, states[group], n_trained[group], n_all[group]) for group in order]


def block_strip(plan: PlanData, *, width: int = 100) -> str:
    """The blocks in a line, input to output, with a ruler above; wrapped after `width` characters.

    `■` trained, `▪` in part, `·` frozen.
    """
    cells = [MARKS[state] for state in plan.block_states]
    step = len(str(max(plan.n_blocks - 1, 0))) + 1
    per_line = max(1, width // step)
    lines = []
    for start in range(0, len(cells), per_line):
        part = range(start, min(start + per_line, len(cells)))
        lines.append("".join(f"{index:>{step}}" for index in part))
        lines.append("".join(f"{cells[index]:>{step}}" for index in part))
    return "\n".join(lines)


STRIP_COLOURS = {FROZEN: "#e9edf1", ADAPTER: "#0072b2", PARTIAL: "#f0c571", TRAINABLE: "#a84300"}
"""Background of a block in a notebook; white text stands on the dark ones."""


def block_strip_html(states: Sequence[str]) -> str:
    """The blocks in a line, input to output, for a notebook: state by colour, and by name under the pointer."""
    look = (
        "display:inline-block;min-width:1.6em;text-align:center;margin:1px;padding:2px 4px;border-radius:3px"
    )
    ink = {FROZEN: "#1b1f24", PARTIAL: "#1b1f24"}
    cells = "".join(
        f'<span title="block {index}: {state}" style="{look};background:{STRIP_COLOURS[state]};'
        f'color:{ink.get(state, "#ffffff")}">{index}</span>'
        for index, state in enumerate(states)
    )
    named = {state: STRIP_COLOURS[state] for state in STRIP_COLOURS if state in states}
    key = ", ".join(
        f'<span style="border-bottom:3px solid {colour}">{state}</span>' for state, colour in named.items()
    )
    return f"<div>{cells}</div><small>blocks from input to output: {key}</small>"

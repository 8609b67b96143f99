"""A plan as a table: how much of each block, and of what lies around the blocks, is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from layerprobe.layers import format_blocks
from layerprobe.plans.plan import FROZEN, GROUPS, PARTIAL, TRAINABLE, FreezePlan, group_states
from layerprobe.records import Record
from layerprobe.tables import tidy

if TYPE_CHECKING:
    import pandas as pd

MARKS = {FROZEN: "·", PARTIAL: "▪", TRAINABLE: "■"}
"""How a block looks in a line of text."""


@dataclass(frozen=True, repr=False)
class PlanTable(Record):
    """What a plan trains, group by group."""

    command: ClassVar[str] = "plan-show"

    plan: FreezePlan
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """One row a group: `value` parameters of its `n` are trained; `group` and `state` say which and how."""
        return plan_frame(self.plan)

    def summary(self) -> str:
        """The plan in a sentence, and how it was found as far as the plan says."""
        return "\n".join([self.plan.summary(), *found_lines(self.plan)])

    def table(self) -> list[dict[str, Any]]:
        """Runs of equal blocks together, then the groups around them, stem and head."""
        frame = self.to_frame()
        rows: list[dict[str, Any]] = []
        for state in (TRAINABLE, PARTIAL, FROZEN):
            part = frame[(frame["state"] == state) & frame["block"].notna()]
            if len(part):
                rows.append(
                    {
                        "part": f"blocks {format_blocks([int(b) for b in part['block']])}",
                        "state": state,
                        "trained": int(part["value"].sum()),
                        "parameters": int(part["n"].sum()),
                    }
                )
        for row in frame[frame["block"].isna()].itertuples():
            rows.append(
                {"part": row.group, "state": row.state, "trained": int(row.value), "parameters": int(row.n)}
            )
        rows += [
            {"part": part, "state": self.plan.states[part], "trained": None, "parameters": None}
            for part in ("stem", "head")
        ]
        return rows

    def to_json(self) -> dict[str, Any]:
        """The table's object, and the plan's own facts beside the rows."""
        body = super().to_json()
        facts = self.plan.to_dict()
        for long in ("frozen", "trainable", "parameters"):
            del facts[long]
        return {**body, "plan": facts}


def plan_frame(plan: FreezePlan, *, name: str | None = None) -> pd.DataFrame:
    """Long table of a plan: blocks from 0, then the groups around them.

    Columns beyond `tables.COLUMNS`: `plan` (its name), `group`, `state`. The metric is
    `trainable_parameters`, out of `n`.
    """
    trained = set(plan.trainable)
    states = group_states(plan.parameters, trained)
    order = [f"block.{index}" for index in range(plan.n_blocks)] + [g for g in GROUPS if g in states]
    sizes = dict.fromkeys(order, 0)
    free = dict.fromkeys(order, 0)
    for parameter_name, parameter in plan.parameters.items():
        sizes[parameter.group] += parameter.size
        free[parameter.group] += parameter.size * (parameter_name in trained)
    return tidy(
        {
            "block": int(group[6:]) if group.startswith("block.") else None,
            "metric": "trainable_parameters",
            "value": float(free[group]),
            "n": sizes[group],
            "plan": name or plan.source,
            "group": group,
            "state": states[group],
        }
        for group in order
    ).assign(model=plan.model_id, revision=plan.revision)


def block_strip(plan: FreezePlan, *, width: int = 100) -> str:
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


def found_lines(plan: FreezePlan) -> list[str]:
    """How the plan was found, one fact a line, for the facts that are single values."""
    simple = {k: v for k, v in plan.found.items() if isinstance(v, (str, int, float, bool))}
    width = max((len(key) for key in simple), default=0)
    return [f"  {key:<{width}}  {value}" for key, value in simple.items()]

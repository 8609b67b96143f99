"""What every exporter needs: the plan's names as the other trainer's model spells them, and a check."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from layerprobe.errors import PlanError
from layerprobe.plans.matching import block_modules, names_within
from layerprobe.plans.plan import TRAINABLE, FreezePlan, few


@dataclass(frozen=True)
class ExportNames:
    """The plan in the spelling of one model.

    Attributes
    ----------
    plan : the plan itself.
    trainable, frozen : full names, those outside the base model included.
    blocks : full dotted name of every block, `transformer.h.0` …
    free_blocks : those of `blocks` whose every parameter is trained.
    others : trainable names outside the free blocks.
    """

    plan: FreezePlan
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    blocks: tuple[str, ...]
    free_blocks: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Every name that is known."""
        return self.trainable + self.frozen

    def require_exact(self, chosen: Iterable[str], target: str, hint: str = "") -> None:
        """Raise PlanError unless `chosen`, what the target's rule makes of the text, is the plan."""
        taken, wanted = set(chosen), set(self.trainable)
        parts = []
        if more := [name for name in self.all if name in taken - wanted]:
            parts.append(f"would also train {few(more)}")
        if less := [name for name in self.all if name in wanted - taken]:
            parts.append(f"would leave out {few(less)}")
        if parts:
            raise PlanError(f"{target} cannot say this plan exactly: it {' and '.join(parts)}{hint}")

    def require_plain(self, target: str) -> None:
        """Raise PlanError for names that a pattern would misread."""
        if odd := [name for name in self.all if not re.fullmatch(r"[A-Za-z0-9_.\-]+", name)]:
            raise PlanError(f"{target} reads names as patterns and would misread {few(odd)}")

    def comment(self, target: str) -> str:
        """Comment lines that say what the file is; the text of a plan cannot end the comment."""
        summary = json.dumps(self.plan.summary())[1:-1]
        return f"# freeze plan for {target}, made by layerprobe\n# {summary}\n"


def export_names(
    plan: FreezePlan, *, prefix: str, outside: Mapping[str, str], without: Iterable[str]
) -> ExportNames:
    """Spell the plan's names with `prefix`, drop the modules in `without`, add those outside."""
    if prefix and not prefix.endswith("."):
        prefix += "."
    absent = names_within(plan, without)
    kept = [n for n in plan.parameters if n not in absent]
    if clash := [name for name in outside if name in {prefix + n for n in kept}]:
        raise PlanError(f"outside: {few(clash)} belongs to the plan itself")
    trained = set(plan.trainable)
    blocks = tuple(prefix + module for module in block_modules(plan))
    free = tuple(module for module, whole in zip(blocks, plan.blocks, strict=True) if whole)
    trainable = [prefix + n for n in kept if n in trained]
    trainable += [name for name, state in outside.items() if state == TRAINABLE]
    frozen = [prefix + n for n in kept if n not in trained]
    frozen += [name for name, state in outside.items() if state != TRAINABLE]
    starts = tuple(module + "." for module in free)
    return ExportNames(
        plan=plan,
        trainable=tuple(trainable),
        frozen=tuple(frozen),
        blocks=blocks,
        free_blocks=free,
        others=tuple(name for name in trainable if not name.startswith(starts)),
    )


def yaml_list(items: Iterable[str], indent: str) -> str:
    """A block sequence of double-quoted strings, which YAML reads as JSON does."""
    return "".join(f"{indent}- {json.dumps(item)}\n" for item in items)

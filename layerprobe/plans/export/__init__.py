"""Plans in the formats of other trainers; what a format cannot say exactly is refused."""

from __future__ import annotations

from typing import Any

from layerprobe.errors import UnknownNameError
from layerprobe.plans.plan import FreezePlan

TARGETS: dict[str, Any] = {}


def export_plan(plan: FreezePlan, target: str, **options: Any) -> str:
    """The plan as text for another trainer."""
    if target not in TARGETS:
        raise UnknownNameError(f"unknown target '{target}'")
    return str(TARGETS[target](plan, **options))

"""A run folder of a search, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from layerprobe.errors import BrokenFileError
from layerprobe.files import read_json
from layerprobe.plans import FreezePlan
from layerprobe.reading import Schema, check_fields, check_plain
from layerprobe.records import SEARCH_SCHEMA
from layerprobe.report.page import PROVENANCE_FIELDS
from layerprobe.tables import read_frame, strict_rows

_NUMBER = (float, type(None))
SEARCH_FIELDS: dict[str, Schema] = {
    "model": str, "task": str, "answer": str, "kind": str, "objective": str, "strategy": str, "trainings": int,
    "spent": float, "budget": float, "chance": float, "seeds": int, "train_seconds": float, "bridge_steps": int,
    "steps": int, "noise": _NUMBER, "margin": _NUMBER, "image_stderr?": _NUMBER, "plan": {"strip": str},
    "pilot": {"lrs": [float], "accuracies": {}, "plateau": _NUMBER, "reached": bool},
    "provenance": {**PROVENANCE_FIELDS, "backbone": dict, "arguments": {"head": str, "margin": float}},
}  # fmt: skip
ROW_FIELDS: dict[str, dict[str, Schema]] = {
    "baselines": {
        "arm": str, "plan": str, "trainable_parameters": _NUMBER, "lr": _NUMBER, "test_accuracy": _NUMBER,
        "low": _NUMBER, "high": _NUMBER, "seconds": _NUMBER,
        **{f"minus_{arm}{end}?": _NUMBER for arm in ("plan", "all", "none") for end in ("", "_low", "_high")},
    },
    "layers": {
        "block": int, "part?": str, "in_plan": (bool, int), "train_gain": _NUMBER, "train_gain_low": _NUMBER,
        "train_gain_high": _NUMBER,
    },
    "trials": {
        "number": int, "repeat": int, "cost": float, "trained_blocks": (int, float), "validation_accuracy": _NUMBER,
    },
    "plans": {
        "plan": str, "trainable_parameters": _NUMBER, "validation_accuracy": _NUMBER, "low": _NUMBER, "high": _NUMBER,
        "chosen": (bool, int), "n_trainings": _NUMBER,
    },
}  # fmt: skip
"""What is read of `search.json` and of the tables beside it."""


ARM_NAMES = {
    "plan": "best plan found",
    "all": "all blocks",
    "none": "no block",
    "norms": "norms only",
    "first-5": "first five blocks",
    "last-5": "last five blocks",
    "first-half": "first half",
    "last-half": "last half",
    "rgn-half": "large gradient-to-weight ratio",
    "auto-rgn": "all, rates by gradient-to-weight",
    "greedy": "greedy selection, same budget",
    "attention": "attention of every block",
    "mlp": "all but attention",
    "first-equal": "first, same size as the plan",
    "last-equal": "last, same size as the plan",
    "random-equal": "random, same size as the plan",
    "everywhere-equal": "adapters everywhere, same size",
    "probe": "probe of frozen features",
    "pixels": "probe of raw pixels",
}


@dataclass(frozen=True, kw_only=True)
class SearchRun:
    """A run folder of a search, read and checked."""

    folder: Path
    found: Mapping[str, Any]
    plan: FreezePlan
    baselines: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    trials: list[dict[str, Any]]
    plans: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> SearchRun:
        """The run; BrokenFileError where a file is missing or of another schema."""
        file = folder / "search.json"
        found = read_json(file, what="search", inside=folder)
        if not isinstance(found, dict) or found.get("schema") != SEARCH_SCHEMA:
            raise BrokenFileError(f"{file} is not of the schema {SEARCH_SCHEMA}")
        check_fields(found, SEARCH_FIELDS, file)
        check_fields(list(found["pilot"]["accuracies"].values()), [float], file)
        check_plain(folder / "plan.json", what="freeze plan", inside=folder)
        plan = FreezePlan.load(folder / "plan.json")
        tables = {name: _rows(folder, name) for name in ROW_FIELDS}
        if all(row["plan"] != found["plan"]["strip"] for row in tables["baselines"]):
            raise BrokenFileError(f"{folder / 'baselines.csv'} lacks the plan that {file} recommends")
        return cls(folder=folder, found=found, plan=plan, **tables)

    @property
    def question(self) -> str:
        """What the page answers."""
        return f"Which blocks of {self.found['model']} should train for {self.found['task']}?"

    @cached_property
    def recommended(self) -> dict[str, Any]:
        """The row of the plan that the verdict recommends; of equal plans the first."""
        return next(row for row in self.baselines if row["plan"] == self.found["plan"]["strip"])

    def states(self, strip: str) -> list[str]:
        """Per block of a plan, as tables write it: trained, frozen, or the name of the part that trains."""
        trained = [mark == "#" for mark in strip.partition("+")[0]]
        parts = list(dict.fromkeys(str(row["part"]) for row in self.layers if row.get("part"))) or ["trained"]
        found = []
        for start in range(0, len(trained), len(parts)):
            chosen = [part for part, on in zip(parts, trained[start:], strict=False) if on]
            whole = "trained" if chosen else "frozen"
            found.append(whole if len(chosen) in (0, len(parts)) else " and ".join(chosen))
        return found

    def same_plan(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is another name of the plan that is recommended."""
        mine = self.recommended
        return row["arm"] not in ("probe", "pixels") and row is not mine and row["plan"] == mine["plan"]

    def difference(self, row: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
        """Test accuracy of a row minus the recommended plan's, with its interval."""
        name = f"minus_{self.recommended['arm']}"
        return row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high")


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.csv"
    return check_fields(strict_rows(read_frame(path, inside=folder)), [ROW_FIELDS[name]], path)


def name_of(row: Mapping[str, Any]) -> str:
    """An arm in words."""
    return ARM_NAMES.get(row["arm"], str(row["arm"]))

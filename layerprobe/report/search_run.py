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
_WORDS = (str, type(None))
SEARCH_FIELDS: dict[str, Schema] = {
    "model": str, "task": str, "answer": str, "objective": str, "strategy": str, "trainings": int, "spent": float,
    "budget": float, "chance": float, "seeds": int, "train_seconds": float, "bridge_steps": int, "steps": int,
    "noise": _NUMBER, "margin?": _NUMBER, "kind?": _WORDS, "recommended?": _WORDS, "head?": _WORDS,
    "stop_margin?": _NUMBER, "image_stderr?": _NUMBER,
    "plan?": ({"strip?": _WORDS}, type(None)),
    "differences?": ([{"arm": str, "versus": str, "difference": _NUMBER, "low": _NUMBER, "high": _NUMBER}], type(None)),
    "pilot?": ({
        "lrs?": [float], "accuracies?": {}, "plateau?": _NUMBER, "reached?": bool, "seconds?": _NUMBER,
        "length?": _NUMBER,
    }, type(None)),
    "provenance?": ({"backbone?": (dict, type(None)), **PROVENANCE_FIELDS}, type(None)),
}  # fmt: skip
ROW_FIELDS: dict[str, dict[str, Schema]] = {
    "baselines": {
        "arm": str, "plan?": _WORDS, "trainable_parameters": _NUMBER, "lr": _NUMBER, "test_accuracy": _NUMBER,
        "low": _NUMBER, "high": _NUMBER, "n_seeds?": _NUMBER, "seconds?": _NUMBER,
        **{f"minus_{arm}{end}?": _NUMBER for arm in ("plan", "all", "none") for end in ("", "_low", "_high")},
    },
    "layers": {
        "block": int, "part?": str, "in_plan": (bool, int), "train_gain": _NUMBER, "train_gain_stderr": _NUMBER,
        "train_gain_low?": _NUMBER, "train_gain_high?": _NUMBER,
    },
    "trials": {
        "number": int, "repeat": int, "cost": float, "trained_blocks": (int, float), "validation_accuracy": _NUMBER,
    },
    "plans": {
        "plan": str, "trainable_parameters": _NUMBER, "validation_accuracy": _NUMBER, "low": _NUMBER, "high": _NUMBER,
        "chosen": (bool, int), "n_trainings?": _NUMBER,
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
        check_plain(folder / "plan.json", what="freeze plan", inside=folder)
        plan = FreezePlan.load(folder / "plan.json")
        try:
            tables = {name: _rows(folder, name) for name in ROW_FIELDS}
        except KeyError as error:
            raise BrokenFileError(
                f"the run in {folder} lacks the entry {error}; run the search again"
            ) from error
        return cls(folder=folder, found=found, plan=plan, **tables)

    @property
    def question(self) -> str:
        """What the page answers."""
        return f"Which blocks of {self.found['model']} should train for {self.found['task']}?"

    @property
    def strip(self) -> str:
        """The plan as tables write it; from the plan itself where the run does not say."""
        said = (self.found.get("plan") or {}).get("strip")
        return said or "".join("#" if chosen else "." for chosen in self.plan.chosen_blocks)

    @cached_property
    def recommended(self) -> dict[str, Any]:
        """The row of what the verdict recommends; an empty one where it cannot be told."""
        name = self.found.get("recommended")
        strip = (self.found.get("plan") or {}).get("strip")
        for row in self.baselines:
            if row["arm"] == name or (name is None and strip is not None and row.get("plan") == strip):
                return row
        return {}

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
        trained = row["arm"] not in ("probe", "pixels")
        return trained and row is not mine and row.get("plan") is not None and row["plan"] == mine.get("plan")

    def difference(self, row: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
        """Test accuracy of a row minus the recommended plan's, with its interval."""
        arm = self.recommended.get("arm")
        if f"minus_{arm}" in row:
            value, low, high = (row.get(f"minus_{arm}{end}") for end in ("", "_low", "_high"))
            return value, low, high
        for pair in self.found.get("differences") or ():
            value, low, high = (pair[key] for key in ("difference", "low", "high"))
            if (pair["arm"], pair["versus"]) == (row["arm"], arm):
                return value, low, high
            if (pair["versus"], pair["arm"]) == (row["arm"], arm) and value is not None:
                return -value, _minus(high), _minus(low)
        return None, None, None


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.csv"
    return check_fields(strict_rows(read_frame(path, inside=folder)), [ROW_FIELDS[name]], path)


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def name_of(row: Mapping[str, Any]) -> str:
    """An arm in words."""
    return ARM_NAMES.get(row["arm"], str(row["arm"]))

"""What can be wrong with a plan from somebody else: every mistake is found before any is reported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from layerprobe.plans.plan import (
    FROZEN,
    GROUPS,
    SCHEMA,
    SCHEMA_WITH_ADAPTERS,
    TRAINABLE,
    Parameter,
    derived_fields,
    few,
    is_group,
    wrong_adapters,
)

MAX_NAMES = 500_000
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 16
MAX_BLOCKS = 10_000
MAX_DEPTH = 40


def find_mistakes(raw: object) -> list[str]:
    """All reasons why `raw`, as the json module reads it, is no plan; empty when it is one."""
    if not isinstance(raw, dict):
        return [f"it holds a JSON {_kind(raw)}, not an object"]
    if "schema" not in raw:
        return [f'it has no \'schema\'; a plan says "schema": "{SCHEMA}"']
    if raw["schema"] not in (SCHEMA, SCHEMA_WITH_ADAPTERS):
        known = f"'{SCHEMA}' and '{SCHEMA_WITH_ADAPTERS}'"
        return [f"its schema is {_show(raw['schema'])}; this version of layerprobe reads {known}"]
    mistakes = _wrong_fields(raw)
    mistakes += _wrong_parameters(raw["parameters"]) if isinstance(raw.get("parameters"), dict) else []
    mistakes += _wrong_ties(raw["tied"]) if "tied" in raw else []
    mistakes += _wrong_adapters(raw)
    for side in (FROZEN, TRAINABLE):
        if isinstance(raw.get(side), list):
            mistakes += _wrong_names(side, raw[side])
    # The parts can only be compared with one another once each is what it should be.
    return mistakes or _contradictions(raw)


def claimed_schema(raw: object) -> str:
    """The version that `raw` says it is of; the first where it says none that is known."""
    said = raw.get("schema") if isinstance(raw, dict) else None
    return SCHEMA_WITH_ADAPTERS if said == SCHEMA_WITH_ADAPTERS else SCHEMA


_FIELDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "model_id": (str, "text"),
    "revision": ((str, type(None)), "text or null"),
    "weights_hash": (str, "text"),
    "blocks": (list, "a list of true and false"),
    "states": (dict, "an object"),
    "counts": (dict, "an object"),
    "found": (dict, "an object"),
    "frozen": (list, "a list of names"),
    "trainable": (list, "a list of names"),
    "parameters": (dict, "an object"),
}


def _wrong_fields(raw: dict[str, Any]) -> list[str]:
    mistakes = []
    for key, (kind, words) in _FIELDS.items():
        if key not in raw:
            mistakes.append(f"'{key}' is missing")
        elif not isinstance(raw[key], kind):
            mistakes.append(f"'{key}' must be {words}, not {_show(raw[key])}")
    if unknown := sorted(set(raw) - set(_FIELDS) - {"schema", "tied", "adapters"}):
        mistakes.append(f"unknown keys: {few(map(_show, unknown))}")
    typed = {k: v for k, v in raw.items() if k in _FIELDS and isinstance(v, _FIELDS[k][0])}
    return mistakes + _wrong_contents(typed)


def _wrong_contents(raw: dict[str, Any]) -> list[str]:
    """What is wrong inside the fields, each of which may be missing."""
    mistakes = [
        f"'{key}' is too long or holds control characters"
        for key in ("model_id", "revision")
        if (text := raw.get(key)) is not None and (len(text) > MAX_NAME_LENGTH or not text.isprintable())
    ]
    blocks = raw.get("blocks", [])
    if not all(isinstance(flag, bool) for flag in blocks):
        mistakes.append("'blocks' must hold only true and false")
    if len(blocks) > MAX_BLOCKS:
        mistakes.append(f"'blocks' has {len(blocks):,} entries; more than {MAX_BLOCKS:,} is no model")
    if "states" in raw:
        mistakes += [
            f"states.{name} must be '{FROZEN}' or '{TRAINABLE}', not {_show(raw['states'].get(name))}"
            for name in ("stem", "head")
            if raw["states"].get(name) not in (FROZEN, TRAINABLE)
        ]
    if not all(map(_is_count, raw.get("counts", {}).values())):
        mistakes.append("'counts' must hold whole numbers from 0")
    if not _is_shallow(raw.get("found", {})):
        mistakes.append(f"'found' is nested deeper than {MAX_DEPTH} levels or holds a non-finite number")
    return mistakes


def _wrong_names(side: str, names: list[Any]) -> list[str]:
    if len(names) > MAX_NAMES:
        return [f"'{side}' has {len(names):,} names; more than {MAX_NAMES:,} are not read"]
    mistakes = []
    if wrong := [name for name in names if not _is_name(name)]:
        mistakes.append(f"'{side}' holds what is no parameter name: {few(map(_show, wrong))}")
    counts = Counter(name for name in names if isinstance(name, str))
    if twice := [name for name, count in counts.items() if count > 1]:
        mistakes.append(f"'{side}' names twice: {few(map(_show, twice))}")
    return mistakes


def _wrong_parameters(parameters: dict[str, Any]) -> list[str]:
    if len(parameters) > MAX_NAMES:
        return [f"'parameters' has {len(parameters):,} names; more than {MAX_NAMES:,} are not read"]
    if not parameters:
        return ["'parameters' is empty"]
    mistakes = []
    if wrong := [name for name in parameters if not _is_name(name)]:
        mistakes.append(f"'parameters' holds what is no parameter name: {few(map(_show, wrong))}")
    entries = {name: entry for name, entry in parameters.items() if isinstance(entry, dict)}
    if wrong := [name for name in parameters if entries.get(name, {}).keys() != _PARAMETER_CHECKS.keys()]:
        mistakes.append(f"these parameters need exactly group, shape and dtype: {few(map(_show, wrong))}")
    for key, holds in _PARAMETER_CHECKS.items():
        if wrong := [name for name, entry in entries.items() if key in entry and not holds(entry[key])]:
            hint = f" (block.<i> or {', '.join(GROUPS)})" if key == "group" else ""
            mistakes.append(f"the {key}{hint} is wrong for {few(map(_show, wrong))}")
    return mistakes


def _wrong_ties(tied: object) -> list[str]:
    """What is wrong with the optional field of names that tensors have in the model around."""
    if not isinstance(tied, dict):
        return [f"'tied' must be an object, not {_show(tied)}"]
    wrong = [
        name
        for name, others in tied.items()
        if not (
            _is_name(name) and isinstance(others, list) and len(others) > 1 and all(map(_is_name, others))
        )
    ]
    return [f"'tied' needs at least two names for {few(map(_show, wrong))}"] if wrong else []


def _wrong_adapters(raw: dict[str, Any]) -> list[str]:
    """What is wrong with the field that version 2 has and version 1 has not."""
    adapters = raw.get("adapters")
    if raw["schema"] == SCHEMA:
        return [f"'adapters' is no field of {SCHEMA}"] if "adapters" in raw else []
    if not isinstance(adapters, dict) or adapters.keys() != {"kind", "scale", "ranks"}:
        return ["'adapters' needs exactly kind, scale and ranks"]
    mistakes = []
    if adapters["kind"] != "lora":
        mistakes.append(f"adapters of kind {_show(adapters['kind'])} are not known here, only 'lora'")
    scale, ranks = adapters["scale"], adapters["ranks"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        mistakes.append(f"the scale of adapters must be a number, not {_show(scale)}")
    if not isinstance(ranks, dict) or not ranks:
        return [*mistakes, "the ranks of adapters must be an object of modules, not empty"]
    if wrong := [module for module, rank in ranks.items() if not _is_count(rank) or rank < 1]:
        mistakes.append(f"a rank must be a whole number from 1: {few(map(_show, wrong))}")
    return mistakes


def _contradictions(raw: dict[str, Any]) -> list[str]:
    """What the fields say against one another; each is valid in itself."""
    mistakes = []
    frozen, trainable, known = set(raw[FROZEN]), set(raw[TRAINABLE]), set(raw["parameters"])
    for words, names in (
        ("both frozen and trainable", frozen & trainable),
        ("neither frozen nor trainable", known - frozen - trainable),
        ("not among the parameters", (frozen | trainable | set(raw.get("tied", {}))) - known),
    ):
        if names:
            mistakes.append(f"{words}: {few(map(_show, sorted(names)))}")
    table = {
        name: Parameter(entry["group"], tuple(entry["shape"]), entry["dtype"])
        for name, entry in raw["parameters"].items()
    }
    ranks = raw.get("adapters", {}).get("ranks", {})
    mistakes += wrong_adapters(ranks, {name: p.shape for name, p in table.items()}, trainable)
    present = {p.block for p in table.values() if p.block is not None}
    if len(raw["blocks"]) != len(present) or present != set(range(len(present))):
        return mistakes + [
            f"'blocks' has {len(raw['blocks'])} entries, but the parameters belong to {len(present)} blocks"
            + (f" up to block.{max(present)}" if present else "")
        ]
    return mistakes or _wrong_sums(raw, table)


def _wrong_sums(raw: dict[str, Any], table: dict[str, Parameter]) -> list[str]:
    """Where blocks, states, counts and hash are not what the parameters and the names make them."""
    states = raw["states"]
    ranks = raw.get("adapters", {}).get("ranks", {})
    truth = derived_fields(
        table, set(raw[TRAINABLE]), stem=states["stem"], head=states["head"], adapters=ranks
    )
    mistakes = []
    if wrong := [i for i, flag in enumerate(raw["blocks"]) if flag != truth["blocks"][i]]:
        mistakes.append(f"'blocks' and the names disagree about block {few(map(str, wrong))}")
    if wrong_states := [key for key, value in states.items() if truth["states"].get(key) != value]:
        mistakes.append(f"'states' and the names disagree about {few(map(_show, wrong_states))}")
    if missing := [key for key in truth["states"] if key not in states]:
        mistakes.append(f"'states' lacks {few(missing)}")
    if raw["counts"] != truth["counts"]:
        mistakes.append(f"'counts' is not what the parameters add up to ({truth['counts']})")
    if raw["weights_hash"] != truth["weights_hash"]:
        mistakes.append("'weights_hash' is not the hash of the parameters listed")
    return mistakes


def _is_name(value: object) -> bool:
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_NAME_LENGTH
        and value.isprintable()
        and not any(letter.isspace() for letter in value)
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(_is_count(n) for n in value)
        and math.prod(value) < 2**63
    )


_PARAMETER_CHECKS: dict[str, Callable[[object], bool]] = {
    "group": lambda value: isinstance(value, str) and is_group(value),
    "shape": _is_shape,
    "dtype": lambda value: isinstance(value, str) and value.isidentifier() and len(value) <= 40,
}


def _is_shallow(value: object, depth: int = 0) -> bool:
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, float):
        return math.isfinite(value)
    items: Iterable[object] = ()
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, list):
        items = value
    return all(_is_shallow(item, depth + 1) for item in items)


def _kind(value: object) -> str:
    return {list: "list", str: "text", bool: "truth value", type(None): "null"}.get(type(value), "number")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

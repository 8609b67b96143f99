"""From the names in a plan to the names in a model: the one prefix under which all of them are found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerprobe.errors import PlanError, did_you_mean
from layerprobe.plans.names import clean_name, is_adapter
from layerprobe.plans.plan import ParameterTable, PlanData, few

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class NameMatch:
    """Where the plan's names stand in a model.

    Attributes
    ----------
    prefix : str
        What the model puts before the base model's names, for example `transformer.`.
    absent : frozenset[str]
        Names of the plan that the model lacks, all of them allowed by the caller.
    outside : tuple[str, ...]
        Names of the model that are no part of the plan.
    """

    prefix: str
    absent: frozenset[str]
    outside: tuple[str, ...]


def match_parameters(
    plan: PlanData,
    present: Mapping[str, nn.Parameter],
    *,
    prefix: str | None = None,
    without: Iterable[str] = (),
) -> NameMatch:
    """Find the plan's parameters among `present`, whose names are free of wrappers' segments.

    PlanError where a name is missing, a block of the model is not in the plan, two prefixes fit, or a shape
    differs.
    """
    optional = names_within(plan, without)
    wanted = plan.parameters.keys() - optional
    if prefix is None:
        prefix = find_prefix(wanted, present)
    absent = frozenset(n for n in optional if prefix + n not in present)
    missing = [n for n in plan.parameters if n not in absent and prefix + n not in present]
    theirs = {prefix + n for n in plan.parameters}
    outside = tuple(n for n in present if n not in theirs)
    blocks = _unplanned_blocks(plan, prefix, outside)
    if missing or blocks:
        bare_names = [n[len(prefix) :] for n in present if n.startswith(prefix)]
        raise PlanError(_mismatch(plan, bare_names, missing, blocks, "this model"))
    ours = {n: present[prefix + n] for n in plan.parameters if n not in absent}
    _check_whole(ours)
    _check_shapes(plan, {n: tuple(p.shape) for n, p in ours.items()}, "this model")
    return NameMatch(prefix, absent, outside)


def _check_whole(parameters: Mapping[str, nn.Parameter]) -> None:
    """PlanError for tensors whose shape is not the weight's: partitioned, packed or nested."""
    parted = [
        n for n, p in parameters.items() if hasattr(p, "ds_shape") and tuple(p.shape) != tuple(p.ds_shape)
    ]
    if parted:
        raise PlanError(
            f"{len(parted)} parameters are placeholders of DeepSpeed ZeRO-3 ({few(parted)}), which keeps their values "
            "apart on all processes; apply the plan before deepspeed.initialize, or inside "
            "deepspeed.zero.GatheredParameters"
        )
    if packed := [
        n for n, p in parameters.items() if hasattr(p, "quant_state") and not p.is_floating_point()
    ]:
        raise PlanError(
            f"{len(packed)} parameters are packed 4-bit codes of bitsandbytes ({few(packed)}), which have neither the "
            "plan's shapes nor values to train; load the model without quantisation"
        )
    if nested := [n for n, p in parameters.items() if p.is_nested]:
        raise PlanError(
            f"{len(nested)} parameters are nested tensors, which have no one shape ({few(nested)})"
        )


def _unplanned_blocks(plan: PlanData, prefix: str, outside: Iterable[str]) -> list[str]:
    """Names that lie in a numbered block beside those of the plan, and are not the plan's."""
    patterns = _block_patterns(plan)
    inside = [name for name in outside if name.startswith(prefix) and not is_adapter(name)]
    behind_prefix = [(name, name[len(prefix) :]) for name in inside]
    return [name for name, bare in behind_prefix if any(pattern.match(bare) for pattern in patterns)]


def check_table(plan: PlanData, parameters: ParameterTable, *, name: str = "this backbone") -> None:
    """Raise PlanError unless `parameters`, of a bare base model, are the ones the plan was made for.

    Names and shapes must agree. The dtype may differ: a plan found in float32 holds in bfloat16.
    """
    parameters = {clean_name(n): entry for n, entry in parameters.items() if not is_adapter(n)}
    missing = [n for n in plan.parameters if n not in parameters]
    extra = [n for n in parameters if n not in plan.parameters]
    if missing or extra:
        raise PlanError(_mismatch(plan, parameters, missing, extra, name))
    _check_shapes(plan, {n: shape for n, (shape, _) in parameters.items()}, name)


def _check_shapes(plan: PlanData, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Raise PlanError where a shape (of those given) differs from the plan's."""
    wrong = [n for n, shape in shapes.items() if tuple(shape) != plan.parameters[n].shape]
    if wrong:
        first = wrong[0]
        raise PlanError(
            f"{plan.source} was made for {plan.model_id}, whose {first} is "
            f"{_size(plan.parameters[first].shape)}; {name} has {_size(shapes[first])}, and "
            f"{len(wrong)} of {len(shapes)} shapes differ"
        )


def block_modules(plan: PlanData) -> list[str]:
    """Dotted module name of every block, `h.0`, `h.1`, …, read off the names of its parameters."""
    members: list[list[list[str]]] = [[] for _ in range(plan.n_blocks)]
    for parameter_name, parameter in plan.parameters.items():
        if parameter.block is not None:
            members[parameter.block].append(parameter_name.split(".")[:-1])
    shared = [_common_start(names) for names in members]
    container = _common_start(shared)
    modules = []
    for index, segments in enumerate(shared):
        # Blocks in one list differ first at their index. A lone block, or blocks of several lists, share
        # more than that: there the last segment that is the index ends the module's name.
        if len(shared) > 1 and segments[len(container) : len(container) + 1] == [str(index)]:
            segments = segments[: len(container) + 1]
        elif str(index) in segments:
            segments = segments[: len(segments) - segments[::-1].index(str(index))]
        modules.append(".".join(segments))
    return modules


def _common_start(lists: list[list[str]]) -> list[str]:
    shared = []
    for segments in zip(*lists, strict=False):
        if len(set(segments)) > 1:
            break
        shared.append(segments[0])
    return shared


def _block_patterns(plan: PlanData) -> list[re.Pattern[str]]:
    """One pattern per container of blocks; its group is the index."""
    containers = dict.fromkeys(module.rpartition(".")[0] for module in block_modules(plan))
    return [re.compile((re.escape(c) + r"\." if c else "") + r"(\d+)\.") for c in containers]


def find_prefix(wanted: Collection[str], present: Iterable[str]) -> str:
    """The prefix under which all of `wanted` stand, else the one under which most of them do."""
    counts: Counter[str] = Counter()
    for candidate in present:
        segments = candidate.split(".")
        for start in range(len(segments)):
            if ".".join(segments[start:]) in wanted:
                counts["".join(f"{segment}." for segment in segments[:start])] += 1
    whole = [prefix for prefix, count in counts.items() if count == len(wanted)]
    if len(whole) > 1:
        raise PlanError(
            f"this model holds the plan's model {len(whole)} times, under {few(map(repr, sorted(whole)))}; "
            "choose one with prefix="
        )
    if whole:
        return whole[0]
    return counts.most_common(1)[0][0] if counts else ""


def _mismatch(plan: PlanData, names: Iterable[str], missing: list[str], extra: list[str], name: str) -> str:
    names = list(names)
    if not any(n in plan.parameters for n in names):
        return (
            f"{plan.source} was made for {plan.model_id}; {name} has none of its {len(plan.parameters)} "
            f"parameter names (plan: {few(plan.parameters, 1)}; model: {few(names, 1)})"
        )
    counted = {match[0] for n in names for p in _block_patterns(plan) if (match := p.match(n))}
    if plan.n_blocks and counted and len(counted) != plan.n_blocks:
        return plan.other_depth(len(counted), name=name)
    parts = []
    if missing:
        parts.append(f"{name} lacks {len(missing)} parameters of the plan ({few(missing)})")
    if extra:
        parts.append(
            f"{'and' if missing else name} has {len(extra)} that the plan does not name ({few(extra)})"
        )
    return f"{plan.source} was made for {plan.model_id}: " + " ".join(parts)


def names_within(plan: PlanData, modules: Iterable[str]) -> frozenset[str]:
    """The plan's names in `modules` (`pooler`); PlanError for a module that holds none."""
    names: set[str] = set()
    for module in modules:
        inside = [n for n in plan.parameters if n == module or n.startswith(module + ".")]
        if not inside:
            dotted = (name.split(".") for name in plan.parameters)
            known = {".".join(parts[:depth]) for parts in dotted for depth in range(1, len(parts))}
            suggestion = did_you_mean(module, sorted(known))
            raise PlanError(
                f"without={module!r}: the plan has no such module{'.' if suggestion else ''}{suggestion}"
            )
        names.update(inside)
    return frozenset(names)


def _size(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a scalar"

"""A plan on a live model: what trains is set, adapters are placed, and everything or nothing is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from layerprobe.errors import PlanError, first_line
from layerprobe.files import dtype_name
from layerprobe.plans.adapters import add_adapters, present_ranks, refuse_other_adapters
from layerprobe.plans.match import match_parameters
from layerprobe.plans.names import adapter_part, is_original
from layerprobe.plans.plan import FROZEN, TRAINABLE, PlanData, few
from layerprobe.plans.verify import (
    AppliedState,
    adapter_digests,
    applied_states,
    effect_of,
    named_parameters,
    take_fingerprint,
)

if TYPE_CHECKING:
    from torch import nn

ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What `apply` did.

    Attributes
    ----------
    prefix : str
        What the model puts before the plan's names.
    trainable, frozen : int
        Numbers of the plan's tensors set on either side.
    outside : dict[str, str]
        Name -> state, for the parameters around the base model.
    tied : dict[str, str]
        Name outside the base model -> the plan's name of the same tensor, whose state it shares.
    absent : tuple[str, ...]
        Names of the plan that the model lacks by the caller's leave.
    """

    prefix: str
    trainable: int
    frozen: int
    outside: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


def apply_plan(
    plan: PlanData,
    model: nn.Module,
    *,
    outside: str | Mapping[str, str] = ERROR,
    without: Iterable[str] = (),
    prefix: str | None = None,
    remember: bool = True,
    seed: int = 0,
) -> Applied:
    """Set `requires_grad` of every parameter of `model` to what the plan says, or change nothing at all.

    Adapters of the plan are placed into the model, unless it carries exactly them. The model may be the base model
    itself or hold it: with a task head, in DistributedDataParallel, compiled. `from_pretrained` makes every parameter
    trainable, so apply before the optimizer is built, and again when training is resumed. DistributedDataParallel and
    FSDP look at `requires_grad` when they wrap a model: apply before them (the Trainer wraps late enough).

    Parameters
    ----------
    outside : str | Mapping[str, str]
        What becomes of parameters around the base model (lm_head, classifier, pooler): `frozen`, `trainable`,
        or a mapping from names or modules to one of the two. Default: an error that lists them. A head tied
        to an embedding is the embedding: it follows the plan.
    without : Iterable[str]
        Modules of the plan that this model is meant not to have (`pooler`).
    prefix : str | None
        Where the base model stands, when it cannot be found by its names alone.
    remember : bool
        Take digests now, so that `verify` needs no other argument. Reads every weight once (about 1 GB/s).
    seed : int
        Of the first factors of adapters.

    Returns
    -------
    Applied

    Raises
    ------
    PlanError
        Names or shapes do not fit; what should train cannot (integer codes); or a tensor has no values here to be
        remembered (offloaded, on the meta device). The first few are listed.
    """
    every = named_parameters(model)
    match = match_parameters(plan, every, prefix=prefix, without=without)
    ours = {match.prefix + name: name for name in plan.parameters if name not in match.absent}
    trained = frozenset(plan.trainable)
    wanted: dict[int, tuple[str, bool]] = {}
    for full, name in ours.items():
        other, state = wanted.setdefault(id(every[full]), (name, name in trained))
        if state != (name in trained):
            raise PlanError(
                f"{name} and {other} are one tensor in this model (tied), but the plan freezes only one"
            )
    placed = present_ranks(every, match.prefix)
    refuse_other_adapters(plan, placed)
    tied = {name: wanted[id(every[name])][0] for name in match.outside if id(every[name]) in wanted}
    around = [name for name in match.outside if name not in tied and not _decided(plan, name)]
    states = _outside_states(outside, _first_names(around, every), tied, trained)
    flags = {name: word == TRAINABLE for name, word in states.items()}
    flags |= {full: name in trained for full, name in ours.items()}
    _check_trainable({name: every[name] for name, flag in flags.items() if flag}, every)
    # Everything that can fail comes before the first flag.
    before = take_fingerprint(plan, model, prefix=match.prefix, without=without) if remember else None
    if plan.adapters and not placed:
        add_adapters(plan, model, match.prefix, seed=seed)
        every = named_parameters(model)
    flags |= {name: adapter_part(name) is not None for name in every if _decided(plan, name)}
    _set_flags(every, flags)
    if before is not None:
        dtypes = {name: str(every[full].dtype) for full, name in ours.items()}
        before.parameters.update(adapter_digests(plan, every, match.prefix))
        applied_states[model] = AppliedState(effect_of(plan), before, dtypes)
    return Applied(
        prefix=match.prefix,
        trainable=sum(name in trained for name in ours.values()),
        frozen=sum(name not in trained for name in ours.values()),
        outside=states,
        tied=tied,
        absent=tuple(name for name in plan.parameters if name in match.absent),
    )


def _first_names(names: Iterable[str], every: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(every[name]), name) for name in names}


def _decided(plan: PlanData, name: str) -> bool:
    """Whether the plan decides on a parameter beside the model's own: of its adapters, or under a copy of PEFT's."""
    return is_original(name) or bool(plan.adapters and adapter_part(name))


def _check_trainable(parameters: Mapping[str, nn.Parameter], every: Mapping[str, nn.Parameter]) -> None:
    """PlanError for parameters that are to be trained and cannot be; `every` are those of the whole model."""
    offloaded = [name for name, p in parameters.items() if p.is_meta]
    if offloaded and not all(p.is_meta for p in every.values()):  # a model without any values is a dry run
        raise PlanError(
            f"{len(offloaded)} parameters that should be trainable are on the meta device, offloaded to disk or CPU: "
            f"{few(offloaded)}; load the model without offloading. Nothing was changed"
        )
    codes = [n for n, p in parameters.items() if not (p.dtype.is_floating_point or p.dtype.is_complex)]
    if codes:
        raise PlanError(
            f"{len(codes)} parameters that should be trainable hold {dtype_name(parameters[codes[0]].dtype)} codes "
            f"(quantised): {few(codes)}; load the model without quantisation, or freeze their blocks. Nothing was "
            "changed"
        )
    if bound := [name for name, p in parameters.items() if p.is_inference()]:
        raise PlanError(
            f"{len(bound)} parameters that should be trainable were made under torch.inference_mode ({few(bound)}); "
            "load the model outside of it. Nothing was changed"
        )


def _set_flags(every: Mapping[str, nn.Parameter], flags: Mapping[str, bool]) -> None:
    """Set every flag, or, where torch refuses one, none."""
    before = {name: every[name].requires_grad for name in flags}
    try:
        for name, flag in flags.items():
            every[name].requires_grad_(flag)
    except RuntimeError as error:
        for known, flag in before.items():
            if every[known].requires_grad != flag:
                every[known].requires_grad_(flag)
        raise PlanError(f"{name} cannot be set: {first_line(error)}. Nothing was changed") from error


def _outside_states(
    outside: str | Mapping[str, str],
    first_names: Mapping[str, str],
    tied: Mapping[str, str],
    trained: frozenset[str],
) -> dict[str, str]:
    """Name -> state of every tensor around the base model, or a PlanError that says what to choose.

    `first_names` maps every name of such a tensor to its first one.
    """
    names = list(dict.fromkeys(first_names.values()))
    if isinstance(outside, str):
        return dict.fromkeys(names, _one_state(outside, names))
    states: dict[str, str] = {}
    for key, state in outside.items():
        if state not in (FROZEN, TRAINABLE):
            raise PlanError(f"outside: '{state}' is no state for {key}; choose '{FROZEN}' or '{TRAINABLE}'")
        under = [name for name in (*first_names, *tied) if name == key or name.startswith(key + ".")]
        if not under:
            raise PlanError(f"outside: nothing around the plan's model is named {key} (there: {few(names)})")
        for name in under:
            if name in tied and (tied[name] in trained) != (state == TRAINABLE):
                raise PlanError(
                    f"{name} cannot be {state}: it is the same tensor as {tied[name]} (tied), which the "
                    f"plan keeps {TRAINABLE if tied[name] in trained else FROZEN}"
                )
            if name in first_names and states.setdefault(first_names[name], state) != state:
                also = "" if first_names[name] == name else f", which is the same tensor as {name}"
                raise PlanError(f"outside: two things are said about {first_names[name]}{also}")
    if left := [name for name in names if name not in states]:
        raise PlanError(f"outside: nothing is said about {few(left)}; add them to the mapping")
    return {name: states[name] for name in names}


def _one_state(outside: str, names: list[str]) -> str:
    if outside not in (ERROR, FROZEN, TRAINABLE):
        raise PlanError(f"outside='{outside}': choose '{FROZEN}', '{TRAINABLE}' or a mapping of names")
    if outside == ERROR and names:
        raise PlanError(
            f"{len(names)} parameters lie outside the plan's model ({few(names)}); say what becomes of "
            f"them: apply(model, outside='{TRAINABLE}'), outside='{FROZEN}', or a mapping of names"
        )
    return outside

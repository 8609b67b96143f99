"""A plan on a live model: set `requires_grad`, take digests, and prove that frozen tensors did not move."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from layerprobe.errors import PlanError
from layerprobe.files import tensor_digest
from layerprobe.plans.matching import NameMatch, block_modules, check_shapes, clean_name, match_names
from layerprobe.plans.plan import FROZEN, TRAINABLE, FreezePlan, few

ERROR = "error"


@dataclass(frozen=True)
class Applied:
    """What `apply` did.

    Attributes
    ----------
    prefix : what the model puts before the plan's names.
    trainable, frozen : numbers of the plan's tensors set on either side.
    outside : name -> state, for the parameters around the base model.
    tied : name outside the base model -> the plan's name of the same tensor, whose state it shares.
    absent : names of the plan that the model lacks by the caller's leave.
    """

    prefix: str
    trainable: int
    frozen: int
    outside: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fingerprint:
    """sha256 of every tensor of the plan, and of every buffer in the frozen blocks, at one moment."""

    parameters: dict[str, str]
    buffers: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, to keep beside a checkpoint."""
        return {"parameters": dict(self.parameters), "buffers": dict(self.buffers)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Fingerprint:
        """Read what `to_dict` made."""
        return cls(dict(raw["parameters"]), dict(raw["buffers"]))


@dataclass(frozen=True)
class Verification:
    """The proof that a training run kept to the plan.

    Attributes
    ----------
    frozen, buffers : how many frozen tensors, and buffers of frozen blocks, were found bit-identical.
    changed : trainable parameters that did move.
    unchanged : trainable parameters that did not, for example because no gradient ever reached them.
    """

    frozen: int
    buffers: int
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]

    def summary(self) -> str:
        """One sentence."""
        text = (
            f"{self.frozen} frozen tensors and {self.buffers} buffers are bit-identical; "
            f"{len(self.changed)} of {len(self.changed) + len(self.unchanged)} trainable tensors changed"
        )
        return text + (f" (not: {few(self.unchanged)})" if self.unchanged else "")


_remembered: weakref.WeakKeyDictionary[nn.Module, tuple[str, Fingerprint]] = weakref.WeakKeyDictionary()
"""Model -> (hash of the plan applied last, digests at that moment); gone when the model is."""


def apply_plan(
    plan: FreezePlan,
    model: nn.Module,
    *,
    outside: str | Mapping[str, str] = ERROR,
    without: Iterable[str] = (),
    prefix: str | None = None,
    remember: bool = True,
) -> Applied:
    """Set `requires_grad` of every parameter of `model` to what the plan says, or change nothing at all.

    The model may be the base model itself or hold it: with a task head, in DistributedDataParallel, compiled.
    `from_pretrained` makes every parameter trainable, so apply before the optimizer is built, and again when
    training is resumed. DistributedDataParallel and FSDP look at `requires_grad` when they wrap a model: apply
    before them (the Trainer wraps late enough).

    Parameters
    ----------
    outside : what becomes of parameters around the base model (lm_head, classifier, pooler): `frozen`,
        `trainable`, or a mapping from names or modules to one of the two. Default: an error that lists them.
        A head tied to an embedding is the embedding: it follows the plan.
    without : modules of the plan that this model is meant not to have (`pooler`).
    prefix : where the base model stands, when it cannot be found by its names alone.
    remember : take digests now, so that `verify` needs no other argument. Reads every weight once
        (about 1 GB/s).

    Returns
    -------
    Applied

    Raises
    ------
    PlanError : names or shapes do not fit; the first few are listed.
    """
    every = named_parameters(model)
    match = _match(plan, every, prefix=prefix, without=without)
    ours = {match.prefix + name: name for name in plan.parameters if name not in match.absent}
    trained = frozenset(plan.trainable)
    wanted: dict[int, tuple[str, bool]] = {}
    for full, name in ours.items():
        other, state = wanted.setdefault(id(every[full]), (name, name in trained))
        if state != (name in trained):
            raise PlanError(
                f"{name} and {other} are one tensor in this model (tied), but the plan freezes only one"
            )
    tied = {name: wanted[id(every[name])][0] for name in match.outside if id(every[name]) in wanted}
    first: dict[int, str] = {}
    twins = {name: first.setdefault(id(every[name]), name) for name in match.outside if name not in tied}
    states = _outside_states(outside, twins, tied, trained)
    for full, name in ours.items():
        every[full].requires_grad_(name in trained)
    for name, word in states.items():
        every[name].requires_grad_(word == TRAINABLE)
    if remember:
        _remembered[model] = (
            plan_key(plan),
            take_fingerprint(plan, model, prefix=match.prefix, without=without),
        )
    return Applied(
        prefix=match.prefix,
        trainable=sum(name in trained for name in ours.values()),
        frozen=sum(name not in trained for name in ours.values()),
        outside=states,
        tied=tied,
        absent=tuple(name for name in plan.parameters if name in match.absent),
    )


def take_fingerprint(
    plan: FreezePlan, model: nn.Module, *, prefix: str | None = None, without: Iterable[str] = ()
) -> Fingerprint:
    """Digests of every tensor of the plan, and of the buffers in the blocks that are frozen as a whole.

    Costs one read of the weights and 64 hex digits a tensor; no copy of the model is kept.
    """
    every = named_parameters(model)
    match = _match(plan, every, prefix=prefix, without=without)
    parameters = {
        name: tensor_digest(every[match.prefix + name])
        for name in plan.parameters
        if name not in match.absent
    }
    inside = tuple(
        f"{match.prefix}{module}."
        for module, state in zip(block_modules(plan), plan.block_states, strict=True)
        if state == FROZEN
    )
    buffers = {
        name[len(match.prefix) :]: tensor_digest(buffer)
        for name, buffer in ((clean_name(n), b) for n, b in model.named_buffers(remove_duplicate=False))
        if name.startswith(inside)
    }
    return Fingerprint(parameters, buffers)


def verify_plan(
    plan: FreezePlan,
    model: nn.Module,
    before: Fingerprint | None = None,
    *,
    prefix: str | None = None,
    without: Iterable[str] = (),
) -> Verification:
    """Compare `model` with its digests from before training.

    Parameters
    ----------
    before : from `fingerprint`; by default the digests that `apply` took of this very object.

    Raises
    ------
    PlanError : a frozen tensor, or a buffer of a frozen block, is not bit-identical; or nothing is known from
        before.
    """
    if before is None:
        key, remembered = _remembered.get(model, ("", None))
        if remembered is None or key != plan_key(plan):
            raise PlanError(
                "nothing to compare with: this plan was not applied to this model object; "
                "keep before = plan.fingerprint(model) and call plan.verify(model, before)"
            )
        before = remembered
    # What the model lacked when the digests were taken, it may lack now.
    absent = [name for name in plan.parameters if name not in before.parameters]
    now = take_fingerprint(plan, model, prefix=prefix, without=[*without, *absent])
    trained = set(plan.trainable)
    moved = [
        name
        for name, digest in before.parameters.items()
        if name not in trained and now.parameters.get(name) != digest
    ]
    moved += [name for name, digest in before.buffers.items() if now.buffers.get(name) != digest]
    if moved:
        total = sum(name not in trained for name in before.parameters) + len(before.buffers)
        raise PlanError(
            f"{len(moved)} of {total} frozen tensors are not what they were before training ({few(moved)}); "
            "requires_grad is lost on from_pretrained: apply the plan before the optimizer is built, "
            "and again on resume"
        )
    trainable = [name for name in plan.trainable if name in before.parameters]
    changed = tuple(name for name in trainable if now.parameters.get(name) != before.parameters[name])
    return Verification(
        frozen=sum(name not in trained for name in before.parameters),
        buffers=len(before.buffers),
        changed=changed,
        unchanged=tuple(name for name in trainable if name not in set(changed)),
    )


def plan_key(plan: FreezePlan) -> str:
    """What tells plans with different effects apart: the model's hash and the trainable names."""
    text = "\n".join([plan.weights_hash, *sorted(plan.trainable)])
    return hashlib.sha256(text.encode()).hexdigest()


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every name of every parameter, tied ones under each of theirs, without the segments of wrappers."""
    return {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


def _match(
    plan: FreezePlan, every: Mapping[str, nn.Parameter], *, prefix: str | None, without: Iterable[str]
) -> NameMatch:
    match = match_names(plan, every, prefix=prefix, without=without)
    shapes = {n: tuple(every[match.prefix + n].shape) for n in plan.parameters if n not in match.absent}
    check_shapes(plan, shapes, "this model")
    return match


def _outside_states(
    outside: str | Mapping[str, str],
    twins: Mapping[str, str],
    tied: Mapping[str, str],
    trained: frozenset[str],
) -> dict[str, str]:
    """Name -> state of every tensor around the base model, or a PlanError that says what to choose.

    `twins` maps every name of such a tensor to its first one.
    """
    names = list(dict.fromkeys(twins.values()))
    if isinstance(outside, str):
        if outside not in (ERROR, FROZEN, TRAINABLE):
            raise PlanError(f"outside='{outside}': choose '{FROZEN}', '{TRAINABLE}' or a mapping of names")
        if outside == ERROR and names:
            raise PlanError(
                f"{len(names)} parameters lie outside the plan's model ({few(names)}); say what becomes of "
                f"them: apply(model, outside='{TRAINABLE}'), outside='{FROZEN}', or a mapping of names"
            )
        return dict.fromkeys(names, outside)
    states: dict[str, str] = {}
    for key, state in outside.items():
        if state not in (FROZEN, TRAINABLE):
            raise PlanError(f"outside: '{state}' is no state for {key}; choose '{FROZEN}' or '{TRAINABLE}'")
        under = [name for name in (*twins, *tied) if name == key or name.startswith(key + ".")]
        if not under:
            raise PlanError(f"outside: nothing around the plan's model is named {key} (there: {few(names)})")
        for name in under:
            if name in tied and (tied[name] in trained) != (state == TRAINABLE):
                raise PlanError(
                    f"{name} cannot be {state}: it is the same tensor as {tied[name]} (tied), which the "
                    f"plan keeps {TRAINABLE if tied[name] in trained else FROZEN}"
                )
            if name in twins and states.setdefault(twins[name], state) != state:
                also = "" if twins[name] == name else f", which is the same tensor as {name}"
                raise PlanError(f"outside: two things are said about {twins[name]}{also}")
    if left := [name for name in names if name not in states]:
        raise PlanError(f"outside: nothing is said about {few(left)}; add them to the mapping")
    return {name: states[name] for name in names}

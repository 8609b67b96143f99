"""A plan on a live model: set `requires_grad`, take digests, and prove that frozen tensors did not move."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerprobe.errors import PlanError
from layerprobe.files import tensor_digest
from layerprobe.plans.match import block_modules, clean_name, match_parameters
from layerprobe.plans.plan import FROZEN, TRAINABLE, PlanData, few

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


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The proof that a training run kept to the plan.

    Attributes
    ----------
    frozen, buffers : int
        How many frozen tensors, and buffers of frozen blocks, were found bit-identical.
    changed : tuple[str, ...]
        Trainable parameters that did move.
    unchanged : tuple[str, ...]
        Trainable parameters that did not, for example because no gradient ever reached them.
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


_Effect = tuple[str, frozenset[str]]
_remembered: weakref.WeakKeyDictionary[nn.Module, tuple[_Effect, Fingerprint]] = weakref.WeakKeyDictionary()
"""Model -> (effect of the plan applied last, digests at that moment); gone when the model is."""


def apply_plan(
    plan: PlanData,
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

    Returns
    -------
    Applied

    Raises
    ------
    PlanError
        Names or shapes do not fit; the first few are listed.
    """
    every = _named_parameters(model)
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
    tied = {name: wanted[id(every[name])][0] for name in match.outside if id(every[name]) in wanted}
    first: dict[int, str] = {}
    first_names = {
        name: first.setdefault(id(every[name]), name) for name in match.outside if name not in tied
    }
    states = _outside_states(outside, first_names, tied, trained)
    for full, name in ours.items():
        every[full].requires_grad_(name in trained)
    for name, word in states.items():
        every[name].requires_grad_(word == TRAINABLE)
    if remember:
        _remembered[model] = (
            _effect(plan),
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
    plan: PlanData, model: nn.Module, *, prefix: str | None = None, without: Iterable[str] = ()
) -> Fingerprint:
    """Digests of every tensor of the plan, and of the buffers in the blocks that are frozen as a whole.

    Costs one read of the weights and 64 hex digits a tensor; no copy of the model is kept.
    """
    every = _named_parameters(model)
    match = match_parameters(plan, every, prefix=prefix, without=without)
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
    plan: PlanData,
    model: nn.Module,
    before: Fingerprint | None = None,
    *,
    prefix: str | None = None,
    without: Iterable[str] = (),
) -> Verification:
    """Compare `model` with its digests from before training.

    Parameters
    ----------
    before : Fingerprint | None
        From `fingerprint`; by default the digests that `apply` took of this very object.

    Raises
    ------
    PlanError
        a frozen tensor, or a buffer of a frozen block, is not bit-identical; or nothing is known from before.
    """
    if before is None:
        effect, before = _remembered.get(model, (None, None))
        if before is None or effect != _effect(plan):
            raise PlanError(
                "nothing to compare with: this plan was not applied to this model object; "
                "keep before = plan.fingerprint(model) and call plan.verify(model, before)"
            )
    # What the model lacked when the digests were taken, it may lack now.
    absent = [name for name in plan.parameters if name not in before.parameters]
    now = take_fingerprint(plan, model, prefix=prefix, without=[*without, *absent])
    differ = [name for name, digest in before.parameters.items() if now.parameters.get(name) != digest]
    trainable = [name for name in plan.trainable if name in before.parameters]
    n_frozen = len(before.parameters) - len(trainable)
    changed = set(trainable).intersection(differ)
    moved = [name for name in differ if name not in changed]
    moved += [name for name, digest in before.buffers.items() if now.buffers.get(name) != digest]
    if moved:
        raise PlanError(
            f"{len(moved)} of {n_frozen + len(before.buffers)} frozen tensors are not what they were before "
            f"training ({few(moved)}); requires_grad is lost on from_pretrained: apply the plan before the "
            "optimizer is built, and again on resume"
        )
    return Verification(
        frozen=n_frozen,
        buffers=len(before.buffers),
        changed=tuple(name for name in trainable if name in changed),
        unchanged=tuple(name for name in trainable if name not in changed),
    )


def _effect(plan: PlanData) -> _Effect:
    """Equal for plans that set the same model alike, whatever else they say."""
    return plan.weights_hash, frozenset(plan.trainable)


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every name of every parameter, tied ones under each of theirs, without the segments of wrappers."""
    return {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


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

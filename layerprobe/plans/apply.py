"""A plan on a live model: set `requires_grad`, take digests, and prove that frozen tensors did not move."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerprobe.errors import PlanError
from layerprobe.files import tensor_digest
from layerprobe.plans.match import block_modules, match_parameters
from layerprobe.plans.names import clean_name
from layerprobe.plans.plan import FROZEN, TRAINABLE, PlanData, few

if TYPE_CHECKING:
    from torch import Tensor, nn

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


@dataclass(frozen=True)
class _Memory:
    """The effect of the plan applied last, and the model's digests and dtypes at that moment."""

    effect: _Effect
    before: Fingerprint
    dtypes: dict[str, str]


_remembered: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()
"""Model -> what `apply` keeps of it; gone when the model is."""


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
        Names or shapes do not fit; what should train cannot (integer codes); or a tensor has no values here to be
        remembered (offloaded, on the meta device). The first few are listed.
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
    flags = {full: name in trained for full, name in ours.items()}
    flags |= {name: word == TRAINABLE for name, word in states.items()}
    _check_trainable({name: every[name] for name, flag in flags.items() if flag}, every)
    # Everything that can fail comes before the first flag.
    before = take_fingerprint(plan, model, prefix=match.prefix, without=without) if remember else None
    _set_flags(every, flags)
    if before is not None:
        dtypes = {name: str(every[full].dtype) for full, name in ours.items()}
        _remembered[model] = _Memory(_effect(plan), before, dtypes)
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
        name: _digest(name, every[match.prefix + name])
        for name in plan.parameters
        if name not in match.absent
    }
    inside = tuple(
        f"{match.prefix}{module}."
        for module, state in zip(block_modules(plan), plan.block_states, strict=True)
        if state == FROZEN
    )
    buffers = {
        name[len(match.prefix) :]: _digest(name, buffer)
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
    memory = _remembered.get(model)
    if before is None:
        if memory is None or memory.effect != _effect(plan):
            raise PlanError(
                "nothing to compare with: this plan was not applied to this model object; "
                "keep before = plan.fingerprint(model) and call plan.verify(model, before)"
            )
        before = memory.before
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
        if memory is not None and before is memory.before:
            _refuse_cast(model, memory.dtypes, moved)
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
            f"{len(codes)} parameters that should be trainable hold {_dtype(parameters[codes[0]])} codes (quantised): "
            f"{few(codes)}; load the model without quantisation, or freeze their blocks. Nothing was changed"
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
        for name, flag in before.items():
            if every[name].requires_grad != flag:
                every[name].requires_grad_(flag)
        line = str(error).strip().splitlines()[0]
        raise PlanError(f"{name} cannot be set: {line}. Nothing was changed") from error


def _digest(name: str, tensor: Tensor) -> str:
    """The tensor's digest; PlanError where it has no bytes here that could be compared later."""
    if tensor.is_meta:
        raise PlanError(
            f"{name} is on the meta device: offloaded by accelerate, or not loaded, so there is nothing to compare "
            "after training; load the model without offloading, or apply with remember=False"
        )
    try:
        return tensor_digest(tensor)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise PlanError(
            f"{name} ({type(tensor).__name__}, {kind}, {_dtype(tensor)}) cannot be read byte by byte ({line}); "
            "apply with remember=False"
        ) from error


def _refuse_cast(model: nn.Module, dtypes: Mapping[str, str], moved: list[str]) -> None:
    """PlanError where what looks like training is a model that was cast after the plan was applied."""
    there = _named_parameters(model)
    suffix = {
        name: next((p for n, p in there.items() if f".{n}".endswith(f".{name}")), None) for name in moved
    }
    cast = [n for n, p in suffix.items() if n in dtypes and p is not None and str(p.dtype) != dtypes[n]]
    if cast:
        was, is_now = dtypes[cast[0]].removeprefix("torch."), _dtype(suffix[cast[0]])
        raise PlanError(
            f"{len(cast)} frozen tensors were {was} when the plan was applied and are {is_now} now ({few(cast)}): "
            "the model was cast in between; cast it first, then apply the plan"
        )


def _dtype(tensor: Tensor | None) -> str:
    return str(tensor.dtype).removeprefix("torch.") if tensor is not None else "gone"


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

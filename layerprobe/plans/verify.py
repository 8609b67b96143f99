"""Digests of a model before and after training, and the proof that what a plan freezes did not move."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerprobe.errors import PlanError, first_line
from layerprobe.files import dtype_name, tensor_digest
from layerprobe.plans.match import block_modules, match_parameters
from layerprobe.plans.names import adapter_part, clean_name
from layerprobe.plans.plan import FROZEN, PlanData, few

if TYPE_CHECKING:
    from torch import Tensor, nn


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
        Trainable parameters that did move; factors of adapters as `h.3.attn.c_attn.lora_A`.
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


Effect = tuple[str, frozenset[str], str]


@dataclass(frozen=True)
class AppliedState:
    """The effect of the plan applied last, and the model's digests and dtypes at that moment."""

    effect: Effect
    before: Fingerprint
    dtypes: dict[str, str]


applied_states: weakref.WeakKeyDictionary[nn.Module, AppliedState] = weakref.WeakKeyDictionary()
"""Model -> what `apply` keeps of it; gone when the model is."""


def take_fingerprint(
    plan: PlanData, model: nn.Module, *, prefix: str | None = None, without: Iterable[str] = ()
) -> Fingerprint:
    """Digests of every tensor of the plan, and of the buffers in the blocks that are frozen as a whole.

    Costs one read of the weights and 64 hex digits a tensor; no copy of the model is kept.
    """
    every = named_parameters(model)
    match = match_parameters(plan, every, prefix=prefix, without=without)
    parameters = {
        name: _digest(name, every[match.prefix + name])
        for name in plan.parameters
        if name not in match.absent
    }
    parameters |= adapter_digests(plan, every, match.prefix)
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


def adapter_digests(plan: PlanData, every: Mapping[str, nn.Parameter], prefix: str) -> dict[str, str]:
    """Digests of the factors of the plan's adapters among a model's parameters, as `h.3.attn.c_attn.lora_A`."""
    digests = {}
    for full, parameter in every.items():
        module, part = adapter_part(full) or ("", "")
        if module.startswith(prefix) and module[len(prefix) :] in plan.adapters:
            digests[f"{module[len(prefix) :]}.{part}"] = _digest(full, parameter)
    return digests


def verify_plan(
    plan: PlanData,
    model: nn.Module,
    before: Fingerprint | None = None,
    *,
    prefix: str | None = None,
    without: Iterable[str] = (),
) -> Verification:
    """Compare `model` with its digests from before training; PlanError where all was frozen after `apply`.

    Parameters
    ----------
    before : Fingerprint | None
        From `fingerprint`; by default the digests that `apply` took of this very object.

    Raises
    ------
    PlanError
        A frozen tensor, or a buffer of a frozen block, is not bit-identical; or nothing is known from before.
    """
    memory = applied_states.get(model)
    if before is None:
        if memory is None or memory.effect != effect_of(plan):
            raise PlanError(
                "nothing to compare with: this plan was not applied to this model object; "
                "keep before = plan.fingerprint(model) and call plan.verify(model, before)"
            )
        before = memory.before
    # What the model lacked when the digests were taken, it may lack now.
    absent = [name for name in plan.parameters if name not in before.parameters]
    now = take_fingerprint(plan, model, prefix=prefix, without=[*without, *absent])
    differ = [name for name, digest in before.parameters.items() if now.parameters.get(name) != digest]
    factors = [f"{module}.{part}" for module in plan.adapters for part in ("lora_A", "lora_B")]
    if gone := [name for name in factors if name in before.parameters and name not in now.parameters]:
        raise PlanError(f"{len(gone)} adapters of the plan are no longer in the model ({few(gone)})")
    trainable = [name for name in (*plan.trainable, *factors) if name in before.parameters]
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
    if not changed and memory is not None and before is memory.before:
        _refuse_frozen_later(model, trainable)
    return Verification(
        frozen=n_frozen,
        buffers=len(before.buffers),
        changed=tuple(name for name in trainable if name in changed),
        unchanged=tuple(name for name in trainable if name not in changed),
    )


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
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        what = f"{name} ({type(tensor).__name__}, {kind}, {dtype_name(tensor.dtype)})"
        raise PlanError(
            f"{what} cannot be read byte by byte ({first_line(error)}); apply with remember=False"
        ) from error


def _refuse_cast(model: nn.Module, dtypes: Mapping[str, str], moved: list[str]) -> None:
    """PlanError where what looks like training is a model that was cast after the plan was applied."""
    there = _by_plan_name(model, [name for name in moved if name in dtypes])
    if cast := [name for name, found in there.items() if str(found[0].dtype) != dtypes[name]]:
        was, is_now = dtype_name(dtypes[cast[0]]), dtype_name(there[cast[0]][0].dtype)
        raise PlanError(
            f"{len(cast)} frozen tensors were {was} when the plan was applied and are {is_now} now ({few(cast)}): "
            "the model was cast in between; cast it first, then apply the plan"
        )


def _refuse_frozen_later(model: nn.Module, trainable: list[str]) -> None:
    """PlanError where nothing was trained because something froze the model after the plan was applied."""
    there = _by_plan_name(model, trainable).items()
    if late := [name for name, found in there if not any(p.requires_grad for p in found)]:
        raise PlanError(
            f"none of {len(trainable)} trainable tensors changed, and {len(late)} are frozen now ({few(late)}): what "
            "froze them after the plan was applied (peft's prepare_model_for_kbit_training does) goes before it"
        )


def _by_plan_name(model: nn.Module, names: Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """The parameters whose names end on each of the plan's; without those of the plan that none ends on."""
    there = named_parameters(model).items()
    found = {name: [p for full, p in there if f".{full}".endswith(f".{name}")] for name in names}
    return {name: fitting for name, fitting in found.items() if fitting}


def effect_of(plan: PlanData) -> Effect:
    """Equal for plans that set the same model alike, whatever else they say."""
    return plan.weights_hash, frozenset(plan.trainable), repr([plan.adapter_scale, plan.adapters])


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every name of every parameter, also the second ones of tied ones, without the segments of wrappers."""
    return {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}

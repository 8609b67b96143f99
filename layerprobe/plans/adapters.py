"""The adapters that a plan places: low-rank terms (LoRA) on linear maps, put there and taken away by PEFT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, cast

from layerprobe.errors import NotAvailableError, PlanError, first_line
from layerprobe.plans.names import adapter_part, clean_name
from layerprobe.plans.plan import PlanData, few

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER_NAME = "layerprobe"
"""What PEFT knows the adapters by that a plan has placed."""


def present_ranks(names: Mapping[str, nn.Parameter], prefix: str = "") -> dict[str, int]:
    """Module, without `prefix` -> rank of the LoRA on it, read off the shapes of a model's parameters."""
    ranks = {}
    for name, parameter in names.items():
        part = adapter_part(name)
        if part is not None and part[1] == "lora_A" and part[0].startswith(prefix):
            ranks[part[0].removeprefix(prefix)] = int(parameter.shape[0])
    return ranks


def add_adapters(plan: PlanData, model: nn.Module, prefix: str, *, seed: int) -> None:
    """Place the plan's adapters into `model`, in place; at first they add exactly zero.

    Parameters
    ----------
    prefix : str
        What the model puts before the plan's names.
    seed : int
        Of the first factors; the second ones are zero.

    Raises
    ------
    NotAvailableError
        PEFT is not installed.
    PlanError
        PEFT did not place exactly these; then none is left.
    """
    import torch

    try:
        import peft
    except ImportError as error:
        raise NotAvailableError("a plan with adapters needs PEFT: pip install 'layerprobe[peft]'") from error
    places = {clean_name(f"{name}.")[:-1]: name for name, _ in model.named_modules()}
    root = places[prefix.rstrip(".")]
    base = model.get_submodule(root)
    inside = f"{root}." if root else ""
    ranks = {places[prefix + module].removeprefix(inside): rank for module, rank in plan.adapters.items()}
    largest = max(ranks.values())
    other = {re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    config = peft.LoraConfig(
        r=largest,
        lora_alpha=cast(int, plan.adapter_scale * largest),  # PEFT divides by it, fractions too
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern=other,
        alpha_pattern={name: plan.adapter_scale * rank for name, rank in other.items()},
    )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GPT-2's transposed matrices, which PEFT turns by itself
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, base, adapter_name=ADAPTER_NAME)
        found = present_ranks({clean_name(name): p for name, p in model.named_parameters()}, prefix)
        if found != plan.adapters:
            differ = [m for m in {**found, **plan.adapters} if found.get(m) != plan.adapters.get(m)]
            raise ValueError(f"{few(differ)} differ from the plan")
    except ValueError as error:  # PEFT's own for a layer that it cannot adapt
        remove_adapters(model)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise PlanError(f"PEFT cannot place the plan's adapters: {first_line(error)}") from error


def remove_adapters(model: nn.Module, *, merge: bool = False) -> tuple[str, ...]:
    """Take away the adapters that plans have placed in `model`; the layers under them are the model's own again.

    Parameters
    ----------
    merge : bool
        Add what they have learnt to the weights first.

    Returns
    -------
    tuple[str, ...]
        The modules that had one.
    """
    layers = [(name, m) for name, m in model.named_modules() if ADAPTER_NAME in _adapters_of(m)]
    for name, layer in layers:
        if merge:
            layer.merge(adapter_names=[ADAPTER_NAME])
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.base_layer)
    for module in model.modules() if layers else ():
        if ADAPTER_NAME in (getattr(module, "peft_config", None) or {}):
            del module.peft_config
    return tuple(clean_name(name) for name, _ in layers)


def keep_adapters(model: nn.Module) -> Callable[[], None]:
    """A function that puts the adapters of now back into `model`, whatever plans placed, took away or merged since.

    It does not restore the values of weights.
    """
    layers = {name: m for name, m in model.named_modules() if ADAPTER_NAME in _adapters_of(m)}
    held = [m for m in model.modules() if ADAPTER_NAME in (getattr(m, "peft_config", None) or {})]
    configs = [(module, module.peft_config) for module in held]

    def put_back() -> None:
        remove_adapters(model)
        for name, layer in layers.items():
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)
            layer.merged_adapters.clear()
        for module, config in configs:
            module.peft_config = config

    return put_back


def has_adapters(model: nn.Module) -> bool:
    """Whether a plan has placed adapters in it."""
    return any(ADAPTER_NAME in _adapters_of(module) for module in model.modules())


def adapter_updates(model: nn.Module) -> dict[str, Tensor]:
    """Weight that a plan's adapter is on -> what the adapter adds to it, of the weight's shape."""
    return {
        f"{clean_name(name)}.weight": layer.get_delta_weight(ADAPTER_NAME).detach()
        for name, layer in model.named_modules()
        if ADAPTER_NAME in _adapters_of(layer)
    }


def refuse_other_adapters(plan: PlanData, found: Mapping[str, int]) -> None:
    """PlanError where a model carries LoRA already and it is not the plan's."""
    if plan.adapters and found and dict(found) != plan.adapters:
        differ = [m for m in {**plan.adapters, **found} if found.get(m) != plan.adapters.get(m)]
        raise PlanError(
            f"the model carries adapters on {len(found)} modules already, and {plan.source} places others "
            f"({few(differ)}); take them away first (model.unload()), or merge them"
        )


def _adapters_of(module: nn.Module) -> Iterable[str]:
    """Names of the LoRA adapters in a layer of PEFT."""
    found = getattr(module, "lora_A", None)
    return found.keys() if found is not None and hasattr(module, "base_layer") else ()

"""What a run would take, told before anything is loaded: the body of `--dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerprobe.backbones import Backbone
    from layerprobe.plans import FreezePlan

FORWARD_FACTOR = 12
"""Rough count of B×T×D tensors alive in one block's forward pass (q, k, v, the widened MLP, residuals)."""


def forward_facts(seen: Backbone, *, batch_size: int) -> dict[str, Any]:
    """Model, blocks, and an estimate of the memory for weights and one forward pass.

    Activations are estimated as batch × tokens × width × 12 values.
    """
    from layerprobe.backbones.load import available_memory

    value_bytes = 2 if str(seen.dtype).endswith("16") else 4
    activations = batch_size * seen.tokens * seen.hidden_size * FORWARD_FACTOR * value_bytes
    free = available_memory(seen.run_device)
    needed = seen.weights_bytes + activations
    return {
        "model": f"{seen.source.model_id} at {seen.source.revision}",
        "blocks": seen.n_blocks,
        "width": seen.hidden_size,
        "parameters": f"{seen.n_parameters:,}",
        "device": str(seen.run_device),
        "dtype": str(seen.dtype).removeprefix("torch."),
        "weights": _size(seen.weights_bytes),
        "tokens an image": seen.tokens_in_words,
        "activations": f"about {_size(activations)} for {batch_size} images of {seen.tokens} tokens",
        "memory free": "unknown" if free is None else _size(free),
        "fits": "unknown" if free is None else ("yes" if needed < free else "no"),
    }


def training_facts(seen: Backbone, plan: FreezePlan | None, *, images: int) -> dict[str, Any]:
    """Model, plan, and an estimate of the memory for weights, gradients and AdamW's moments.

    Activations are estimated at 34·T·d bytes of float32 per block and image, twice (Korthikanti et al. 2022,
    arXiv 2205.05198, count 34 bytes in 16 bits without attention maps).
    """
    trained = seen.n_parameters if plan is None else plan.counts["trainable_parameters"]
    size = seen.weights_bytes // max(1, seen.n_parameters)
    activations = images * seen.tokens * seen.hidden_size * 34 * 2 * seen.n_blocks
    return {
        "model": f"{seen.source.model_id} @ {seen.source.revision}",
        "device": str(seen.run_device),
        "blocks": seen.n_blocks,
        "plan": "no plan: everything trains" if plan is None else plan.summary(),
        "trained parameters": trained,
        "weights": _mib(seen.weights_bytes),
        "gradients and moments": _mib(3 * trained * size),
        "tokens an image": seen.tokens_in_words,
        "activations": _mib(activations),
        "memory": _mib(seen.weights_bytes + 3 * trained * size + activations),
    }


def check_plan(plan: FreezePlan | None, seen: Backbone) -> None:
    """PlanError for a plan of another model, by names and shapes alone."""
    if plan is not None:
        from layerprobe.plans import parameter_table

        plan.check(parameter_table(seen.model), name="this model")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"

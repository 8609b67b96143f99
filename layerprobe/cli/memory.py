"""What a run would take, told before anything is loaded: the body of `--dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from layerprobe.backbones import Backbone
    from layerprobe.plans import FreezePlan

FORWARD_VALUES = 12
"""Rough count of B×T×D tensors alive in one block's forward pass (q, k, v, the widened MLP, residuals)."""

TRAINING_BYTES = 2 * 34
"""Bytes that a block keeps per token and channel for the backward pass, in float32. Korthikanti et al. 2022
(arXiv 2205.05198) count 34 in 16 bits, without attention maps."""


class Memory(NamedTuple):
    """Bytes."""

    weights: int
    gradients_and_moments: int
    activations: int


def memory_needed(seen: Backbone, *, images: int, trained: int | None = None) -> Memory:
    """Memory of one forward pass, or of one training step with AdamW for `trained` parameters."""
    size = seen.weights_bytes // max(1, seen.n_parameters)
    per_value = FORWARD_VALUES * size if trained is None else TRAINING_BYTES * seen.n_blocks
    return Memory(
        seen.weights_bytes, 3 * (trained or 0) * size, images * seen.tokens * seen.hidden_size * per_value
    )


def forward_facts(seen: Backbone, *, batch_size: int) -> dict[str, Any]:
    """Model, blocks, and an estimate of the memory for weights and one forward pass."""
    from layerprobe.backbones.load import available_memory
    from layerprobe.tables import bytes_text

    free = available_memory(seen.run_device)
    needed = memory_needed(seen, images=batch_size)
    fits = "unknown" if free is None else ("yes" if sum(needed) < free else "no")
    return {
        "model": f"{seen.source.model_id} at {seen.source.revision}",
        "blocks": seen.n_blocks,
        "width": seen.hidden_size,
        "parameters": f"{seen.n_parameters:,}",
        "device": str(seen.run_device),
        "dtype": str(seen.dtype).removeprefix("torch."),
        "weights": bytes_text(needed.weights),
        "tokens an image": seen.tokens_in_words,
        "activations": f"about {bytes_text(needed.activations)} for {batch_size} images of {seen.tokens} tokens",
        "memory free": "unknown" if free is None else bytes_text(free),
        "fits": fits,
    }


def training_facts(seen: Backbone, plan: FreezePlan | None, *, images: int) -> dict[str, Any]:
    """Model, plan, and an estimate of the memory for weights, gradients, AdamW's moments and activations."""
    from layerprobe.tables import bytes_text

    trained = seen.n_parameters if plan is None else plan.trained_parameters
    needed = memory_needed(seen, images=images, trained=trained)
    return {
        "model": f"{seen.source.model_id} @ {seen.source.revision}",
        "device": str(seen.run_device),
        "blocks": seen.n_blocks,
        "plan": "no plan: everything trains" if plan is None else plan.summary(),
        "trained parameters": trained,
        "weights": bytes_text(needed.weights),
        "gradients and moments": bytes_text(needed.gradients_and_moments),
        "tokens an image": seen.tokens_in_words,
        "activations": bytes_text(needed.activations),
        "memory": bytes_text(sum(needed)),
    }


def check_plan(plan: FreezePlan | None, seen: Backbone) -> None:
    """PlanError for a plan of another model, by names and shapes alone."""
    if plan is not None:
        from layerprobe.plans import parameter_table

        plan.check(parameter_table(seen.model), name="this model")

"""What a run would take, told before anything is loaded: the body of `--dry-run`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerprobe.files import dtype_name
from layerprobe.locks import n_processes

if TYPE_CHECKING:
    from layerprobe.backbones import Backbone
    from layerprobe.cli.options import TaskOptions
    from layerprobe.cli.output import Output
    from layerprobe.plans import FreezePlan


def forward_facts(
    seen: Backbone,
    *,
    batch_size: int,
    models: int = 1,
    counts: Mapping[str, int] | None = None,
    shard: bool = False,
) -> dict[str, Any]:
    """Model, blocks, and an estimate of the memory of a process that holds `models` models of this size."""
    from layerprobe.backbones.load import available_memory
    from layerprobe.backbones.memory_use import memory_needed
    from layerprobe.tables import bytes_text

    free = available_memory(seen.run_device)
    batch_size = min(batch_size, max((counts or {}).values(), default=batch_size))
    needed = memory_needed(seen, images=batch_size, copies=models - 1, shards=n_processes() if shard else 1)
    fits = "unknown" if free is None else ("yes" if sum(needed) - needed.process < free else "no")
    return {
        **_processes(shard),
        "model": f"{seen.source.model_id} at {seen.source.revision}",
        "blocks": seen.n_blocks,
        "width": seen.hidden_size,
        "parameters": f"{seen.n_parameters:,}",
        "device": str(seen.run_device),
        "dtype": dtype_name(seen.dtype),
        "weights": bytes_text(seen.weights_bytes // (n_processes() if shard else 1)),
        "tokens an image": seen.tokens_in_words,
        "activations": f"about {bytes_text(needed.activations)} for {batch_size} images of {seen.tokens} tokens",
        "memory": needed.words(str(seen.run_device)),
        "memory free": "unknown" if free is None else bytes_text(free),
        "fits": fits,
    }


def _processes(shard: bool) -> dict[str, Any]:
    """What stands before figures that are those of one process of several."""
    if n_processes() == 1:
        return {}
    part = f"1/{n_processes()} of the model" if shard else "the whole model"
    return {"processes": f"{n_processes()}; figures of one, which holds {part}"}


def training_facts(
    seen: Backbone, plan: FreezePlan | None, *, images: int, n_images: int = 0, shard: bool = False
) -> dict[str, Any]:
    """Model, plan, and an estimate of the memory for weights, gradients, AdamW's moments and activations."""
    from layerprobe.backbones.memory_use import memory_needed
    from layerprobe.errors import PlanError
    from layerprobe.plans.apply import apply_plan
    from layerprobe.tables import bytes_text
    from layerprobe.training.data import IN_MEMORY_BYTES

    trained = seen.n_parameters if plan is None else plan.trained_parameters
    if plan is not None and not plan.adapters:
        # What is frozen needs no activations. A plan that no stage trains may be another model's.
        with contextlib.suppress(PlanError):
            apply_plan(plan, seen.model, remember=False)
    # A bridge compares its weights with the first ones, an evaluation goes back to them.
    pixels = 4 * 3 * (seen.image_size or 0) ** 2 * n_images
    held = pixels if pixels <= IN_MEMORY_BYTES else 0
    needed = memory_needed(
        seen,
        images=max(1, images // n_processes()),
        trained=trained,
        copies=1,
        held=held,
        shards=n_processes() if shard else 1,
    )
    return {
        **_processes(shard),
        "model": f"{seen.source.model_id} @ {seen.source.revision}",
        "device": str(seen.run_device),
        "blocks": seen.n_blocks,
        "plan": "no plan: everything trains" if plan is None else plan.summary(),
        "trained parameters": trained,
        "weights": bytes_text(seen.weights_bytes // (n_processes() if shard else 1)),
        "gradients and moments": bytes_text(needed.gradients_and_moments),
        "tokens an image": seen.tokens_in_words,
        "activations": bytes_text(needed.activations),
        "images": bytes_text(needed.images) + ("" if n_images else ": not counted, they are not here yet"),
        "memory": needed.words(str(seen.run_device)),
    }


def count_images(task: TaskOptions, out: Output) -> dict[str, int]:
    """Images of each split; none where they cannot be read, or would have to be downloaded first."""
    from layerprobe.errors import LayerprobeError

    try:
        return {name: len(split) for name, split in task.load(out).splits.items()}
    except LayerprobeError:
        return {}


def check_plan(plan: FreezePlan | None, seen: Backbone) -> None:
    """PlanError for a plan of another model, by names and shapes alone."""
    if plan is not None:
        from layerprobe.plans import parameter_table

        plan.check(parameter_table(seen.model), name="this model")

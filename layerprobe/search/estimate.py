"""What a search would take, told before anything is loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from layerprobe.backbones.backbone import Backbone
from layerprobe.backbones.load import available_memory
from layerprobe.layers import parse_blocks
from layerprobe.search.baselines import GREEDY, arms_cost, chosen_arms
from layerprobe.search.settings import make_settings, refuse
from layerprobe.search.space import Space


def search_facts(
    seen: Backbone,
    preset: str | None,
    given: Mapping[str, Any],
    *,
    workers: int,
    output: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Facts for --dry-run: plans, budget, memory, and a rough duration, from the configuration alone.

    The duration counts 6 operations per block parameter and token and divides by the speed of a matrix
    product measured here for a moment; overheads and evaluation come on top.

    Raises
    ------
    UsageError : what `freeze_search` would refuse of these settings and this model.
    """
    settings = make_settings(preset, **given)
    n_blocks, width = seen.n_blocks, seen.hidden_size
    space = Space(_block_params(seen), settings.constraints)
    refuse(settings, space, output)
    arms = chosen_arms(settings.baselines, space, seed=settings.seed)
    report = arms_cost(arms, space, settings.lrs, settings.seeds, settings.fidelity) + settings.seeds
    if any(arm.name == GREEDY for arm in arms):
        report += settings.budget or 0.0
    steps = settings.bridge_steps + settings.finetune_steps
    operations = 6.0 * sum(space.block_params) * seen.tokens * settings.batch_size * steps
    facts: dict[str, Any] = {
        "model": f"{seen.source.model_id} at {seen.source.revision}",
        "blocks": n_blocks,
        "plans": f"2^{len(space.free)}",
        "strategy": settings.strategy,
        "one full training": f"{settings.bridge_steps} bridge + {settings.finetune_steps} fine-tuning steps "
        f"of {settings.batch_size} images",
        "report": f"about {report:.3g} full trainings for the plan and {len(arms)} baselines",
    }
    # Weights, the copy that restores them, gradients and two moments; activations as the trainer counts them.
    size = seen.weights_bytes // max(1, seen.n_parameters)
    activations = settings.batch_size * seen.tokens * width * 34 * 2 * n_blocks
    needed = workers * (2 * seen.weights_bytes + 3 * seen.n_parameters * size + activations)
    free = available_memory(seen.run_device)
    facts |= {
        "device": str(seen.run_device),
        "tokens an image": seen.tokens_in_words,
        "memory": f"about {needed / 2**20:,.0f} MiB for {workers} process{'es' if workers > 1 else ''}",
        "memory free": "unknown" if free is None else f"{free / 2**20:,.0f} MiB",
    }
    if settings.budget is not None:
        facts["budget"] = f"{settings.budget:g} full trainings"
        seconds = operations * (settings.budget + report) / _speed(str(seen.run_device)) / workers
        facts["duration"] = f"very roughly {max(1, round(seconds / 60)):,} min (matrix products alone)"
    else:
        facts["time"] = f"{settings.time:g} s for search and report"
    return facts


def parse_constraints(
    given: dict[str, str | None], n_blocks: int, *, model: str
) -> dict[str, tuple[int, ...]]:
    """`must_freeze` and `must_train` as block indices, where they are given."""
    return {
        name: tuple(parse_blocks(text, n_blocks, model=model))
        for name, text in given.items()
        if text is not None
    }


def _block_params(seen: Backbone) -> tuple[int, ...]:
    """Number of parameters of each block."""
    sizes = [0] * seen.n_blocks
    for name, parameter in seen.model.named_parameters():
        group = seen.layout.parameter_groups[name]
        if group.startswith("block."):
            sizes[int(group.removeprefix("block."))] += parameter.numel()
    return tuple(sizes)


def _speed(device: str) -> float:
    """Operations per second of a float32 matrix product here, measured for a moment."""
    import torch

    a = torch.randn(1024, 512, device=device)
    b = torch.randn(512, 1024, device=device)
    (a @ b).sum().item()
    began = time.perf_counter()
    for _ in range(10):
        c = a @ b
    c.sum().item()
    return 10 * 2 * 1024 * 512 * 1024 / max(time.perf_counter() - began, 1e-9)

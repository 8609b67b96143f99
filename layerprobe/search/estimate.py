"""What a search would take, told before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from layerprobe.search.baselines import GREEDY, arms_cost, chosen_arms
from layerprobe.search.settings import make_settings
from layerprobe.search.space import Space

TOKENS = 64
"""Image tokens assumed per image; language backbones take about so many by default."""


def search_facts(
    model: str,
    preset: str | None,
    given: Mapping[str, Any],
    *,
    workers: int,
    revision: str | None,
    device: str | None,
    dtype: str | None,
    offline: bool,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Facts for --dry-run: plans, budget, memory, and a rough duration, from the configuration alone.

    The duration counts 6 operations per block parameter and token and divides by the speed of a matrix
    product measured here for a moment; overheads and evaluation come on top.
    """
    from layerprobe.backbones.layout import hidden_size
    from layerprobe.backbones.loading import (
        available_memory,
        choose_device,
        choose_dtype,
        estimate_memory,
        load_config,
    )
    from layerprobe.backbones.sources import resolve_model

    settings = make_settings(preset, **given)
    source = resolve_model(model, revision=revision, offline=offline)
    config = load_config(source, trust_remote_code=trust_remote_code)
    config = getattr(config, "vision_config", None) or config
    target = choose_device(device)
    weights = estimate_memory(source, choose_dtype(dtype), trust_remote_code=trust_remote_code)
    width, n_blocks = hidden_size(config), int(config.num_hidden_layers)
    vocabulary = int(getattr(config, "vocab_size", 0)) * width
    per_block = max(1, (weights["parameters"] - vocabulary) // n_blocks)
    space = Space((per_block,) * n_blocks, settings.constraints)
    arms = chosen_arms(settings.baselines, space, seed=settings.seed)
    report = arms_cost(arms, space, settings.lrs, settings.seeds, settings.fidelity) + settings.seeds
    if any(arm.name == GREEDY for arm in arms):
        report += settings.budget or 0.0
    steps = settings.bridge_steps + settings.finetune_steps
    operations = 6.0 * per_block * n_blocks * TOKENS * settings.batch_size * steps
    facts: dict[str, Any] = {
        "model": f"{source.model_id} at {source.revision}",
        "blocks": n_blocks,
        "plans": f"2^{len(space.free)}",
        "strategy": settings.strategy,
        "one full training": f"{settings.bridge_steps} bridge + {settings.finetune_steps} fine-tuning steps "
        f"of {settings.batch_size} images",
        "report": f"about {report:.3g} full trainings for the plan and {len(arms)} baselines",
    }
    # Weights, the copy that restores them, gradients and two moments; activations as the trainer counts them.
    size = weights["weights_bytes"] // max(1, weights["parameters"])
    activations = settings.batch_size * TOKENS * width * 34 * 2 * n_blocks
    needed = workers * (2 * weights["weights_bytes"] + 3 * weights["parameters"] * size + activations)
    free = available_memory(target)
    facts |= {
        "device": str(target),
        "memory": f"about {needed / 2**20:,.0f} MiB for {workers} process{'es' if workers > 1 else ''}",
        "memory free": "unknown" if free is None else f"{free / 2**20:,.0f} MiB",
    }
    if settings.budget is not None:
        facts["budget"] = f"{settings.budget:g} full trainings"
        seconds = operations * (settings.budget + report) / _speed(str(target)) / workers
        facts["duration"] = f"very roughly {max(1, round(seconds / 60)):,} min (matrix products alone)"
    else:
        facts["time"] = f"{settings.time:g} s for search and report"
    return facts


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

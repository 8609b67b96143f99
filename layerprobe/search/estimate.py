"""What a search takes: checks before anything is computed, the facts of a dry run, and the budget of a given time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layerprobe.backbones.backbone import Backbone
from layerprobe.backbones.load import available_memory
from layerprobe.backbones.memory_use import memory_needed
from layerprobe.errors import UsageError
from layerprobe.metrics.inference import detectable_with
from layerprobe.search.baselines import GREEDY, Baseline, baselines_cost, chosen_baselines
from layerprobe.search.budget import TrialBudget
from layerprobe.search.evaluator import block_params, search_space
from layerprobe.search.settings import Settings, make_settings
from layerprobe.search.space import Space
from layerprobe.search.strategies import make_strategy


def check_search(settings: Settings, space: Space, output: str | os.PathLike[str] | None) -> None:
    """Raise what the search itself would raise of these settings, before anything is computed or kept."""
    if settings.keep_bridge and output is None:
        raise UsageError("keeping the bridge-trained model needs an output folder")
    chosen_baselines(settings, space)
    if settings.budget is not None:
        budget = TrialBudget(
            space=space, train_batch=lambda trials: {}, settings=settings, total=settings.budget
        )
        make_strategy(settings.strategy).check(budget)


def search_facts(
    seen: Backbone,
    preset: str | None,
    given: Mapping[str, Any],
    *,
    workers: int,
    shards: int = 1,
    output: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Facts for a dry run: plans, budget, memory, and a rough duration, from the configuration alone.

    The duration counts 6 operations per block parameter and token and divides by the speed of a matrix
    product measured here for a moment; overheads and evaluation come on top. `shards` processes hold the model
    together. Raises what `freeze_search` would.
    """
    settings = make_settings(preset, **given)
    space = search_space(seen, settings)
    check_search(settings, space, output)
    baselines = chosen_baselines(settings, space)
    report = baselines_cost(baselines, space, settings) + settings.seeds
    if any(one.name == GREEDY for one in baselines):
        report += settings.budget or 0.0
    bridge_steps, finetune_steps = settings.steps
    batch_size = settings.finetune.batch_size
    free = available_memory(seen.run_device)
    # A worker holds the weights, a copy that restores them, and trains all blocks at most; images are left out.
    held = memory_needed(seen, images=batch_size, trained=seen.n_parameters, copies=1, shards=shards)
    whose = f"{workers} process{'es' if workers > 1 else ''}"
    if shards > 1:
        whose = f"each of {shards} processes, which holds 1/{shards} of the model"
    facts: dict[str, Any] = {
        "model": f"{seen.source.model_id} at {seen.source.revision}",
        "blocks": seen.n_blocks,
        "plans": f"2^{len(space.free)}",
        "strategy": settings.strategy,
        "one full training": f"{f'{bridge_steps} bridge + ' if bridge_steps else ''}"
        f"{'at most ' if settings.find_length else ''}{finetune_steps} fine-tuning steps of {batch_size} images",
        "report": f"at least {report:.3g} full trainings for the plan and {len(baselines)} baselines",
        "device": str(seen.run_device),
        "tokens an image": seen.tokens_in_words,
        "memory": f"about {workers * sum(held) / 2**20:,.0f} MiB for {whose}",
        "memory free": "unknown" if free is None else f"{free / 2**20:,.0f} MiB",
    }
    if settings.budget is None:
        return facts | {"time": f"{settings.time:g} s for search and report"}
    images = batch_size * (bridge_steps + finetune_steps) * (settings.budget + report)
    operations = 6.0 * sum(block_params(seen)) * seen.tokens * images
    minutes = operations / _speed(str(seen.run_device)) / workers / shards / 60
    return facts | {
        "budget": f"{settings.budget:g} full trainings",
        "duration": f"very roughly {max(1, round(minutes)):,} min (matrix products alone)",
    }


def power_in_words(noise: float, settings: Settings) -> str:
    """The detectable difference of a report with its fewest and its most seeds, the sampling of test images left
    out, which is not known yet."""
    found = [100 * detectable_with(n_seeds, noise=noise) for n_seeds in (settings.seeds, settings.max_seeds)]
    more = f", {found[1]:.1f} with {settings.max_seeds}" if settings.max_seeds > settings.seeds else ""
    return (
        f"trainings of one plan differ by about {100 * noise:.1f} points; detectable difference (found in 8 of 10 "
        f"cases) if test images were unlimited: {found[0]:.1f} points with {settings.seeds} unseen seeds{more}"
    )


def budget_of_time(
    settings: Settings, space: Space, baselines: Sequence[Baseline], workers: int, seconds: float, left: float
) -> tuple[float, list[Baseline]]:
    """The search's budget in full trainings of `seconds` each, and the baselines that `left` seconds allow."""
    total = 0.9 * left * workers / seconds
    kept = list(baselines)
    # All and none at every rate, and on two more seeds.
    least = 2.0 * (len(settings.lrs) + 2)

    def report() -> float:
        return settings.seeds + baselines_cost(kept, space, settings)

    while len(kept) > 2 and total - report() < 2 * least:
        kept.pop()
    budget = (total - report()) / (1 + any(one.name == GREEDY for one in kept))  # which searches once more
    if budget < least:
        assert settings.time is not None
        needed = (least + report()) * seconds / (0.9 * workers) + settings.time - left
        raise UsageError(
            f"time {settings.time:g} s is too small for a search and its report: one training takes "
            f"{seconds:.3g} s here, so allow at least {needed:.0f} s or "
            "shorten the steps, with another output folder: this one holds a search of the time that was given"
        )
    return budget, kept


def _speed(device: str) -> float:
    """Operations per second of a float32 matrix product here, measured for a moment."""
    a = torch.randn(1024, 512, device=device)
    b = torch.randn(512, 1024, device=device)
    (a @ b).sum().item()
    began = time.perf_counter()
    for _ in range(10):
        c = a @ b
    c.sum().item()
    return 10 * 2 * 1024 * 512 * 1024 / max(time.perf_counter() - began, 1e-9)

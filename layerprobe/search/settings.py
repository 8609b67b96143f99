"""The settings of a search, presets, and what makes two searches the same."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerprobe.errors import UnknownNameError, UsageError, did_you_mean
from layerprobe.search import defaults
from layerprobe.search.baselines import ALL, chosen_arms
from layerprobe.search.bench import Bench
from layerprobe.search.defaults import DEFAULT_BUDGET, DEFAULT_LRS, PRESET_LOADING, PRESETS
from layerprobe.search.space import Constraints, Space
from layerprobe.search.strategies import make_strategy
from layerprobe.search.strategies.base import hold_back
from layerprobe.search.strategies.plain import Exhaustive
from layerprobe.search.valuing import Chain

__all__ = [
    "DEFAULT_BUDGET",
    "DEFAULT_LRS",
    "PRESETS",
    "PRESET_LOADING",
    "Settings",
    "identify",
    "make_settings",
    "refuse",
]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that the answer depends on, beside backbone and task. See `freeze_search`."""

    budget: float | None = None
    time: float | None = None
    strategy: str = defaults.DEFAULT_STRATEGY
    objective: str = defaults.DEFAULT_OBJECTIVE
    seeds: int = defaults.DEFAULT_SEEDS
    lrs: tuple[float, ...] = DEFAULT_LRS
    fidelity: float = 0.25
    bridge_steps: int = defaults.DEFAULT_BRIDGE_STEPS
    finetune_steps: int = defaults.DEFAULT_FINETUNE_STEPS
    batch_size: int = defaults.DEFAULT_BATCH_SIZE
    random_classes: int = defaults.DEFAULT_RANDOM_CLASSES
    precision: str = defaults.DEFAULT_PRECISION
    use_scores: bool = True
    baselines: tuple[str, ...] | None = None
    min_frozen: int = 0
    max_trainable_params: int | None = None
    must_freeze: tuple[int, ...] = ()
    must_train: tuple[int, ...] = ()
    keep_bridge: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        make_strategy(self.strategy)
        if self.budget is not None and self.time is not None:
            raise UsageError("state a budget (in full trainings) or a time (in seconds), not both")
        for name in ("budget", "time"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be positive, got {value}")
        if self.baselines is not None and not {ALL} <= set(self.baselines):
            raise UsageError("baselines must contain 'all': every report compares with training everything")

    def check_output(self, output: str | os.PathLike[str] | None) -> None:
        """UsageError where something is to be kept and there is no folder for it."""
        if self.keep_bridge and output is None:
            raise UsageError("keeping the bridge-trained model needs an output folder")

    @property
    def chain(self) -> Chain:
        """The training that every plan gets."""
        return Chain(
            bridge_steps=self.bridge_steps,
            finetune_steps=self.finetune_steps,
            batch_size=self.batch_size,
            random_classes=self.random_classes,
            precision=self.precision,
        )

    @property
    def constraints(self) -> Constraints:
        """What a plan must obey."""
        return Constraints(self.min_frozen, self.max_trainable_params, self.must_freeze, self.must_train)


def make_settings(preset: str | None, **given: Any) -> Settings:
    """Settings from what the caller gave (None = not given), a preset, and the defaults, in that order."""
    if preset is not None and preset not in PRESETS:
        raise UnknownNameError(
            f"unknown preset '{preset}'.{did_you_mean(preset, PRESETS)} Presets: {', '.join(PRESETS)}"
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    base = dict(PRESETS[preset]) if preset is not None else {}
    if "time" in chosen and "budget" not in chosen:
        base.pop("budget", None)
    merged = {**base, **chosen}
    for name in ("lrs", "must_freeze", "must_train", "baselines"):
        if name in merged:
            merged[name] = tuple(merged[name])
    if "lrs" in merged:  # one grid, one search, however it was written
        merged["lrs"] = tuple(sorted(set(merged["lrs"])))
    if merged.get("budget") is None and merged.get("time") is None:
        merged["budget"] = DEFAULT_BUDGET
    return Settings(**merged)


def refuse(settings: Settings, space: Space, output: str | os.PathLike[str] | None) -> None:
    """Build what the search is made of, so that its own checks speak before anything is computed or kept."""
    settings.check_output(output)
    settings.chain.bridge_config()
    settings.chain.finetune_config()
    chosen_arms(settings.baselines, space, seed=settings.seed)
    bench = Bench(
        space,
        lambda trials: {},
        settings.lrs,
        settings.seeds,
        settings.budget or 0.0,
        seed=settings.seed,
        fidelity=settings.fidelity,
        objective=settings.objective,
    )
    if settings.budget is not None:
        hold_back(bench)
        if settings.strategy == Exhaustive.name:
            Exhaustive.trials(bench)


def identify(backbone: Any, task: Any, settings: Settings) -> dict[str, Any]:
    """What makes two searches the same: model, data, settings; not where or by how many it is run."""
    about = backbone.describe()
    local = backbone.source.origin != "hub"
    # Paths, and the last bits of a computed stem, may differ between machines that share one search.
    left_out = ("model", "model_id", "origin", "stem_hash")
    return {
        "model": Path(backbone.source.model_id).name if local else backbone.source.model_id,
        "revision": backbone.source.revision,
        "backbone": {key: about[key] for key in sorted(about) if key not in left_out},
        "task": Path(task.task_id).name,
        "split_hash": task.split_hash,
        **{key: value for key, value in asdict(settings).items() if key != "keep_bridge"},
    }

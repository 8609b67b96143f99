"""The settings of a search: defaults, presets, and what makes two searches the same.

The command line reads the defaults for its help, so nothing heavy is imported with this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.errors import UnknownNameError, UsageError, did_you_mean, shortened
from layerprobe.layers import UNITS
from layerprobe.search.space import Constraints

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.tasks import Task
    from layerprobe.training.config import BridgeConfig, FineTuneConfig

DEFAULT_LRS = (3e-4, 1e-3, 3e-3)
"""Where the pilot starts; it moves the grid until the best rate of all blocks lies inside."""
DEFAULT_BUDGET = 40.0
DEFAULT_STRATEGY = "bayes"
DEFAULT_OBJECTIVE = "frugal"
DEFAULT_SEEDS = 3
DEFAULT_BRIDGE_STEPS = 0
DEFAULT_STEP_LIMIT = 1600
"""The longest fine-tuning that the pilot may find necessary."""
DEFAULT_MARGIN = 0.01
DEFAULT_HALF_WIDTH = 0.015
DEFAULT_MAX_SEEDS = 8
DEFAULT_HEAD = "probe"
"""A head that starts from a probe needs a fraction of the steps: digits with MiniLM reach 96 % in 50, not in 300."""
DEFAULT_HEAD_LR = 1.0
BRIDGE_HEAD_LR = 10.0
"""The head of a bridge starts at random and learns at this multiple of the blocks' rate."""
DEFAULT_AUGMENT = "none"
"""Shifted images would forbid keeping the outputs of a frozen prefix, which makes most plans cheaper."""
DEFAULT_BATCH_SIZE = 32
DEFAULT_RANDOM_CLASSES = 10
DEFAULT_RANK = 8
DEFAULT_PRECISION = "float32"
DEFAULT_BASELINES = ("all", "none", "norms", "first-half", "last-half", "attention", "mlp")
"""Baselines of a report that names none, where the backbone and the scores allow them (`standard_baselines`)."""

STRATEGIES = ("bayes", "exhaustive", "greedy", "random", "tpe")
"""Names of the strategies; `layerprobe.search.strategies` says what each does."""

OBJECTIVES = ("frugal", "accuracy")
"""'frugal' is the fewest trainable parameters among the plans whose expected accuracy is at most one standard error,
or half of the margin, below the best. 'accuracy' is the best alone."""

PRESETS: dict[str, dict[str, Any]] = {
    "quickstart": {
        "budget": 20.0,
        "finetune_steps": 50,
        "lrs": (1e-4, 3e-4),
        "baselines": ("all", "none"),
        "use_scores": False,
    },
}
"""Settings that a preset replaces where the caller left the default."""

PRESET_LOADING: dict[str, dict[str, Any]] = {"quickstart": {"patch_size": 4}}
"""The same for the command line: how the backbone meets the images."""


def preset_in_words(name: str) -> str:
    """What a preset sets, as options of the command line.

    >>> preset_in_words("quickstart").split("; ")[:2]
    ['--budget 20', '--steps 50']
    """
    return "; ".join(
        "--no-scores"
        if key == "use_scores"
        else f"--{key.removeprefix('finetune_').replace('_', '-')} {in_words(value)}"
        for key, value in {**PRESETS[name], **PRESET_LOADING[name]}.items()
    )


def in_words(value: Any) -> str:
    """A value for a help text; with spaces in a list, so that a narrow terminal wraps it.

    >>> in_words((1e-4, 3e-3)), in_words(20.0)
    ('0.0001, 0.003', '20')
    """
    if isinstance(value, tuple):
        return ", ".join(in_words(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_strategy(name: str) -> None:
    """UnknownNameError where there is no strategy `name`."""
    if name not in STRATEGIES:
        raise UnknownNameError(
            f"unknown strategy '{name}'.{did_you_mean(name, STRATEGIES)} Strategies: {', '.join(STRATEGIES)}"
        )


_TRAINING = {"batch_size": DEFAULT_BATCH_SIZE, "precision": DEFAULT_PRECISION, "augment": DEFAULT_AUGMENT}
"""Of bridge and fine-tuning; learning rate and seed are those of the trial."""


def default_finetune(**changes: Any) -> FineTuneConfig:
    """The fine-tuning of every plan, at full length."""
    from layerprobe.training.config import FineTuneConfig

    own = {"steps": DEFAULT_STEP_LIMIT, "head": DEFAULT_HEAD, "head_lr": DEFAULT_HEAD_LR}
    return FineTuneConfig(**{**_TRAINING, **own, **changes})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that the answer depends on, beside backbone and task.

    Parameters
    ----------
    budget
        What the search itself may spend, in full trainings of everything (default 40); pilot, baselines and the
        report come on top.
    time
        Seconds for search and report together, instead of a budget; converted once, by the measured duration
        of the first training.
    strategy
        Bayes (default), exhaustive, greedy, random, tpe.
    objective
        'frugal' (the one-standard-error rule: fewest parameters within one standard error of the best) or
        'accuracy'.
    seeds, max_seeds
        Unseen seeds of the report: at least, at most (default 8; with `time`, as many as `seeds`).
    half_width
        Seeds are added until each difference between plan, all and none is a claim, or its 95 % interval reaches so
        far on either side, as a share. "No difference" is said of differences within twice this.
    margin
        Stopping margin: the search ends when no plan is likely to be better than the best by this share.
    lrs
        Learning rates to choose from, for each plan separately; order and repetitions do not matter.
    find_length, find_lrs
        A pilot finds the number of steps (up to that of `finetune`) at which training all blocks reaches 95 % of
        its plateau; and moves the grid until its best rate is not at an edge.
    bridge, finetune
        Training of every plan, at full length; `bridge` None leaves the bridge out. `freeze_search` takes
        bridge_steps, finetune_steps, batch_size, random_classes and precision instead.
    use_scores
        Compute transfer scores, and let the trainable ones propose plans; False: neither.
    baselines
        Names of the baselines to report; default all of `standard_baselines`. Beyond those there are
        `auto-rgn`, `greedy`, which doubles the search, and those of about the plan's number of trained parameters,
        see `layerprobe.search.baselines.chosen_baselines`.
    train
        'weights' trains the blocks of a plan; 'lora' or 'lora:RANK' places adapters (rank 8 by default) on all linear
        maps of its blocks, whose weights stay frozen.
    units
        'block': a plan trains whole blocks; 'attention,mlp': or the attention or the rest of one alone.
    min_frozen, max_trainable_params, must_freeze, must_train
        Constraints on the plan.
    keep_bridge
        Bridge-train the chosen plan in the end and save it into `output`/bridge.
    seed
        Of everything random.
    """

    budget: float | None = None
    time: float | None = None
    strategy: str = DEFAULT_STRATEGY
    objective: str = DEFAULT_OBJECTIVE
    seeds: int = DEFAULT_SEEDS
    max_seeds: int = DEFAULT_MAX_SEEDS
    half_width: float = DEFAULT_HALF_WIDTH
    margin: float = DEFAULT_MARGIN
    lrs: tuple[float, ...] = DEFAULT_LRS
    find_length: bool = False
    find_lrs: bool = False
    bridge: BridgeConfig | None = None
    finetune: FineTuneConfig = field(default_factory=default_finetune)
    use_scores: bool = True
    baselines: tuple[str, ...] | None = None
    constraints: Constraints = field(default_factory=Constraints)
    keep_bridge: bool = False
    train: str = "weights"
    units: str = "block"
    seed: int = 0

    def __post_init__(self) -> None:
        check_strategy(self.strategy)
        if self.budget is not None and self.time is not None:
            raise UsageError("state a budget (in full trainings) or a time (in seconds), not both")
        for name in ("budget", "time"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be positive, got {value}")
        if not self.lrs or any(not lr > 0 for lr in self.lrs):
            raise UsageError(f"learning rates must be positive and at least one, got {list(self.lrs)}")
        if self.seeds < 2:
            raise UsageError(
                f"the report needs at least 2 unseen seeds for a standard error, got {self.seeds}"
            )
        if self.max_seeds < self.seeds:
            raise UsageError(f"max_seeds is {self.max_seeds}, fewer than seeds, {self.seeds}")
        for name in ("half_width", "margin"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} is a share of the accuracy in (0, 1), got {getattr(self, name)}")
        if self.objective not in OBJECTIVES:
            raise UsageError(f"unknown objective '{self.objective}'; objectives: {', '.join(OBJECTIVES)}")
        if self.keep_bridge and self.bridge is None:
            raise UsageError(
                "the bridge-trained model can be kept only where there is one, and there is none; "
                "give --bridge-steps"
            )
        if self.units not in UNITS:
            raise UsageError(f"units is {' or '.join(UNITS)}, not '{self.units}'")
        if re.fullmatch(r"weights|lora(:[1-9]\d{0,4})?", self.train) is None:
            raise UsageError(f"train is weights, lora or lora:RANK, not '{self.train}'")

    @property
    def adapter_rank(self) -> int | None:
        """Rank of the adapters that a plan places; None where it trains weights."""
        if self.train == "weights":
            return None
        return int(self.train.partition(":")[2] or DEFAULT_RANK)

    @property
    def steps(self) -> tuple[int, int]:
        """Bridge and fine-tuning steps of a full training."""
        return (0 if self.bridge is None else self.bridge.steps or 0), self.finetune.steps or 0

    def to_dict(self) -> dict[str, Any]:
        """The settings by the names that `make_settings` takes."""
        nested = ("bridge", "finetune", "constraints")
        shared = ("batch_size", "precision", "head_lr", "augment", "shots", "head")
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name not in nested},
            "bridge_steps": self.steps[0],
            "finetune_steps": self.steps[1],
            "random_classes": None if self.bridge is None else self.bridge.random_classes,
            **{name: getattr(self.finetune, name) for name in shared},
            **asdict(self.constraints),
        }


def make_settings(preset: str | None = None, **given: Any) -> Settings:
    """Settings from what the caller gave (None = not given), a preset, and the defaults, in that order.

    Beside the fields of `Settings` there are `bridge_steps` (0: no bridge), `finetune_steps` (not given: found by
    the pilot), `batch_size`, `random_classes`, `precision`, `head_lr`, `augment`, `head` and `shots` of the training,
    and the fields of `Constraints`. Learning rates that are given are a grid that stays.
    """
    from layerprobe.training.config import BridgeConfig

    if preset is not None and preset not in PRESETS:
        raise UnknownNameError(
            f"unknown preset '{preset}'.{did_you_mean(preset, PRESETS)} Presets: {', '.join(PRESETS)}"
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    base = dict(PRESETS[preset]) if preset is not None else {}
    if "time" in chosen and "budget" not in chosen:
        base.pop("budget", None)
    merged = {**base, **chosen}
    if merged.get("budget") is None and merged.get("time") is None:
        merged["budget"] = DEFAULT_BUDGET
    for name in ("lrs", "must_freeze", "must_train", "baselines"):
        if name in merged:
            merged[name] = tuple(merged[name])
    merged.setdefault("find_length", "finetune_steps" not in merged)
    merged.setdefault("find_lrs", "lrs" not in merged)
    few = merged.get("seeds", DEFAULT_SEEDS)  # a time leaves no room for more seeds than it was planned with
    merged.setdefault("max_seeds", max(DEFAULT_MAX_SEEDS if merged.get("budget") is not None else 0, few))
    if "lrs" in merged:  # one grid, one search, however it was written
        merged["lrs"] = tuple(sorted(set(merged["lrs"])))

    def take(*names: str) -> dict[str, Any]:
        return {name: merged.pop(name) for name in names if name in merged}

    constraints = Constraints(**take(*Constraints.__dataclass_fields__))
    both = take("batch_size", "precision", "head_lr", "augment")
    finetune = {**both, **take("shots", "head"), "steps": merged.pop("finetune_steps", DEFAULT_STEP_LIMIT)}
    bridge = None
    own = {"random_classes": merged.pop("random_classes", DEFAULT_RANDOM_CLASSES)}
    if steps := merged.pop("bridge_steps", DEFAULT_BRIDGE_STEPS):
        bridge = BridgeConfig(**{**_TRAINING, "head_lr": BRIDGE_HEAD_LR, **both, **own}, steps=steps)
    return Settings(bridge=bridge, finetune=default_finetune(**finetune), constraints=constraints, **merged)


def identify(backbone: Backbone, task: Task, settings: Settings) -> dict[str, Any]:
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
        **{
            key: value
            for key, value in settings.to_dict().items()
            if key not in ("keep_bridge", "train", "units")
        },
        **({} if settings.train == "weights" else {"train": f"lora:{settings.adapter_rank}"}),
        **({} if settings.units == "block" else {"units": settings.units}),
    }


def how_to_load(
    backbone: Backbone, task: Task, preset: str | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What another process makes backbone, task and settings of; nothing where one of them was made in memory."""
    if backbone.loaded_with is None or task.loaded_with is None:
        return {}
    return {
        "backbone": backbone.loaded_with,
        "task": task.loaded_with,
        "preset": preset,
        "settings": dict(given),
    }


def difference_in_words(known: Mapping[str, Any], wanted: Mapping[str, Any], within: str = "") -> str:
    """The first entry in which two identities differ."""
    for key in [*wanted, *known]:
        ours, theirs = wanted.get(key), known.get(key)
        if ours == theirs:
            continue
        if isinstance(ours, dict) and isinstance(theirs, dict):
            return difference_in_words(theirs, ours, f"{within}{key}.")
        return f"{within}{key} {shortened(repr(theirs), 80)} there, {shortened(repr(ours), 80)} here"
    return "arguments differ"

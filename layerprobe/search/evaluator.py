"""One trial, trained: random-label bridge, then fine-tuning, scored on validation; and transfer scores of blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from layerprobe.analyzers.transfer import transfer_scores
from layerprobe.backbones.layout import parameter_units
from layerprobe.errors import UsageError
from layerprobe.plans import FreezePlan, norm_parameter_names
from layerprobe.plans.names import clean_name, is_adapter
from layerprobe.search.budget import Scores
from layerprobe.search.settings import Settings
from layerprobe.search.sharded import announce
from layerprobe.search.space import REPORT_REPEAT, Mask, Space, Trial, parts_of, trial_seed
from layerprobe.training import Outcome, TaskTensors, block_plan, train_and_score, unit_plan
from layerprobe.training.config import TrainConfig

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.tasks import ImageSplit, Task

PROPOSING = ("rgn", "gradient_snr", "taylor")
"""Trainable scores that propose plans. Readable scores stand in the layer table and propose nothing:
what a layer already says about the task is not what training it would gain."""

MAX_IMAGES = 2000
"""Transfer scores see so many training images."""
MAX_VALIDATION = 1000
"""Validation images that every trial is judged on: the time of more is better spent on steps."""


@dataclass
class Evaluator:
    """Callable that trains and scores a trial; the backbone is handed back as it was.

    The task is preprocessed when the first trial comes, so that a search whose answers are all stored
    prepares nothing.
    """

    backbone: Backbone
    task: Task
    settings: Settings

    @cached_property
    def splits(self) -> dict[str, ImageSplit]:
        """The task's splits; of the validation images, those that trials are judged on."""
        splits = dict(self.task.splits)
        # Rows stand in a fixed order in which every prefix holds the classes in proportion.
        if len(splits["validation"]) > MAX_VALIDATION:
            splits["validation"] = splits["validation"].subset(range(MAX_VALIDATION))
        return splits

    @cached_property
    def tensors(self) -> TaskTensors:
        """`splits` as the backbone takes them."""
        return TaskTensors.of(self.backbone, replace(self.task, splits=self.splits))

    @cached_property
    def space(self) -> Space:
        """The plans that the settings allow."""
        return search_space(self.backbone, self.settings)

    def plan(self, mask: Mask, *, norms: bool = False, rank: int = 0) -> FreezePlan:
        """The freeze plan of a mask: its units, and nothing of the backbone outside them."""
        if norms:
            own = set(norm_parameter_names(self.backbone.model))
            names = [name for name, _ in self.backbone.model.named_parameters() if name in own]
            return block_plan(self.backbone, (), also_trainable=names)
        return unit_plan(self.backbone, self.space.names(mask), rank=rank or self.settings.adapter_rank)

    def __call__(self, trial: Trial) -> Outcome:
        announce(self.backbone, trial)
        return self.train(trial)

    def train(self, trial: Trial) -> Outcome:
        """Train and score a trial; of a sharded backbone every process must, see `layerprobe.search.sharded`."""
        bridge, finetune = self.settings.bridge, self.settings.finetune
        shared = {"lr": trial.lr, "seed": trial_seed(self.settings.seed, trial.repeat)}
        return train_and_score(
            self.backbone,
            self.tensors,
            self.plan(trial.mask, norms=trial.norms, rank=trial.rank),
            bridge=bridge and bridge.replace(steps=_shortened(bridge, trial.fidelity), **shared),
            finetune=finetune.replace(steps=_shortened(finetune, trial.fidelity), **shared),
            test=trial.repeat >= REPORT_REPEAT,
            auto_rgn=trial.auto_rgn,
        )


def search_space(backbone: Backbone, settings: Settings) -> Space:
    """The plans of a backbone, with the number of parameters that train with each unit: its own, or of its adapters.

    UsageError where a unit has nothing to train, or constraints contradict one another.
    """
    units, rank = parameter_units(backbone, settings.units), settings.adapter_rank
    sizes = {unit: unit_plan(backbone, [unit], rank=rank).trained_parameters for unit in units}
    if empty := [unit for unit, size in sizes.items() if not size]:
        what = "parameter to train" if rank is None else "linear map for an adapter"
        raise UsageError(f"{backbone.name}: {empty[0]} holds no {what}; use --units block")
    return Space(tuple(sizes.values()), settings.constraints, parts_of(settings.units))


def block_params(backbone: Backbone) -> tuple[int, ...]:
    """Number of parameters of each block."""
    sizes = [0] * backbone.n_blocks
    groups = {clean_name(name): group for name, group in backbone.layout.parameter_groups.items()}
    for name, parameter in backbone.model.named_parameters():
        if not is_adapter(name) and (group := groups[clean_name(name)]).startswith("block."):
            sizes[int(group.removeprefix("block."))] += parameter.numel()
    return tuple(sizes)


def _shortened(config: TrainConfig, fidelity: float) -> int:
    """Steps at a share of the full length; at least two where there are."""
    assert config.steps is not None
    return min(max(2, round(fidelity * config.steps)), config.steps)


def layer_scores(backbone: Backbone, task: Task, *, seed: int, quiet: bool) -> pd.DataFrame:
    """All transfer scores by layer (long table), on at most `MAX_IMAGES` training images."""
    train = task.splits["train"]
    if len(train) > MAX_IMAGES:
        # Rows stand in a fixed order in which every prefix holds the classes in proportion.
        part = train.subset(range(MAX_IMAGES))
        task = replace(task, splits={**task.splits, "train": part})
    # Four batches are one more than the spread between batches needs.
    batch_size = max(1, min(32, len(train) // 4))
    return transfer_scores(
        backbone, task, n_replicates=10, batch_size=batch_size, seed=seed, quiet=quiet
    ).to_frame()


def proposals(frame: pd.DataFrame, n_blocks: int) -> Scores:
    """Score name → (value, standard error) per block, for the scores that are defined on every block."""
    found = {}
    for name in PROPOSING:
        rows = frame[(frame["metric"] == f"transfer_{name}") & frame["block"].notna()]
        rows = rows.drop_duplicates("block").sort_values("block")
        value = rows["value"].astype(float).to_numpy()
        if len(value) == n_blocks and np.isfinite(value).all():
            found[name] = (value, rows["stderr"].astype(float).to_numpy())
    return found


def by_block(frame: pd.DataFrame, n_blocks: int) -> pd.DataFrame:
    """One row a block, one column a score (`resid_post` for the readable ones)."""
    inside = frame[frame["block"].notna()]
    if inside.empty:
        return pd.DataFrame(index=range(n_blocks))
    wide = inside.pivot_table(index="block", columns="metric", values="value", aggfunc="first", sort=False)
    return wide.reindex(range(n_blocks))

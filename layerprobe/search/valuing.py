"""The value of a plan by the real chain: random-label bridge, then fine-tuning, judged on validation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from layerprobe.plans import FreezePlan, norm_parameter_names, parameter_table, standard_plans
from layerprobe.search import defaults
from layerprobe.search.bench import Outcome
from layerprobe.search.space import REPORT_REPEAT, Mask, Trial, blocks_of, trial_seed
from layerprobe.training import BridgeConfig, FineTuneConfig, TaskTensors, train_and_score


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The training that every plan gets; `fidelity` shortens both stages, each anneals fully.

    Attributes
    ----------
    bridge_steps, finetune_steps : optimizer steps of a full training; 0 bridge steps leave the bridge out.
    batch_size : images per step in both stages.
    random_classes : number K of random labels in the bridge.
    precision : float32, or bfloat16 for autocast.
    """

    bridge_steps: int = defaults.DEFAULT_BRIDGE_STEPS
    finetune_steps: int = defaults.DEFAULT_FINETUNE_STEPS
    batch_size: int = defaults.DEFAULT_BATCH_SIZE
    random_classes: int = defaults.DEFAULT_RANDOM_CLASSES
    precision: str = defaults.DEFAULT_PRECISION

    def bridge_config(self, **changes: Any) -> BridgeConfig:
        """The bridge's settings."""
        return BridgeConfig(
            batch_size=self.batch_size,
            random_classes=self.random_classes,
            precision=self.precision,
            **changes,
        )

    def finetune_config(self) -> FineTuneConfig:
        """The fine-tuning's settings."""
        return FineTuneConfig(batch_size=self.batch_size, precision=self.precision)

    def steps(self, fidelity: float) -> tuple[int, int]:
        """Bridge and fine-tuning steps at a share of the full length; at least two where there are."""
        bridge, finetune = (max(2, round(fidelity * n)) for n in (self.bridge_steps, self.finetune_steps))
        return min(bridge, self.bridge_steps), min(finetune, self.finetune_steps)


@dataclass
class ChainEvaluator:
    """Callable that values a trial by training; the backbone is handed back as it was.

    The task is preprocessed when the first trial comes, so that a search whose answers are all stored
    prepares nothing.
    """

    backbone: Any
    task: Any
    chain: Chain = field(default_factory=Chain)
    seed: int = 0

    @cached_property
    def tensors(self) -> TaskTensors:
        """The task's splits as the backbone takes them."""
        return TaskTensors.of(self.backbone, self.task)

    @cached_property
    def plans(self) -> dict[str, FreezePlan]:
        """The baselines as plans, see `layerprobe.plans.standard_plans`."""
        return standard_plans(
            parameter_table(self.backbone.model),
            self.backbone.layout.parameter_groups,
            model_id=self.backbone.source.model_id,
            revision=self.backbone.source.revision,
            norm_names=norm_parameter_names(self.backbone.model),
        )

    def plan(self, mask: Mask, *, norms: bool = False) -> FreezePlan:
        """The freeze plan of a mask: whole blocks; all blocks means everything, outer norms included."""
        if norms:
            return self.plans["norms"]
        if all(mask):
            return self.plans["all"]
        return FreezePlan.from_blocks(
            parameter_table(self.backbone.model),
            self.backbone.layout.parameter_groups,
            blocks_of(mask),
            model_id=self.backbone.source.model_id,
            revision=self.backbone.source.revision,
        )

    def block_params(self) -> tuple[int, ...]:
        """Number of parameters of each block."""
        sizes = [0] * self.backbone.n_blocks
        for parameter in self.plans["all"].parameters.values():
            if parameter.block is not None:
                sizes[parameter.block] += parameter.size
        return tuple(sizes)

    def __call__(self, trial: Trial) -> Outcome:
        bridge_steps, finetune_steps = self.chain.steps(trial.fidelity)
        tensors = self.tensors  # preprocessed before the clock starts: once for all trials
        began = time.perf_counter()
        both: dict[str, Any] = {"lr": trial.lr, "seed": trial_seed(self.seed, trial.repeat)}
        found = train_and_score(
            self.backbone,
            tensors,
            self.plan(trial.mask, norms=trial.norms),
            bridge=self.chain.bridge_config(steps=bridge_steps, **both) if bridge_steps else None,
            finetune=self.chain.finetune_config().replace(steps=finetune_steps, **both),
            test=trial.repeat >= REPORT_REPEAT,
            auto_rgn=trial.auto_rgn,
        )
        return Outcome(
            found.validation_accuracy,
            found.test_accuracy,
            seconds=found.train_seconds,
            reason=found.reason,
            facts={
                "bridge_accuracy": found.bridge_accuracy,
                "train_flops": found.train_flops,
                "steps": found.steps,
                "trainable_parameters": found.trainable_parameters,
                "n_validation": found.n_validation,
                "n_test": found.n_test,
                "call_seconds": max(found.train_seconds, time.perf_counter() - began),
            },
        )

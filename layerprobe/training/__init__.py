"""Random-label bridge training under a freeze plan, fine-tuning and evaluation.

Names are bound lazily: the settings of a training are checked before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerprobe.lazy import lazy_names

if TYPE_CHECKING:
    from layerprobe.training.arms import ARMS, ArmRun, Evaluation
    from layerprobe.training.block_plans import all_trainable, block_plan, unit_plan
    from layerprobe.training.bridge import bridge_train
    from layerprobe.training.bridge_run import BridgeRun
    from layerprobe.training.config import BridgeConfig, FineTuneConfig
    from layerprobe.training.data import TaskTensors
    from layerprobe.training.evaluation import evaluate, evaluate_arms
    from layerprobe.training.finetune import train_and_score
    from layerprobe.training.outcome import Outcome

_FILES = {
    "arms": ("ARMS", "ArmRun", "Evaluation"),
    "block_plans": ("all_trainable", "block_plan", "unit_plan"),
    "bridge": ("bridge_train",),
    "bridge_run": ("BridgeRun",),
    "config": ("BridgeConfig", "FineTuneConfig"),
    "data": ("TaskTensors",),
    "evaluation": ("evaluate", "evaluate_arms"),
    "finetune": ("train_and_score",),
    "outcome": ("Outcome",),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}

__all__ = [
    "ARMS",
    "ArmRun",
    "BridgeConfig",
    "BridgeRun",
    "Evaluation",
    "FineTuneConfig",
    "Outcome",
    "TaskTensors",
    "all_trainable",
    "block_plan",
    "bridge_train",
    "evaluate",
    "evaluate_arms",
    "train_and_score",
    "unit_plan",
]
__getattr__, __dir__ = lazy_names(__name__, _FILE_OF)

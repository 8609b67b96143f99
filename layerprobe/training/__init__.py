"""Random-label bridge training under a freeze plan, fine-tuning and evaluation."""

from layerprobe.training.arms import ARMS, ArmRun, Evaluation
from layerprobe.training.bridge import bridge_train
from layerprobe.training.bridge_run import BridgeRun
from layerprobe.training.config import BridgeConfig, FineTuneConfig
from layerprobe.training.data import TaskTensors
from layerprobe.training.evaluate import evaluate, evaluate_arms
from layerprobe.training.finetune import Outcome, train_and_score
from layerprobe.training.freeze_check import all_trainable, block_plan, unit_plan

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

"""Random-label bridge training under a freeze plan, fine-tuning and evaluation."""

from layerprobe.training.config import BridgeConfig, FineTuneConfig
from layerprobe.training.data import TaskTensors
from layerprobe.training.evaluate import ARMS, evaluate, evaluate_arms
from layerprobe.training.evaluation import Evaluation, Trial
from layerprobe.training.finetune import Outcome, train_and_score
from layerprobe.training.guard import all_trainable, block_plan
from layerprobe.training.run import BridgeRun
from layerprobe.training.trainer import bridge_train

__all__ = [
    "ARMS",
    "BridgeConfig",
    "BridgeRun",
    "Evaluation",
    "FineTuneConfig",
    "Outcome",
    "TaskTensors",
    "Trial",
    "all_trainable",
    "block_plan",
    "bridge_train",
    "evaluate",
    "evaluate_arms",
    "train_and_score",
]

"""Random-label bridge training under a freeze plan, and what it is worth afterwards."""

from layerprobe.bridge.config import BridgeConfig, FineTuneConfig
from layerprobe.bridge.data import TaskTensors
from layerprobe.bridge.evaluate import ARMS, evaluate, evaluate_arms
from layerprobe.bridge.evaluation import Evaluation, Trial
from layerprobe.bridge.guard import all_trainable, block_plan
from layerprobe.bridge.run import BridgeRun
from layerprobe.bridge.trainer import bridge_train
from layerprobe.bridge.value import Outcome, value_plan

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
    "value_plan",
]

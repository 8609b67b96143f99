"""Random-label bridge training under a freeze plan, and what it is worth afterwards."""

from layerprobe.bridge.config import BridgeConfig, FineTuneConfig
from layerprobe.bridge.data import TaskTensors
from layerprobe.bridge.guard import all_trainable, block_plan
from layerprobe.bridge.run import BridgeRun
from layerprobe.bridge.trainer import bridge_train
from layerprobe.bridge.value import Outcome, value_plan

__all__ = [
    "BridgeConfig",
    "BridgeRun",
    "FineTuneConfig",
    "Outcome",
    "TaskTensors",
    "all_trainable",
    "block_plan",
    "bridge_train",
    "value_plan",
]

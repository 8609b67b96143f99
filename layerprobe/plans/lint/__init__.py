"""What another trainer's configuration trains, by that trainer's own rule, and where it is not what it seems."""

from layerprobe.plans.lint.config import read_config
from layerprobe.plans.lint.verdict import Verdict, lint_config

__all__ = ["Verdict", "lint_config", "read_config"]

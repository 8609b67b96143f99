"""What another trainer's configuration trains, by that trainer's own rule, and where it is not what it seems."""

from layerprobe.plans.lint.config import read_config
from layerprobe.plans.lint.report import LintReport, lint_config

__all__ = ["LintReport", "lint_config", "read_config"]

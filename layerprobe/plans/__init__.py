"""Freeze plans: which parameters are trained and which stay as they are, by exact name."""

from layerprobe.plans.baselines import norm_parameter_names, random_blocks, standard_blocks
from layerprobe.plans.freeze_plan import FreezePlan
from layerprobe.plans.plan import Parameter, model_hash, parameter_table

__all__ = [
    "FreezePlan",
    "Parameter",
    "model_hash",
    "norm_parameter_names",
    "parameter_table",
    "random_blocks",
    "standard_blocks",
]

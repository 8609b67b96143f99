"""Lightning's finetuning-scheduler: an explicit schedule of one phase.

Its rule (speediedan/finetuning-scheduler, src/finetuning_scheduler/fts_supporters.py, `_parse_phase` and
`_validate_phases_disjoint`): everything is frozen first; an entry of `params` that is a parameter's name is
that parameter, any other is a pattern matched from the start of the names, and one that matches nothing is an
error; phases are numbered from 0 without gaps and may not share a parameter. Full names and a single
phase are exact whatever else the model holds. Names start at the LightningModule, so its attribute belongs
into the prefix (`model.transformer.`).
"""

from __future__ import annotations

from layerprobe.plans.export.names import ExportNames, yaml_list

TARGET = "finetuning-scheduler"


def write(names: ExportNames) -> str:
    """A YAML schedule with phase 0 alone."""
    return names.comment(TARGET) + "0:\n  params:\n" + yaml_list(names.trainable, "  ")

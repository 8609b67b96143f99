"""axolotl: `unfrozen_parameters`, a list of patterns of names to train.

Its rule (axolotl-ai-cloud/axolotl, src/axolotl/utils/freeze.py, `freeze_layers_except` and `LayerNamePattern`):
a trailing `[a:b]` is cut off as a range of rows; every dot that no `+` follows is escaped; the rest is
matched from the start of the name, and anything may follow. So patterns begin with `^`, a block ends with
its dot (or `h.1` takes `h.10` along), and a full name ends with `$`. The list is only read when it is not
empty: an empty one trains everything. Reentrant gradient checkpointing is refused beside it (src/axolotl/utils/
schemas/validation.py), and an `adapter` would be trained instead of the weights.
"""

from __future__ import annotations

import re

from layerprobe.plans.export.names import ExportNames, yaml_list

TARGET = "axolotl"


def write(names: ExportNames) -> str:
    """A YAML fragment with `unfrozen_parameters`."""
    names.require_plain(TARGET)
    patterns = [f"^{block}." for block in names.free_blocks] + [f"^{name}$" for name in names.others]
    compiled = [re.compile(pattern.replace(".", r"\.")) for pattern in patterns]
    names.require_exact((n for n in names.all if any(p.match(n) for p in compiled)), TARGET)
    hint = "# set no adapter; with gradient_checkpointing, gradient_checkpointing_kwargs: {use_reentrant: false}\n"
    return names.comment(TARGET) + hint + "unfrozen_parameters:\n" + yaml_list(patterns, "  ")

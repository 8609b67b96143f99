"""LLaMA-Factory: `finetuning_type: freeze`, which knows the first or the last N layers and nothing between.

Its rule (hiyouga/LLaMA-Factory, src/llamafactory/model/adapter.py, `_setup_freeze_tuning`): with
`freeze_trainable_layers` N > 0 the last N layers are chosen, with N < 0 the first |N|; a name is trained when
it contains `.<index>.` of a chosen layer, followed by one of `freeze_trainable_modules` unless that is `all`,
or when it contains one of `freeze_extra_modules` anywhere. Each extra module must be the last but one part of
some name without a number in it.
"""

from __future__ import annotations

import re

from layerprobe.errors import PlanError
from layerprobe.layers import format_blocks
from layerprobe.plans.export.names import ExportNames


def write_llama_factory(names: ExportNames) -> str:
    """A YAML fragment with the `freeze_…` options."""
    n_blocks = names.plan.n_blocks
    inside = {block: [n for n in names.trainable if n.startswith(block + ".")] for block in names.blocks}
    touched = [index for index, block in enumerate(names.blocks) if inside[block]]
    count = _signed_count(touched, n_blocks)
    if count is None:
        raise PlanError(
            "LLaMA-Factory knows only the first or the last N layers, and this plan trains blocks "
            f"{format_blocks(touched)} of {n_blocks}"
        )
    # In a layer trained in part, the module that follows the layer's index is all that can be named.
    parts = {n[len(block) + 1 :].split(".")[0] for block, members in inside.items() for n in members}
    modules = ["all"] if len(names.free_blocks) == len(touched) else sorted(parts)
    in_blocks = set().union(*inside.values())
    extra = sorted({_module(name) for name in names.others if name not in in_blocks})
    layers = range(n_blocks - count, n_blocks) if count > 0 else range(-count)
    wanted = [f".{i}.{'' if m == 'all' else m}" for i in layers for m in modules] + extra
    names.require_exact((n for n in names.all if any(part in n for part in wanted)), "llama-factory")
    known = {_module(n) for n in names.all if re.search(r"\.\d+\.", n) is None}
    if unknown := [module for module in extra if module not in known]:
        raise PlanError(f"LLaMA-Factory finds extra modules by name alone and would not find '{unknown[0]}'")
    text = names.comment("llama-factory") + "finetuning_type: freeze\n"
    text += f"freeze_trainable_layers: {count}\n"
    text += f'freeze_trainable_modules: "{",".join(modules)}"\n'
    return text + (f'freeze_extra_modules: "{",".join(extra)}"\n' if extra else "")


def _signed_count(blocks: list[int], n_blocks: int) -> int | None:
    """The N that means these blocks, or None."""
    size = len(blocks)
    if blocks == list(range(n_blocks - size, n_blocks)):
        return size
    return -size if blocks == list(range(size)) else None


def _module(name: str) -> str:
    parts = name.split(".")
    if len(parts) < 2:
        raise PlanError(f"LLaMA-Factory names modules, and the parameter '{name}' lies in none")
    return parts[-2]

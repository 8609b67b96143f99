"""Trainers that are told modules instead of parameters: LLaMA-Factory and PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from layerprobe.errors import PlanError
from layerprobe.layers import format_blocks
from layerprobe.plans.export.names import ExportNames
from layerprobe.plans.plan import few


def write_llama_factory(names: ExportNames) -> str:
    """A YAML fragment with `finetuning_type: freeze`, which knows the first or the last N layers and nothing between.

    Its rule (hiyouga/LLaMA-Factory, src/llamafactory/model/adapter.py, `_setup_freeze_tuning`): with
    `freeze_trainable_layers` N > 0 the last N layers are chosen, with N < 0 the first |N|; a name is trained when
    it contains `.<index>.` of a chosen layer, followed by one of `freeze_trainable_modules` unless that is `all`,
    or when it contains one of `freeze_extra_modules` anywhere. Each extra module must be the last but one part of
    some name without a number in it.
    """
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
    _require_known(names, extra)
    text = names.comment("llama-factory") + "finetuning_type: freeze\n"
    text += f"freeze_trainable_layers: {count}\n"
    text += f'freeze_trainable_modules: "{",".join(modules)}"\n'
    return text + (f'freeze_extra_modules: "{",".join(extra)}"\n' if extra else "")


def _require_known(names: ExportNames, extra: list[str]) -> None:
    known = {_module(n) for n in names.all if re.search(r"\.\d+\.", n) is None}
    if unknown := [module for module in extra if module not in known]:
        raise PlanError(f"LLaMA-Factory finds extra modules by name alone and would not find '{unknown[0]}'")


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


def write_peft(names: ExportNames) -> str:
    """JSON with the arguments of `peft.LoraConfig`.

    `modules_to_save` is the one option that trains weights of the model itself.
    `layers_to_transform` looks like the plan and is not: it says where adapters are placed, and every weight of the
    model stays frozen. `modules_to_save` trains a copy of each module named and saves it with the adapter.

    Its rule (huggingface/peft, src/peft/utils/other.py, `_set_trainable`): a module is trained, with everything in it,
    when its name *ends* with an entry, so a bare `norm` takes `input_layernorm` along. The names of whole plain modules
    (`model.layers.3.mlp.up_proj`) are therefore written in full. No adapter is placed beside them: PEFT reserves
    `target_modules: dummy-target-modules` for that.

    An embedding that a head is tied to becomes a copy of its own: the head keeps the old, frozen tensor.
    """
    holders = _modules(names.all)
    trained = set(names.trainable)
    chosen = list(dict.fromkeys(name.rpartition(".")[0] for name in names.trainable))
    if tied := [name for name in names.trainable if name in names.aliases]:
        raise PlanError(
            f"PEFT trains a copy of a module, and {tied[0]} is one tensor with {names.aliases[tied[0]][0]}, which "
            "would stay as it is; export to hf-trainer instead"
        )
    for module in chosen:
        if not module:
            raise PlanError(f"PEFT trains whole modules, and {few(names.trainable, 1)} lies in none")
        inside = [name for name in names.all if name.startswith(module + ".")]
        if left := [name for name in inside if name not in trained]:
            raise PlanError(
                f"PEFT trains whole modules, and in {module} the plan keeps {few(left)} frozen; "
                "export to hf-trainer instead"
            )
        if any(other.startswith(module + ".") for other in holders):
            raise PlanError(
                f"PEFT trains whole modules, and {few(n for n in inside if n.rpartition('.')[0] == module)} lies "
                f"directly in {module}, which holds others; export to hf-trainer instead"
            )
    taken = [module for module in holders if any(module.endswith(entry) for entry in chosen)]
    names.require_exact(
        (n for n in names.all if n.startswith(tuple(module + "." for module in taken))),
        "peft",
        ", because it compares the ends of module names; give the prefix of the model it will train",
    )
    body = {"target_modules": "dummy-target-modules", "modules_to_save": chosen}
    return json.dumps(body, indent=1) + "\n"


def _modules(names: Iterable[str]) -> list[str]:
    """Every dotted start of the names: the modules as far as they hold parameters."""
    modules: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1]
        modules.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
    return list(modules)

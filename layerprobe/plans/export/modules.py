"""Trainers that are told modules instead of parameters: LLaMA-Factory and PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from layerprobe.errors import PlanError
from layerprobe.layers import format_blocks
from layerprobe.plans.export.names import ExportNames
from layerprobe.plans.export.peft_rule import PeftPlaces
from layerprobe.plans.plan import few


def write_llama_factory(names: ExportNames) -> str:
    """A YAML fragment with `finetuning_type: freeze`: the first or the last N layers, or every k-th (`use_llama_pro`).

    Its rule (hiyouga/LLaMA-Factory, src/llamafactory/model/adapter.py, `_setup_freeze_tuning`): with
    `freeze_trainable_layers` N > 0 the last N layers are chosen, with N < 0 the first |N|; a name is trained when
    it contains `.<index>.` of a chosen layer, followed by one of `freeze_trainable_modules` unless that is `all`,
    or when it contains one of `freeze_extra_modules` anywhere. Each extra module must be the last but one part of
    some name without a number in it.
    """
    n_blocks = names.plan.n_blocks
    inside = {block: [n for n in names.trainable if n.startswith(block + ".")] for block in names.blocks}
    touched = [index for index, block in enumerate(names.blocks) if inside[block]]
    count, spread = _signed_count(touched, n_blocks), False
    if count is None:
        stride = n_blocks // len(touched)
        spread = n_blocks % len(touched) == 0 and touched == list(range(stride - 1, n_blocks, stride))
        if not spread:
            raise PlanError(
                "LLaMA-Factory knows only the first or the last N layers, or every k-th up to the last, and this plan "
                f"trains blocks {format_blocks(touched)} of {n_blocks}"
            )
        count = len(touched)
    # In a layer trained in part, the module that follows the layer's index is all that can be named.
    parts = {n[len(block) + 1 :].split(".")[0] for block, members in inside.items() for n in members}
    modules = ["all"] if len(names.free_blocks) == len(touched) else sorted(parts)
    in_blocks = set().union(*inside.values())
    extra = sorted({_module(name) for name in names.others if name not in in_blocks})
    layers = touched if spread else range(n_blocks - count, n_blocks) if count > 0 else range(-count)
    wanted = [f".{i}.{'' if m == 'all' else m}" for i in layers for m in modules] + extra
    names.require_exact((n for n in names.all if any(part in n for part in wanted)), "llama-factory")
    _require_known(names, extra)
    text = names.comment("llama-factory") + "finetuning_type: freeze\n"
    text += f"freeze_trainable_layers: {count}\n" + ("use_llama_pro: true\n" if spread else "")
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
    body = lora_places(names) if names.adapters else {"target_modules": "dummy-target-modules"}
    return json.dumps({**body, **({"modules_to_save": chosen} if chosen else {})}, indent=1) + "\n"


def lora_places(names: ExportNames) -> dict[str, object]:
    """The arguments of LoraConfig that say where adapters go, and of which rank.

    The same modules of some blocks are said by `target_modules` and `layers_to_transform`, whatever cannot be said so
    by the modules' full names. Its rule (peft 0.21.2, src/peft/tuners/tuners_utils.py, `check_target_module_exists`,
    and src/peft/utils/other.py, `get_pattern_key`): a module is taken when its name is an entry or ends with a dot and
    an entry, and the first number behind `layers_pattern` is one of `layers_to_transform`; its rank is that of the
    first key of `rank_pattern` which, as a regular expression, matches the end of its name.
    """
    ranks = names.adapters
    largest = max(ranks.values())
    other = {re.escape(module): rank for module, rank in ranks.items() if rank != largest}
    scale = names.plan.adapter_scale
    body: dict[str, object] = {"r": largest, "lora_alpha": scale * largest, **_targets(names)}
    if other:
        body |= {"rank_pattern": other, "alpha_pattern": {module: scale * r for module, r in other.items()}}
    config = PeftPlaces.of(body)
    taken = {module: config.rank(module) for module in _modules(names.all) if config.takes(module)}
    if taken != ranks:
        differ = [module for module in {**taken, **ranks} if taken.get(module) != ranks.get(module)]
        raise PlanError(f"peft cannot say this plan exactly: it would place other adapters at {few(differ)}")
    return body


def _targets(names: ExportNames) -> dict[str, object]:
    """`target_modules`, with `layers_to_transform` where every adapted block has the same modules."""
    by_block = {
        index: {m.removeprefix(f"{block}.") for m in names.adapters if m.startswith(f"{block}.")}
        for index, block in enumerate(names.blocks)
    }
    adapted = {index: modules for index, modules in by_block.items() if modules}
    containers = {block.rpartition(".")[0] for block in names.blocks}
    same = len({frozenset(modules) for modules in adapted.values()}) == 1
    if same and len(containers) == 1 and sum(map(len, adapted.values())) == len(names.adapters):
        body: dict[str, object] = {
            "target_modules": sorted(adapted[min(adapted)]),
            "layers_to_transform": sorted(adapted),
            "layers_pattern": re.escape(containers.pop().rpartition(".")[2]),
        }
        config = PeftPlaces.of(body)
        if {m for m in _modules(names.all) if config.takes(m)} == names.adapters.keys():
            return body
    return {"target_modules": list(names.adapters)}


def _modules(names: Iterable[str]) -> list[str]:
    """Every dotted start of the names: the modules as far as they hold parameters."""
    modules: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1]
        modules.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
    return list(modules)

"""PEFT: `modules_to_save`, the one option that trains weights of the model itself.

`layers_to_transform` looks like the plan and is not: it says where adapters are placed, and every weight of the
model stays frozen. `modules_to_save` trains a copy of each module named and saves it with the adapter.

Its rule (huggingface/peft, src/peft/utils/other.py, `_set_trainable`): a module is trained, with everything in it,
when its name *ends* with an entry, so a bare `norm` takes `input_layernorm` along. The names of whole plain modules
(`model.layers.3.mlp.up_proj`) are therefore written in full. No adapter is placed beside them: PEFT reserves
`target_modules: dummy-target-modules` for that.

An embedding that a head is tied to becomes a copy of its own: the head keeps the old, frozen tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from layerprobe.errors import PlanError
from layerprobe.plans.export.names import ExportNames
from layerprobe.plans.plan import few


def write_peft(names: ExportNames) -> str:
    """JSON with the arguments of `peft.LoraConfig`."""
    holders = _modules(names.all)
    trained = set(names.trainable)
    chosen = list(dict.fromkeys(name.rpartition(".")[0] for name in names.trainable))
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

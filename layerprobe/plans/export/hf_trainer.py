"""The Hugging Face Trainer has no option for freezing; it trains what requires a gradient.

So the export is a small Python file that needs neither layerprobe nor the plan. `from_pretrained` makes every
parameter trainable: call `freeze` before the Trainer is built, and again when training is resumed.
"""

from __future__ import annotations

from layerprobe.plans.export.names import ExportNames

TARGET = "hf-trainer"

_FUNCTION = '''

def freeze(model):
    """Train exactly TRAINABLE; call before the Trainer is built, and again on resume."""
    parameters = dict(model.named_parameters())
    missing = sorted((TRAINABLE | FROZEN) - parameters.keys())
    if missing:
        raise ValueError(f"this model lacks {len(missing)} parameters of the plan, for example {missing[0]}")
    unknown = sorted(parameters.keys() - TRAINABLE - FROZEN)
    if unknown:
        raise ValueError(f"the plan says nothing about {len(unknown)} parameters, for example {unknown[0]}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in TRAINABLE)
    return model
'''


def write(names: ExportNames) -> str:
    """A Python module with the names and a function `freeze(model)`."""
    text = names.comment(TARGET)
    for title, members in (("TRAINABLE", names.trainable), ("FROZEN", names.frozen)):
        listed = "".join(f"    {name!a},\n" for name in members)
        text += f"\n{title} = frozenset([\n{listed}])\n"
    return text + _FUNCTION

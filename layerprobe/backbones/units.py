"""Units of a backbone: named groups of parameters that a plan can train or adapt by themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from layerprobe.backbones.layout import attention_path, is_linear
from layerprobe.errors import UnknownNameError
from layerprobe.layers import UNITS

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone


def parameter_units(backbone: Backbone, by: str = "block") -> dict[str, tuple[str, ...]]:
    """Unit -> names of its parameters, from input to output: `0`, `1`, … or `0.attention`, `0.mlp`, `1.attention`, …

    The two halves of a block are all of it: what lies outside its attention module, norms included, is `mlp`.

    Raises
    ------
    UnknownNameError
        `by` is none of `UNITS`.
    """
    if by not in UNITS:
        raise UnknownNameError(f"unknown units '{by}'; choose one of: {', '.join(UNITS)}")
    units: dict[str, list[str]] = {}
    for index, (name, block) in enumerate(zip(backbone.layout.block_names, backbone.blocks, strict=True)):
        inside = attention_path(block) if by != "block" else None
        for part in ("attention", "mlp") if by != "block" else ("",):
            units[f"{index}.{part}" if part else str(index)] = []
        for parameter, _ in block.named_parameters():
            part = "attention" if inside and f"{parameter}.".startswith(f"{inside}.") else "mlp"
            units[str(index) if by == "block" else f"{index}.{part}"].append(f"{name}.{parameter}")
    return {unit: tuple(names) for unit, names in units.items()}


def linear_modules(backbone: Backbone, names: Iterable[str]) -> list[str]:
    """The linear maps among the modules that hold parameters of these names: where adapters can be."""
    holders = dict.fromkeys(name.rpartition(".")[0] for name in names)
    model = backbone.model
    return [name for name in holders if is_linear(model.get_submodule(name))]

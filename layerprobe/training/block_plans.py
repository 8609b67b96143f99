"""Freeze plans of a backbone, by its blocks and their halves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from layerprobe.backbones.layout import linear_modules, parameter_units
from layerprobe.errors import PlanError, UnknownNameError, did_you_mean
from layerprobe.layers import UNITS
from layerprobe.plans import FreezePlan
from layerprobe.plans.names import clean_name, is_adapter, is_expert
from layerprobe.plans.plan import FROZEN, TRAINABLE, parameter_table

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone


def all_trainable(backbone: Backbone) -> FreezePlan:
    """The plan that freezes nothing."""
    return block_plan(backbone, range(backbone.n_blocks), outside=TRAINABLE)


def unit_plan(backbone: Backbone, units: Iterable[str], *, rank: int | None = None) -> FreezePlan:
    """The plan that trains these units, or, with a `rank`, places adapters on all their linear maps.

    `units` are names of `layerprobe.backbones.layout.parameter_units`: `3`, `3.attention`, `3.mlp`.

    Raises
    ------
    UnknownNameError
        A unit that does not exist.
    PlanError
        A rank larger than one of the matrices; experts stacked in one tensor.
    """
    known = {unit: names for by in UNITS for unit, names in parameter_units(backbone, by).items()}
    chosen = list(units)
    if missing := [unit for unit in chosen if unit not in known]:
        raise UnknownNameError(
            f"{backbone.name} has no unit '{missing[0]}'.{did_you_mean(missing[0], known)}"
        )
    names = [name for unit in chosen for name in known[unit] if not is_adapter(name)]
    if rank is None:
        return block_plan(backbone, (), also_trainable=names)
    parameters = dict(backbone.model.named_parameters())
    if stacked := [name for name in names if is_expert(name) and parameters[name].ndim > 2]:
        raise PlanError(
            f"adapters are placed on linear maps, and {stacked[0]} is a stack of experts, which has none; "
            "train the unit itself (no rank), or place adapters on attention alone (0.attention)"
        )
    maps = [clean_name(f"{name}.")[:-1] for name in linear_modules(backbone, names)]
    return block_plan(backbone, ()).with_adapters(dict.fromkeys(maps, rank))


def block_plan(
    backbone: Backbone,
    trainable_blocks: Iterable[int],
    *,
    outside: str = FROZEN,
    stem: str = TRAINABLE,
    also_trainable: Iterable[str] = (),
) -> FreezePlan:
    """The plan that trains these blocks; `outside` is the state of embeddings, positions and outer norms."""
    return FreezePlan.from_blocks(
        parameter_table(backbone.model),
        backbone.layout.parameter_groups,
        trainable_blocks,
        model_id=backbone.source.model_id,
        revision=backbone.source.revision,
        norms=outside,
        positions=outside,
        embeddings=outside,
        other=outside,
        stem=stem,
        also_trainable=also_trainable,
        tied=backbone.tied_names,
    )

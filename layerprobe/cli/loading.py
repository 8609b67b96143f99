"""From the shared options (`layerprobe.cli.options`) to a backbone and a task, for every command alike.

A command names the options in its signature, for its help. The functions here take them all at once, as
`given`: the mapping of option names to values that typer keeps in the context of a call (`ctx.params`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerprobe.backbones import Backbone
    from layerprobe.layers import LayerRef
    from layerprobe.tasks.task import Task

_TASK = ("data_dir", "limit", "seed", "offline")
_PLACE = ("revision", "device", "dtype", "offline", "trust_remote_code")
_ENTRY = (*_PLACE, "init", "stem", "patch_size", "image_size", "attention", "pooling")
_BACKBONE = (*_ENTRY, "seed")


def load_images(given: Mapping[str, Any]) -> Task:
    """The task that the options name."""
    from layerprobe.tasks import load_task

    return load_task(given["task"], **_part(given, _TASK))


def load_model(given: Mapping[str, Any], **changes: Any) -> Backbone:
    """The backbone that the options name, with `changes` to them, such as `init="random"` for the twin."""
    from layerprobe.backbones import load_backbone

    chosen = {**given, **changes}
    return load_backbone(chosen["model"], **_part(chosen, _BACKBONE))


def load_pair(given: Mapping[str, Any], **changes: Any) -> tuple[Backbone, Task]:
    """Backbone and task; the task comes first, so that its mistakes are told before weights are read."""
    task = load_images(given)
    return load_model(given, **changes), task


def sketch(given: Mapping[str, Any], **changes: Any) -> Backbone:
    """For --dry-run: what is known before images and weights are read; refuses what `load_pair` would.

    The task comes first, as there.
    """
    from layerprobe.backbones.backbone import MIXED_SIZE
    from layerprobe.backbones.load import load_for_dry_run
    from layerprobe.tasks.load import peek_image_size

    chosen = {**given, **changes}
    side, certain = peek_image_size(chosen["task"], data_dir=chosen["data_dir"])
    return load_for_dry_run(
        chosen["model"],
        task_size=MIXED_SIZE if side == 0 else side,
        task_size_certain=certain,
        **_part(chosen, _ENTRY),
    )


def check_split(split: str, *others: str) -> None:
    """UnknownNameError for a split that no task has, nor is one of `others`."""
    from layerprobe.errors import UnknownNameError, did_you_mean
    from layerprobe.tasks.split import SPLITS

    known = (*SPLITS, *others)
    if split not in known:
        raise UnknownNameError(
            f"unknown split '{split}'.{did_you_mean(split, known)} Choose from: {', '.join(known)}"
        )


def parse_sites(text: str) -> list[str]:
    """`attn_out, mlp_out` as names of sites.

    Raises
    ------
    UnknownNameError : there is no such site.
    """
    from layerprobe.layers import LayerRef

    return [LayerRef(0, site.strip()).site for site in text.split(",")]


def pick_layers(backbone: Backbone, blocks: str, sites: Sequence[str], *, model: str) -> list[LayerRef]:
    """The layers at `sites` of the chosen blocks, and those outside all blocks."""
    from layerprobe.hooks.capture import all_layers, check_layers
    from layerprobe.layers import parse_blocks

    kept = set(parse_blocks(blocks, backbone.n_blocks, model=model))
    layers = all_layers(backbone.n_blocks, sites)
    chosen = [layer for layer in layers if layer.block is None or layer.block in kept]
    check_layers(chosen, backbone)
    return chosen


def _part(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: given[name] for name in names}

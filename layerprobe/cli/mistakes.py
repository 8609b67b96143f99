"""What a call may have wrong, told by names, configurations and the heads of files before torch is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerprobe.errors import PlanError

if TYPE_CHECKING:
    from layerprobe.backbones.resolve import ModelSource
    from layerprobe.cli.options import BackboneOptions, TaskOptions
    from layerprobe.plans import FreezePlan


def refuse_mistakes(
    backbone: BackboneOptions, task: TaskOptions, *, dry_run: bool, blocks: str, plan: FreezePlan | None
) -> tuple[int | None, bool]:
    """Refuse a task or model that is not there, broken weights, blocks and plans of another depth.

    A dry run asks for no data set of the hub. Whatever needs the model itself is refused later, when there is a
    skeleton of it. Returns the size of the images, as `layerprobe.tasks.load.peek_image_size` tells it.
    """
    from layerprobe.backbones.resolve import resolve_model
    from layerprobe.layers import parse_blocks
    from layerprobe.tasks.load import check_reachable, peek_image_size

    size = peek_image_size(task.task, data_dir=task.data_dir)
    if not dry_run:
        check_reachable(task.task, data_dir=task.data_dir, offline=task.offline)
    source = resolve_model(backbone.model, revision=backbone.revision, offline=backbone.offline)
    if backbone.init != "random":
        _read_headers(source)
    n_blocks = None if backbone.trust_remote_code else announced_blocks(source)
    if n_blocks is not None:
        parse_blocks(blocks, n_blocks, model=backbone.model)
        if plan is not None and plan.n_blocks != n_blocks:
            raise PlanError(plan.other_depth(n_blocks))
    return size


def announced_blocks(source: ModelSource) -> int | None:
    """Blocks of a model of one tower, by its configuration; None where only the model itself tells."""
    from layerprobe.model_config import read_model_config

    config = read_model_config(source.folder)
    parts = any(isinstance(value, dict) for key, value in config.items() if key.endswith("_config"))
    found = config.get("num_hidden_layers", config.get("n_layer"))
    return found if type(found) is int and not parts and not config.get("is_encoder_decoder") else None


def _read_headers(source: ModelSource) -> None:
    """BrokenFileError for a safetensors file that is shorter than its header says, or has none."""
    from layerprobe.checkpoints.safetensors import read_safetensors
    from layerprobe.files import weight_files

    for file in weight_files(source.folder)[0]:
        if file.suffix == ".safetensors":
            read_safetensors(file)

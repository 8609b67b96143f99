"""The parts of a classifier as a checkpoint keeps them: the base model's own tensors, adapters, stem and head."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerprobe.backbones.pretrained import place_in_whole_model
from layerprobe.backbones.processor import RECIPE_FILES
from layerprobe.backbones.resolve import TRAINED, ModelSource
from layerprobe.errors import UsageError
from layerprobe.files import read_json, write_json
from layerprobe.plans.adapters import has_adapters
from layerprobe.plans.names import adapter_part, clean_name, is_adapter
from layerprobe.training.classifier import spread_like

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone


def split_weights(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of a classifier -> `model` (under the model's own names), `adapters`, `stem` and `head`."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "adapters": {}, "stem": {}, "head": {}}
    for full, tensor in weights.items():
        place, _, name = full.removeprefix("backbone.").partition(".")
        if place != "model":
            parts[place][name] = tensor
        elif part := adapter_part(name):
            parts["adapters"][f"{clean_name(part[0])}.{part[1]}"] = tensor
        else:
            parts["model"][clean_name(name)] = tensor
    return parts


@torch.no_grad()
def put_back(saved: Mapping[str, Tensor], backbone: Backbone, *, only: Iterable[str] | None = None) -> None:
    """Copy tensors of `split_weights` (model and adapters) into a backbone with the same adapters, bit for bit.

    `only` are the names of the model that must be there; None: all, buffers that are not saved aside.

    Raises
    ------
    KeyError, ValueError
        One is missing, or has another shape.
    """
    wanted = None if only is None else set(only)
    own = {**dict(backbone.model.named_parameters()), **dict(backbone.model.named_buffers())}
    for full, tensor in own.items():
        part = adapter_part(full)
        name = f"{clean_name(part[0])}.{part[1]}" if part else clean_name(full)
        if part is None and wanted is not None and name not in wanted:
            continue
        if saved[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(spread_like(tensor, saved[name]))


def base_of(backbone: Backbone) -> dict[str, str]:
    """How the model that was trained is found again.

    Raises
    ------
    UsageError
        It cannot be: it was handed over in memory, is a control, or is itself a run that keeps trained tensors alone.
    """
    source = backbone.source
    why = None
    if source.origin == "memory":
        why = "this one was handed over in memory"
    elif source.origin == TRAINED:
        why = "this one was trained in place since it was loaded"
    elif backbone.init != "pretrained":
        why = f"this one is a control (init '{backbone.init}')"
    elif source.run is not None:
        why = "this one is a bridge run itself"
    if why:
        raise UsageError(
            f"saving only what was trained needs a base model that is found by name, but {why}; save 'full'"
        )
    name = str(Path(source.name).expanduser().resolve()) if source.origin == "local" else source.name
    return {"name": name, "model_id": source.model_id, "revision": source.revision, "origin": source.origin}


def check_save(backbone: Backbone, save: str) -> None:
    """UsageError where a run folder cannot hold this backbone."""
    if save == "trained":
        base_of(backbone)
    if foreign := [name for name, _ in backbone.model.named_parameters() if is_adapter(name)]:
        own = has_adapters(backbone.model)  # of an earlier training of this very object
        raise UsageError(
            f"a run folder holds plain models, and this one carries adapters already ({foreign[0]}); "
            + ("load the backbone anew" if own else "merge them first: model.merge_and_unload()")
        )


def save_model(backbone: Backbone, tensors: dict[str, Tensor], folder: Path) -> None:
    """The model in its own class's format, with its preprocessing: without that it would see other pixels."""
    # AutoModel, too, must find every tensor where it looks for it.
    architecture, prefix = place_in_whole_model(backbone.model)
    with no_transformers_bars():
        backbone.model.save_pretrained(
            folder, state_dict={f"{prefix}{name}": value for name, value in tensors.items()}
        )
    if prefix:
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "architectures": [architecture]})
    if backbone.processor is not None:
        backbone.processor.save_pretrained(folder)
    source = backbone.source
    if isinstance(source, ModelSource):
        for name in RECIPE_FILES:
            if (recipe := source.folder / name).is_file():
                shutil.copyfile(recipe, folder / name)


@contextlib.contextmanager
def no_transformers_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would break the run's."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""The class of a checkpoint on the meta device: names and shapes without values, in no memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from layerprobe.backbones.layout import is_linear
from layerprobe.backbones.load import random_model
from layerprobe.backbones.pretrained import architecture_of
from layerprobe.backbones.resolve import resolve_model
from layerprobe.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def class_skeleton(folder: Path) -> tuple[nn.Module, bool] | None:
    """The model that a folder's configuration describes, and whether it is the class that was saved, with its head.

    None where transformers does not know it or cannot build it. The repository's own code is never run.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return random_model(config, trust_remote_code=False), architecture_of(config) is not AutoModel
    except Exception:  # whatever the class raises for a configuration it cannot build: nothing is known
        return None
    finally:
        hf_logging.set_verbosity(verbosity)


def model_names(name: str, *, revision: str | None, offline: bool) -> dict[str, Any]:
    """What a trainer's configuration sees of a model: `sizes`, `linear`, `n_layers`, `head`, without its weights.

    The class is the one that the checkpoint was saved from, head included, whose names other trainers use.

    Raises
    ------
    UsageError
        The class cannot be built from its configuration alone.
    """
    source = resolve_model(name, revision=revision, offline=offline)
    found = class_skeleton(source.folder)
    if found is None:
        raise UsageError(f"'{name}' cannot be built from its configuration alone, so its names are not known")
    model = cast("PreTrainedModel", found[0])
    head = model.get_output_embeddings()
    return {
        "sizes": {key: p.numel() for key, p in model.named_parameters()},
        "linear": frozenset(key for key, m in model.named_modules() if is_linear(m)),
        "n_layers": int(getattr(model.config.get_text_config(), "num_hidden_layers", 0) or 0),
        "head": next((key for key, m in model.named_modules() if m is head), None)
        if head is not None
        else None,
    }

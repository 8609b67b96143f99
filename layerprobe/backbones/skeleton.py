"""The class of a checkpoint on the meta device: names and shapes without values, in no memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from layerprobe.backbones.load import architecture_of, quiet_transformers, random_model


def class_skeleton(folder: Path) -> tuple[nn.Module, bool] | None:
    """The model that a folder's configuration describes, and whether it is the class that was saved, with its head.

    None where transformers does not know it or cannot build it. The repository's own code is never run.
    """
    from transformers import AutoConfig, AutoModel

    try:
        with warnings.catch_warnings(), quiet_transformers(), torch.device("meta"):
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return random_model(config, trust_remote_code=False), architecture_of(config) is not AutoModel
    except Exception:  # whatever the class raises for a configuration it cannot build: nothing is known
        return None

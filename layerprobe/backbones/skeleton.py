"""The class of a checkpoint on the meta device: names and shapes without values, in no memory."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from layerprobe.backbones.load import random_model
from layerprobe.backbones.pretrained import architecture_of


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

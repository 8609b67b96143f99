"""From a name to a loaded transformer whose blocks can be found and which takes images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.backbones.load import load_backbone
    from layerprobe.backbones.resolve import resolve_model

_FILES = {"Backbone": "backbone", "load_backbone": "load", "resolve_model": "resolve"}

__all__ = ["Backbone", "load_backbone", "resolve_model"]


def __getattr__(name: str) -> object:
    # Lazily, because finding a model's files must not load torch.
    if name not in _FILES:
        raise AttributeError(f"module 'layerprobe.backbones' has no attribute '{name}'")
    return getattr(importlib.import_module(f"layerprobe.backbones.{_FILES[name]}"), name)

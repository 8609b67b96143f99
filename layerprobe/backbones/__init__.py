"""From a name to a loaded transformer whose blocks can be found and which takes images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerprobe.lazy import lazy_names

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.backbones.load import load_backbone
    from layerprobe.backbones.resolve import resolve_model

_FILES = {"Backbone": "backbone", "load_backbone": "load", "resolve_model": "resolve"}

__all__ = ["Backbone", "load_backbone", "resolve_model"]
__getattr__, __dir__ = lazy_names(__name__, _FILES)  # finding a model's files must not load torch

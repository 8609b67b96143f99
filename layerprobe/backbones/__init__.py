"""From a name to a loaded transformer whose blocks can be found and which takes images."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "load_backbone": "loading",
    "Backbone": "backbone",
    "ModelSource": "sources",
    "resolve_model": "sources",
    "MODELS": "catalog",
    "Layout": "layout",
    "find_layout": "layout",
    "PatchStem": "stem",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    # Lazily, because finding a model's files must not load torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'layerprobe.backbones' has no attribute '{name}'")
    return getattr(importlib.import_module(f"layerprobe.backbones.{_PUBLIC[name]}"), name)

"""Freeze search: which blocks to train, found by training plans under a budget.

Names are bound lazily: importing this package loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "freeze_search": "layerprobe.search.run",
    "SearchResult": "layerprobe.search.result",
    "STRATEGIES": "layerprobe.search.strategies",
    "Constraints": "layerprobe.search.space",
    "Space": "layerprobe.search.space",
    "Trial": "layerprobe.search.space",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'layerprobe.search' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value

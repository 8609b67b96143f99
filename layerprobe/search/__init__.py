"""Freeze search: which blocks to train, valued by the real chain.

Names are bound lazily: strategies and the ledger of trials load no torch.
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

"""Freeze search: which blocks to train, found by training plans under a budget.

Names are bound lazily: importing this package loads nothing heavy.
"""

from __future__ import annotations

from layerprobe.lazy import lazy_names

_PUBLIC = {
    "freeze_search": "run",
    "follow_search": "run",
    "SearchResult": "result",
    "STRATEGIES": "strategies",
    "Constraints": "space",
    "Space": "space",
    "Trial": "space",
}

__all__ = list(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

"""Freeze search: which blocks to train, valued by the real chain."""

from layerprobe.search.result import SearchResult
from layerprobe.search.run import freeze_search
from layerprobe.search.space import Constraints, Space, Trial
from layerprobe.search.strategies import STRATEGIES

__all__ = ["STRATEGIES", "Constraints", "SearchResult", "Space", "Trial", "freeze_search"]

"""layerprobe: which layers of a language-pretrained transformer already serve vision, and which to train.

The names below are bound on first use, so that importing the package stays instant and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "layerprobe.records",
    "load_backbone": "layerprobe.backbones",
    "Backbone": "layerprobe.backbones",
    "load_task": "layerprobe.tasks",
    "Task": "layerprobe.tasks",
    "make_task": "layerprobe.tasks",
    "extract_features": "layerprobe.analyzers.features",
    "outlier_report": "layerprobe.analyzers.outliers",
    "compare_outliers": "layerprobe.analyzers.compare",
    "cka_matrix": "layerprobe.analyzers.similarity",
    "linear_probes": "layerprobe.analyzers.probes",
    "transfer_scores": "layerprobe.analyzers.transfer",
    "attribute_layers": "layerprobe.analyzers.attribution",
    "FreezePlan": "layerprobe.plans",
    "bridge_train": "layerprobe.training",
    "evaluate": "layerprobe.training",
    "freeze_search": "layerprobe.search",
    "write_report": "layerprobe.report",
    "LayerRef": "layerprobe.layers",
    "LayerprobeError": "layerprobe.errors",
}
_MODULES = ("metrics", "plotting")

__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"layerprobe.{name}")
    else:
        raise AttributeError(f"module 'layerprobe' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

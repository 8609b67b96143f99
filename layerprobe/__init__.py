"""layerprobe: which layers of a language-pretrained transformer already serve vision, and which to train.

The names below are bound on first use, so that importing the package stays instant and loads no torch.
"""

from __future__ import annotations

from layerprobe.lazy import lazy_names

__version__ = "0.1.0"

_PUBLIC = {
    "load": "records",
    "load_backbone": "backbones",
    "Backbone": "backbones",
    "load_task": "tasks",
    "Task": "tasks",
    "make_task": "tasks",
    "extract_features": "analyzers.features",
    "outlier_report": "analyzers.outliers",
    "compare_outliers": "analyzers.compare",
    "cka_matrix": "analyzers.similarity",
    "linear_probes": "analyzers.probes",
    "transfer_scores": "analyzers.transfer",
    "attribute_layers": "analyzers.attribution",
    "FreezePlan": "plans",
    "bridge_train": "training",
    "evaluate": "training",
    "freeze_search": "search",
    "write_report": "report",
    "LayerRef": "layers",
    "LayerprobeError": "errors",
}
_MODULES = ("metrics", "plotting")

__all__ = [*_PUBLIC, *_MODULES, "__version__"]
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC, modules=_MODULES)

"""Frames in, matplotlib Axes out: `plot_x(frame, *, ax=None, **style) -> Axes`, one module a subject.

The names below are bound on first use, so that nothing is drawn with before it is asked for.
"""

from __future__ import annotations

from layerprobe.lazy import lazy_names

_FUNCTIONS = {
    "bridge": ("plot_bridge_curve", "plot_weight_drift", "plot_accuracy_against"),
    "layer_scores": (
        "plot_transfer", "transfer_figure", "plot_features", "plot_attribution", "attribution_figure",
        "plot_patch_map", "patch_maps_figure",
    ),
    "outliers": (
        "plot_outlier_depth", "plot_outlier_heatmap", "plot_outlier_tails", "plot_outlier_comparison",
    ),
    "probes": ("plot_probe_accuracy", "plot_probe_strength", "plot_few_shot"),
    "search": (
        "plot_pareto", "plot_ranking", "plot_differences", "plot_trials", "plot_strips", "plot_plan",
    ),
    "similarity": ("plot_cka", "plot_cka_closest"),
    "studies": ("plot_lines", "plot_claims", "draw_levels"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _FUNCTIONS.items() for name in names}

_FILES = (*_FUNCTIONS, "style")

__all__ = sorted([*_FILES, *_MODULE_OF])
__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF, modules=_FILES)

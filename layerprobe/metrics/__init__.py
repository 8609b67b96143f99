"""Arrays in, numbers out: outliers, similarity, probing, transferability, uncertainty. No models, no files.

The names below are bound on first use; each is documented where it is defined.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "MinibatchCKA": "similarity_minibatch",
    "rsa": "similarity_measures",
    "mutual_knn": "similarity_measures",
    "pwcca": "similarity_measures",
    "svcca": "similarity_measures",
    "procrustes_distance": "similarity_measures",
    "debiased_rbf_cka": "similarity_measures",
    "OutlierRules": "outliers",
    "TensorOutliers": "outliers",
    "outlier_statistics": "outliers",
    "outlier_ratio": "outliers",
    "merge_outliers": "outliers",
    "ratio_of_ratios": "outlier_comparison",
    "hedges_g": "outlier_comparison",
    "cliffs_delta": "outlier_comparison",
    "group_test": "outlier_comparison",
    "permutation_null": "similarity_null",
    "pairwise_cka": "similarity_pairs",
    "linear_cka": "similarity",
    "debiased_linear_cka": "similarity",
    "debiased_hsic": "similarity",
    "BiasedEstimateWarning": "similarity",
    "gbc": "transferability",
    "h_score": "transferability",
    "half_sample_errors": "transferability",
    "logme": "transferability",
    "loo_knn": "transferability",
    "loo_ridge": "transferability",
    "neural_collapse": "transferability",
    "readable_scores": "transferability",
    "transrate": "transferability",
    "Interval": "uncertainty",
    "MeanInterval": "uncertainty",
    "PairedDifference": "uncertainty",
    "PairedSeeds": "uncertainty",
    "bootstrap_interval": "uncertainty",
    "mean_interval": "uncertainty",
    "paired_bootstrap": "uncertainty",
    "paired_seed_interval": "uncertainty",
    "wilson_interval": "uncertainty",
    "C_GRID": "probing",
    "LogisticProbe": "probing",
    "ProbeResult": "probing",
    "fit_logistic_path": "probing",
    "select_probe": "probing",
    "online_code_length": "probing_curves",
    "few_shot_curve": "probing_curves",
    "control_accuracy": "probing_curves",
    "knn_predict": "probing_knn",
    "select_knn": "probing_knn",
    "ridge_sweep": "probing_ridge",
    "select_ridge": "probing_ridge",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'layerprobe.metrics' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"layerprobe.metrics.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

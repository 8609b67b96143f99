"""Arrays in, numbers out: outliers, similarity, probing, transferability, uncertainty. No models, no files.

The names below are bound on first use; each is documented where it is defined.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "MinibatchCKA": "similarity.minibatch",
    "rsa": "similarity.measures",
    "mutual_knn": "similarity.measures",
    "pwcca": "similarity.measures",
    "svcca": "similarity.measures",
    "procrustes_distance": "similarity.measures",
    "debiased_rbf_cka": "similarity.measures",
    "OutlierRules": "outliers",
    "TensorOutliers": "outliers",
    "outlier_statistics": "outliers",
    "outlier_ratio": "outliers",
    "merge_outliers": "outliers",
    "ratio_of_ratios": "outliers.comparison",
    "hedges_g": "outliers.comparison",
    "cliffs_delta": "outliers.comparison",
    "group_test": "outliers.comparison",
    "permutation_null": "similarity.permutation",
    "pairwise_cka": "similarity.all_pairs",
    "linear_cka": "similarity.cka",
    "debiased_linear_cka": "similarity.cka",
    "debiased_hsic": "similarity.cka",
    "BiasedEstimateWarning": "similarity.cka",
    "gbc": "transferability.scores",
    "h_score": "transferability.scores",
    "half_sample_errors": "transferability.scores",
    "logme": "transferability.scores",
    "loo_knn": "transferability.scores",
    "loo_ridge": "transferability.scores",
    "neural_collapse": "transferability.scores",
    "readable_scores": "transferability.scores",
    "transrate": "transferability.scores",
    "Estimate": "intervals",
    "Interval": "intervals",
    "MeanInterval": "intervals",
    "PairedDifference": "intervals",
    "PairedSeeds": "intervals",
    "bootstrap_interval": "intervals",
    "mean_interval": "intervals",
    "paired_bootstrap": "intervals",
    "paired_seed_interval": "intervals",
    "wilson_interval": "intervals",
    "C_GRID": "probing.logistic",
    "LogisticProbe": "probing.logistic",
    "ProbeResult": "probing.logistic",
    "fit_logistic_path": "probing.logistic",
    "select_probe": "probing.logistic",
    "online_code_length": "probing.curves",
    "few_shot_curve": "probing.curves",
    "control_accuracy": "probing.curves",
    "knn_predict": "probing.neighbours",
    "select_knn": "probing.neighbours",
    "ridge_sweep": "probing.ridge",
    "select_ridge": "probing.ridge",
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

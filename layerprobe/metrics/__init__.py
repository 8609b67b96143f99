"""Arrays in, numbers out: outliers, similarity, probing, transferability, uncertainty. No models, no files.

The names below are bound on first use; each is documented where it is defined.
"""

from __future__ import annotations

from layerprobe.lazy import lazy_names

_MODULES = {
    "intervals": (
        "Estimate Interval bootstrap_interval mean_interval "
        "paired_bootstrap paired_seed_interval wilson_interval"
    ),
    "outliers": "OutlierRules TensorOutliers merge_outliers",
    "outliers.comparison": "ratio_of_ratios hedges_g cliffs_delta group_test",
    "outliers.summary": "outlier_statistics outlier_ratio",
    "probing.curves": "online_code_length few_shot_curve control_labels control_probe",
    "probing.knn_ridge": "knn_predict select_knn ridge_sweep select_ridge",
    "probing.logistic": "LogisticProbe ProbeResult fit_logistic_path select_probe",
    "similarity.all_pairs": "MinibatchCKA pairwise_cka",
    "similarity.measures": (
        "rsa mutual_knn pwcca svcca procrustes_distance debiased_rbf_cka linear_cka "
        "debiased_linear_cka debiased_hsic BiasedEstimateWarning"
    ),
    "similarity.permutation": "permutation_null",
    "validation": "C_GRID",
    "transferability.scores": (
        "gbc h_score half_sample_errors logme loo_knn loo_ridge neural_collapse readable_scores transrate"
    ),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)

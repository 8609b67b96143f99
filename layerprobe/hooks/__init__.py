"""From a running model to activations, and from activations to files that are found again."""

from layerprobe.hooks.capture import Capture, all_layers, capture
from layerprobe.hooks.store import FeatureStore, features_root, list_stores, prune_stores

__all__ = [
    "Capture",
    "FeatureStore",
    "all_layers",
    "capture",
    "features_root",
    "list_stores",
    "prune_stores",
]

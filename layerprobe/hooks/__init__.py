"""From a running model to activations, and from activations to files that are found again."""

from layerprobe.hooks.capture import all_layers, capture

__all__ = ["all_layers", "capture"]

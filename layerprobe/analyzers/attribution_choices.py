"""What an attribution can be asked for, checked before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from layerprobe.errors import UnknownNameError, UsageError

METHODS = ("skip", "mean_ablation", "conductance", "update")
SLOW_METHODS = ("gradient_x_activation", "integrated_gradients")
REFUSED = {
    "deeplift": "its rules cover pointwise non-linearities, not softmax attention or LayerNorm, and its "
    "contributions miss f(x) − f(baseline) by 43 to 300 % on transformers",
    "lrp": "it has no propagation rule for LayerNorm or attention",
    "block_sum": "the sum of conductance or integrated gradients over a whole block is f(x) − f(baseline) for "
    "every block, because every block's output cuts the network; it ranks nothing",
}
"""Methods that are not offered, and why."""
FIRST_STEPS = 8
"""Steps along the path before any is halved."""


def check_sizes(n_images: int, tolerance: float, max_steps: int) -> None:
    """UsageError for numbers that `attribute_layers` cannot work with."""
    if n_images < 2 or not 0 < tolerance < 1 or max_steps < FIRST_STEPS:
        raise UsageError(
            f"attribution needs at least 2 images, a tolerance between 0 and 1 and max_steps ≥ {FIRST_STEPS}: got "
            f"n_images={n_images}, tolerance={tolerance}, max_steps={max_steps}"
        )


def check_methods(methods: Sequence[str]) -> list[str]:
    """The methods, each once; UnknownNameError or UsageError for one that is not offered here."""
    for method in methods:
        plain = method.lower().replace("-", "").replace("_", "")
        for name, reason in REFUSED.items():
            if plain.startswith((name.replace("_", ""), f"layer{name}")):
                raise UsageError(f"'{method}' is not valid for transformer blocks: {reason}")
        if method not in (*METHODS, *SLOW_METHODS):
            known = ", ".join((*METHODS, *SLOW_METHODS))
            raise UnknownNameError(f"unknown attribution method '{method}'; choose of: {known}")
    if not methods:
        raise UsageError(f"no attribution method was asked for; choose of: {', '.join(METHODS)}")
    return list(dict.fromkeys(methods))

"""The plans every search is compared with: all, none, norms only, first, last, random."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def norm_parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that belong to normalisation layers.

    A norm is a parameter held directly by a module whose class name contains `Norm` (LayerNorm,
    LlamaRMSNorm, GroupNorm …).
    """
    return tuple(
        f"{module_name}.{name}" if module_name else name
        for module_name, child in module.named_modules()
        if "norm" in type(child).__name__.lower()
        for name, _ in child.named_parameters(recurse=False)
    )


def random_blocks(n_blocks: int, seed: int) -> tuple[int, ...]:
    """Half of the blocks, rounded down, drawn without replacement by `seed`."""
    return tuple(
        sorted(random.Random(f"layerprobe-random-plan-{seed}").sample(range(n_blocks), n_blocks // 2))
    )


def standard_blocks(
    n_blocks: int, *, first: int = 5, random_seeds: Iterable[int] = (0,)
) -> dict[str, tuple[int, ...]]:
    """Name of the baseline -> blocks it trains, for those that are whole blocks.

    `first-5` and `last-5` are left out where the backbone has no more than five blocks, since they
    would be `all`. A half of an odd number of blocks is rounded down.

    >>> standard_blocks(4, random_seeds=())
    {'all': (0, 1, 2, 3), 'none': (), 'first-half': (0, 1), 'last-half': (2, 3)}
    """
    blocks = tuple(range(n_blocks))
    half = n_blocks // 2
    baselines = {"all": blocks, "none": ()}
    if first < n_blocks:
        baselines[f"first-{first}"] = blocks[:first]
        baselines[f"last-{first}"] = blocks[n_blocks - first :]
    baselines["first-half"] = blocks[:half]
    baselines["last-half"] = blocks[n_blocks - half :]
    return baselines | {f"random-{seed}": random_blocks(n_blocks, seed) for seed in random_seeds}

"""The plans every search is compared with: all, none, norms only, first, last, random."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from layerprobe.errors import UsageError
from layerprobe.plans.plan import FROZEN, TRAINABLE, FreezePlan, ParameterTable

if TYPE_CHECKING:
    from torch import nn

_NORM_NAME = re.compile(r"norm|(?:^|_)ln(?:_|\d|$)", re.IGNORECASE)


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


def guess_norm_names(parameters: ParameterTable) -> tuple[str, ...]:
    """The same from names and shapes alone: a vector in a module called `…norm…`, `ln`, `ln_1`, `ln_f`.

    For use where no module is at hand; `norm_parameter_names` knows the classes.

    >>> guess_norm_names({"h.0.ln_1.weight": ((8,), "float32"), "h.0.mlp.fc.bias": ((8,), "float32")})
    ('h.0.ln_1.weight',)
    """
    return tuple(
        name
        for name, (shape, _) in parameters.items()
        if len(shape) == 1 and _NORM_NAME.search(name.split(".")[-2] if "." in name else "")
    )


def random_blocks(n_blocks: int, seed: int, *, size: int | None = None) -> tuple[int, ...]:
    """`size` blocks (default: half of them, rounded down) drawn without replacement by `seed`."""
    size = n_blocks // 2 if size is None else size
    if not 0 <= size <= n_blocks:
        raise UsageError(f"cannot draw {size} of {n_blocks} blocks")
    return tuple(sorted(random.Random(f"layerprobe-random-plan-{seed}").sample(range(n_blocks), size)))


def standard_blocks(
    n_blocks: int, *, first: int = 5, random_seeds: Iterable[int] = (0,), random_size: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Name of the baseline -> blocks it trains, for those that are whole blocks.

    `first-5` and `last-5` are left out where the backbone has no more than five blocks, since they
    would be `all`. A half of an odd number of blocks is rounded down.

    >>> standard_blocks(4, random_seeds=())
    {'all': (0, 1, 2, 3), 'none': (), 'first-half': (0, 1), 'last-half': (2, 3)}
    """
    blocks = tuple(range(n_blocks))
    half = n_blocks // 2
    found = {"all": blocks, "none": ()}
    if first < n_blocks:
        found[f"first-{first}"] = blocks[:first]
        found[f"last-{first}"] = blocks[n_blocks - first :]
    found["first-half"] = blocks[:half]
    found["last-half"] = blocks[n_blocks - half :]
    for seed in random_seeds:
        found[f"random-{seed}"] = random_blocks(n_blocks, seed, size=random_size)
    return found


def standard_plans(
    parameters: ParameterTable,
    groups: Mapping[str, str],
    *,
    model_id: str,
    revision: str | None = None,
    norm_names: Iterable[str] | None = None,
    norms: str = FROZEN,
    positions: str = FROZEN,
    embeddings: str = FROZEN,
    first: int = 5,
    random_seeds: Iterable[int] = (0,),
    random_size: int | None = None,
) -> dict[str, FreezePlan]:
    """The baselines as plans, by name.

    Parameters
    ----------
    parameters, groups, norms, positions, embeddings : as for `FreezePlan.from_blocks`; the states hold for
        every baseline but two: `all` also frees norms, positions and other, and `norms` the norms. Word
        embeddings are never used when a language model reads image tokens, so `embeddings` stays what the
        caller says even in `all`.
    norm_names : parameters of norms, inside the blocks and outside, from `norm_parameter_names(model)`;
        by default guessed from names and shapes, see `guess_norm_names`.
    first, random_seeds, random_size : as for `standard_blocks`.

    Returns
    -------
    dict with `all`, `none`, `norms` (Frozen Pretrained Transformers, Lu et al. 2021, arXiv 2103.05247),
    `first-5`, `last-5`, `first-half`, `last-half`, `random-<seed>`.
    """
    n_blocks = len({group for group in groups.values() if group.startswith("block.")})
    states = {"norms": norms, "positions": positions, "embeddings": embeddings}

    def plan(name: str, blocks: Iterable[int], **changes: str) -> FreezePlan:
        return FreezePlan.from_blocks(
            parameters,
            groups,
            blocks,
            model_id=model_id,
            revision=revision,
            found={"baseline": name},
            **{**states, **changes},
        )

    chosen = standard_blocks(n_blocks, first=first, random_seeds=random_seeds, random_size=random_size)
    plans = {name: plan(name, blocks) for name, blocks in chosen.items()}
    plans["all"] = plan("all", chosen["all"], norms=TRAINABLE, positions=TRAINABLE, other=TRAINABLE)
    all_norms = set(guess_norm_names(parameters) if norm_names is None else norm_names)
    within = [name for name in parameters if name in all_norms]
    norms_only = FreezePlan.from_blocks(
        parameters,
        groups,
        (),
        model_id=model_id,
        revision=revision,
        found={"baseline": "norms"},
        also_trainable=within,
        positions=positions,
        embeddings=embeddings,
        norms=norms,
    )
    return {"all": plans.pop("all"), "none": plans.pop("none"), "norms": norms_only, **plans}

"""What the training commands share: lists of numbers, and an estimate of memory before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from layerprobe.errors import UsageError


def learning_rates(text: str) -> tuple[float, ...]:
    """`3e-4,1e-3` as numbers.

    >>> learning_rates("3e-4, 1e-3")
    (0.0003, 0.001)
    """
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError as error:
        raise UsageError(f"'{text}' is no list of learning rates; write for example 3e-4,1e-3") from error


def seeds_of(text: str) -> list[int]:
    """`3` means seeds 0, 1, 2; `0,5,7` means these.

    >>> seeds_of("3"), seeds_of("0,5")
    ([0, 1, 2], [0, 5])
    """
    try:
        numbers = [int(item) for item in text.split(",") if item.strip()]
    except ValueError as error:
        raise UsageError(f"'{text}' is no number of seeds nor a list of them; write 3 or 0,1,2") from error
    if not numbers or min(numbers) < 0 or (len(numbers) == 1 and numbers[0] < 1):
        raise UsageError(f"'{text}' names no seeds; write 3 or 0,1,2")
    return list(range(numbers[0])) if len(numbers) == 1 else numbers


def own_device(device: str | None) -> str | None:
    """The accelerator of this process where `accelerate launch` or `torchrun` started several."""
    rank = os.environ.get("LOCAL_RANK")
    if device is not None or rank is None:
        return device
    import torch

    return f"cuda:{int(rank) % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def training_memory(model: str, plan: Path | None, *, images: int, **loading: Any) -> dict[str, Any]:
    """Facts for --dry-run: weights, gradients and AdamW's moments, from the configuration alone.

    Activations are estimated for 64 tokens per image at 34·T·d bytes of float32 per block and image, twice
    (Korthikanti et al. 2022, arXiv 2205.05198, count 34 bytes in 16 bits without attention maps).
    """
    from layerprobe.backbones.loading import choose_device, choose_dtype, estimate_memory, load_config
    from layerprobe.backbones.sources import resolve_model

    source = resolve_model(model, revision=loading["revision"], offline=loading["offline"])
    trust = loading["trust_remote_code"]
    dtype = choose_dtype(loading["dtype"])
    weights = estimate_memory(source, dtype, trust_remote_code=trust)
    config = load_config(source, trust_remote_code=trust)
    trained, note = weights["parameters"], "no plan: everything trains"
    if plan is not None:
        from layerprobe.plans import FreezePlan

        loaded = FreezePlan.load(plan)
        trained, note = loaded.counts["trainable_parameters"], loaded.summary()
    size = weights["weights_bytes"] // max(1, weights["parameters"])
    from layerprobe.backbones.layout import hidden_size

    n_blocks = int(getattr(config, "num_hidden_layers", 0))
    activations = images * 64 * hidden_size(config) * 34 * 2 * n_blocks
    total = weights["weights_bytes"] + 3 * trained * size + activations
    return {
        "model": f"{source.model_id} @ {source.revision}",
        "device": str(choose_device(loading["device"])),
        "blocks": n_blocks,
        "plan": note,
        "trained parameters": trained,
        "weights": _mib(weights["weights_bytes"]),
        "gradients and moments": _mib(3 * trained * size),
        "activations (64 tokens an image)": _mib(activations),
        "memory": _mib(total),
    }


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"

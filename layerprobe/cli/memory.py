"""What a run would take, told before anything is loaded: the body of `--dry-run`."""

from __future__ import annotations

from typing import Any

FORWARD_FACTOR = 12
"""Rough count of B×T×D tensors alive in one block's forward pass (q, k, v, the widened MLP, residuals)."""


def forward_facts(
    model: str,
    *,
    revision: str | None,
    device: str | None,
    dtype: str | None,
    offline: bool,
    batch_size: int,
    n_tokens: int = 64,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Model, blocks, and an estimate of the memory for weights and one forward pass.

    Reads configuration files only. Activations are estimated as batch × tokens × width × 12 values.
    """
    from layerprobe.backbones.layout import hidden_size
    from layerprobe.backbones.loading import (
        available_memory,
        choose_device,
        choose_dtype,
        estimate_memory,
        load_config,
    )
    from layerprobe.backbones.sources import resolve_model

    target, kind = choose_device(device), choose_dtype(dtype)
    source = resolve_model(model, revision=revision, offline=offline)
    config = load_config(source, trust_remote_code=trust_remote_code)
    config = getattr(config, "vision_config", None) or config
    weights = estimate_memory(source, kind, trust_remote_code=trust_remote_code)
    width = hidden_size(config)
    value_bytes = 2 if str(kind).endswith("16") else 4
    activations = batch_size * n_tokens * width * FORWARD_FACTOR * value_bytes
    free = available_memory(target)
    needed = weights["weights_bytes"] + activations
    return {
        "model": f"{source.model_id} at {source.revision}",
        "blocks": config.num_hidden_layers,
        "width": width,
        "parameters": f"{weights['parameters']:,}",
        "device": str(target),
        "dtype": str(kind).removeprefix("torch."),
        "weights": _size(weights["weights_bytes"]),
        "activations": f"about {_size(activations)} for {batch_size} images of {n_tokens} tokens",
        "memory free": "unknown" if free is None else _size(free),
        "fits": "unknown" if free is None else ("yes" if needed < free else "no"),
    }


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

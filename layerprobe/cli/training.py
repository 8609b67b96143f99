"""What the training commands share: lists of numbers, and the device of a process among several."""

from __future__ import annotations

import os

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

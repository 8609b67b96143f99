"""Parameters spread over processes (PyTorch's FSDP2), for backbones beyond one device.

Sharding is done here and not by accelerate, whose FSDP needs accelerators: this one also runs, and is tested,
on CPU processes. Frozen and trained parameters may be mixed in any way, inside a block too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from layerprobe.errors import UsageError
from layerprobe.training.classifier import Classifier


def shard(classifier: Classifier, device: torch.device) -> None:
    """Spread every parameter over all processes, block by block; in place.

    Raises
    ------
    UsageError : there is one process only.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise UsageError(
            "--shard spreads the model over several processes; start them with: accelerate launch"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # One group per block, one for the head (it may have another dtype), one for all the rest.
    for module in [*classifier.backbone.blocks, classifier.head, classifier]:
        fully_shard(module, mesh=mesh)


def full(tensor: Any) -> Tensor:
    """The whole tensor; of a sharded one, gathered from all processes, which must all ask for it."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def placed_like(whole: Tensor, tensor: Any) -> Tensor:
    """`whole` on the device of `tensor`, and sharded as it is."""
    if not hasattr(tensor, "device_mesh"):
        return whole.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)


@contextlib.contextmanager
def gradients_stay_here(accelerator: Any, model: Any) -> Iterator[None]:
    """Within: a backward pass adds to this process's gradients and exchanges nothing."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with accelerator.no_sync(model):
            yield

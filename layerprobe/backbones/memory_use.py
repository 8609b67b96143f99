"""What a run takes in memory; passes are counted on the meta device, where tensors have sizes and no values."""

from __future__ import annotations

import contextlib
import resource
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerprobe.backbones.backbone import Backbone, evaluating
from layerprobe.tables import bytes_text

LIBRARIES = 150 << 20
"""What a run imports, maps and sets up on top of a dry run: figures, numba, oneDNN and its workspaces."""


FORWARD_VALUES = 12
"""Rough count of B×T×D tensors alive in one block's forward pass (q, k, v, the widened MLP, residuals)."""

TRAINING_BYTES = 2 * 34
"""Bytes that a block keeps per token and channel for the backward pass, in float32. Korthikanti et al. 2022
(arXiv 2205.05198) count 34 in 16 bits, without attention maps."""


class Memory(NamedTuple):
    """Bytes of a process. On an accelerator, `process` and `images` stay on the host."""

    process: int
    weights: int
    gradients_and_moments: int
    activations: int
    images: int

    def words(self, device: str) -> str:
        """The sum, for the memory that has to hold it."""
        if device.startswith("cuda"):
            held = sum(self) - self.process - self.images
            return (
                f"about {bytes_text(held)} on the device, {bytes_text(self.process + self.images)} beside it"
            )
        return f"about {bytes_text(sum(self))} for the process"


def memory_needed(
    seen: Backbone,
    *,
    images: int,
    trained: int | None = None,
    copies: int = 0,
    held: int = 0,
    shards: int = 1,
) -> Memory:
    """Memory of a run: of forward passes alone, or of training `trained` parameters with AdamW.

    Parameters
    ----------
    images : int
        Images of one pass.
    copies : int
        How many more times the run holds the weights: another model, or a copy to compare with or go back to.
    held : int
        Bytes of images that are held preprocessed.
    shards : int
        Processes that hold the model together; the figures are those of one of them.
    """
    process = process_bytes() + LIBRARIES
    size = seen.weights_bytes // max(1, seen.n_parameters)
    per_value = FORWARD_VALUES * size if trained is None else TRAINING_BYTES * seen.n_blocks
    counted = pass_bytes(seen, images, training=trained is not None)
    gradients = size * (trained or 0)
    if counted is None:
        counted = images * seen.tokens * seen.hidden_size * per_value + gradients
    # The file of the weights is mapped beside the weights while they are copied from it.
    weights = (2 + copies) * seen.weights_bytes // shards
    if shards > 1:  # one block is gathered while the next one is on its way
        weights += 2 * max(sum(p.numel() * p.itemsize for p in b.parameters()) for b in seen.blocks)
    return Memory(
        process=process,
        weights=weights,
        gradients_and_moments=3 * gradients // shards,
        activations=max(0, counted - gradients),
        images=held,
    )


class _LiveTensors(TorchDispatchMode):
    """Within: the most bytes that tensors made here have together."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[torch.Tensor, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:
            # A model looks at a value, which has none here: masks say of all tokens that they are there.
            return args[0].dtype == torch.bool
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.live -= size


def pass_bytes(seen: Backbone, images: int, *, training: bool) -> int | None:
    """Peak bytes of one pass of `images` images beside the weights, and with `training` its gradients.

    Dropout counts: with it, attention keeps its maps for the backward pass. What trains is what `requires_grad` says.

    Returns
    -------
    int | None
        None where the model cannot run without values.
    """
    shape = _image_shape(seen)
    if shape is None:
        return None
    with contextlib.suppress(RuntimeError, NotImplementedError), evaluating(seen):
        return _peak(seen, images, shape, training=training)
    return None


def _peak(seen: Backbone, n: int, shape: tuple[int, int, int], *, training: bool) -> int:
    counted = _LiveTensors()
    pixels = torch.empty(n, *shape, device="meta")
    seen.train(training)
    with counted, torch.set_grad_enabled(training):
        hidden = seen(pixels)
        if hidden.requires_grad:
            hidden.float().square().mean().backward()
    for parameter in seen.parameters():
        parameter.grad = None
    return counted.peak


def _image_shape(seen: Backbone) -> tuple[int, int, int] | None:
    recipe = seen.preprocessing
    if recipe is None:
        return None
    if seen.modality == "language":
        return (3, seen.image_size, seen.image_size) if seen.image_size else None
    return None if recipe.output_size is None else (recipe.channels, *recipe.output_size)


def process_bytes() -> int:
    """The most that this process has held so far: interpreter, libraries, and images that were read."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""What a pass takes in memory, counted on the meta device, where tensors have sizes and no values."""

from __future__ import annotations

import contextlib
import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerprobe.backbones.backbone import Backbone

LIBRARIES = 150 << 20
"""What a run imports, maps and sets up on top of a dry run: figures, numba, oneDNN and its workspaces."""


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
    with contextlib.suppress(RuntimeError, NotImplementedError), _modes_kept(seen):
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


@contextlib.contextmanager
def _modes_kept(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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

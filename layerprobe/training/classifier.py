"""A backbone with a linear head, the state it starts from, and the frozen part that need not run twice."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.errors import PlanError
from layerprobe.training.config import derive_seed

PREFIX_BYTES = 4 << 30
"""Outputs of a frozen prefix are kept when they take no more memory than this."""


class Classifier(nn.Module):
    """images B×C×H×W → logits B×K: the backbone, its pooling, and one linear layer.

    The head starts from N(0, 0.02²) and zero bias, drawn from `seed` alone.
    """

    def __init__(self, backbone: Any, n_classes: int, *, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        first = next(backbone.parameters())
        self.head = nn.Linear(backbone.hidden_size, n_classes)
        draw = torch.Generator().manual_seed(derive_seed(seed, "head"))
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=draw) * 0.02)
            self.head.bias.zero_()
        self.head.to(device=first.device)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.backbone.pool(self.backbone(pixels))
        return self.head(pooled.to(self.head.weight.dtype))


def set_training(classifier: Classifier) -> None:
    """Training mode for what trains, evaluation mode (no dropout) for what is frozen.

    A block with any trained parameter drops out as its configuration says; a frozen block does not. What
    lies outside the blocks follows whether anything outside them trains.
    """
    backbone = classifier.backbone
    blocks = backbone.blocks
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    outside = any(p.requires_grad and id(p) not in inside for p in backbone.parameters())
    classifier.train(outside)
    for block in blocks:
        block.train(any(parameter.requires_grad for parameter in block.parameters()))


def trained_parameters(classifier: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer gets, by name within the classifier."""
    return {name: p for name, p in classifier.named_parameters() if p.requires_grad}


class Snapshot:
    """A backbone's exact state, held in memory, so that one loaded model can serve many runs.

    >>> # with Snapshot.restored(backbone):  train at will; afterwards every bit is as before
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._tensors = {name: tensor.detach().clone() for name, tensor in _state(backbone).items()}
        self._trainable = {name: p.requires_grad for name, p in backbone.named_parameters()}
        self._modes = {name: module.training for name, module in backbone.named_modules()}

    def restore(self, backbone: nn.Module) -> None:
        """Put everything back and prove it.

        Raises
        ------
        PlanError : the backbone gained, lost or reshaped a tensor, or one does not read back bit by bit.
        """
        state = _state(backbone)
        if state.keys() != self._tensors.keys():
            odd = sorted(state.keys() ^ self._tensors.keys())
            raise PlanError(
                f"the backbone cannot be restored: it gained or lost {len(odd)} tensors ({odd[0]})"
            )
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(self._tensors[name])
        wrong = [name for name, tensor in state.items() if not same_bits(tensor, self._tensors[name])]
        if wrong:
            raise PlanError(
                f"the backbone was not restored exactly: {len(wrong)} tensors differ ({wrong[0]})"
            )
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(self._trainable[name])
            parameter.grad = None
        for name, module in backbone.named_modules():
            module.training = self._modes[name]

    @classmethod
    @contextlib.contextmanager
    def restored(cls, backbone: nn.Module) -> Iterator[Snapshot]:
        """Restore on the way out, also after an exception."""
        snapshot = cls(backbone)
        try:
            yield snapshot
        finally:
            snapshot.restore(backbone)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit-identical, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's bits, dtype and shape."""
    seen = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    seen.update(_bytes(tensor).numpy().data)
    return seen.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    local = tensor.detach()
    if hasattr(local, "to_local"):  # sharded: the part that lies here
        local = local.to_local()
    flat = local.cpu().contiguous().flatten()
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


class Prefix:
    """The frozen blocks at the input end, computed once per image instead of once per step.

    Valid where nothing that acts before block `depth` trains: neither stem, embeddings nor positions.
    `filled` keeps the output of block `depth`-1 for all images; `used` makes those blocks hand on the
    kept values. The model's own code does everything else, so masks and rotary tables stay its own.
    """

    def __init__(self, classifier: Classifier, depth: int) -> None:
        self._classifier = classifier
        self._blocks = classifier.backbone.blocks[:depth]
        self.depth = depth
        self.kept: Tensor | None = None
        self._returns_tuple = 0

    def fill(self, load: Callable[[Any], Tensor], n: int, batch_size: int) -> None:
        """Run the prefix over positions 0 … n−1, which `load` turns into images on the device."""
        import numpy as np

        caught: list[Tensor] = []

        def catch(_module: nn.Module, _args: Any, output: Any) -> None:
            self._returns_tuple = len(output) if isinstance(output, tuple) else 0
            caught.append(output[0] if isinstance(output, tuple) else output)

        handle = self._blocks[-1].register_forward_hook(catch)
        try:
            with torch.no_grad():
                for start in range(0, n, batch_size):
                    rows = np.arange(start, min(start + batch_size, n))
                    self._classifier.backbone(load(rows))
                    hidden = caught.pop()
                    if self.kept is None:
                        self.kept = torch.empty((n, *hidden.shape[1:]), dtype=hidden.dtype)
                    self.kept[start : start + len(rows)] = hidden.cpu()
        finally:
            handle.remove()

    @contextlib.contextmanager
    def used(self, indices: Any) -> Iterator[None]:
        """Within: a forward pass over the images `indices` takes the kept outputs."""
        assert self.kept is not None, "fill the prefix first"
        device = next(self._classifier.parameters()).device
        hidden = self.kept[torch.as_tensor(indices)].to(device)
        more = (None,) * (self._returns_tuple - 1)
        answer: Any = (hidden, *more) if self._returns_tuple else hidden
        for block in self._blocks:
            block.forward = lambda *_args, **_kwargs: answer
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward


def gradient_flow(classifier: Classifier, pixels: Tensor) -> tuple[list[bool], list[bool]]:
    """Per block, whether its input and its output carry a gradient, asked of autograd itself."""
    inputs: list[bool] = []
    outputs: list[bool] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        inputs.append(bool(hidden.requires_grad))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(bool(hidden.requires_grad))

    handles = []
    for block in classifier.backbone.blocks:
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    try:
        with torch.enable_grad():
            classifier.backbone(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


def frozen_depth(classifier: Classifier, pixels: Tensor) -> int:
    """How many blocks at the input end neither train nor have anything before them that does."""
    _, outputs = gradient_flow(classifier, pixels)
    return outputs.index(True) if True in outputs else len(outputs)

"""A backbone with a linear head: its forward passes, training mode, exact state, and cost of a step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from layerprobe.backbones.backbone import evaluating
from layerprobe.backbones.sharding import is_sharded, shard_beside
from layerprobe.errors import NotAvailableError, PlanError, UsageError
from layerprobe.files import tensor_digest
from layerprobe.plans.adapters import has_adapters, keep_adapters
from layerprobe.plans.names import is_expert
from layerprobe.training.config import derive_seed
from layerprobe.training.data import ImageTensors, row_batches

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone


class Classifier(nn.Module):
    """images B×C×H×W → logits B×K: the backbone, its pooling, and one linear layer.

    The head starts from N(0, 0.02²) and zero bias, drawn from `seed` alone.
    """

    backbone: Backbone

    def __init__(self, backbone: Backbone, n_classes: int, *, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.seed = seed
        self.head = nn.Linear(backbone.output_width, n_classes)
        draw = torch.Generator().manual_seed(derive_seed(seed, "head"))
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=draw) * 0.02)
            self.head.bias.zero_()
        self.head.to(device=next(backbone.parameters()).device)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.backbone.pool(self.backbone(pixels))
        return self.head(pooled.to(self.head.weight.dtype))


def shard(classifier: Classifier, device: torch.device) -> None:
    """Spread every parameter over all processes (PyTorch's FSDP2), block by block; in place.

    Not by accelerate, whose FSDP needs accelerators: this also runs on CPU processes. Frozen and trained
    parameters may be mixed in any way, inside a block too. UsageError for a single process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise UsageError(
            "--shard spreads the model over several processes; start them with: accelerate launch"
        )
    backbone = classifier.backbone
    if is_sharded(backbone.model):  # since it was loaded
        if has_adapters(backbone.model):
            raise UsageError(
                "a model that --shard spread takes no adapters; use a plan without them, or one process"
            )
        # FSDP warns that the stem's output is a view; nothing writes into it (gradients: test_sharded_loading.py).
        for part in (backbone.stem and backbone.stem.projection, classifier.head):
            if part is not None:
                shard_beside(part, backbone.model)
        return
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # One group per block, one for the head (it may have another dtype), one for all the rest.
    for module in [*backbone.blocks, classifier.head, classifier]:
        fully_shard(module, mesh=mesh)


def set_training(classifier: Classifier) -> None:
    """Training mode for each block, and for all that lies outside the blocks, where any parameter of it trains;
    evaluation mode (no dropout) for what is frozen."""
    backbone = classifier.backbone
    blocks = backbone.blocks
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    classifier.train(any(p.requires_grad and id(p) not in inside for p in backbone.parameters()))
    for block in blocks:
        block.train(any(parameter.requires_grad for parameter in block.parameters()))


@contextlib.contextmanager
def without_layerdrop(model: nn.Module) -> Iterator[None]:
    """Within: no block is skipped at random (LayerDrop), for a frozen one belongs to what the others learn from."""
    found: list[Any] = [module for module in model.modules() if getattr(module, "layerdrop", None)]
    rates = [module.layerdrop for module in found]
    for module in found:
        module.layerdrop = 0.0
    try:
        yield
    finally:
        for module, rate in zip(found, rates, strict=True):
            module.layerdrop = rate


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast where asked for, else nothing; NotAvailableError where the accelerator lacks it."""
    if precision == "float32":
        return contextlib.nullcontext()
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise NotAvailableError(f"{torch.cuda.get_device_name(device)} has no bfloat16; use --dtype float32")
    return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def in_batches(
    forward: Callable[[Tensor], Tensor], pixels: ImageTensors, *, device: torch.device, batch_size: int = 256
) -> Tensor:
    """`forward` of all images, batch by batch; the results stacked on the CPU."""
    batches = row_batches(len(pixels), batch_size)
    return torch.cat([forward(pixels[rows].to(device)).cpu() for rows in batches])


def predict(classifier: Classifier, pixels: ImageTensors, *, precision: str = "float32") -> np.ndarray:
    """The most likely class of every image, int64 n; without dropout or augmentation."""
    device = classifier.device
    size = 64 if device.type == "cpu" else 256  # larger activations leave a CPU's cache
    with evaluating(classifier), autocast(device, precision):
        found = in_batches(lambda x: classifier(x).argmax(1), pixels, device=device, batch_size=size)
    return found.numpy()


class Snapshot:
    """A backbone's exact state, held in memory, so that one loaded model can serve many runs.

    As a context manager it restores that state on the way out, also after an exception. Of the parameters `frozen`,
    names within the model that nothing will change, a model spread over processes keeps digests: copies would take as
    much memory as its part.
    """

    def __init__(self, backbone: nn.Module, *, frozen: Iterable[str] = ()) -> None:
        self._backbone = backbone
        self._put_adapters_back = keep_adapters(backbone)
        digested = {f"model.{name}" for name in frozen} if is_sharded(backbone) else set()
        self._tensors = {
            name: tensor_digest(tensor) if name in digested else tensor.detach().clone()
            for name, tensor in state_tensors(backbone).items()
        }
        self._trainable = {name: p.requires_grad for name, p in backbone.named_parameters()}
        self._modes = {name: module.training for name, module in backbone.named_modules()}

    def restore(self) -> None:
        """Put everything back and check every bit; PlanError where that fails. Adapters placed since are taken away."""
        self._put_adapters_back()
        state = state_tensors(self._backbone)
        if odd := sorted(state.keys() ^ self._tensors.keys()):
            raise PlanError(
                f"the backbone cannot be restored: it gained or lost {len(odd)} tensors ({odd[0]})"
            )
        with torch.no_grad():
            for name, tensor in state.items():
                if not isinstance(kept := self._tensors[name], str):
                    tensor.copy_(spread_like(tensor, kept))
        if wrong := [name for name, tensor in state.items() if not self._is_kept(name, tensor)]:
            raise PlanError(
                f"the backbone was not restored exactly: {len(wrong)} tensors differ ({wrong[0]})"
            )
        for name, parameter in self._backbone.named_parameters():
            parameter.requires_grad_(self._trainable[name])
            parameter.grad = None
        for name, module in self._backbone.named_modules():
            module.training = self._modes[name]

    def _is_kept(self, name: str, tensor: Tensor) -> bool:
        kept = self._tensors[name]
        if isinstance(kept, str):
            return tensor_digest(tensor) == kept
        return _same_bits(tensor, spread_like(tensor, kept))

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.restore()


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers by name, those that are not saved included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def whole(tensor: Tensor) -> Tensor:
    """The tensor; a sharded one on the CPU, gathered from all processes, which must all ask for it."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def spread_like(target: Tensor, tensor: Tensor) -> Tensor:
    """The whole `tensor`, as it is or, where `target` is sharded, this process's part of it."""
    if isinstance(target, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
    return tensor


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit-identical, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (a, b))
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


def gradient_flow(classifier: Classifier, pixels: Tensor) -> tuple[list[bool], list[bool]]:
    """Per block, whether its input and its output carry a gradient, asked of autograd itself."""
    inputs: list[bool] = []
    outputs: list[bool] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        inputs.append(hidden.requires_grad)
        outputs.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    blocks = classifier.backbone.blocks
    handles = [block.register_forward_hook(look, with_kwargs=True) for block in blocks]
    try:
        with torch.enable_grad():
            classifier.backbone(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


def training_flops(
    classifier: Classifier, shape: tuple[int, ...], batch_size: int, cached_depth: int = 0
) -> float:
    """Operations of one optimizer step in the blocks' matrix products: 2 per multiply-add.

    Per token and block with P matrix entries: 2P forward; 2P more for the gradient of its input where
    anything before the block trains; 2 per trained entry for the gradient of the weights. Attention adds
    4·T²·d per image and block forward (T tokens of width d), and twice that backward. Stem, head, norms and
    the optimizer are left out; they are the same for every plan. Of experts, those that a token is sent to count.
    A second forward pass of gradient checkpointing does not.

    `shape` is n×C×H×W; `cached_depth` blocks at the input end have their outputs kept, at no cost per step.
    """
    backbone = classifier.backbone
    sample = torch.zeros((1, *shape[1:]), device=classifier.device)
    with torch.no_grad():
        tokens = backbone(sample).shape[1]
    attention = 4.0 * tokens * tokens * backbone.hidden_size
    inputs, outputs = gradient_flow(classifier, sample)
    share = _active_experts(backbone.model.config)
    total = 0.0
    for index in range(cached_depth, backbone.n_blocks):
        entries = trained = 0.0
        for name, p in backbone.blocks[index].named_parameters():
            if p.ndim >= 2 and not name.endswith("bias"):
                used = p.numel() * (share if is_expert(name) else 1.0)
                entries, trained = entries + used, trained + used * p.requires_grad
        total += tokens * 2.0 * (entries * (1 + inputs[index]) + trained)
        total += attention * (1 + 2 * outputs[index])
    return total * batch_size


def _active_experts(config: object) -> float:
    """The share of its experts that a token is sent to; 1 where the configuration does not say."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    total = next((n for name in names if (n := getattr(config, name, None))), None)
    active = getattr(config, "num_experts_per_tok", None)
    return active / total if active and total else 1.0


@contextlib.contextmanager
def gradient_checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Within: activations inside the blocks are computed again instead of kept, where `on`."""
    if not on:
        yield
        return
    # Newer transformers have another name for it, which the oldest supported ones lack.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model.gradient_checkpointing_disable()

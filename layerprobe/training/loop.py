"""The training loop: one function that every stage runs, bridge, fine-tuning and plan values alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from layerprobe.errors import LayerprobeError, NotAvailableError, UsageError
from layerprobe.training.classifier import (
    PREFIX_BYTES,
    Classifier,
    Prefix,
    frozen_depth,
    set_training,
    trained_parameters,
)
from layerprobe.training.config import TrainConfig, derive_seed
from layerprobe.training.data import Batch, Order, Pixels, view
from layerprobe.training.relative import PER_BLOCK, RelativeRates
from layerprobe.training.sharding import full, gradients_stay_here

DIVERGED_WINDOW = 50
"""A run has diverged when its mean loss over this many steps is twice the loss of a uniform guess."""


class DivergedError(LayerprobeError):
    """Training left the finite numbers, or its loss stays far above that of a guess."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step was like, over all processes."""

    index: int
    """From 0."""
    loss: float
    """Mean cross-entropy in nats over the step's images."""
    accuracy: float
    """Share of the step's images whose label was the most likely one before the step."""
    lr: float
    grad_norm: float
    """Before clipping, over all trained parameters."""
    seconds: float


def make_accelerator(device: torch.device | str, **options: Any) -> Accelerator:
    """An Accelerator on `device`; under `accelerate launch` or `torchrun`, one of many processes.

    Precision is left to the loop's own autocast, so that one process may train in several precisions.
    """
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    if PartialState._shared_state and PartialState().num_processes == 1:
        # Accelerate remembers the first device of the process; a later model may live elsewhere.
        AcceleratorState._reset_state(reset_partial_state=True)
    # Tensors of a plan that this forward pass does not touch (token embeddings) get no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[unused], **options)
    if accelerator.num_processes == 1 and device.index not in (None, accelerator.device.index):
        torch.cuda.set_device(device)
    return accelerator


def make_optimizer(
    classifier: Classifier, config: TrainConfig, *, by_block: bool = False
) -> torch.optim.AdamW:
    """AdamW over exactly the trained parameters; no weight decay on norms, vectors and positions.

    With `by_block`, every block has parameter groups of its own (`layerprobe.training.relative`).

    Raises
    ------
    UsageError : nothing is left to train.
    """
    layout = classifier.backbone.layout
    positions = {name for name, group in layout.parameter_groups.items() if group == "positions"}
    spared = {f"backbone.model.{name}" for name in layout.norm_names | positions}
    places = {f"backbone.model.{name}": place for name, place in layout.parameter_groups.items()}
    found: dict[tuple[bool, str], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(classifier).items():
        plain = parameter.ndim < 2 or name in spared or name.endswith("cls_token")
        place = places.get(name, "")
        block = place if by_block and place.startswith("block.") else ""
        found.setdefault((plain, block), []).append(parameter)
    if not found:
        raise UsageError("nothing to train: the plan freezes the blocks, the stem and the head")
    groups: list[dict[str, Any]] = [
        {"params": found[key], "weight_decay": 0.0 if key[0] else config.weight_decay, PER_BLOCK: key[1]}
        for key in sorted(found)
    ]
    first = groups[0]["params"][0]
    fused = first.device.type in ("cpu", "cuda") and first.is_floating_point()
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast where asked for, else nothing.

    Raises
    ------
    NotAvailableError : the accelerator has no bfloat16.
    """
    if precision == "float32":
        return contextlib.nullcontext()
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise NotAvailableError(f"{torch.cuda.get_device_name(device)} has no bfloat16; use --dtype float32")
    return torch.autocast(device.type, dtype=torch.bfloat16)


def training_steps(
    model: nn.Module,
    optimizer: Any,
    pixels: Pixels,
    labels: np.ndarray,
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    n_steps: int,
    start: int = 0,
    flip: bool = False,
    prefix: Prefix | None = None,
    prepare_step: Callable[[int], Prefix | None] | None = None,
    relative: RelativeRates | None = None,
) -> Iterator[Step]:
    """Train `model` (a prepared `Classifier`) on `labels`, one optimizer step per item handed out.

    Everything random is a function of the seed and the step: a run that stops after step s and goes on
    from s+1 is bit for bit the run that never stopped. A step's images are the same for any number of
    processes; each process takes its part, and losses are summed, never averaged per process.

    Parameters
    ----------
    labels : int64, one per image of `pixels`.
    start : the first step to take; those before it were taken by an earlier run.
    prefix : kept outputs of a frozen prefix, see `Prefix`.
    prepare_step : called with the step's index before it begins; hands back the prefix to use.
    relative : gives every block a learning rate of its own, measured at the first step of an epoch; for runs
        that are not continued, since it is kept nowhere.

    Raises
    ------
    DivergedError : a loss or gradient that is not finite, or a loss that stays at twice a guess's.
    UsageError : fewer images in a step than there are processes.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    if config.batch_size < world:
        raise UsageError(f"batch size {config.batch_size} is smaller than the number of processes, {world}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = Order(len(pixels), pixels.shape, config, flip=flip)
    share = np.linspace(0, config.batch_size, world + 1).round().astype(int)
    guess = float(np.log(labels.max() + 1)) if len(labels) else 0.0
    recent: list[float] = []

    for step in range(start, n_steps):
        began = time.perf_counter()
        if prepare_step is not None:
            prefix = prepare_step(step)
        lr = config.rate(step, n_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        mine = order.batch(step).part(share[rank], share[rank + 1])
        pieces = list(mine.pieces(config.micro_batch))
        seen = torch.zeros(2, device=device)  # summed loss, number right

        for number, piece in enumerate(pieces):
            images, targets = _load(pixels, labels, piece, device)
            last = number == len(pieces) - 1
            with contextlib.ExitStack() as stack:
                if not last:
                    stack.enter_context(gradients_stay_here(accelerator, model))
                if prefix is not None:
                    stack.enter_context(prefix.used(piece.indices))
                # Dropout alone draws from torch's generator.
                _seed(derive_seed(config.seed, "dropout", step, rank, number), device)
                with autocast(device, config.precision):
                    logits = model(images)
                loss = cross_entropy(logits.float(), targets, reduction="sum")
                # Processes' gradients are averaged; times their number this is the mean over the step.
                accelerator.backward(loss * (world / config.batch_size))
            seen += torch.stack([loss.detach(), (logits.argmax(1) == targets).sum()])

        if relative is not None:
            if step == start or order.begins_epoch(step):
                relative.measure()
            relative.apply(lr)
        norm = _clip(accelerator, parameters, config.clip_norm)
        total = cast(Tensor, accelerator.reduce(seen, "sum")) if world > 1 else seen
        mean_loss, accuracy = (total / config.batch_size).tolist()
        norm = float(full(norm))
        if not (np.isfinite(mean_loss) and np.isfinite(norm)):
            raise DivergedError(
                f"step {step + 1} of {n_steps}: loss {mean_loss}, gradient norm {norm} at learning rate "
                f"{lr:.3g}; try a lower --lr"
            )
        recent = [*recent[1 - DIVERGED_WINDOW :], mean_loss]
        if len(recent) == DIVERGED_WINDOW and np.mean(recent) > 2 * max(guess, 0.5):
            raise DivergedError(
                f"step {step + 1} of {n_steps}: the mean loss of the last {DIVERGED_WINDOW} steps is "
                f"{np.mean(recent):.3g}, a guess has {guess:.3g}; the learning rate {config.lr:.3g} is too high"
            )
        optimizer.step()
        yield Step(step, mean_loss, accuracy, lr, norm, time.perf_counter() - began)


def _load(pixels: Pixels, labels: np.ndarray, piece: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    images = view(pixels[piece.indices], piece)
    return images.to(device), torch.from_numpy(labels[piece.indices]).to(device)


def _seed(seed: int, device: torch.device) -> None:
    if device.type == "cpu":
        # What torch.manual_seed does for the CPU, without its tour of all accelerators in every step.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _clip(accelerator: Accelerator, parameters: list[nn.Parameter], limit: float | None) -> Any:
    return accelerator.clip_grad_norm_(parameters, float("inf") if limit is None else limit)


def make_prefix(
    classifier: Classifier, pixels: Pixels, config: TrainConfig, *, device: torch.device
) -> Prefix | None:
    """The frozen prefix's outputs for all images, where that is sound and fits in memory; else None.

    Sound: no augmentation changes the images, and nothing that acts before the prefix's end trains.
    """
    if not config.cache_prefix or config.augment != "none" or config.compile:
        return None
    set_training(classifier)
    sample = pixels[np.arange(1)].to(device)
    depth = frozen_depth(classifier, sample)
    if depth == 0:
        return None
    with torch.no_grad():
        hidden = classifier.backbone(sample)
    if hidden.numel() * hidden.element_size() * len(pixels) > PREFIX_BYTES:
        return None
    prefix = Prefix(classifier, depth)
    with autocast(device, config.precision):
        prefix.fill(
            lambda rows: pixels[rows].to(device), len(pixels), config.micro_batch or config.batch_size
        )
    return prefix


@torch.no_grad()
def predict(
    classifier: Classifier, pixels: Pixels, *, batch_size: int | None = None, precision: str = "float32"
) -> np.ndarray:
    """The most likely class of every image, int64 n; without dropout or augmentation."""
    device = next(classifier.parameters()).device
    # On a CPU larger activations leave the cache.
    batch_size = batch_size or (64 if device.type == "cpu" else 256)
    modes = {module: module.training for module in classifier.modules()}
    classifier.eval()
    try:
        found = []
        for start in range(0, len(pixels), batch_size):
            rows = np.arange(start, min(start + batch_size, len(pixels)))
            with autocast(device, precision):
                logits = classifier(pixels[rows].to(device))
            found.append(logits.float().argmax(1).cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(found).numpy()


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """Leave torch's generators as they were: the loop reseeds them at every step."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield

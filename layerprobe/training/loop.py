"""The training loop of every stage (bridge, fine-tuning, trials), with its optimizer and its forward passes."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from layerprobe.backbones.backbone import evaluating
from layerprobe.errors import LayerprobeError, NotAvailableError, UsageError, stopped_by
from layerprobe.training.classifier import Classifier, autocast, gradient_flow, set_training, whole
from layerprobe.training.config import TrainConfig, derive_seed
from layerprobe.training.data import Batch, BatchSampler, ImageTensors, augmented, row_batches

DIVERGED_WINDOW = 50
"""A run has diverged when over the latest half of this many steps its mean loss is twice that of a uniform guess,
and no lower than over the half before: a head that starts from a probe may begin high and come down."""
PREFIX_BYTES = 4 << 30
"""Outputs of a frozen prefix are kept when they take no more memory than this."""
GROUP_BLOCK = "block"
"""Key of an optimizer's parameter group that names the block its parameters belong to, '' outside all."""
RATE_MULTIPLE = "rate_multiple"
"""Key of a parameter group's multiple of the learning rate: stem and head may learn faster than the blocks."""


class DivergedError(LayerprobeError):
    """Training left the finite numbers, or its loss stays far above that of a guess."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step, over all processes.

    `index` counts from 0; `loss` is the mean cross-entropy in nats and `accuracy` the share of right images
    before the step; `grad_norm` is taken before clipping.
    """

    index: int
    loss: float
    accuracy: float
    lr: float
    grad_norm: float
    seconds: float


def make_accelerator(device: torch.device | str, **options: Any) -> Accelerator:
    """An Accelerator on `device`, one of many under `accelerate launch`; precision is left to `autocast`."""
    device = torch.device(device)
    if PartialState._shared_state and PartialState().num_processes == 1:
        # Accelerate remembers the first device of the process; a later model may live elsewhere.
        AcceleratorState._reset_state(reset_partial_state=True)
    # Tensors of a plan that this forward pass does not touch (token embeddings) get no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[unused], **options
    )
    if accelerator.num_processes == 1 and device.index not in (None, accelerator.device.index):
        torch.cuda.set_device(device)
    return accelerator


def tracker_options(names: tuple[str, ...], folder: Path | None) -> dict[str, Any]:
    """Accelerate's arguments for trackers; one that is missing is an error."""
    if not names:
        return {}
    here = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if missing := [name for name in names if name not in here]:
        raise NotAvailableError(
            f"tracker '{missing[0]}' is not installed; installed: {', '.join(here) or 'none'} "
            "(history.csv is written in any case)"
        )
    if folder is None:
        raise UsageError("trackers write into the run folder; name one with -o")
    return {"log_with": list(names), "project_dir": folder}


def make_optimizer(
    classifier: Classifier, config: TrainConfig, *, by_block: bool = False
) -> torch.optim.AdamW:
    """AdamW over exactly the trained parameters; no weight decay on norms, vectors, biases, positions, tokens.

    With `by_block`, every block has parameter groups of its own (`BlockRates`). UsageError where nothing trains.
    """
    layout = classifier.backbone.layout
    groups = {f"backbone.model.{name}": group for name, group in layout.parameter_groups.items()}
    norms = {f"backbone.model.{name}" for name in layout.norm_names}
    multiples = {"head": config.head_lr, "stem": config.stem_lr}
    found: dict[tuple[bool, str, float], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            group = groups.get(name, "")
            undecayed = name in norms or group == "positions" or name.endswith(("bias", "_token", "_tokens"))
            block = group if by_block and group.startswith("block.") else ""
            part = name.removeprefix("backbone.").partition(".")[0]
            key = (parameter.ndim < 2 or undecayed, block, multiples.get(part, 1.0))
            found.setdefault(key, []).append(parameter)
    if not found:
        raise UsageError("nothing to train: the plan freezes the blocks, the stem and the head")
    options: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": 0.0 if undecayed else config.weight_decay,
            GROUP_BLOCK: block,
            RATE_MULTIPLE: multiple,
        }
        for (undecayed, block, multiple), parameters in sorted(found.items(), key=lambda item: item[0])
    ]
    first = options[0]["params"][0]
    fused = first.device.type in ("cpu", "cuda") and first.is_floating_point()
    return torch.optim.AdamW(options, lr=config.lr, fused=fused)


class BlockRates:
    """Auto-RGN: block b learns at ‖g_b‖/‖θ_b‖ ÷ (the largest such ratio of all blocks) of the learning rate.

    For an optimizer from `make_optimizer` with `by_block`. What lies outside the blocks learns at the full
    rate: stem and head are new, so their ratio says nothing about pretrained weights. Where the authors measure
    five batches before each epoch, forget Adam's moments, and have a ratio per tensor, here it is the epoch's
    first batch, the moments stay, and the ratio is the block's, the unit of a freeze plan.

    References
    ----------
    Lee et al., Surgical Fine-Tuning Improves Adaptation to Distribution Shifts, ICLR 2023, arXiv 2210.11466, section 4.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups: list[dict[str, Any]] = optimizer.param_groups
        self.shares: dict[str, float] = {}

    @torch.no_grad()
    def measure(self) -> None:
        """Take the shares from the gradients as they are now, before any clipping."""
        gradient: dict[str, float] = {}
        weight: dict[str, float] = {}
        for group in self._groups:
            if block := group[GROUP_BLOCK]:
                for p in group["params"]:
                    squared = 0.0 if p.grad is None else float(p.grad.double().square().sum())
                    gradient[block] = gradient.get(block, 0.0) + squared
                    weight[block] = weight.get(block, 0.0) + float(p.double().square().sum())
        ratio = {b: (gradient[b] / weight[b]) ** 0.5 if weight[b] else 0.0 for b in weight}
        largest = max(ratio.values(), default=0.0)
        self.shares = {block: value / largest if largest else 1.0 for block, value in ratio.items()}

    def apply(self, lr: float) -> None:
        """Set every group's learning rate for the coming step."""
        for group in self._groups:
            group["lr"] = lr * group[RATE_MULTIPLE] * self.shares.get(group[GROUP_BLOCK], 1.0)


def training_steps(
    model: nn.Module,
    optimizer: Optimizer,
    pixels: ImageTensors,
    labels: np.ndarray,
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    n_steps: int,
    start: int = 0,
    flip: bool = False,
    before_step: Callable[[int], FrozenPrefix | None] | None = None,
    block_rates: BlockRates | None = None,
) -> Iterator[Step]:
    """Train `model` (a prepared `Classifier`) on `labels`, one optimizer step per item handed out.

    Everything random is a function of the seed and the step: a run that stops after step s and goes on
    from s+1 is bit for bit the run that never stopped. A step's images are the same for any number of
    processes; each process takes its part, and losses are summed, never averaged per process.

    Parameters
    ----------
    labels : np.ndarray
        int64, one per image of `pixels`.
    start : int
        The first step to take; those before it were taken by an earlier run.
    before_step : Callable[[int], FrozenPrefix | None] | None
        Called with the step's index before it begins; hands back the prefix to use from then on.
    block_rates : BlockRates | None
        Measured at each epoch's first step; for runs that are not continued, since it is not saved.

    Raises
    ------
    DivergedError
        A loss or gradient that is not finite, or a loss that stays at twice a guess's.
    UsageError
        Fewer images in a step than there are processes.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    if config.batch_size < world:
        raise UsageError(f"batch size {config.batch_size} is smaller than the number of processes, {world}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sampler = BatchSampler(len(pixels), pixels.shape, config, flip=flip)
    share = np.linspace(0, config.batch_size, world + 1).round().astype(int)
    guess = float(np.log(labels.max() + 1))
    losses: list[float] = []
    for step in range(start, n_steps):
        began = time.perf_counter()
        prefix = before_step(step) if before_step is not None else None
        lr = config.rate(step, n_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group[RATE_MULTIPLE]
        optimizer.zero_grad()
        batch = sampler.batch(step).part(share[rank], share[rank + 1])
        sums = _accumulate_gradients(model, pixels, labels, batch, step, config, accelerator, prefix)
        if block_rates is not None:
            if step == start or sampler.begins_epoch(step):
                block_rates.measure()
            block_rates.apply(lr)
        limit = float("inf") if config.clip_norm is None else config.clip_norm
        norm = float(whole(accelerator.clip_grad_norm_(parameters, limit)))
        sums = cast(Tensor, accelerator.reduce(sums, "sum")) if world > 1 else sums
        loss, accuracy = (sums / config.batch_size).tolist()
        losses = [*losses[1 - DIVERGED_WINDOW :], loss]
        if found := _divergence(losses, norm, guess=guess, lr=lr, peak=config.lr):
            raise DivergedError(f"step {step + 1} of {n_steps}: {found}")
        optimizer.step()
        seconds = time.perf_counter() - began
        yield Step(index=step, loss=loss, accuracy=accuracy, lr=lr, grad_norm=norm, seconds=seconds)


def _accumulate_gradients(
    model: nn.Module,
    pixels: ImageTensors,
    labels: np.ndarray,
    batch: Batch,
    step: int,
    config: TrainConfig,
    accelerator: Accelerator,
    prefix: FrozenPrefix | None,
) -> Tensor:
    """Backward passes over the micro-batches of a process; the summed loss and the number of right images."""
    device, world = accelerator.device, accelerator.num_processes
    sums = torch.zeros(2, device=device)
    pieces = list(batch.pieces(config.micro_batch))
    for number, piece in enumerate(pieces):
        images = augmented(pixels[piece.indices], piece).to(device)
        targets = torch.from_numpy(labels[piece.indices]).to(device)
        with contextlib.ExitStack() as stack:
            if number < len(pieces) - 1:
                stack.enter_context(_no_gradient_sync(accelerator, model))
            if prefix is not None:
                stack.enter_context(prefix.used(piece.indices))
            # For dropout. On a CPU torch.manual_seed would visit every accelerator at every step.
            seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
            seed(derive_seed(config.seed, "dropout", step, accelerator.process_index, number))
            with autocast(device, config.precision):
                logits = model(images)
            smoothing = config.label_smoothing
            loss = cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
            # Processes' gradients are averaged; times their number this is the mean over the step.
            accelerator.backward(loss * (world / config.batch_size))
        sums += torch.stack([loss.detach(), (logits.argmax(1) == targets).sum()])
    return sums


def _divergence(losses: list[float], norm: float, *, guess: float, lr: float, peak: float) -> str | None:
    """What is wrong with the latest steps, if anything."""
    if not (np.isfinite(losses[-1]) and np.isfinite(norm)):
        return f"loss {losses[-1]}, gradient norm {norm} at learning rate {lr:.3g}; try a lower --lr"
    if len(losses) < DIVERGED_WINDOW:
        return None
    half = DIVERGED_WINDOW // 2
    before, latest = np.mean(losses[:half]), np.mean(losses[half:])
    if latest > 2 * max(guess, 0.5) and latest >= before:
        return (
            f"the mean loss of the last {half} steps is {latest:.3g} and does not fall, a guess has {guess:.3g}; "
            f"the learning rate {peak:.3g} is too high"
        )
    return None


@contextlib.contextmanager
def _no_gradient_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Within: a backward pass adds to this process's gradients and exchanges nothing."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not sharded:
        with accelerator.no_sync(model):
            yield
        return
    for module in sharded:
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_requires_gradient_sync(True, recurse=False)


class FrozenPrefix:
    """The outputs of the frozen blocks at the input end, computed once per image instead of once per step.

    Inside `used`, those blocks hand on the kept outputs of block `depth`-1; the model's own code does everything
    else. Made by `make_prefix`.
    """

    def __init__(self, classifier: Classifier, depth: int, pixels: ImageTensors, *, batch_size: int) -> None:
        self.depth = depth
        self._device = classifier.device
        self._blocks = classifier.backbone.blocks[:depth]
        self._n_outputs = 0
        self.kept = torch.empty(0)

        def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self._n_outputs = len(output) if isinstance(output, tuple) else 0
            hidden = output[0] if isinstance(output, tuple) else output
            if not len(self.kept):
                self.kept = torch.empty((len(pixels), *hidden.shape[1:]), dtype=hidden.dtype)
            self.kept[torch.from_numpy(rows)] = hidden.cpu()

        handle = self._blocks[-1].register_forward_hook(keep)
        try:
            for rows in row_batches(len(pixels), batch_size):
                classifier.backbone(pixels[rows].to(self._device))
        finally:
            handle.remove()

    @contextlib.contextmanager
    def used(self, indices: np.ndarray) -> Iterator[None]:
        """Within: a forward pass over the images `indices` takes the kept outputs."""
        hidden = self.kept[torch.as_tensor(indices)].to(self._device)
        output = (hidden, *(None,) * (self._n_outputs - 1)) if self._n_outputs else hidden
        for block in self._blocks:
            block.forward = lambda *_args, **_kwargs: output
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward


def make_prefix(classifier: Classifier, pixels: ImageTensors, config: TrainConfig) -> FrozenPrefix | None:
    """The frozen prefix's outputs for all images, where they fit in memory; None where augmentation, training or
    dropout before the prefix's end would change them, or later blocks need more of it (T5's position bias)."""
    if not config.cache_prefix or config.augment != "none" or config.compile:
        return None
    set_training(classifier)
    rows = np.arange(min(len(pixels), 2))
    few, sample = pixels.subset(rows), pixels[rows].to(classifier.device)
    _, outputs = gradient_flow(classifier, sample)
    depth = outputs.index(True) if True in outputs else len(outputs)
    if depth == 0 or classifier.backbone.layout.tokens_first:
        return None
    with torch.no_grad(), autocast(classifier.device, config.precision):
        in_training = FrozenPrefix(classifier, depth, few, batch_size=2).kept
        with evaluating(classifier):
            trial = FrozenPrefix(classifier, depth, few, batch_size=2)
            whole_model = classifier.backbone(sample)
            with trial.used(rows):
                same = torch.equal(classifier.backbone(sample), whole_model)
            fits = whole_model[0].nbytes * len(pixels) <= PREFIX_BYTES
            if not (fits and same and torch.equal(trial.kept, in_training)):
                return None
            return FrozenPrefix(classifier, depth, pixels, batch_size=config.micro_batch or config.batch_size)


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave torch's generators as they were: the loop reseeds them at every step."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Within: the first Ctrl-C or SIGTERM is noted and acted on between two steps, a second is immediate."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def remember(signum: int, _frame: object) -> None:
        if seen:
            raise stopped_by(signum)
        seen.append(signum)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

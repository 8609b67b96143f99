"""The settings of bridge training and fine-tuning, checked together before any work begins.

The published work does not state its number of random classes, epochs, learning rates or patch size. Each is
therefore an explicit setting with a default of our own, recorded with the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any, Self

from layerprobe.choices import AUGMENTATIONS, HEAD_STARTS, PRECISIONS, RANDOM_LABELS, SAVES
from layerprobe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training stage has in common.

    Parameters
    ----------
    lr : float
        Peak learning rate of AdamW, > 0.
    stem_lr, head_lr : float
        Multiples of `lr` at which stem and head learn: they are new, the blocks are not.
    steps : int | None
        Optimizer steps; None derives them from `epochs`.
    epochs : float
        Passes over the training images, fractions allowed; ignored when `steps` is set.
    batch_size : int
        Images per optimizer step, over all processes and accumulated micro-batches together.
    micro_batch : int | None
        Images per forward pass and process; None takes a process's whole share at once.
    warmup : float
        Share of the steps, in [0, 1), over which the rate climbs linearly to `lr`.
    final_lr : float
        Share of `lr` at which the cosine ends, in [0, 1].
    weight_decay : float
        Decoupled; matrices only, never norms, biases, positions, class or other tokens.
    clip_norm : float | None
        Largest gradient norm over all trained parameters; None leaves gradients alone.
    label_smoothing : float
        Share of the target spread evenly over all classes, in [0, 1).
    augment : str
        "weak" shifts by at most one pixel in 32 (at least one) and mirrors; "none".
    flip : bool | None
        Mirror left and right half of the time; None does so for colour images only, because digits and
        letters have a handedness.
    precision : str
        "float32", or "bfloat16" for autocast with float32 parameters.
    gradient_checkpointing : bool
        Trade a second forward pass of the trained blocks for memory.
    compile : bool
        Run the model through `torch.compile`.
    cache_prefix : bool
        Keep the outputs of a frozen prefix instead of computing them again, where nothing before it trains
        and `augment` is "none".
    seed : int
        Of labels, head, data order, augmentation and dropout.
    """

    lr: float = 1e-3
    stem_lr: float = 1.0
    head_lr: float = 1.0
    steps: int | None = None
    epochs: float = 10.0
    batch_size: int = 128
    micro_batch: int | None = None
    warmup: float = 0.1
    final_lr: float = 0.0
    weight_decay: float = 0.05
    clip_norm: float | None = 1.0
    label_smoothing: float = 0.0
    augment: str = "weak"
    flip: bool | None = None
    precision: str = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    cache_prefix: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        mistakes = [text for wrong, text in self._checks() if wrong]
        if mistakes:
            raise UsageError(f"{type(self).__name__}: " + "; ".join(mistakes))

    def _checks(self) -> list[tuple[bool, str]]:
        """(whether it is violated, what it says) per rule."""
        micro, clip = self.micro_batch, self.clip_norm
        augmentations, precisions = ", ".join(AUGMENTATIONS), ", ".join(PRECISIONS)
        return [
            (not _positive(self.lr), f"lr must be a positive number, not {self.lr}"),
            (not _positive(self.stem_lr), f"stem_lr must be a positive multiple, not {self.stem_lr}"),
            (not _positive(self.head_lr), f"head_lr must be a positive multiple, not {self.head_lr}"),
            (self.steps is not None and self.steps < 1, f"steps must be at least 1, not {self.steps}"),
            (not _positive(self.epochs), f"epochs must be positive, not {self.epochs}"),
            (self.batch_size < 1, f"batch_size must be at least 1, not {self.batch_size}"),
            (micro is not None and micro < 1, f"micro_batch must be at least 1, not {micro}"),
            (not 0 <= self.warmup < 1, f"warmup is a share of the steps in [0, 1), not {self.warmup}"),
            (not 0 <= self.final_lr <= 1, f"final_lr is a share of lr in [0, 1], not {self.final_lr}"),
            (self.weight_decay < 0, f"weight_decay must not be negative, not {self.weight_decay}"),
            (
                not 0 <= self.label_smoothing < 1,
                f"label_smoothing is a share in [0, 1), not {self.label_smoothing}",
            ),
            (clip is not None and clip <= 0, f"clip_norm must be positive or None, not {clip}"),
            (self.augment not in AUGMENTATIONS, f"augment is one of {augmentations}, not '{self.augment}'"),
            (self.precision not in PRECISIONS, f"precision is one of {precisions}, not '{self.precision}'"),
        ]

    def n_steps(self, n_images: int) -> int:
        """Optimizer steps for a training set of `n_images`."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * n_images / self.batch_size))

    def rate(self, step: int, n_steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of `n_steps`: linear warm-up, then a cosine.

        A function of the step alone, so a resumed run has no scheduler state to restore.

        >>> TrainConfig(lr=1.0, warmup=0.5).rate(0, 4), TrainConfig(lr=1.0, warmup=0.5).rate(1, 4)
        (0.5, 1.0)
        """
        climb = round(self.warmup * n_steps)
        if step < climb:
            return self.lr * (step + 1) / climb
        done = (step - climb) / max(1, n_steps - climb)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class BridgeConfig(TrainConfig):
    """Random-label training; adds to `TrainConfig`:

    Parameters
    ----------
    random_classes : int
        Number K ≥ 2 of random labels. Our own default: the published work does not say.
    random_labels : str
        "hash", a keyed hash of the image's id; or "complementary", never the true class, which then needs
        `random_classes` to be that of the task.
    label_seed : int | None
        Seed of the labels; None uses `seed`.
    lrs : tuple[float, ...]
        Candidate learning rates; with two or more, each trains for `lr_steps` and the one with the lowest
        random-label loss on unshifted training images is taken (random labels of *other* images cannot be
        predicted by any model).
    lr_steps : int | None
        Optimizer steps of each candidate; None takes a tenth of the run, at least 20.
    stem_steps : int
        Train stem and head alone for this many first steps, then head and blocks of the plan, the stem as it is.
        Candidates of `lrs` spend the same share of their steps so. For one process.
    checkpoint_every : int | None
        Optimizer steps between checkpoints; None makes ten over the run.
    keep : int
        Checkpoints kept, the newest.
    save : str
        "full" keeps whole models; "trained" what was trained, and the name and revision of the base model.
    shard : bool
        Spread the parameters over the processes (FSDP) instead of copying them to each (DDP).
    trackers : tuple[str, ...]
        Names of accelerate's trackers, such as "tensorboard" or "wandb".
    """

    random_classes: int = 10
    random_labels: str = "hash"
    label_seed: int | None = None
    lrs: tuple[float, ...] = ()
    lr_steps: int | None = None
    stem_steps: int = 0
    checkpoint_every: int | None = None
    keep: int = 2
    save: str = "full"
    shard: bool = False
    trackers: tuple[str, ...] = ()

    def _checks(self) -> list[tuple[bool, str]]:
        every, choosing = self.checkpoint_every, len(self.lrs) > 1
        return [
            *super()._checks(),
            (
                self.random_labels not in RANDOM_LABELS,
                f"random_labels is one of {', '.join(RANDOM_LABELS)}, not '{self.random_labels}'",
            ),
            (self.random_classes < 2, f"random_classes must be at least 2, not {self.random_classes}"),
            (not all(map(_positive, self.lrs)), f"lrs must be positive numbers, not {list(self.lrs)}"),
            (self.stem_steps < 0, f"stem_steps must not be negative, not {self.stem_steps}"),
            (every is not None and every < 1, f"checkpoint_every must be at least 1, not {every}"),
            (
                self.shard and self.stem_steps != 0,
                "stem_steps cannot go with shard: what trains must not change once it is sharded",
            ),
            (self.shard and choosing, "lrs cannot go with shard: choose the rate with one process first"),
            (self.keep < 1, f"keep must be at least 1, not {self.keep}"),
            (self.save not in SAVES, f"save is one of {', '.join(SAVES)}, not '{self.save}'"),
        ]


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(TrainConfig):
    """Supervised training on the task's own labels; adds to `TrainConfig`:

    Parameters
    ----------
    lrs : tuple[float, ...]
        Learning rates to choose from on validation; every arm chooses its own.
    shots : int | None
        Images per class for few-shot training; None uses all training images.
    head : str
        How the head starts: "random", or "probe", a logistic regression on the pooled features of the training images
        before any step (Kumar et al., Fine-Tuning Can Distort Pretrained Features, ICLR 2022, arXiv 2202.10054).
    """

    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    shots: int | None = None
    head: str = "random"

    def _checks(self) -> list[tuple[bool, str]]:
        usable = bool(self.lrs) and all(map(_positive, self.lrs))
        few = self.shots is not None and self.shots < 1
        return [
            *super()._checks(),
            (not usable, f"lrs must be one or more positive numbers, not {list(self.lrs)}"),
            (few, f"shots must be at least 1, not {self.shots}"),
            (self.head not in HEAD_STARTS, f"head is one of {', '.join(HEAD_STARTS)}, not '{self.head}'"),
        ]


def _positive(number: float) -> bool:
    return math.isfinite(number) and number > 0


def text_hash(text: str) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all `parts`: equal everywhere, unrelated for unequal parts.

    >>> derive_seed(0, "head") == derive_seed(0, "head"), derive_seed(0, "head") == derive_seed(1, "head")
    (True, False)
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

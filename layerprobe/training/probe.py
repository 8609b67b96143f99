"""Judging without training the backbone: a linear probe on its output, or the classifier it brought."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from layerprobe.errors import UsageError
from layerprobe.metrics.probing.logistic import select_probe
from layerprobe.training.data import Pixels


@torch.no_grad()
def output_features(backbone: Any, split: Any, *, batch_size: int = 256) -> np.ndarray:
    """Pooled features of the last hidden states, float64 n×d, without dropout."""
    pixels = Pixels(backbone, split)
    was_training = backbone.training
    backbone.eval()
    parts = []
    for start in range(0, len(pixels), batch_size):
        rows = np.arange(start, min(start + batch_size, len(pixels)))
        parts.append(backbone.features(pixels[rows].to(backbone.device)).double().cpu().numpy())
    backbone.train(was_training)
    return np.concatenate(parts)


def judge_probe(backbone: Any, task: Any) -> tuple[float, np.ndarray]:
    """Validation accuracy, and which test images a linear probe on the frozen output classifies right.

    `layerprobe.metrics.probing.logistic.select_probe`: logistic regression with its C chosen on validation.
    """
    train, validation, test = (
        (output_features(backbone, task.splits[name]), np.asarray(task.splits[name].labels))
        for name in ("train", "validation", "test")
    )
    found = select_probe(train, validation, test, task.n_classes)
    best = list(found.Cs).index(found.best_C)
    return float(found.val_accuracy[best]), found.correct


@torch.no_grad()
def judge_own_head(backbone: Any, task: Any) -> tuple[float, np.ndarray]:
    """Validation accuracy of the checkpoint's own classifier, and which test images it gets right.

    Classes are matched by name, else by index.

    Raises
    ------
    UsageError : the checkpoint has no classifier, or one of other classes.
    """
    found = []
    for name in ("validation", "test"):
        split = task.splits[name]
        pixels = Pixels(backbone, split)
        guesses = []
        for start in range(0, len(pixels), 256):
            rows = np.arange(start, min(start + 256, len(pixels)))
            guesses.append(backbone.own_logits(pixels[rows]).argmax(1).cpu().numpy())
        mapping = _class_map(backbone, task)
        found.append(mapping[np.concatenate(guesses)] == split.labels)
    return float(found[0].mean()), found[1]


def _class_map(backbone: Any, task: Any) -> np.ndarray:
    """Class of the checkpoint → class of the task."""
    names = [str(backbone.config.id2label[i]) for i in range(len(backbone.config.id2label))]
    theirs = [_plain(name) for name in names]
    ours = [_plain(name) for name in task.classes]
    if sorted(theirs) == sorted(ours):
        return np.array([ours.index(name) for name in theirs])
    unnamed = all(name == f"label{i}" or name == str(i) for i, name in enumerate(theirs))
    if unnamed and len(theirs) == len(ours):
        return np.arange(len(ours))
    raise UsageError(
        f"the classifier of {backbone.name} knows {len(names)} classes ({', '.join(names[:3])}, …), the task "
        f"{task.name} has {len(ours)} ({', '.join(task.classes[:3])}, …); fine-tune or probe it instead"
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())

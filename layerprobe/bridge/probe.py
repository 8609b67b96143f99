"""Judging without training the backbone: a linear probe on its output, or the classifier it brought."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from layerprobe.bridge.data import Pixels
from layerprobe.errors import UsageError

PROBE_C = tuple(float(10.0**power) for power in range(-5, 4))
"""Inverse L2 strengths to choose from on validation."""


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


def probe_accuracies(backbone: Any, task: Any) -> tuple[np.ndarray, np.ndarray]:
    """Which validation and which test images a linear probe on the frozen output classifies right.

    Multinomial logistic regression with L2 on features standardised by the training split, its strength
    chosen on validation; the test images are judged once, at that strength.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = {
        name: output_features(backbone, task.splits[name]) for name in ("train", "validation", "test")
    }
    best: tuple[float, Any, np.ndarray] | None = None
    for strength in PROBE_C:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        probe.fit(features["train"], task.splits["train"].labels)
        right = probe.predict(features["validation"]) == task.splits["validation"].labels
        if best is None or right.mean() > best[0]:
            best = (float(right.mean()), probe, right)
    assert best is not None
    return best[2], best[1].predict(features["test"]) == task.splits["test"].labels


@torch.no_grad()
def own_head_accuracies(backbone: Any, task: Any) -> tuple[np.ndarray, np.ndarray]:
    """Which images the checkpoint's own classifier gets right; classes are matched by name, else by index.

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
    return found[0], found[1]


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

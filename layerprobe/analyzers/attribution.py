"""Which blocks carry a visual prediction? Ablations, conductance of all blocks in one pass, patch-level maps.

The only module that imports captum, for the two methods that need a pass per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from layerprobe.analyzers.attribution_path import Ablation, Taps, mean_updates, path_conductance, refined
from layerprobe.analyzers.attribution_record import LayerAttribution, no_maps
from layerprobe.analyzers.heads import Classifier, make_classifier
from layerprobe.analyzers.trainability import only_these_train
from layerprobe.backbones.backbone import Backbone
from layerprobe.errors import LayerprobeError, UnknownNameError, UsageError
from layerprobe.layers import EMBED
from layerprobe.progress import progress_bar
from layerprobe.provenance import provenance
from layerprobe.tables import tidy
from layerprobe.tasks import ImageSplit, Task

METHODS = ("skip", "mean_ablation", "conductance", "update")
SLOW_METHODS = ("gradient_x_activation", "integrated_gradients")
REFUSED = {
    "deeplift": "its rules cover pointwise non-linearities, not softmax attention or LayerNorm, and its "
    "contributions miss f(x) − f(baseline) by 43 to 300 % on transformers",
    "lrp": "it has no propagation rule for LayerNorm or attention",
    "block_sum": "the sum of conductance or integrated gradients over a whole block is f(x) − f(baseline) for "
    "every block, because every block's output cuts the network; it ranks nothing",
}
"""Methods that are not offered, and why."""
FIRST_STEPS = 8


@dataclass
class _Found:
    """Per-image values of one metric at every place (B×places), collected batch by batch."""

    batches: list[np.ndarray] = field(default_factory=list)

    def add(self, values: Sequence[Tensor] | np.ndarray) -> None:
        if not isinstance(values, np.ndarray):
            values = np.stack([v.double().cpu().numpy() for v in values], axis=1)
        self.batches.append(values)

    @property
    def values(self) -> np.ndarray:
        return np.concatenate(self.batches)


def attribute_layers(
    backbone: Backbone,
    task: Task,
    *,
    methods: Sequence[str] = METHODS,
    head: str | nn.Module = "probe",
    split: str = "test",
    n_images: int = 128,
    n_maps: int = 6,
    n_reference: int = 256,
    tolerance: float = 0.02,
    max_steps: int = 512,
    batch_size: int = 32,
    seed: int = 0,
    quiet: bool = False,
) -> LayerAttribution:
    """How much each block contributes to the class that the backbone with a head predicts.

    f(x) is the logit of the predicted class minus the mean of all logits, so that a constant added to all
    classes changes nothing. The baseline of all paths is the mean training image (preprocessed): zero images are
    far from anything an RMSNorm model handles smoothly.

    Methods and the metrics they give (`attribution_<name>`, one row a block, ± standard error over images):

    - `skip`: f lost when the block hands on its input; and `skip_accuracy`, the share of images lost.
    - `mean_ablation`: the same when its update is replaced by the mean update per token; `mean_ablation_accuracy`.
    - `conductance`: mean |conductance| per unit of the block's output. Its plain sum would be the same for all.
    - `update`: conductance through what the block adds (output − input), in logits; the rest of
      f(x) − f(baseline) would pass the block unchanged.
    - `gradient_x_activation`, `integrated_gradients`: mean |·| per unit by captum, one pass per layer.

    Parameters
    ----------
    head : see `layerprobe.analyzers.heads.make_classifier`.
    split : where the images come from; the probe is fitted on train and chosen on validation.
    n_images : images to attribute. n_maps : the first so many get patch-level maps.
    n_reference : training images behind the mean image and the mean updates.
    tolerance : largest completeness error, Σ|Σconductance − (f(x) − f(baseline))| / Σ|f(x) − f(baseline)| over
        images, at the worst place. From 8 equal steps on, those with the largest error are halved until it holds
        for a few images with room to spare; where it fails for all of them, or would take more than `max_steps`,
        the path's rows stay empty and say so.

    Raises
    ------
    UsageError : a method that is invalid here (DeepLift, LRP, sums over blocks), too few images.
    UnknownNameError : a method or split that does not exist.
    """
    wanted = check_methods(methods)
    if split not in task.splits:
        raise UnknownNameError(f"unknown split '{split}'; choose one of: {', '.join(task.splits)}")
    check_sizes(n_images, tolerance, max_steps)
    classifier = make_classifier(backbone, task, head, batch_size=batch_size)
    images = task.splits[split].subset(range(min(n_images, len(task.splits[split]))))
    run = _Run(backbone, classifier, images, batch_size, quiet)
    with only_these_train(backbone, []):
        reference = task.train.subset(range(min(n_reference, len(task.train))))
        updates, mean_image = mean_updates(backbone, list(_pixel_batches(backbone, reference, batch_size)))
        run.predict()
        rows: list[dict[str, Any]] = []
        if "skip" in wanted:
            rows += run.ablations("skip", None)
        if "mean_ablation" in wanted:
            rows += run.ablations("mean_ablation", updates)
        n_steps, maps = 0, no_maps()
        if {"conductance", "update", *SLOW_METHODS} & set(wanted) or n_maps:
            found, n_steps, maps = run.path(wanted, mean_image, tolerance, max_steps, n_maps)
            rows += found
        for method in SLOW_METHODS:
            if method in wanted:
                rows += run.one_by_one(method, mean_image, n_steps)
    frame = tidy(
        rows,
        model=backbone.name if backbone.init == "pretrained" else f"{backbone.name} (random init)",
        revision=backbone.source.revision,
        task=task.name,
        split=split,
        n=len(images),
        seed=seed,
    )
    prediction = {
        **classifier.facts,
        "split": split,
        "n_images": len(images),
        "accuracy": float((run.targets.numpy() == images.labels).mean()),
        "n_steps": n_steps,
        "output": "logit of the predicted class minus the mean logit",
        "baseline": f"mean of {len(reference)} training images",
    }
    arguments = {
        "methods": wanted,
        "split": split,
        "n_images": n_images,
        "n_reference": n_reference,
        "tolerance": tolerance,
        "max_steps": max_steps,
        "seed": seed,
    }
    made = provenance(
        "attribute", arguments, backbone=backbone.describe(), task=task.describe(), prediction=prediction
    )
    pictures = dict(zip(images.ids[:n_maps], images.images(range(min(n_maps, len(images)))), strict=True))
    return LayerAttribution(frame, maps, pictures if not maps.empty else {}, made)


def check_sizes(n_images: int, tolerance: float, max_steps: int) -> None:
    """UsageError for numbers that `attribute_layers` cannot work with."""
    if n_images < 2 or not 0 < tolerance < 1 or max_steps < FIRST_STEPS:
        raise UsageError(
            f"attribution needs at least 2 images, a tolerance between 0 and 1 and max_steps ≥ {FIRST_STEPS}: got "
            f"n_images={n_images}, tolerance={tolerance}, max_steps={max_steps}"
        )


def check_methods(methods: Sequence[str]) -> list[str]:
    """The methods, each once; UnknownNameError or UsageError for one that is not offered here."""
    for method in methods:
        plain = method.lower().replace("-", "").replace("_", "")
        for name, reason in REFUSED.items():
            if plain.startswith((name.replace("_", ""), f"layer{name}")):
                raise UsageError(f"'{method}' is not valid for transformer blocks: {reason}")
        if method not in (*METHODS, *SLOW_METHODS):
            known = ", ".join((*METHODS, *SLOW_METHODS))
            raise UnknownNameError(f"unknown attribution method '{method}'; choose of: {known}")
    if not methods:
        raise UsageError(f"no attribution method was asked for; choose of: {', '.join(METHODS)}")
    return list(dict.fromkeys(methods))


def _pixel_batches(backbone: Backbone, split: ImageSplit, batch_size: int) -> Iterator[Tensor]:
    for start in range(0, len(split), batch_size):
        pixels = backbone.preprocess(split.images(range(start, min(start + batch_size, len(split)))))
        yield pixels.to(backbone.device)


class _Run:
    """One backbone, one head, one set of images: what all methods share."""

    def __init__(
        self, backbone: Backbone, classifier: Classifier, images: ImageSplit, batch_size: int, quiet: bool
    ) -> None:
        self.backbone, self.classifier, self.images = backbone, classifier, images
        self.batch_size, self.quiet = batch_size, quiet
        self.targets = torch.zeros(0, dtype=torch.int64)
        self.scores = torch.zeros(0)

    def batches(self, stop: int | None = None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        split = self.images if stop is None else self.images.subset(range(min(stop, len(self.images))))
        for number, pixels in enumerate(_pixel_batches(self.backbone, split, self.batch_size)):
            where = slice(number * self.batch_size, number * self.batch_size + len(pixels))
            yield where, pixels, self.targets[where].to(pixels.device)

    def score(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Logit of each image's target class minus the mean logit, B."""
        logits = self.classifier(pixels).float()
        return logits.gather(1, targets[:, None])[:, 0] - logits.mean(dim=1)

    @torch.no_grad()
    def predict(self) -> None:
        batches = _pixel_batches(self.backbone, self.images, self.batch_size)
        self.targets = torch.cat([self.classifier(pixels).argmax(dim=1).cpu() for pixels in batches])
        self.scores = torch.cat([self.score(p, t).cpu() for _, p, t in self.batches()])
        if not torch.isfinite(self.scores).all():
            raise LayerprobeError(
                f"logits of {self.backbone.name} are not finite; try --dtype bfloat16 or float32"
            )

    @torch.no_grad()
    def ablations(self, name: str, updates: list[Tensor] | None) -> list[dict[str, Any]]:
        labels = torch.from_numpy(self.images.labels)
        blocks = self.backbone.blocks
        lost, hits = _Found(), _Found()
        total = math.ceil(len(self.images) / self.batch_size)
        for where, pixels, targets in progress_bar(
            self.batches(), total=total, unit="batch", desc=name, quiet=self.quiet
        ):
            drops, misses = [], []
            for index, block in enumerate(blocks):
                with Ablation(block, None if updates is None else updates[index].to(pixels.device)):
                    logits = self.classifier(pixels).float()
                left = logits.gather(1, targets[:, None])[:, 0] - logits.mean(dim=1)
                drops.append(self.scores[where] - left.cpu())
                right = (self.targets[where] == labels[where]).float()
                misses.append(right - (logits.argmax(dim=1).cpu() == labels[where]).float())
            lost.add(drops)
            hits.add(misses)
        return _rows(f"attribution_{name}", lost.values) + _rows(f"attribution_{name}_accuracy", hits.values)

    def path(
        self, wanted: list[str], mean_image: Tensor, tolerance: float, max_steps: int, n_maps: int
    ) -> tuple[list[dict[str, Any]], int, pd.DataFrame]:
        alphas = self._steps(mean_image, tolerance, max_steps)
        per_unit, update, errors, maps = self._integrate(mean_image, alphas, n_maps)
        n_steps = len(alphas) - 1
        reason = None
        if errors.max() > tolerance:
            reason = (
                f"completeness error {100 * errors.max():.3g} % at {n_steps} steps exceeds "
                f"{100 * tolerance:.3g} %; raise max_steps"
            )
            maps = no_maps()
        rows: list[dict[str, Any]] = []
        if "conductance" in wanted:
            rows += _rows("attribution_conductance", per_unit[:, 1:], reason=reason, n_steps=n_steps)
        if "update" in wanted:
            rows += _rows("attribution_update", update, reason=reason, n_steps=n_steps)
        for place, error in enumerate(errors):
            block = place - 1 if place else None
            site = "resid_post" if place else EMBED
            row = {
                "block": block,
                "site": site,
                "metric": "attribution_completeness_error",
                "value": float(error),
            }
            rows.append({**row, "n_steps": n_steps})
        return rows, n_steps, maps

    def _steps(self, mean_image: Tensor, tolerance: float, max_steps: int) -> list[float]:
        """Steps that keep the completeness error of a few images within half of `tolerance`.

        They stand close where the error arises, usually near the baseline, and far apart elsewhere.
        """
        _, pixels, targets = next(self.batches(min(16, self.batch_size)))
        alphas = np.linspace(0.0, 1.0, FIRST_STEPS + 1).tolist()
        while True:
            with Taps(self.backbone) as taps, torch.enable_grad():
                found = path_conductance(
                    partial(self.score, targets=targets),
                    taps,
                    pixels,
                    mean_image.to(pixels),
                    alphas,
                    with_step_errors=True,
                )
            missed, moved = _completeness(found.conductance, found.end - found.start)
            if missed.max() <= tolerance / 2 * moved or len(alphas) > max_steps:
                return alphas
            assert found.step_errors is not None
            steps = found.step_errors.tolist()
            finer = refined(alphas, steps, tolerance / 2 * moved / len(steps))
            if len(finer) - 1 > max_steps:
                return alphas
            alphas = finer

    def _integrate(
        self, mean_image: Tensor, alphas: list[float], n_maps: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, pd.DataFrame]:
        """Mean |conductance| per unit (B×places), update (B×blocks), completeness error (places), maps."""
        per_unit, update = _Found(), _Found()
        missed, moved = np.zeros(self.backbone.n_blocks + 1), 0.0
        maps: list[pd.DataFrame] = []
        total = math.ceil(len(self.images) / self.batch_size)
        with Taps(self.backbone) as taps, torch.enable_grad():
            for where, pixels, targets in progress_bar(
                self.batches(), total=total, unit="batch", desc=f"{len(alphas) - 1} steps", quiet=self.quiet
            ):
                score = partial(self.score, targets=targets)
                found = path_conductance(score, taps, pixels, mean_image.to(pixels), alphas)
                per_unit.add([c.abs().mean(dim=(1, 2)) for c in found.conductance])
                update.add([u.sum(dim=1) for u in found.update])
                part, change = _completeness(found.conductance, found.end - found.start)
                missed, moved = missed + part, moved + change
                if where.start < n_maps:
                    maps += self._maps(where, found.conductance[0].sum(dim=2), found.update, n_maps)
        errors = missed / moved if moved else np.full_like(missed, np.inf)
        return per_unit.values, update.values, errors, pd.concat(maps) if maps else no_maps()

    def _maps(self, where: slice, embed: Tensor, updates: list[Tensor], n_maps: int) -> list[pd.DataFrame]:
        """Token values of the first images as square maps; class and register tokens are left out."""
        n_tokens = embed.shape[1]
        prefix = self.backbone.n_prefix(n_tokens)
        side = math.isqrt(n_tokens - prefix)
        if side * side != n_tokens - prefix:
            return []
        rows, columns = (axis.ravel() for axis in np.indices((side, side)))
        frames = []
        for image in range(min(n_maps - where.start, len(embed))):
            position = where.start + image
            for block, values in enumerate([embed, *updates], start=-1):
                frames.append(
                    pd.DataFrame(
                        {
                            "image": self.images.ids[position],
                            "label": int(self.images.labels[position]),
                            "prediction": int(self.targets[position]),
                            "block": pd.array([None if block < 0 else block] * len(rows), dtype="Int64"),
                            "row": rows,
                            "column": columns,
                            "value": values[image, prefix:].double().cpu().numpy(),
                        }
                    )
                )
        return frames

    def one_by_one(self, method: str, mean_image: Tensor, n_steps: int) -> list[dict[str, Any]]:
        """Mean |attribution| per unit by captum, layer after layer."""
        from captum.attr import LayerGradientXActivation, LayerIntegratedGradients

        found = _Found()
        with Taps(self.backbone) as taps, torch.enable_grad():
            for _, pixels, targets in progress_bar(
                self.batches(), unit="batch", desc=method, quiet=self.quiet
            ):
                start = mean_image.to(pixels).expand_as(pixels)
                per_block = []
                for tap in taps.modules[1:]:
                    attribute: Callable[..., Any]
                    if method == "gradient_x_activation":
                        attribute = LayerGradientXActivation(self.score, tap).attribute
                        values = attribute(
                            pixels.clone().requires_grad_(), additional_forward_args=(targets,)
                        )
                    else:
                        attribute = LayerIntegratedGradients(self.score, tap).attribute
                        values = attribute(
                            pixels.clone().requires_grad_(),
                            baselines=start,
                            additional_forward_args=(targets,),
                            n_steps=n_steps,
                            internal_batch_size=max(len(pixels), 2 * self.batch_size),
                        )
                    per_block.append(values.detach().abs().mean(dim=(1, 2)))
                found.add(per_block)
        return _rows(f"attribution_{method}", found.values)


def _completeness(conductance: list[Tensor], change: Tensor) -> tuple[np.ndarray, float]:
    """Σ over images of |Σ conductance − change| per place, and of |change|."""
    sums = torch.stack([c.double().sum(dim=(1, 2)) for c in conductance], dim=1)
    missed = (sums - change.double()[:, None]).abs().sum(dim=0)
    return missed.cpu().numpy(), float(change.double().abs().sum())


def _rows(
    metric: str, values: np.ndarray, *, reason: str | None = None, n_steps: int | None = None
) -> list[dict[str, Any]]:
    """One row a block from per-image values B×L: mean and standard error."""
    means, errors = values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))
    rows = []
    for block, (mean, error) in enumerate(zip(means, errors, strict=True)):
        row = {"block": block, "site": "resid_post", "metric": metric, "n_steps": n_steps, "reason": reason}
        shown = {"value": None, "stderr": None} if reason else {"value": float(mean), "stderr": float(error)}
        rows.append({**row, **shown})
    return rows

"""Which blocks carry a visual prediction? Ablations, conductance of all blocks in one pass, patch-level maps.

The only module that imports captum, for the two methods that need a pass per layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from layerprobe.analyzers.attribution_choices import METHODS, SLOW_METHODS, check_methods, check_sizes
from layerprobe.analyzers.attribution_path import (
    ablated,
    adaptive_steps,
    completeness,
    mean_updates,
    path_conductance,
    residual_taps,
)
from layerprobe.analyzers.attribution_rows import (
    COMPLETENESS,
    block_rows,
    completeness_rows,
    large_errors,
    per_image,
)
from layerprobe.analyzers.extraction import pixel_batches
from layerprobe.analyzers.features import columns_of, rows_of_metric
from layerprobe.analyzers.heads import Predictor, make_predictor, only_these_train
from layerprobe.analyzers.leader import best_row, lead_in_words
from layerprobe.backbones.backbone import Backbone
from layerprobe.errors import LayerprobeError, UnknownNameError
from layerprobe.progress import note, progress_bar
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.shared_work import Result, SharedWork
from layerprobe.tables import table_by_layer, tidy
from layerprobe.tasks import ImageSplit, Task

MAP_COLUMNS = ["image", "label", "prediction", "block", "row", "column", "value"]


@dataclass(repr=False, kw_only=True)
class LayerAttribution(Record):
    """Importance of every block for the predicted class, and patch-level maps of a few images.

    `gap_to_best` is how far a block is behind the largest of its metric; `gap_low` and `gap_high` are the paired 95 %
    interval over the same images. `maps` is long: image, label, prediction, block (empty for `embed`), row, column,
    value. The map of `embed` splits f(x) − f(baseline) over the patches; the map of a block says where what it adds
    comes to matter.
    """

    command: ClassVar[str] = "attribute"

    frame: pd.DataFrame
    maps: pd.DataFrame
    pictures: dict[str, np.ndarray]
    provenance: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        return self.frame.copy()

    def metric(self, name: str) -> pd.DataFrame:
        """The rows of one metric ("skip" or "attribution_skip")."""
        return rows_of_metric(self.frame, name, prefix="attribution_", what="attribution")

    def table(self) -> list[dict[str, Any]]:
        """One row a block, one column a metric."""
        rows = self.frame[self.frame["block"].notna() & ~self.frame["metric"].isin(list(COMPLETENESS))]
        return table_by_layer(rows, rows["block"].astype(int).tolist(), key="block", prefix="attribution_")

    def extra_tables(self) -> dict[str, pd.DataFrame]:
        return {} if self.maps.empty else {"attribution_maps": self.maps}

    def summary(self) -> str:
        facts = self.provenance["prediction"]
        metrics = set(self.frame["metric"])
        parts = []
        for name, words in (
            ("skip", "Skipping {}"),
            ("mean_ablation", "Replacing the update of {} by its mean"),
        ):
            if f"attribution_{name}" not in metrics:
                continue
            rows = self.metric(name)
            top = best_row(rows)
            lost = float(self.metric(f"{name}_accuracy_lost").set_index("block")["value"][top["block"]])
            parts.append(
                f"{words.format(_block(top))} costs most{lead_in_words(rows, top, _block)}: the predicted class loses "
                f"{top['value']:.3g} ± {top['stderr']:.2g} logits, accuracy {100 * lost:.1f} points."
            )
        for name, what in COMPLETENESS.items():
            if name in metrics:
                worst = float(self.frame.loc[self.frame["metric"] == name, "value"].astype(float).max())
                parts.append(
                    f"Completeness error of {what}: {100 * worst:.2g} % at {int(facts['n_steps'])} steps."
                )
        parts.append(
            f"{facts['n_images']} {facts['split']} images, accuracy {100 * facts['accuracy']:.1f} %, "
            f"head: {facts['head']}" + (f" (C = {facts['C']:g})" if facts.get("C") else "") + "."
        )
        return " ".join(parts)


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
    work: SharedWork | None = None,
) -> LayerAttribution:
    """How much each block contributes to the class that the backbone with a head predicts.

    f(x) is the logit of the predicted class minus the mean of all logits. The baseline of all paths is the mean
    training image (preprocessed): zero images are far from anything an RMSNorm model handles smoothly.

    Methods and the metrics they give (`attribution_<name>`, one row a block, ± standard error over images):

    - `skip`: f lost when the block hands on its input; `skip_accuracy_lost`: the share of images lost.
    - `mean_ablation`, `mean_ablation_accuracy_lost`: the same when its update is replaced by the mean one per token.
    - `conductance`: mean |conductance| per unit of the block's output. Its plain sum would be the same for all.
    - `update`: conductance through what the block adds (output − input), in logits; the rest of
      f(x) − f(baseline) would pass the block unchanged.
    - `gradient_x_activation`, `integrated_gradients`: mean |·| per unit by captum, one pass per layer.
    - `completeness_error` of the path, `integrated_gradients_completeness_error`: at each place,
      Σ|Σ attributions − (f(x) − f(baseline))| / Σ|f(x) − f(baseline)| over images; a remark tells one above 5 %.

    Parameters
    ----------
    head : str | nn.Module
        See `layerprobe.analyzers.heads.make_predictor`.
    split : str
        Where the images come from; the probe is fitted on train and chosen on validation.
    n_images, n_maps, n_reference : int
        Images to attribute, those with patch-level maps, and training images behind the mean image and updates.
    tolerance : float
        Largest completeness error of the path, at the worst place. Steps are halved until it holds; where that would
        take more than `max_steps`, the path's rows stay empty and say so. Integrated gradients take as many steps.
    work : SharedWork | None
        Through which several processes that make this very call share the batches.

    Raises
    ------
    UsageError, UnknownNameError
        A method that is invalid here (DeepLift, LRP, sums over blocks) or unknown, an unknown split, too few images.
    """
    wanted = check_methods(methods)
    if split not in task.splits:
        raise UnknownNameError(f"unknown split '{split}'; choose one of: {', '.join(task.splits)}")
    check_sizes(n_images, tolerance, max_steps)
    predictor = make_predictor(backbone, task, head, batch_size=batch_size)
    images, reference = _first(task.splits[split], n_images), _first(task.train, n_reference)
    with only_these_train(backbone, []):
        run = _Run(predictor, images, batch_size, quiet, work)
        rows, n_steps, maps = run.measure(wanted, reference, tolerance, max_steps, n_maps)
    prediction = {
        **predictor.facts,
        "split": split,
        "n_images": len(images),
        "accuracy": float((run.targets.numpy() == images.labels).mean()),
        "n_steps": n_steps,
        "output": "logit of the predicted class minus the mean logit",
        "baseline": f"mean of {len(reference)} training images",
    }
    sizes = {"n_images": n_images, "n_reference": n_reference, "tolerance": tolerance, "max_steps": max_steps}
    arguments = {"methods": wanted, "split": split, **sizes, "seed": seed}
    described = {"backbone": backbone.provenance(), "task": task.describe(), "prediction": prediction}
    n_maps = 0 if maps.empty else min(n_maps, len(images))
    return LayerAttribution(
        frame=tidy(rows, **columns_of(backbone, task), split=split, n=len(images), seed=seed),
        maps=maps,
        pictures=dict(zip(images.ids[:n_maps], images.images(range(n_maps)), strict=True)),
        provenance=provenance("attribute", arguments, **described),
    )


def _block(row: pd.Series) -> str:
    return f"block {int(row['block'])}"


def _first(split: ImageSplit, n: int) -> ImageSplit:
    return split.subset(range(min(n, len(split))))


class _Run:
    """One backbone, one head, one set of images: what all methods share.

    `targets` are the predicted classes, `scores` the f(x) of all images.
    """

    def __init__(
        self, predictor: Predictor, images: ImageSplit, batch_size: int, quiet: bool, work: SharedWork | None
    ) -> None:
        self.predictor, self.backbone, self.images = predictor, predictor.backbone, images
        self.batch_size, self.quiet, self.work = batch_size, quiet, work
        with torch.no_grad():
            batches = pixel_batches(self.backbone, images, batch_size)
            logits = [self.predictor(pixels).float() for _, pixels in batches]
        self.targets = torch.cat([batch.argmax(dim=1).cpu() for batch in logits])
        self.scores = torch.cat([_margin(batch, batch.argmax(dim=1)).cpu() for batch in logits])
        if not torch.isfinite(self.scores).all():
            raise LayerprobeError(
                f"logits of {self.backbone.name} are not finite; try --dtype bfloat16 or float32"
            )

    def of_batches(self, what: str, compute: Callable[[slice, Tensor, Tensor], Result]) -> list[Result]:
        """`compute` of the rows, pixels and target classes of every batch, under a progress bar."""
        size = self.batch_size
        total = math.ceil(len(self.images) / size)

        def piece(number: int) -> Result:
            part = self.images.subset(range(number * size, min((number + 1) * size, len(self.images))))
            _, pixels = next(pixel_batches(self.backbone, part, size))
            rows = slice(number * size, number * size + len(part))
            return compute(rows, pixels, self.targets[rows].to(pixels.device))

        shown: dict[str, Any] = {"unit": "batch", "quiet": self.quiet}
        if self.work is not None:
            return self.work.results(total, piece, what=what, **shown)
        batches = pixel_batches(self.backbone, self.images, size)
        return [
            compute(rows, pixels, self.targets[rows].to(pixels.device))
            for rows, pixels in progress_bar(batches, total=total, desc=what, **shown)
        ]

    def score(self, pixels: Tensor, targets: Tensor) -> Tensor:
        return _margin(self.predictor(pixels).float(), targets)

    def measure(
        self, wanted: list[str], reference: ImageSplit, tolerance: float, max_steps: int, n_maps: int
    ) -> tuple[list[dict[str, Any]], int, pd.DataFrame]:
        """Rows of all methods, the number of steps of the path, and the maps."""
        batches = pixel_batches(self.backbone, reference, self.batch_size)
        updates, mean_image = mean_updates(self.backbone, (pixels for _, pixels in batches))
        rows: list[dict[str, Any]] = []
        if "skip" in wanted:
            rows += self.ablations("skip", [None] * len(updates))
        if "mean_ablation" in wanted:
            rows += self.ablations("mean_ablation", updates)
        n_steps, maps = 0, pd.DataFrame(columns=MAP_COLUMNS)
        if {"conductance", "update", *SLOW_METHODS} & set(wanted) or n_maps:
            few = self.images.subset(range(min(16, self.batch_size, len(self.images))))
            shown, pixels = next(pixel_batches(self.backbone, few, self.batch_size))
            score = partial(self.score, targets=self.targets[shown].to(pixels.device))
            with residual_taps(self.backbone) as taps:
                alphas = adaptive_steps(score, taps, pixels, mean_image, tolerance / 2, max_steps)
            found, maps = self.path(wanted, mean_image, alphas, tolerance, n_maps)
            rows, n_steps = rows + found, len(alphas) - 1
        for method in SLOW_METHODS:
            if method in wanted:
                rows += self.one_by_one(method, mean_image, n_steps)
        for line in () if self.quiet else large_errors(rows):
            note(line)
        return rows, n_steps, maps

    @torch.no_grad()
    def ablations(self, name: str, updates: Sequence[Tensor | None]) -> list[dict[str, Any]]:
        labels = torch.from_numpy(self.images.labels)

        def losses(rows: slice, pixels: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
            right = (self.targets[rows] == labels[rows]).float()
            found = []
            for block, update in zip(self.backbone.blocks, updates, strict=True):
                with ablated(block, None if update is None else update.to(pixels.device)):
                    logits = self.predictor(pixels).float()
                missed = right - (logits.argmax(dim=1).cpu() == labels[rows]).float()
                found.append((self.scores[rows] - _margin(logits, targets).cpu(), missed))
            return found

        lost, misses = zip(*itertools.chain.from_iterable(self.of_batches(name, losses)), strict=True)
        n_blocks = len(updates)
        return [
            *block_rows(f"attribution_{name}", per_image(lost, n_blocks)),
            *block_rows(f"attribution_{name}_accuracy_lost", per_image(misses, n_blocks)),
        ]

    def path(
        self, wanted: list[str], mean_image: Tensor, alphas: list[float], tolerance: float, n_maps: int
    ) -> tuple[list[dict[str, Any]], pd.DataFrame]:
        """Rows of the path methods with their completeness errors, and the maps."""
        n_places, n_steps = self.backbone.n_blocks + 1, len(alphas) - 1

        def along(rows: slice, pixels: Tensor, targets: Tensor) -> tuple[Any, ...]:
            score = partial(self.score, targets=targets)
            found = path_conductance(score, taps, pixels, mean_image.to(pixels), alphas)
            places = [found.conductance[0].sum(dim=2), *found.update]
            return (
                [c.abs().mean(dim=(1, 2)).cpu() for c in found.conductance],
                [u.sum(dim=1).cpu() for u in found.update],
                completeness(found),
                self._maps(range(rows.start, min(rows.stop, n_maps)), places),
            )

        with residual_taps(self.backbone) as taps:
            parts = self.of_batches(f"{n_steps} steps", along)
        per_unit, update = ([values for part in parts for values in part[i]] for i in (0, 1))
        missed, moved = (sum(part[2][i] for part in parts) for i in (0, 1))
        maps = [pd.DataFrame(columns=MAP_COLUMNS), *(drawn for part in parts for drawn in part[3])]
        errors = completeness_rows("attribution_completeness_error", missed, moved, n_steps, first=-1)
        worst = max(row["value"] for row in errors)
        reason = None
        if worst > tolerance:
            reason = (
                f"completeness error {100 * worst:.3g} % at {n_steps} steps exceeds "
                f"{100 * tolerance:.3g} %; raise max_steps"
            )
            maps = maps[:1]
        result: list[dict[str, Any]] = []
        for name, values in (
            ("conductance", per_image(per_unit, n_places)[:, 1:]),
            ("update", per_image(update, n_places - 1)),
        ):
            if name in wanted:
                result += block_rows(f"attribution_{name}", values, reason=reason, n_steps=n_steps)
        result += errors
        return result, pd.concat(maps[1:]) if maps[1:] else maps[0]

    def _maps(self, images: range, places: list[Tensor]) -> list[pd.DataFrame]:
        """Token values (B×T per place) of some images as square maps, without class and register tokens."""
        n_tokens = places[0].shape[1]
        prefix = self.backbone.n_prefix(n_tokens)
        side = math.isqrt(n_tokens - prefix)
        if side * side != n_tokens - prefix:
            return []
        rows, columns = (axis.ravel() for axis in np.indices((side, side)))
        return [
            pd.DataFrame(
                {
                    "image": self.images.ids[image],
                    "label": int(self.images.labels[image]),
                    "prediction": int(self.targets[image]),
                    "block": pd.array([None if block < 0 else block] * len(rows), dtype="Int64"),
                    "row": rows,
                    "column": columns,
                    "value": values[image - images.start, prefix:].double().cpu().numpy(),
                }
            )
            for image in images
            for block, values in enumerate(places, start=-1)
        ]

    def one_by_one(self, method: str, mean_image: Tensor, n_steps: int) -> list[dict[str, Any]]:
        """Mean |attribution| per unit by captum, layer after layer."""
        from captum.attr import LayerGradientXActivation, LayerIntegratedGradients

        def attributed(
            rows: slice, pixels: Tensor, targets: Tensor
        ) -> tuple[list[Tensor], np.ndarray, float]:
            inputs = pixels.clone().requires_grad_()
            options: dict[str, Any] = {"additional_forward_args": (targets,)}
            of: type[Any] = LayerGradientXActivation
            if method == "integrated_gradients":
                of = LayerIntegratedGradients
                options |= {"baselines": mean_image.to(pixels).expand_as(pixels), "n_steps": n_steps}
                options["internal_batch_size"] = max(len(pixels), 2 * self.batch_size)
            with torch.no_grad():
                baseline = self.predictor(mean_image[None].to(pixels)).float()
            change = (self.scores[rows] - _margin(baseline.expand(len(pixels), -1), targets).cpu()).double()
            per_unit, missed = [], []
            for tap in taps[1:]:
                values = of(self.score, tap).attribute(inputs, **options).detach()
                per_unit.append(values.abs().mean(dim=(1, 2)).cpu())
                missed.append(float((values.double().sum(dim=(1, 2)).cpu() - change).abs().sum()))
            return per_unit, np.array(missed), float(change.abs().sum())

        with residual_taps(self.backbone) as taps:
            parts = self.of_batches(method, attributed)
        per_unit = per_image([values for part in parts for values in part[0]], self.backbone.n_blocks)
        rows = block_rows(f"attribution_{method}", per_unit)
        if method == "integrated_gradients":
            missed, moved = np.sum([part[1] for part in parts], axis=0), sum(part[2] for part in parts)
            rows += completeness_rows(f"attribution_{method}_completeness_error", missed, moved, n_steps)
        return rows


def _margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Logit of each image's target class minus the mean logit, B."""
    return logits.gather(1, targets[:, None])[:, 0] - logits.mean(dim=1)

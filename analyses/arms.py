"""Arms of a training, each at a learning rate of its own, trained with every seed and compared pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from study import Answer, short

from layerprobe.metrics.inference import PooledArms, holm


class Arms:
    """The arms of one model on one task.

    Attributes
    ----------
    rates : arm → its own learning rate.
    outcomes : arm → seed → `Outcome.to_dict` at that rate.
    rows : two table rows a training, its validation and its test accuracy.
    """

    def __init__(self, model: str, task: str, n_images: int) -> None:
        self.model, self.task, self.n_images = short(model), short(task), n_images
        self.rates: dict[str, float] = {}
        self.outcomes: dict[str, dict[int, dict[str, Any]]] = {}
        self.rows: list[dict[str, Any]] = []

    def train(
        self,
        arm: str,
        one: Callable[[float, int], dict[str, Any]],
        lrs: Sequence[float],
        seeds: Sequence[int],
        *,
        most: int,
        **about: Any,
    ) -> None:
        """Find the rate of `arm` that is best on validation with the first seed; train there with the others.

        The grid grows by factors of three while the best lies at an edge, to at most `most` rates. `one` trains at a
        rate and with a seed, and gives `Outcome.to_dict`; `about` are further columns of the table.
        """
        first, *others = seeds
        tried = {lr: one(lr, first) for lr in lrs}
        while True:
            best = max(tried, key=lambda lr: tried[lr]["validation_accuracy"] or 0.0)
            beyond = {max(tried): 3 * best, min(tried): best / 3}.get(best)
            if beyond is None or len(tried) >= most:
                break
            beyond = float(f"{beyond:.1g}")
            tried[beyond] = one(beyond, first)
        self.rates[arm] = best
        self.outcomes[arm] = {first: tried[best]} | {seed: one(best, seed) for seed in others}
        trained = [(lr, first, outcome) for lr, outcome in tried.items()]
        trained += [(best, seed, self.outcomes[arm][seed]) for seed in others]
        self.rows += [
            {
                "metric": f"{split}_accuracy",
                "split": split,
                "value": outcome[f"{split}_accuracy"],
                "n": outcome[f"n_{split}"],
                "model": self.model,
                "task": self.task,
                "arm": arm,
                **about,
                "lr": lr,
                "seed": seed,
                "own": lr == best,
                "reason": outcome["reason"],
            }
            for lr, seed, outcome in trained
            for split in ("validation", "test")
        ]

    @property
    def where(self) -> str:
        return f"{self.model}, {self.task}"

    @cached_property
    def pooled(self) -> PooledArms:
        """Test accuracies at the arms' own rates; a failed training counts as 0."""
        values = {
            arm: {seed: outcome["test_accuracy"] or 0.0 for seed, outcome in runs.items()}
            for arm, runs in self.outcomes.items()
        }
        return PooledArms(values, n_images=self.n_images)

    def mean_in_words(self, arm: str) -> str:
        """Mean test accuracy of an arm with its 95 % interval, in per cent: `72.7 (70.3 to 75.1)`."""
        found = self.pooled.mean(arm)
        value, low, high = (100 * (end or 0.0) for end in (found.value, found.low, found.high))
        return f"{value:.1f} ({low:.1f} to {high:.1f})"

    def noise_in_words(self) -> str:
        """How far one training is from its arm and seed."""
        return (
            f"One training varies by {100 * self.pooled.noise:.2f} points around its arm and seed "
            f"({self.pooled.freedom} degrees of freedom, pooled over all arms)."
        )

    def claims(self, pairs: Sequence[tuple[str, str, str]], key: Callable[[str], str] = str) -> list[Answer]:
        """A claim for each (words, arm, other arm): noise pooled over arms, p-values corrected for their number."""
        estimates = [self.pooled.difference(arm, other) for _, arm, other in pairs]
        corrected = holm([estimate.pvalue or 0.0 for estimate in estimates])
        nan = float("nan")
        return [
            Answer(
                key=key(words),
                claim=words,
                value=100 * (found.value or 0.0),
                low=nan if found.low is None else 100 * found.low,
                high=nan if found.high is None else 100 * found.high,
                interval="95 % interval, noise pooled over arms, images included",
                n=self.n_images,
                counted="test images",
                n_seeds=found.n or 0,
                model=self.model,
                task=self.task,
                pvalue=pvalue,
            )
            for (words, _, _), found, pvalue in zip(pairs, estimates, corrected, strict=True)
        ]

"""The database of a search that has begun, without a training."""

from __future__ import annotations

from pathlib import Path

from layerprobe.search.pilot import Pilot
from layerprobe.search.space import Trial
from layerprobe.search.trials import TrialStore
from layerprobe.training.outcome import Outcome

ABOUT = {"model": "tiny", "task": "digits", "strategy": "bayes", "budget": 10.0}


def make_study(path: Path) -> None:
    """A search of three blocks that has trained all and none of them."""
    pilot = Pilot(length=1.0, lrs=(1e-3,), accuracies={50: 0.9}, plateau=None, reached=True, seconds=2.0)
    store = TrialStore.open(path, ABOUT)
    store.put("pilot", pilot.to_dict())
    masks = [(True, True, True), (False, False, False), (True, False, False)]
    wanted = [Trial(mask=mask, lr=1e-3, repeat=repeat) for mask in masks for repeat in (0, 1)]
    store.outcomes(
        wanted,
        lambda trial: Outcome(
            validation_accuracy=0.5 + 0.4 * trial.mask[0] + 0.01 * trial.repeat,
            trainable_parameters=100 * sum(trial.mask),
        ),
    )
    store.close()

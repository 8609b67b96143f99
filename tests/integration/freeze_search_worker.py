"""A whole search on a made-up accuracy landscape, as a process that tests can kill.

    python freeze_search_worker.py STORAGE WORKERS LOG ANSWER PAUSE

Appends "start KEY PID" to LOG when a training begins, of PAUSE seconds, and writes the chosen
plan to ANSWER in the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from layerprobe.search.budget import TrialBudget
from layerprobe.search.run import serve
from layerprobe.search.settings import Settings
from layerprobe.search.space import Space, Trial, strip
from layerprobe.search.strategies import bayes, make_strategy, run_strategy
from layerprobe.search.trials import TrialStore, storage_url
from layerprobe.search.workers import helpers
from layerprobe.training import Outcome

ARGUMENTS = {"made": "up", "budget": 60.0}
GAINS = (0.02, 0.1, 0.0, 0.05)


class MadeUp:
    """Sleeps instead of training; the answer depends on the trial alone.

    The first training lasts until all `workers` have begun one (or for half a minute), so that a kill meets
    a search at which all are at work.
    """

    def __init__(self, log: str, pause: float, workers: int) -> None:
        self.log, self.pause, self.workers = log, pause, workers

    def __call__(self, trial: Trial) -> Outcome:
        handle = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"start {trial.key} {os.getpid()}\n".encode())
        os.close(handle)
        deadline = time.monotonic() + 30
        while self.at_work() < self.workers and time.monotonic() < deadline:
            time.sleep(0.02)
        self.workers = 1
        time.sleep(self.pause)
        seed = [trial.repeat, *map(int, trial.mask), round(1e6 * trial.lr)]
        noise = 0.01 * np.random.default_rng(seed).standard_normal()
        gain = sum(gain for gain, trained in zip(GAINS, trial.mask, strict=True) if trained)
        return Outcome(
            validation_accuracy=float(0.4 + gain + noise),
            train_seconds=self.pause,
        )

    def at_work(self) -> int:
        """How many processes have begun a training."""
        return len({line.rsplit(" ", 1)[1] for line in Path(self.log).read_text().splitlines()})


def main(storage: str, workers: int, log: str, answer: str, pause: float) -> None:
    url, work = storage_url(storage), MadeUp(log, pause, workers)
    bayes.SETTLED = 2.0  # no probability reaches it: the search spends its budget
    store = TrialStore.open(url, ARGUMENTS)
    budget = TrialBudget(
        space=Space((100,) * 4),
        train_batch=lambda trials: store.outcomes(trials, work),
        settings=Settings(lrs=(1e-3, 3e-3), seeds=3),
        total=ARGUMENTS["budget"],
    )
    with helpers(workers - 1, partial(serve, url, ARGUMENTS, work)):
        mask, lr = run_strategy(make_strategy("bayes"), budget)
    found = {"plan": strip(mask), "lr": lr, "trainings": [trial.key for trial in budget.history]}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], float(sys.argv[5]))

"""optuna's samplers behind the same interface: TPE on accuracy, NSGA-II on accuracy against parameters."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from layerprobe.search.bench import Bench
from layerprobe.search.space import Mask, Trial
from layerprobe.search.strategies.plain import WithoutModel

Direction = Literal["minimize", "maximize"]

BATCH = 8
"""Trials asked for at once, so that several workers have something to do; part of the search's definition."""

PATIENCE = 30
"""Batches in a row without anything new after which a sampler is believed to have converged."""


class _Sampler(WithoutModel, ABC):
    """Ask and tell in an in-memory study: results live in the bench, the sampler only proposes.

    The samplers repeat plans; a repeated plan is answered from what is known and costs nothing.
    """

    directions: ClassVar[list[Direction]]

    @abstractmethod
    def sampler(self, seed: int) -> Any:
        """The optuna sampler that proposes."""

    @abstractmethod
    def objectives(self, bench: Bench, mask: Mask, accuracy: float) -> list[float]:
        """What it is told of a valued plan, one number a direction."""

    def explore(self, bench: Bench) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(directions=self.directions, sampler=self.sampler(bench.seed))
        idle = 0
        while idle < PATIENCE:
            asked = []
            for _ in range(BATCH):
                proposal = study.ask()
                wanted = tuple(
                    bool(proposal.suggest_categorical(f"block_{index}", [False, True]))
                    for index in range(bench.space.n_blocks)
                )
                lr = proposal.suggest_categorical("lr", list(bench.lrs))
                if not bench.space.allows(wanted):
                    # In an order of chance: always from one end would keep plans of that end out.
                    wanted = bench.space.repair(wanted, bench.rng.permutation(bench.space.n_blocks).tolist())
                asked.append((proposal, Trial(wanted, lr)))
            price = bench.price([trial for _, trial in asked])
            found = bench.value([trial for _, trial in asked])
            for proposal, trial in asked:
                if trial in found and math.isfinite(found[trial]):
                    study.tell(proposal, self.objectives(bench, trial.mask, found[trial]))
                else:
                    study.tell(proposal, state=optuna.trial.TrialState.FAIL)
            if any(trial not in found for _, trial in asked):
                return
            idle = idle + 1 if price == 0 else 0


class TPE(_Sampler):
    """Tree-structured Parzen estimator over blocks and learning rate (optuna)."""

    name = "tpe"
    directions: ClassVar[list[Direction]] = ["maximize"]

    def sampler(self, seed: int) -> Any:
        import optuna

        # The constant liar keeps a batch from asking for the same plan eight times.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=BATCH)

    def objectives(self, bench: Bench, mask: Mask, accuracy: float) -> list[float]:
        return [accuracy]


class NSGA2(_Sampler):
    """NSGA-II on accuracy (up) and trainable parameters (down) (optuna)."""

    name = "nsga2"
    directions: ClassVar[list[Direction]] = ["maximize", "minimize"]

    def sampler(self, seed: int) -> Any:
        import optuna

        return optuna.samplers.NSGAIISampler(seed=seed, population_size=2 * BATCH)

    def objectives(self, bench: Bench, mask: Mask, accuracy: float) -> list[float]:
        return [accuracy, float(bench.space.params(mask))]

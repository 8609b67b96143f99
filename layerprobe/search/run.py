"""`freeze_search`: from a backbone and a task to a freeze plan with its evidence."""

from __future__ import annotations

import math
import os
import tempfile
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from layerprobe.backbones.sharding import is_sharded
from layerprobe.errors import LayerprobeError, UsageError
from layerprobe.files import output_folder
from layerprobe.locks import folder_lock
from layerprobe.plans import FreezePlan
from layerprobe.progress import Stages, duration, note
from layerprobe.provenance import provenance
from layerprobe.reading import check_fields
from layerprobe.search.baselines import (
    GREEDY,
    PLAN,
    Baseline,
    baselines_cost,
    chosen_baselines,
    equal_baselines,
    report_baselines,
)
from layerprobe.search.budget import Scores, TrialBudget
from layerprobe.search.database import DATABASE
from layerprobe.search.estimate import budget_of_time, check_search, power_in_words
from layerprobe.search.evaluator import Evaluator, layer_scores, proposals
from layerprobe.search.pilot import Pilot, run_pilot
from layerprobe.search.probes import ProbeBaseline, probe_baselines
from layerprobe.search.result import SearchResult, make_result
from layerprobe.search.settings import Settings, how_to_load, identify, make_settings
from layerprobe.search.sharded import PROBES, announce, check_sharded, follow, leading
from layerprobe.search.space import Space, Trial
from layerprobe.search.strategies import make_strategy, run_strategy
from layerprobe.search.trials import FINISHED, LOADING, TrialStore, hide_password, storage_url
from layerprobe.search.workers import gpus_of, helpers
from layerprobe.tables import strict_rows
from layerprobe.training import Outcome, bridge_train
from layerprobe.training.checkpoints import find_checkpoint

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.tasks import Task

SCORE_COLUMNS = ["block", "site", "metric", "value", "stderr", "n", "reason", "family"]

Watch = Callable[[int, int], None]
"""Is called with the number of finished trials and of all."""


def freeze_search(
    backbone: Backbone,
    task: Task,
    *,
    preset: str | None = None,
    storage: str | os.PathLike[str] | None = None,
    workers: int = 1,
    output: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> SearchResult:
    """Find which blocks to train, by training and scoring plans under a stated budget.

    A plan is judged by its validation accuracy after random-label bridge and fine-tuning under it, with its
    own learning rate and common seeds. Validation selects; test accuracy is measured once, for the final
    plan and the baselines, on seeds that selected nothing.

    Parameters
    ----------
    backbone, task
        From `load_backbone` and `load_task`.
    preset : str | None
        'quickstart' for a first look on a small task.
    storage : str | os.PathLike[str] | None
        Database that several processes and machines share; default: study.db in `output`.
    workers : int
        Processes on this machine; their order does not matter to the answer.
    output : str | os.PathLike[str] | None
        Run folder. The same arguments again continue there; finished trainings are looked up.
    quiet : bool
        No progress on stderr.
    **settings
        Fields of `layerprobe.search.settings.Settings`: budget, strategy, objective, seeds, lrs and others.

    Raises
    ------
    UsageError
        Budget too small for one plan, contradicting constraints, a run folder or storage that holds another
        search.
    NotAvailableError
        The storage cannot be reached.
    """
    chosen = make_settings(preset, **settings)
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    with _storage(storage, output) as url, leading(backbone):
        runner = prepare(backbone, task, chosen, url)
        about = backbone.provenance()  # now: of a model that trained in parts one process could not tell
        check_search(chosen, runner.space, output)
        check_sharded(backbone, chosen, workers)
        folder = None if output is None else output_folder(output)
        with closing(runner.store) as store:
            store.put(LOADING, how_to_load(backbone, task, preset, settings))
            found = _Search(runner, workers, quiet).run()
            store.put(FINISHED, True)
    found.provenance = provenance(
        "freeze-search",
        {**chosen.to_dict(), "preset": preset, "workers": workers},
        backbone=about,
        task=task.describe(),
        storage=hide_password(url) if storage is not None else DATABASE,
    )
    if folder is not None:
        found.folder = folder
        with folder_lock(
            folder, "layerprobe freeze-search", wait=True
        ):  # others of this search save the same
            found.save(folder)
        if chosen.keep_bridge:
            keep_bridge(backbone, task, found, chosen, folder, quiet=quiet)
    return found


def follow_search(backbone: Backbone, task: Task, *, preset: str | None = None, **settings: Any) -> None:
    """What every process but the first does while the first is in `freeze_search` with the same arguments.

    Only for a backbone that is spread over the processes of a launch (`load_backbone(…, shard=True)`): its parts train
    together. Returns when the first has its answer. UsageError for a backbone that this process holds whole.
    """
    if not is_sharded(backbone.model):
        raise UsageError("nothing to follow: this process holds the whole model")
    evaluator = Evaluator(backbone.prepare(task), task, make_settings(preset, **settings))
    follow({PROBES: lambda: probe_baselines(evaluator)}, evaluator.train)


@dataclass(kw_only=True)
class TrialRunner:
    """Evaluator, space and trial store of one backbone and task: trials are looked up, or trained and kept."""

    evaluator: Evaluator
    space: Space
    url: str
    identity: dict[str, Any]

    @cached_property
    def store(self) -> TrialStore:
        """Opened when it is first needed; whoever opens it closes it."""
        return TrialStore.open(self.url, self.identity)

    def outcomes(self, trials: Sequence[Trial], watch: Watch | None = None) -> dict[Trial, Outcome]:
        """Outcomes of all `trials`, see `TrialStore.outcomes`."""
        return self.store.outcomes(trials, self.evaluator, watch)

    def helpers(self, count: int) -> AbstractContextManager[None]:
        """`count` more processes that train waiting trials while the context is open."""
        work = partial(serve, self.url, self.identity, self.evaluator)
        return helpers(count, work, gpus=gpus_of(self.evaluator.backbone))

    def scores(self, *, quiet: bool = True) -> pd.DataFrame:
        """Transfer scores by layer, computed by whoever comes first and kept with the trials."""
        if self.store.get("scores") is None:
            if not quiet:
                note("transfer scores of every block")
            evaluator = self.evaluator
            try:
                frame = layer_scores(
                    evaluator.backbone, evaluator.task, seed=evaluator.settings.seed, quiet=quiet
                )
            except LayerprobeError as error:
                # Scores only propose; a task that is too small for them can still be searched.
                if not quiet:
                    note(f"no transfer scores: {error}")
                frame = pd.DataFrame(columns=SCORE_COLUMNS)
            self.store.put("scores", strict_rows(frame[SCORE_COLUMNS]))
        stored = check_fields(self.store.get("scores"), [dict], "the search's database")
        return pd.DataFrame(stored, columns=SCORE_COLUMNS)

    def probes(self, *, quiet: bool = True) -> list[ProbeBaseline]:
        """Linear probes of frozen features and raw pixels, fitted once and kept with the trials."""
        if self.store.get("probes") is None:
            announce(self.evaluator.backbone, PROBES)
            found = probe_baselines(self.evaluator, quiet=quiet)
            self.store.put("probes", [probe.to_dict() for probe in found])
        stored = check_fields(self.store.get("probes"), list, "the search's database")
        return [ProbeBaseline.from_dict(one) for one in stored]


def prepare(
    backbone: Backbone, task: Task, settings: Settings, storage: str | os.PathLike[str], **also: Any
) -> TrialRunner:
    """What trains and keeps the trials of `settings`; `also` joins what the store is recognised by."""
    backbone.prepare(task)
    evaluator = Evaluator(backbone, task, settings)
    return TrialRunner(
        evaluator=evaluator,
        space=evaluator.space,
        url=storage_url(storage),
        identity={**identify(backbone, task, settings), **also},
    )


def serve(url: str, identity: Mapping[str, Any], evaluator: Evaluator, keep_on: Callable[[], bool]) -> None:
    """Train waiting trials of a store while `keep_on` is true; what helper processes run."""
    TrialStore.open(url, identity).serve(evaluator, keep_on)


class _Search:
    """One process's run of a search: scores, budget, strategy, baselines, verdict."""

    def __init__(self, runner: TrialRunner, workers: int, quiet: bool) -> None:
        self.runner, self.workers, self.quiet = runner, workers, quiet
        self.settings, self.space = runner.evaluator.settings, runner.space
        self.began = clock.monotonic()
        self.stages, self.stage = Stages(quiet=quiet), "pilot"

    def run(self) -> SearchResult:
        with closing(self.stages), self.runner.helpers(self.workers - 1):
            settings, space = self.settings, self.space
            pilot = self.pilot()
            probes = self.runner.probes(quiet=self.quiet)
            scores = pd.DataFrame(columns=SCORE_COLUMNS)
            if settings.use_scores:
                scores = self.runner.scores(quiet=self.quiet)
            guides = proposals(scores, space.n_blocks)
            baselines = chosen_baselines(settings, space, scores=guides)
            total, baselines = self.total(pilot, baselines)
            budget = self.budget(pilot, total, guides)
            self.say(self.plan_in_words(pilot, total, baselines))
            self.stages.show("search", 0.0, total, unit="full trainings")
            mask, lr = run_strategy(make_strategy(settings.strategy), budget)
            baselines = equal_baselines(baselines, mask, space, settings)
            posterior = budget.posterior()
            self.say(power_in_words(posterior.noise, settings))
            self.say(
                f"chosen on validation: {space.describe(mask)}; now {len(baselines)} baselines on unseen seeds"
            )
            baselines, rates = self.greedy(baselines, budget)
            self.stage = "report"
            report = report_baselines(
                mask,
                baselines,
                budget,
                self.report_batch,
                tolerance=budget.tolerance(posterior),
                rates={PLAN: lr, **rates},
            )
        records = self.runner.store.records()
        return make_result(self.runner.evaluator, budget, pilot, report, records, scores, probes)

    def plan_in_words(self, pilot: Pilot, total: float, baselines: list[Baseline]) -> str:
        """What is ahead after the pilot, and how long it takes at the pilot's pace."""
        report = baselines_cost(baselines, self.space, self.settings) + self.settings.seeds
        seconds = (total + report) * pilot.seconds / self.workers
        return (
            f"{self.settings.strategy} over {self.space.n_blocks} blocks: {total:.3g} full trainings and a report of "
            f"{report:.3g}, about {duration(seconds)}"
        )

    def pilot(self) -> Pilot:
        """Length, rates and duration of a training; found once, and kept with the trials."""
        store, settings = self.runner.store, self.settings
        if store.get("pilot") is None:
            if settings.find_length:
                self.say(f"pilot: how many steps a training needs, at most {settings.steps[1]}")
            store.put("pilot", run_pilot(self.report_batch, self.space, settings).to_dict())
        found = Pilot.from_dict(store.get("pilot"))
        bridge_steps, steps = (max(1, round(found.length * n)) if n else 0 for n in settings.steps)
        bridge = f"{bridge_steps} bridge + " if bridge_steps else ""
        rates = ", ".join(f"{lr:g}" for lr in found.lrs)
        reaches = f"{100 * found.accuracies[max(found.accuracies)]:.1f} % after {max(found.accuracies)} steps"
        self.say(
            f"one training: {bridge}{steps} steps, {found.seconds:.3g} s; rates {rates}; all blocks reach {reaches}"
        )
        if not found.reached:
            self.say("the accuracy still grows at the limit of steps; a larger --steps may change the answer")
        return found

    def budget(self, pilot: Pilot, total: float, scores: Scores) -> TrialBudget:
        """What a strategy sees."""
        return TrialBudget(
            space=self.space,
            train_batch=self.runner.outcomes,
            settings=self.settings,
            total=total,
            length=pilot.length,
            lrs=pilot.lrs,
            scores=scores,
            watch=self.watch,
        )

    def total(self, pilot: Pilot, baselines: list[Baseline]) -> tuple[float, list[Baseline]]:
        """The search's budget in full trainings, and the baselines that the time allows."""
        s, store = self.settings, self.runner.store
        if s.budget is not None:
            return s.budget, baselines
        if store.get("budget") is None:
            # Once, so that a search which goes on, or another process of it, gives the same answer.
            assert s.time is not None
            left = max(0.0, s.time - (clock.monotonic() - self.began))
            total, kept = budget_of_time(s, self.space, baselines, self.workers, pilot.seconds, left)
            store.put("budget", {"budget": total, "arms": [one.name for one in kept]})
        stored = check_fields(store.get("budget"), {"budget": float, "arms": [str]}, "the search's database")
        return stored["budget"], [one for one in baselines if one.name in stored["arms"]]

    def greedy(
        self, baselines: list[Baseline], searched: TrialBudget
    ) -> tuple[list[Baseline], dict[str, float]]:
        """The baselines with the plan of greedy forward selection, where that is one of them; and its rate."""
        if all(one.name != GREEDY for one in baselines):
            return baselines, {}
        self.say(f"greedy forward selection for comparison, with the same budget of {searched.total:.3g}")
        budget = replace(searched, watch=None, spent=0.0, history={})
        strategy = make_strategy("greedy")
        strategy.check(budget)
        strategy.explore(budget)
        mask = max(budget.tried_masks(), key=budget.estimate)
        made = Baseline(name=GREEDY, mask=mask)
        return [made if one.name == GREEDY else one for one in baselines], {GREEDY: budget.best_lr(mask)}

    def report_batch(self, trials: Sequence[Trial]) -> Mapping[Trial, Outcome]:
        """Outcomes of the trials of pilot and report."""

        def watch(finished: int, total: int) -> None:
            self.stages.show(self.stage, finished, total, unit="trainings")

        return self.runner.outcomes(trials, watch)

    def watch(self, budget: TrialBudget) -> None:
        """The bar of the search: budget, time left, best so far."""
        best = max(budget.tried_masks(), key=budget.estimate)
        leader = "all runs have failed so far"
        if math.isfinite(accuracy := budget.estimate(best)):
            leader = f"best {100 * accuracy:.1f} %, {self.space.describe(best)}"
        self.stages.show("search", budget.spent, budget.total, unit="full trainings", about=leader)

    def say(self, message: str) -> None:
        if not self.quiet:
            note(message)


def keep_bridge(
    backbone: Backbone, task: Task, found: SearchResult, settings: Settings, folder: Path, *, quiet: bool
) -> None:
    """Bridge-train the chosen plan and save it into `folder`/bridge; a finished one is left as it is, and refused with
    a UsageError where its plan or rate is another."""
    assert settings.bridge is not None, "settings that keep a bridge have one"
    target = folder / "bridge"
    config = settings.bridge.replace(lr=found.facts["plan"]["lr"], seed=settings.seed)
    with folder_lock(target, "layerprobe freeze-search", wait=True):
        checkpoint = find_checkpoint(target) if target.is_dir() else None
        if checkpoint is not None and checkpoint.state["finished"]:
            kept, lr = FreezePlan.load(target / "plan.json"), checkpoint.state["config"]["lr"]
            if kept.trainable != found.plan.trainable or lr != config.lr:
                raise UsageError(
                    f"{target} holds the bridge of another plan or learning rate (lr {lr:g}, now {config.lr:g}); move "
                    "it away and repeat the command"
                )
            return
        if not quiet:
            note(f"bridge training under the chosen plan, {config.steps} steps")
        bridge_train(backbone, task, plan=found.plan, config=config, output=target, quiet=quiet)


@contextmanager
def _storage(storage: str | os.PathLike[str] | None, output: str | os.PathLike[str] | None) -> Iterator[str]:
    """The database's URL: as given, study.db in the run folder, or a temporary file."""
    if storage is not None:
        yield storage_url(storage)
    elif output is not None:
        yield storage_url(Path(output) / DATABASE)
    else:
        with tempfile.TemporaryDirectory(prefix="layerprobe-") as scratch:
            yield storage_url(Path(scratch) / DATABASE)

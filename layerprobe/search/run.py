"""`freeze_search`: from a backbone and a task to a freeze plan with its evidence."""

from __future__ import annotations

import math
import os
import tempfile
import time as clock
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from layerprobe.errors import LayerprobeError, UsageError
from layerprobe.files import output_folder
from layerprobe.progress import note
from layerprobe.provenance import provenance
from layerprobe.search import result as frames
from layerprobe.search.baselines import GREEDY, PLAN, Arm, arms_cost, chosen_arms, report_arms
from layerprobe.search.bench import Bench, Outcome
from layerprobe.search.kept_bridge import keep_bridge
from layerprobe.search.scores import by_block, layer_scores, proposals
from layerprobe.search.settings import Settings, identify, make_settings, refuse
from layerprobe.search.space import Space, Trial, blocks_of, describe_mask, strip
from layerprobe.search.strategies import make_strategy, run_strategy
from layerprobe.search.study import Ledger, hide_password, storage_url
from layerprobe.search.surrogate import Scores
from layerprobe.search.valuing import ChainEvaluator
from layerprobe.search.verdict import (
    Finalist,
    choose,
    contenders,
    pooled_stderr,
    verdict_kind,
    verdict_sentence,
)
from layerprobe.search.workers import helpers

REPORT_LINE_SECONDS = 15.0
"""Between two lines of progress while the baselines train."""

SCORE_COLUMNS = ["block", "site", "metric", "value", "stderr", "n", "reason", "family"]


def freeze_search(
    backbone: Any,
    task: Any,
    *,
    preset: str | None = None,
    storage: str | os.PathLike[str] | None = None,
    workers: int = 1,
    output: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> frames.SearchResult:
    """Find which blocks to train, by valuing plans with the real chain under a stated budget.

    A plan's value is its validation accuracy after random-label bridge and fine-tuning under it, with its
    own learning rate and common seeds. Validation selects; test accuracy is measured once, for the final
    plan and the baselines, on seeds that selected nothing.

    Parameters
    ----------
    backbone, task : from `load_backbone` and `load_task`.
    preset : 'quickstart' for a first look on a small task.
    storage : database that several processes and machines share; default: study.db in `output`.
    workers : processes on this machine; their order does not matter to the answer.
    output : run folder. The same arguments again continue there; finished trainings are looked up.
    quiet : no progress on stderr.
    budget : what the search itself may spend, in full trainings of everything (default 20); baselines and
        the final test come on top and are stated.
    time : seconds for search and report together, instead of a budget; converted once, by the measured
        duration of the first training.
    strategy : racing (default), exhaustive, prefix, suffix, contiguous, greedy, random, tpe, nsga2.
    objective : 'frugal' (fewest parameters within one standard error of the best) or 'accuracy'.
    seeds : common seeds of finalists, and unseen seeds of the report, ≥ 2.
    lrs : learning rates to choose from, for each plan separately; order and repetitions do not matter.
    fidelity : length of the short rung, as a share of the full training.
    bridge_steps, finetune_steps, batch_size, random_classes, precision : the training; see `Chain`.
    use_scores : compute transfer scores, and let the trainable ones propose plans; False: neither.
    baselines : names of the baselines to report; default all of `standard_arms`. Beyond those there are
        `auto-rgn` and `greedy`, see `layerprobe.search.baselines.ON_REQUEST`; the latter doubles the search.
    min_frozen, max_trainable_params, must_freeze, must_train : constraints on the plan.
    keep_bridge : bridge-train the chosen plan in the end and save it into `output`/bridge.
    seed : of everything random.

    Returns
    -------
    SearchResult with `.plan`, `.table`, `.trials`, `.baselines`.

    Raises
    ------
    UsageError : budget too small for one plan, contradicting constraints, a run folder or storage that holds
        another search. NotAvailableError : the storage cannot be reached.
    """
    chosen = make_settings(preset, **settings)
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    backbone.prepare(task)
    evaluator = ChainEvaluator(backbone, task, chosen.chain, chosen.seed)
    space = Space(evaluator.block_params(), chosen.constraints)
    refuse(chosen, space, output)
    folder = output_folder(output) if output is not None else None
    identity = identify(backbone, task, chosen)
    with _storage(storage, folder) as url:
        ledger = Ledger.open(url, identity)
        try:
            search = _Search(backbone, task, chosen, evaluator, space, ledger, quiet)
            with helpers(workers - 1, url, identity, evaluator):
                found = search.run(workers)
        finally:
            ledger.close()
    found.provenance = provenance(
        "freeze-search",
        {**asdict(chosen), "preset": preset, "workers": workers},
        backbone=backbone.describe(),
        task=task.describe(),
        storage=hide_password(url) if storage is not None else "study.db",
    )
    if folder is not None:
        found.folder = folder
        found.save(folder)
        if chosen.keep_bridge:
            keep_bridge(backbone, task, found, chosen, folder, quiet=quiet)
    return found


class _Search:
    """One process's walk through a search: scores, strategy, baselines, verdict."""

    def __init__(
        self,
        backbone: Any,
        task: Any,
        settings: Settings,
        evaluator: Callable[[Trial], Outcome],
        space: Space,
        ledger: Ledger,
        quiet: bool,
    ) -> None:
        self.backbone, self.task, self.settings = backbone, task, settings
        self.evaluator, self.space, self.ledger, self.quiet = evaluator, space, ledger, quiet
        self.began = clock.monotonic()
        self.looked_up = 0.0  # full trainings that were finished before this process came

    def run(self, workers: int) -> frames.SearchResult:
        settings, space = self.settings, self.space
        score_frame = self.scores() if settings.use_scores else pd.DataFrame(columns=SCORE_COLUMNS)
        guides = proposals(score_frame, space.n_blocks) if settings.use_scores else {}
        arms = chosen_arms(settings.baselines, space, seed=settings.seed, scores=guides)
        budget, arms = self.budget(arms, workers)
        bench = self.bench(budget, guides)
        self.say(
            f"{settings.strategy} over {space.n_blocks} blocks: budget {budget:.3g} full trainings of "
            f"{settings.bridge_steps} bridge + {settings.finetune_steps} fine-tuning steps"
        )
        finalists = run_strategy(make_strategy(settings.strategy), bench)
        winner = self.chosen(finalists, bench)
        values = "; ".join(f"{describe_mask(f.mask)} {100 * f.mean:.1f} %" for f in contenders(finalists))
        self.say(f"on {len(winner.accuracies)} common seeds, validation: {values}")
        self.say(
            f"chosen on validation: {describe_mask(winner.mask)}; now {len(arms)} baselines on unseen seeds"
        )
        arms, rates = self.rival(arms, budget)
        results = report_arms(winner.mask, winner.lr, arms, bench, self.report, rates=rates)
        return self.conclude(bench, finalists, winner, results, score_frame)

    def bench(self, budget: float, guides: Scores) -> Bench:
        """What the strategy sees."""
        s = self.settings
        return Bench(
            self.space,
            self.value,
            s.lrs,
            s.seeds,
            budget,
            guides,
            s.seed,
            s.fidelity,
            s.objective,
            watch=self.watch,
        )

    def rival(self, arms: Sequence[Arm], budget: float) -> tuple[list[Arm], dict[str, float]]:
        """The arms with the plan of greedy forward selection, where that is one of them; and its rate."""
        if all(arm.name != GREEDY for arm in arms):
            return list(arms), {}
        self.say(f"greedy forward selection for comparison, with the same budget of {budget:.3g}")
        bench = self.bench(budget, {})
        bench.watch = None
        finalists = run_strategy(make_strategy("greedy"), bench)
        try:
            found = self.chosen(finalists, bench)
        except UsageError as error:  # of a baseline; the search itself has its answer
            self.say(f"greedy forward selection is left out: {error}")
            return [arm for arm in arms if arm.name != GREEDY], {}
        return [Arm(GREEDY, found.mask) if arm.name == GREEDY else arm for arm in arms], {GREEDY: found.lr}

    def chosen(self, finalists: Sequence[Finalist], bench: Bench) -> Finalist:
        """The answer among finalists; where there is none, the error says why their runs failed."""
        try:
            return choose(finalists, self.space, objective=self.settings.objective)
        except UsageError as error:
            reasons = [outcome.reason for outcome in bench.history.values() if outcome.reason]
            why = f"; the first of {len(reasons)} failures: {reasons[0]}" if reasons else ""
            raise UsageError(f"{error}{why}") from None

    def scores(self) -> pd.DataFrame:
        """Transfer scores, computed by whoever comes first and kept with the search."""
        if (stored := self.ledger.get("scores")) is not None:
            return pd.DataFrame(stored, columns=SCORE_COLUMNS)
        self.say("transfer scores of every block")
        try:
            frame = layer_scores(self.backbone, self.task, seed=self.settings.seed, quiet=self.quiet)
        except LayerprobeError as error:
            # Scores only propose; a task that is too small for them can still be searched.
            self.say(f"no transfer scores: {error}")
            frame = pd.DataFrame(columns=SCORE_COLUMNS)
        self.ledger.put("scores", frames.strict_rows(frame[SCORE_COLUMNS]))
        return pd.DataFrame(self.ledger.get("scores"), columns=SCORE_COLUMNS)

    def budget(self, arms: Sequence[Arm], workers: int) -> tuple[float, list[Arm]]:
        """The search's budget in full trainings, and the baselines that the time allows."""
        s = self.settings
        if s.budget is not None:
            return s.budget, list(arms)
        if (stored := self.ledger.get("budget")) is not None:
            # Measured once, so that a search which goes on, or another process of it, walks the same way.
            return stored["budget"], [arm for arm in arms if arm.name in stored["arms"]]
        assert s.time is not None
        seconds = self.pilot(workers)
        left = max(0.0, s.time - (clock.monotonic() - self.began))
        total = 0.9 * left * workers / seconds
        kept = list(arms)
        least = s.seeds + len(s.lrs) * s.fidelity
        plan_cost = float(s.seeds)
        while len(kept) > 1 and total - plan_cost - arms_cost(
            kept, self.space, s.lrs, s.seeds, s.fidelity
        ) < (2 * least):
            kept.pop()
        budget = total - plan_cost - arms_cost(kept, self.space, s.lrs, s.seeds, s.fidelity)
        budget /= 1 + any(arm.name == GREEDY for arm in kept)  # which searches once more
        if budget < least:
            needed = (least + plan_cost + arms_cost(kept, self.space, s.lrs, s.seeds, s.fidelity)) * seconds
            raise UsageError(
                f"time {s.time:g} s is too small for one plan and its baseline: one training takes "
                f"{seconds:.3g} s here, so allow at least {needed / (0.9 * workers) + s.time - left:.0f} s or "
                "shorten the steps, with another output folder: this one holds a search of the time that was given"
            )
        self.ledger.put("budget", {"budget": budget, "arms": [arm.name for arm in kept]})
        stored = self.ledger.get("budget")
        return stored["budget"], [arm for arm in arms if arm.name in stored["arms"]]

    def pilot(self, workers: int) -> float:
        """Seconds that a full training of everything takes here, its evaluation included, with all workers busy.

        Raises
        ------
        UsageError : it diverges at the middle learning rate and at every smaller one.
        """
        s = self.settings
        rates = sorted(s.lrs)[: len(s.lrs) // 2 + 1]
        for lr in reversed(rates):
            # As many at once as there are workers: they take cores and memory from each other.
            outcomes = self.value(
                [Trial(self.space.all, lr, repeat, s.fidelity) for repeat in range(workers)]
            )
            fine = [outcome for outcome in outcomes.values() if outcome.accuracy is not None]
            if fine:
                seconds = [float(outcome.facts.get("call_seconds", outcome.seconds)) for outcome in fine]
                return max(1e-9, max(seconds) / s.fidelity)
        outcome = next(iter(outcomes.values()))
        raise UsageError(
            f"training everything fails at the learning rates {', '.join(f'{lr:g}' for lr in rates)} "
            f"({outcome.reason}); give smaller --lrs"
        )

    def value(self, trials: Sequence[Trial]) -> Mapping[Trial, Outcome]:
        """Answers to trials, from the ledger or by training."""
        looks = 0

        def watch(finished: int, total: int) -> None:
            nonlocal looks
            looks += 1
            if finished == total and looks == 1:
                self.looked_up += sum(self.space.cost(trial) for trial in trials)

        return self.ledger.value(trials, self.evaluator, watch)

    def report(self, trials: Sequence[Trial]) -> Mapping[Trial, Outcome]:
        """Answers to the report's trials, with a line of progress every now and then."""
        began = told = clock.monotonic()
        found_before: int | None = None

        def watch(finished: int, total: int) -> None:
            nonlocal told, found_before
            found_before = finished if found_before is None else found_before
            now = clock.monotonic()
            if found_before < finished < total and now - told >= REPORT_LINE_SECONDS:
                told = now
                rest = (now - began) / (finished - found_before) * (total - finished)
                self.say(
                    f"baselines: {finished} of {total} trainings of this step; about {rest / 60:.1f} min of it left"
                )

        return self.ledger.value(trials, self.evaluator, watch)

    def watch(self, bench: Bench) -> None:
        """One line of progress: best so far, budget left, expected end."""
        known = [mask for mask in bench.valued_masks() if bench.full(mask)] or bench.valued_masks()
        best = max(known, key=bench.estimate)
        elapsed = clock.monotonic() - self.began
        trained = bench.spent - self.looked_up
        rest = elapsed * max(0.0, bench.budget - bench.spent) / trained if trained > 1e-9 else math.nan
        short = "" if bench.full(best) else " (short runs)"
        leader = (
            f"best so far {100 * bench.estimate(best):.1f} % with {describe_mask(best)}{short}"
            if math.isfinite(bench.estimate(best))
            else "all runs have failed so far"
        )
        self.say(
            f"{len(bench.history)} trainings, {bench.spent:.1f} of {bench.budget:.3g} spent; {leader}"
            + (
                f"; about {rest / 60:.1f} min of search left"
                if math.isfinite(rest)
                else ", all found finished"
            )
        )

    def conclude(
        self,
        bench: Bench,
        finalists: Sequence[Finalist],
        winner: Finalist,
        results: Sequence[Any],
        score_frame: pd.DataFrame,
    ) -> frames.SearchResult:
        space, settings = self.space, self.settings
        by_name = {result.arm.name: result for result in results}
        plan_result = by_name[PLAN]
        versus = plan_result.against_all
        answer = verdict_sentence(
            winner.mask,
            space,
            versus,
            objective=settings.objective,
            test_mean=plan_result.mean,
            n_finalists=sum(np.isfinite(f.mean) for f in finalists),
        )
        kind = verdict_kind(winner.mask, versus)
        records = self.ledger.records()
        report_cost = sum({t.key: space.cost(t) for t, _, _ in records if t not in bench.history}.values())
        grid = sorted(settings.lrs)
        at_edge = [
            result.arm.name for result in results if len(grid) > 1 and result.lr in (grid[0], grid[-1])
        ]
        if at_edge:
            self.say(
                f"the best learning rate lies at the edge of the grid for {', '.join(at_edge)}; a wider --lrs "
                "may change the comparison"
            )
        facts = {
            "model": self.backbone.name,
            "revision": self.backbone.source.revision,
            "task": self.task.name,
            "split_hash": self.task.split_hash,
            "n_blocks": space.n_blocks,
            "plan": {
                "strip": strip(winner.mask),
                "blocks": blocks_of(winner.mask),
                "words": describe_mask(winner.mask),
                "lr": winner.lr,
                "validation_accuracy": winner.mean,
                "validation_per_seed": list(winner.accuracies),
                "test_accuracy": plan_result.mean,
                "test_low": plan_result.low,
                "test_high": plan_result.high,
                "trainable_parameters": plan_result.params,
            },
            "against_all": asdict(versus) if versus else None,
            "standard_error": pooled_stderr(contenders(finalists)),
            "objective": settings.objective,
            "strategy": settings.strategy,
            "budget": bench.budget,
            "spent": bench.spent,
            "report_cost": report_cost,
            "trainings": len(records),
            "train_seconds": sum(outcome.seconds for _, outcome, _ in records),
            "seeds": settings.seeds,
            "seed": settings.seed,
            "lr_at_edge": at_edge,
            "chance": 1.0 / self.task.n_classes,
            "score_columns": sorted(score_frame["metric"].unique()) if len(score_frame) else [],
        }
        baselines = frames.arm_frame(results)
        finals = frames.finalist_frame(finalists, winner.mask, space)
        plan = self.evaluator.plan(winner.mask).with_found(  # type: ignore[attr-defined]
            method="freeze-search",
            answer=answer,
            kind=kind,
            task=self.task.name,
            task_id=self.task.task_id,
            split_hash=self.task.split_hash,
            settings=frames.strict_value(asdict(settings)),
            budget=bench.budget,
            spent=bench.spent,
            lr=winner.lr,
            validation_accuracy=winner.mean,
            test_accuracy={
                "mean": plan_result.mean,
                "low": plan_result.low,
                "high": plan_result.high,
                "interval": "95 % t over unseen seeds",
                "n_seeds": sum(value is not None for value in plan_result.test),
            },
            against_all=facts["against_all"],
            runners_up=frames.strict_rows(finals[~finals["chosen"]]),
            scores=frames.strict_rows(by_block(score_frame, space.n_blocks).reset_index(names="block")),
            versions=_versions(),
        )
        return frames.SearchResult(
            plan=plan,
            answer=answer,
            kind=kind,
            table=frames.layer_frame(bench, winner.mask, by_block(score_frame, space.n_blocks)),
            trials=frames.trial_frame(records, space),
            baselines=baselines,
            pareto=frames.pareto_frame(bench, winner.mask, finalists),
            finalists=finals,
            facts=facts,
        )

    def say(self, message: str) -> None:
        if not self.quiet:
            note(message)


def _versions() -> dict[str, str | None]:
    from layerprobe.provenance import versions

    return versions()


@contextmanager
def _storage(storage: str | os.PathLike[str] | None, folder: Path | None) -> Any:
    """The database's URL: as given, study.db in the run folder, or a temporary file."""
    if storage is not None:
        yield storage_url(storage)
    elif folder is not None:
        yield storage_url(folder / "study.db")
    else:
        with tempfile.TemporaryDirectory(prefix="layerprobe-") as scratch:
            yield storage_url(Path(scratch) / "study.db")

"""What a search knows so far, read from its database by somebody who takes no part in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from layerprobe.errors import BrokenFileError, NotAvailableError, UsageError
from layerprobe.reading import Schema, check_fields
from layerprobe.records import Estimate
from layerprobe.search.database import DATABASE, STORAGE_ERRORS, STUDY, hide_password, root_cause, storage_url
from layerprobe.search.pilot import Pilot
from layerprobe.search.posterior import Posterior
from layerprobe.search.space import REPORT_REPEAT, Mask, Space, Trial, parts_of, training_cost
from layerprobe.training.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class SearchStatus:
    """How far a search is, and what it knows.

    Attributes
    ----------
    arguments : Mapping[str, Any]
        What makes the search: model, task, settings.
    pilot : Pilot | None
        None while it runs.
    budget, spent : float | None
        In full trainings; None before the pilot's end.
    trainings, running, failed : int
        Finished ones, those that train now, and those that ended without an accuracy.
    workers : int
        Processes that train now.
    reported : int
        Finished trainings on the report's unseen seeds.
    space : Space
        The plans.
    gains : list[Estimate]
        What training each unit adds; empty while nothing is known.
    best : Mask | None
        The plan of highest expected validation accuracy among those trained.
    accuracy : Estimate | None
        That accuracy.
    seconds_left : float | None
        Of the search, without the report, at the pace so far.
    """

    arguments: Mapping[str, Any]
    pilot: Pilot | None
    budget: float | None
    spent: float | None
    trainings: int
    running: int
    failed: int
    workers: int
    reported: int
    space: Space
    gains: list[Estimate]
    best: Mask | None
    accuracy: Estimate | None
    seconds_left: float | None


def find_storage(run: Path) -> str:
    """The database of a run folder; UsageError where there is none."""
    path = run / DATABASE if run.is_dir() else run
    if not path.is_file():
        raise UsageError(
            f"no search in {run}: there is no {DATABASE}. Name the folder of a freeze-search, or its --storage"
        )
    return str(path)


def search_status(storage: str | os.PathLike[str]) -> SearchStatus:
    """Read a search's database; nothing is written there.

    Raises
    ------
    NotAvailableError
        The database cannot be read, or holds no search yet.
    BrokenFileError
        It holds a study of somebody else.
    """
    url = storage_url(storage)
    shown = hide_password(url)
    if url.startswith("sqlite:///") and "?" not in url:  # which would be made where it is not there
        path = sqlalchemy.make_url(url).database or ""
        if not Path(path).is_file():
            raise NotAvailableError(f"{shown} holds no search yet: there is no such file")
        query = {"mode": "ro", "uri": "true"}
        url = str(sqlalchemy.URL.create("sqlite", database=f"file:{quote(path)}", query=query))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        database = optuna.storages.RDBStorage(url.replace("{", "{{").replace("}", "}}"))
        try:
            study = optuna.load_study(study_name=STUDY, storage=database)
            arguments = study.user_attrs.get("arguments")
            trials = study.get_trials(deepcopy=False)
        finally:
            database.remove_session()
            database.engine.dispose()
    except KeyError as error:
        raise NotAvailableError(f"{shown} holds no search yet") from error
    except ImportError as error:
        raise NotAvailableError(
            f"storage {shown} needs a driver that is not installed ({error.name}); "
            "for PostgreSQL: pip install 'layerprobe[postgres]'"
        ) from error
    except (*STORAGE_ERRORS, TypeError, LookupError) as error:
        raise NotAvailableError(f"storage {shown} cannot be read: {root_cause(error)}") from error
    if not isinstance(arguments, dict):
        raise BrokenFileError(f"storage {shown} holds a study that layerprobe did not make")
    return summarise(arguments, trials)


def summarise(arguments: Mapping[str, Any], trials: list[FrozenTrial]) -> SearchStatus:
    """The state of a search from the rows of its database; BrokenFileError where they are none of a search."""
    check_fields(arguments, ARGUMENTS, PLACE)
    facts: dict[str, Any] = {
        str(t.user_attrs["fact"]): t.user_attrs.get("value") for t in trials if "fact" in t.user_attrs
    }
    check_fields(facts, {"budget?": {"budget": float}}, PLACE)
    pilot = Pilot.from_dict(facts["pilot"]) if "pilot" in facts else None
    found: dict[Trial, tuple[Outcome, datetime | None]] = {}
    for frozen in trials:
        stored = frozen.user_attrs.get("outcome")
        if stored is not None and frozen.state.is_finished():
            found[Trial.from_dict(frozen.user_attrs)] = Outcome.from_dict(stored), frozen.datetime_complete
    running = [frozen for frozen in trials if frozen.state == TrialState.RUNNING]
    searched = {
        trial: outcome
        for trial, (outcome, _) in found.items()
        if pilot is not None
        and trial.is_plan
        and trial.repeat < REPORT_REPEAT
        and trial.lr in pilot.lrs
        and abs(trial.fidelity - pilot.length) < 1e-9
    }
    if len({len(trial.mask) for trial in searched}) > 1:
        raise BrokenFileError(f"{PLACE} holds plans of several sizes")
    budget = arguments.get("budget") or facts.get("budget", {}).get("budget")
    spent = _cost(searched) if pilot is not None else None
    n_units = max((len(trial.mask) for trial in searched), default=1)
    space = Space((1,) * n_units, parts=parts_of(str(arguments.get("units", "block"))))
    gains, best, accuracy = (
        _expected(searched, space, pilot) if pilot is not None and searched else ([], None, None)
    )
    ended = [when for trial, (_, when) in found.items() if trial in searched and when is not None]
    left = None
    if spent and budget and len(ended) > 1:
        took = (max(ended) - min(ended)).total_seconds() * len(ended) / (len(ended) - 1)
        left = max(0.0, budget - spent) * took / spent
    return SearchStatus(
        arguments=arguments,
        pilot=pilot,
        budget=budget,
        spent=spent,
        trainings=len(found),
        running=len(running),
        failed=sum(outcome.validation_accuracy is None for outcome, _ in found.values()),
        workers=len({frozen.user_attrs.get("worker") for frozen in running}),
        reported=sum(trial.repeat >= REPORT_REPEAT for trial in found),
        space=space,
        gains=gains,
        best=best,
        accuracy=accuracy,
        seconds_left=left,
    )


PLACE = "the search's database"
ARGUMENTS: dict[str, Schema] = {
    "model": str, "task": str, "strategy?": str, "units?": str, "budget?": (float, type(None)),
}  # fmt: skip


def _cost(searched: Mapping[Trial, Outcome]) -> float:
    """In full trainings, as `Space.cost`; the largest plan is the one of all blocks, which every pilot trains."""
    sizes = [outcome.trainable_parameters or 0 for outcome in searched.values()]
    return sum(training_cost(size / max(1, *sizes)) for size in sizes)


def _expected(
    searched: Mapping[Trial, Outcome], space: Space, pilot: Pilot
) -> tuple[list[Estimate], Mask, Estimate]:
    """Gains of the units, the best plan that was trained, and its accuracy, by the search's own posterior."""
    trials = list(searched)
    accuracies = [searched[trial].ranked_accuracy for trial in trials]
    posterior = Posterior(space=space, lrs=pilot.lrs, trials=trials, accuracies=accuracies)
    masks = list(dict.fromkeys(trial.mask for trial in trials))
    rates = posterior.best_rates(masks)
    mean, covariance = posterior.predict(
        [Trial(mask=mask, lr=rates[mask], fidelity=pilot.length) for mask in masks]
    )
    top = int(np.argmax(mean))
    value, stderr = float(mean[top]), float(np.sqrt(max(0.0, covariance[top, top])))
    accuracy = Estimate(
        value=value, low=max(0.0, value - 1.96 * stderr), high=min(1.0, value + 1.96 * stderr), stderr=stderr
    )
    return posterior.unit_gains(np.random.default_rng(0)), masks[top], accuracy

"""Where trials live: an optuna study in a database that several processes and machines may share.

Every process that joins a search runs the same deterministic strategy and asks for the same trials, so no
one coordinates: a trial that is finished is looked up, a waiting one is claimed by whoever comes first, and
one whose process died goes back into the queue.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from layerprobe.errors import NotAvailableError, UsageError
from layerprobe.search.database import (
    HEARTBEAT_SECONDS,
    STORAGE_ERRORS,
    connect,
    damage_named,
    heartbeats,
    hide_password,
    no_retry,
    storage_url,
    with_retry,
)
from layerprobe.search.settings import difference_in_words
from layerprobe.search.space import Trial
from layerprobe.search.workers import is_dead, this_worker
from layerprobe.training.outcome import Outcome

GRACE_SECONDS = 60
POLL_SECONDS = 0.25
MOST_POLL_SECONDS = 6.0
"""Who waits looks into the database at first four times a second, and then ever less often: a quarter of the time that
it has waited, so that what it waits for is found late by no more than that. No worker looks 30 times in any minute."""
QUEUE = 32
"""How many trials wait at a time: enough for the workers of several machines, few enough that reading all
trials that have not ended, as every look into the database does, stays far below the time of a training."""

FINISHED = "finished"
"""The fact of a search that has its answer."""
LOADING = "loading"
"""The fact that says how a worker makes backbone, task and settings of a search."""

DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-9, 1e3, log=True),
    "fidelity": FloatDistribution(0.0, 1.0),
    "repeat": IntDistribution(0, 1 << 30),
}

Evaluate = Callable[[Trial], Outcome]
"""Trains one trial in this process, as `layerprobe.search.evaluator.Evaluator` does."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A trial with its outcome, its number in the database, and where and when it ended."""

    trial: Trial
    outcome: Outcome
    number: int
    worker: str | None = None
    finished: datetime | None = None


class TrialStore:
    """The trials of one search in one database.

    Made by `TrialStore.open`. A trial's identity is its key (plan, learning rate, repeat, fidelity). The database
    numbers trials in the order of their creation; among live trials with one key the lowest number owns it and the
    others are closed, so two processes that enqueue the same trial at the same moment still train it once.
    """

    def __init__(self, storage: optuna.storages.RDBStorage, study: optuna.Study) -> None:
        self._storage, self._study = storage, study
        self._beats: dict[
            int, tuple[object, float]
        ] = {}  # of running trials: a heartbeat, and since when we saw it

    @classmethod
    def open(cls, url: str | os.PathLike[str], arguments: Mapping[str, Any]) -> TrialStore:
        """Create or join the search in the database at `url`: an SQLite file, or a SQLAlchemy URL.

        `arguments` are everything that the answer depends on; a database holds one search with one set, and others
        raise UsageError. Further errors as of `connect`.
        """
        shown = hide_password(storage_url(url))
        storage, study = connect(url)
        wanted = json.loads(json.dumps(dict(arguments)))
        with damage_named():
            known = study.user_attrs.get("arguments")
            if known is None and study.trials:
                raise UsageError(f"storage {shown} holds a study that layerprobe did not make")
        if known is None:
            study.set_user_attr("arguments", wanted)
        elif known != wanted:
            other = (
                difference_in_words(known, wanted) if isinstance(known, dict) else "its settings are damaged"
            )
            raise UsageError(
                f"{shown} holds another search ({other}); "
                "choose another output folder or storage, or repeat the same arguments"
            )
        return cls(storage, study)

    @classmethod
    def join(cls, url: str | os.PathLike[str]) -> TrialStore:
        """The store of whatever search is in a database; NotAvailableError where there is no database."""
        target = storage_url(url)
        path = hide_password(target)
        if target.startswith("sqlite:") and not Path(path).is_file():
            raise NotAvailableError(
                f"there is no search at {path}; start it with: layerprobe freeze-search --storage {path} …"
            )
        return cls(*connect(url))

    def outcomes(
        self, trials: Sequence[Trial], evaluate: Evaluate, watch: Callable[[int, int], None] | None = None
    ) -> dict[Trial, Outcome]:
        """Outcomes of all `trials`: looked up where finished, trained here, or awaited from other processes.

        `evaluate` runs in this process, one trial at a time, while a heartbeat is kept. A run that diverged is
        an answer (no accuracy, a reason); an exception is none: the trial goes back and it is raised.
        `watch` is called with the number of finished trials and of all, at each look at the database.
        """
        wanted, pause = {trial.key: trial for trial in trials}, Backoff()
        while True:
            owners = _owners(self._trials())
            done = {key: found for key in wanted if (found := _finished(owners.get(key))) is not None}
            if watch is not None:
                watch(len(done), len(wanted))
            if len(done) == len(wanted):
                return {trial: done[trial.key] for trial in trials}
            missing = [trial for key, trial in wanted.items() if key not in owners]
            ours = (owners[key].state for key in wanted if key in owners)
            waiting = sum(state == TrialState.WAITING for state in ours)
            if missing and waiting <= QUEUE // 2:
                for trial in missing[: QUEUE - waiting]:
                    self._enqueue(trial)
                continue
            claimed = self._claim(owners, list(wanted))
            if claimed is not None:
                self._run(claimed, wanted[claimed.user_attrs["key"]], evaluate)
                pause = Backoff()
            else:
                self.revive()
                pause.sleep()

    def serve(self, evaluate: Evaluate, keep_on: Callable[[], bool] = lambda: True) -> int:
        """Train waiting trials until the search has its answer or `keep_on` is false; how many it were."""
        pause, trained = Backoff(), 0
        while keep_on():
            trials = self._trials()
            if _fact(trials, FINISHED) is not None:
                break
            owners = _owners(trials)
            claimed = self._claim(owners, list(owners))
            if claimed is not None:
                self._run(claimed, Trial.from_dict(claimed.user_attrs), evaluate)
                pause, trained = Backoff(), trained + 1
            else:
                pause.sleep(keep_on)
        return trained

    def records(self) -> list[Finished]:
        """Finished trials in the order of their numbers."""
        return [
            Finished(
                trial=Trial.from_dict(frozen.user_attrs),
                outcome=outcome,
                number=frozen.number,
                worker=frozen.user_attrs.get("worker"),
                finished=frozen.datetime_complete,
            )
            for frozen in sorted(self._trials(), key=lambda t: t.number)
            if (outcome := _finished(frozen)) is not None
        ]

    def revive(self) -> None:
        """Set trials of dead processes free: stale heartbeats, and dead processes on this host.

        A heartbeat is stale when it has stayed the same for so long by this process's own steady clock: clocks of
        machines differ and jump. Such trials end as failed without an outcome, and whoever wants one enqueues it anew.
        """
        now, beats = time.monotonic(), heartbeats(self._storage)
        running = [frozen for frozen in self._trials() if frozen.state == TrialState.RUNNING]
        before, self._beats = self._beats, {}
        for frozen in running:
            beat = beats.get(frozen._trial_id)
            same, since = before.get(frozen._trial_id, (beat, now))
            self._beats[frozen._trial_id] = beat, since if same == beat else now
            stale = beat is not None and now - self._beats[frozen._trial_id][1] > GRACE_SECONDS
            if stale or is_dead(frozen.user_attrs.get("worker", "")):
                self._close(frozen, TrialState.FAIL)

    def get(self, name: str) -> Any:
        """A fact kept with the search by `put`, or None."""
        return _fact(self._trials(), name)

    def put(self, name: str, value: Any) -> None:
        """Keep a fact (strict JSON) with the search; the first one stays, so that all processes agree."""
        if self.get(name) is None:
            # As a row that the database numbers: an attribute of the study would be the last writer's, and
            # processes that started at one moment would go on with two budgets.
            plain = json.loads(json.dumps(value, allow_nan=False))
            self._study.add_trial(
                optuna.create_trial(state=TrialState.FAIL, user_attrs={"fact": name, "value": plain})
            )

    def close(self) -> None:
        """Let go of the database connections."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _trials(self) -> list[FrozenTrial]:
        with damage_named():
            return self._study.get_trials(deepcopy=False)

    def _enqueue(self, trial: Trial) -> None:
        # Parameters are for optuna's own tools; the attributes are what is read back here.
        params: dict[str, Any] = {f"unit_{index}": trained for index, trained in enumerate(trial.mask)}
        distributions = dict.fromkeys(params, CategoricalDistribution([False, True]))
        with damage_named(StorageInternalError):  # a trial that the tables do not take
            self._study.add_trial(
                optuna.create_trial(
                    state=TrialState.WAITING,
                    params={**params, "lr": trial.lr, "fidelity": trial.fidelity, "repeat": trial.repeat},
                    distributions={**distributions, **DISTRIBUTIONS},
                    user_attrs={"key": trial.key, **asdict(trial)},
                )
            )

    def _claim(self, owners: Mapping[str, FrozenTrial], keys: Sequence[str]) -> FrozenTrial | None:
        for key in keys:
            frozen = owners.get(key)
            if frozen is None or frozen.state != TrialState.WAITING:
                continue
            trial_id = frozen._trial_id
            # The heartbeat goes in first: a process that dies right after claiming must be found out. The
            # name follows the claim, for only who has the trial may say whose death sets it free.
            with_retry(self._storage.record_heartbeat, "the storage")(trial_id)
            try:
                if self._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING):
                    self._set_attr(trial_id, "worker", this_worker())
                    return frozen
            except optuna.exceptions.UpdateFinishedTrialError:
                continue
        return None

    def _run(self, frozen: FrozenTrial, trial: Trial, evaluate: Evaluate) -> None:
        try:
            with self._heartbeat(frozen._trial_id):
                outcome = evaluate(trial)
        except BaseException:  # Ctrl-C as well: whatever it was, nobody trains this trial any more
            with suppress(*STORAGE_ERRORS), no_retry():  # else it is found out by its heartbeat
                self._close(frozen, TrialState.FAIL)
            raise
        self._set_attr(frozen._trial_id, "outcome", outcome.to_dict())
        value = outcome.validation_accuracy
        if value is None:
            self._close(frozen, TrialState.FAIL)
        else:
            self._close(frozen, TrialState.COMPLETE, [value])
        for other in self._trials():  # duplicates that another process enqueued at the same moment
            same = other.user_attrs.get("key") == trial.key and other.number > frozen.number
            if same and other.state == TrialState.WAITING:
                self._close(other, TrialState.FAIL)

    def _close(self, frozen: FrozenTrial, state: TrialState, values: list[float] | None = None) -> None:
        # Finished already: somebody took this process for dead and queued the trial again; theirs stands.
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(frozen._trial_id, state=state, values=values)

    def _set_attr(self, trial_id: int, key: str, value: Any) -> None:
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, key, value)

    @contextmanager
    def _heartbeat(self, trial_id: int) -> Iterator[None]:
        stop = threading.Event()

        def beat() -> None:
            while True:
                # A missed beat is what the grace period is for; a lost database shows at the next write.
                with suppress(*STORAGE_ERRORS):
                    self._storage.record_heartbeat(trial_id)
                if stop.wait(HEARTBEAT_SECONDS):
                    self._storage.remove_session()
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class Backoff:
    """Sleeps that grow with the time since it was made."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def sleep(self, keep_on: Callable[[], bool] = lambda: True) -> None:
        """Sleep, and no longer once `keep_on` is false."""
        now = time.monotonic()
        end = now + min(max(POLL_SECONDS, (now - self._since) / 4), MOST_POLL_SECONDS)
        while (left := end - time.monotonic()) > 0 and keep_on():
            time.sleep(min(POLL_SECONDS, left))


def _fact(trials: Sequence[FrozenTrial], name: str) -> Any:
    kept = [f for f in trials if f.user_attrs.get("fact") == name and "value" in f.user_attrs]
    return min(kept, key=lambda frozen: frozen.number).user_attrs["value"] if kept else None


def _owners(trials: Sequence[FrozenTrial]) -> dict[str, FrozenTrial]:
    """By key, the trial that stands for all with that key."""
    owners: dict[str, FrozenTrial] = {}
    for frozen in trials:
        key = frozen.user_attrs.get("key")
        if key is None or (frozen.state.is_finished() and _finished(frozen) is None):
            continue
        if key not in owners or frozen.number < owners[key].number:
            owners[key] = frozen
    return owners


def _finished(frozen: FrozenTrial | None) -> Outcome | None:
    """The outcome of a trial that ended with one: complete, or failed for a stated reason."""
    if frozen is None or frozen.state not in (TrialState.COMPLETE, TrialState.FAIL):
        return None
    stored = frozen.user_attrs.get("outcome")
    return None if stored is None else Outcome.from_dict(stored)

"""The trial store: nothing is trained twice, nothing stays running for ever, another search is refused."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from layerprobe.errors import LayerprobeError, NotAvailableError, UsageError
from layerprobe.search import trials as trials_module
from layerprobe.search.database import with_retry
from layerprobe.search.space import Trial
from layerprobe.search.trials import TrialStore, _owners, hide_password, storage_url
from layerprobe.search.workers import is_dead, this_worker
from layerprobe.training import Outcome

TRIALS = [
    Trial(mask=(bool(i & 1), bool(i & 2)), lr=1e-3, repeat=repeat) for i in range(4) for repeat in range(2)
]


def running(store: TrialStore) -> int:
    """How many trials are marked as running."""
    return sum(frozen.state == TrialState.RUNNING for frozen in store._trials())


def accuracy(trial: Trial) -> float:
    return 0.1 * sum(trial.mask) + 0.01 * trial.repeat


class Counting:
    def __init__(self, log: Path | None = None, pause: float = 0.0) -> None:
        self.log, self.pause, self.seen = log, pause, []

    def __call__(self, trial: Trial) -> Outcome:
        self.seen.append(trial.key)
        time.sleep(self.pause)
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(trial.key + "\n")
        return Outcome(validation_accuracy=accuracy(trial), train_seconds=self.pause, steps=3)


def test_finished_trials_are_looked_up_with_all_they_said(tmp_path: Path) -> None:
    work = Counting()
    store = TrialStore.open(tmp_path / "study.db", {"budget": 1})
    seen = []
    first = store.outcomes(TRIALS, work, lambda finished, total: seen.append((finished, total)))
    assert seen[0] == (0, len(TRIALS)) and seen[-1] == (len(TRIALS), len(TRIALS)) and seen == sorted(seen)
    again = TrialStore.open(tmp_path / "study.db", {"budget": 1}).outcomes(TRIALS[::-1], work)
    assert Counter(work.seen) == Counter(trial.key for trial in TRIALS)
    assert first == again
    assert first[TRIALS[3]] == Outcome(validation_accuracy=accuracy(TRIALS[3]), steps=3)
    assert [record.trial for record in store.records()] == TRIALS


def test_of_facts_put_at_one_moment_all_processes_read_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [TrialStore.open(tmp_path / "study.db", {}) for _ in range(2)]
    with monkeypatch.context() as neither_sees_the_other:
        neither_sees_the_other.setattr(TrialStore, "get", lambda *_: None)
        for number, store in enumerate(stores):
            store.put("budget", {"budget": number})
    assert [store.get("budget") for store in stores] == [{"budget": 0}] * 2
    assert stores[0].get("scores") is None
    # Facts are no trials.
    assert not stores[0].records() and running(stores[1]) == 0


def test_a_long_batch_waits_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials_module, "QUEUE", 4)
    trials = [Trial(mask=(True,), lr=1e-3, repeat=repeat) for repeat in range(11)]
    store = TrialStore.open(tmp_path / "study.db", {})
    waiting = []

    def work(trial: Trial) -> Outcome:
        states = [frozen.state for frozen in store._trials()]
        waiting.append(states.count(TrialState.WAITING))
        return Outcome(validation_accuracy=accuracy(trial))

    # Waiting trials that nobody here asks for must not keep the others out.
    for repeat in range(100, 110):
        store._enqueue(Trial(mask=(True,), lr=1e-3, repeat=repeat))
    found = store.outcomes(trials, work)
    assert {trial: outcome.validation_accuracy for trial, outcome in found.items()} == {
        t: accuracy(t) for t in trials
    }
    assert max(waiting) - 10 <= 4 and min(waiting) == 10


def test_a_diverged_run_is_an_answer_and_an_exception_is_not(tmp_path: Path) -> None:
    store = TrialStore.open(tmp_path / "study.db", {})
    calls = []

    def diverges(trial: Trial) -> Outcome:
        calls.append(trial)
        return Outcome(validation_accuracy=None, reason="diverged at step 3")

    for _ in range(2):
        outcome = store.outcomes(TRIALS[:1], diverges)[TRIALS[0]]
        assert outcome.validation_accuracy is None and outcome.reason == "diverged at step 3"
    assert len(calls) == 1

    def bug(trial: Trial) -> Outcome:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.outcomes(TRIALS[1:2], bug)
    assert running(store) == 0
    assert store.outcomes(TRIALS[1:2], Counting())[TRIALS[1]].validation_accuracy == accuracy(TRIALS[1])


def test_an_interrupted_trial_is_trained_again_and_the_finished_ones_are_not(tmp_path: Path) -> None:
    store = TrialStore.open(tmp_path / "study.db", {})
    work = Counting()

    def interrupted(trial: Trial) -> Outcome:
        if len(work.seen) == 3:
            raise KeyboardInterrupt
        return work(trial)

    with pytest.raises(KeyboardInterrupt):
        store.outcomes(TRIALS, interrupted)
    assert running(store) == 0 and len(store.records()) == 3
    rest = Counting()
    TrialStore.open(tmp_path / "study.db", {}).outcomes(TRIALS, rest)
    assert Counter(work.seen + rest.seen) == Counter(trial.key for trial in TRIALS)


def test_duplicates_enqueued_by_two_processes_are_trained_once(tmp_path: Path) -> None:
    one, two = (TrialStore.open(tmp_path / "study.db", {}) for _ in range(2))
    for store in (one, two):
        for trial in TRIALS:
            store._enqueue(trial)
    work = Counting()
    two.outcomes(TRIALS, work)
    one.outcomes(TRIALS, work)
    assert Counter(work.seen) == Counter(trial.key for trial in TRIALS)
    states = Counter(trial.state for trial in one._trials())
    assert states == {TrialState.COMPLETE: 8, TrialState.FAIL: 8}


def test_a_stale_heartbeat_from_another_machine_goes_back_into_the_queue(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trials_module, "GRACE_SECONDS", 1)
    store = TrialStore.open(tmp_path / "study.db", {})
    store._enqueue(TRIALS[0])
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(trials_module, "this_worker", lambda: "elsewhere:1:1")
        assert store._claim(_owners(store._trials()), [TRIALS[0].key]) is not None
    assert running(store) == 1
    work = Counting()
    began = time.time()
    assert store.outcomes(TRIALS[:1], work)[TRIALS[0]].validation_accuracy == accuracy(TRIALS[0])
    assert time.time() - began < 20
    assert work.seen == [TRIALS[0].key] and running(store) == 0


def test_only_a_process_that_can_be_looked_for_is_taken_for_dead() -> None:
    code = "from layerprobe.search.workers import this_worker; print(this_worker())"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert is_dead(ended) and not is_dead(this_worker())
    host, rest = ended.split(":", 1)
    # The same name of a host elsewhere, or another container of this one: its process ids say nothing here.
    assert not is_dead(f"{host.split('/')[0]}:{rest}") and not is_dead(f"{host}1:{rest}")
    assert not is_dead("") and not is_dead("elsewhere:1:1")


def test_two_claims_at_the_same_moment_give_the_trial_to_one(tmp_path: Path, monkeypatch) -> None:
    one, two = (TrialStore.open(tmp_path / "study.db", {}) for _ in range(2))
    one._enqueue(TRIALS[0])
    claims = {}

    def slowly(storage: optuna.storages.RDBStorage) -> None:
        check = storage.check_trial_is_updatable

        def waiting(*args: object) -> None:
            check(*args)
            time.sleep(0.5)  # between the look whether the trial still waits and the mark that it runs

        monkeypatch.setattr(storage, "check_trial_is_updatable", waiting)

    def claim(store: TrialStore) -> None:
        claims[store] = store._claim(_owners(store._trials()), [TRIALS[0].key])

    threads = []
    for store in (one, two):
        slowly(store._storage)
        threads.append(threading.Thread(target=claim, args=(store,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claims) == 2 and sum(found is not None for found in claims.values()) == 1


def test_a_process_that_dies_right_after_its_claim_is_found_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trials_module, "GRACE_SECONDS", 1)
    store = TrialStore.open(tmp_path / "study.db", {})
    store._enqueue(TRIALS[0])
    monkeypatch.setattr(store, "_set_attr", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store._claim(_owners(store._trials()), [TRIALS[0].key])
    assert running(store) == 1
    again = TrialStore.open(tmp_path / "study.db", {})
    work = Counting()
    again.outcomes(TRIALS[:1], work)
    assert work.seen == [TRIALS[0].key] and running(again) == 0


def _value_all(path: Path, log: Path, pause: float) -> None:
    TrialStore.open(path, {}).outcomes(TRIALS, Counting(log, pause))


def test_processes_share_the_work_and_a_killed_one_loses_only_its_running_trial(tmp_path: Path) -> None:
    path, log = tmp_path / "study.db", tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_value_all, args=(path, log, 0.15)) for _ in range(2)]
    for process in processes:
        process.start()
    while not log.exists():
        time.sleep(0.02)
    os.kill(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert processes[1].exitcode == 0
    store = TrialStore.open(path, {})
    assert {record.trial for record in store.records()} == set(TRIALS)
    assert running(store) == 0
    # The log is written just before the result: at most the killed trial stands there twice.
    assert sum(Counter(log.read_text().split()).values()) <= len(TRIALS) + 1


def test_another_search_in_the_storage_is_refused_in_one_line(tmp_path: Path) -> None:
    TrialStore.open(tmp_path / "study.db", {"budget": 20, "model": "a"})
    with pytest.raises(UsageError, match=r"holds another search \(budget 20 there, 30 here\)"):
        TrialStore.open(tmp_path / "study.db", {"budget": 30, "model": "a"})
    with pytest.raises(UsageError, match=r"\(stem.size 3 there, 4 here\)"):
        TrialStore.open(tmp_path / "nested.db", {"stem": {"kind": "pca", "size": 3}}).close()
        TrialStore.open(tmp_path / "nested.db", {"stem": {"kind": "pca", "size": 4}})
    optuna.create_study(study_name="mine", storage=f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(UsageError, match=r"already holds another optuna study \('mine'\)"):
        TrialStore.open(tmp_path / "other.db", {})


@pytest.mark.parametrize(
    "url", ["/nowhere/at/all/study.db", "postgresql://nobody:secret@127.0.0.1:1/none", "nosuch://x"]
)
def test_a_storage_that_cannot_be_reached_is_one_line_without_the_password(url: str) -> None:
    with pytest.raises(NotAvailableError) as caught:
        TrialStore.open(url, {})
    message = str(caught.value)
    assert "\n" not in message and "secret" not in message and message.startswith("storage ")


def test_a_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("not a database, but long enough to be looked at " * 10)
    with pytest.raises(NotAvailableError, match="not a database"):
        TrialStore.open(tmp_path / "study.db", {})


@pytest.mark.parametrize(
    "name", ["per%cent", "a%20b", "run?1", "run{1}", "a#b &c=d", "Übung 写", "100%?x={}"]
)
def test_a_path_may_hold_what_means_something_in_a_url(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "study.db"
    path.parent.mkdir()
    TrialStore.open(path, {"run": name}).close()
    assert path.read_bytes().startswith(b"SQLite format 3")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert hide_password(storage_url(path)) == str(path)
    with pytest.raises(UsageError, match="holds another search"):
        TrialStore.open(storage_url(path), {"run": "another"})


def test_a_url_with_braces_is_no_template(tmp_path: Path) -> None:
    TrialStore.open(f"sqlite:///{tmp_path}/a{{1}}.db", {}).close()
    assert (tmp_path / "a{1}.db").is_file()


def test_urls() -> None:
    assert storage_url("/a/b.db") == "sqlite:////a/b.db"
    assert storage_url("postgresql://u:p@h/d") == "postgresql+psycopg://u:p@h/d"
    assert hide_password("postgresql+psycopg://u:p@h/d") == "postgresql+psycopg://u@h/d"
    assert hide_password("postgresql://u:a?b@h/d") == "postgresql://u@h/d"
    assert hide_password("postgresql://h/d?user=u&password=p") == "postgresql://h/d?user=u&password=***"
    assert hide_password("postgresql://h/d?Password=p") == "postgresql://h/d?Password=***"
    assert hide_password("sqlite:////a/b.db") == "/a/b.db"


@pytest.mark.parametrize("days", [-2, 2])
def test_a_clock_that_jumps_frees_no_living_trial(tmp_path: Path, monkeypatch, days: int) -> None:
    """Heartbeats are compared with what was seen of them before, not with the time of day."""
    monkeypatch.setattr(trials_module, "GRACE_SECONDS", 0.6)
    store = TrialStore.open(tmp_path / "study.db", {})
    store._enqueue(TRIALS[0])
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(trials_module, "this_worker", lambda: "elsewhere:1:1")
        assert store._claim(_owners(store._trials()), [TRIALS[0].key]) is not None
    for beat in range(6):
        with store._storage.engine.begin() as connection:
            now = f"datetime('now', '{days * (beat % 2)} days', '{beat} seconds')"
            connection.exec_driver_sql(f"UPDATE trial_heartbeats SET heartbeat = {now}")
        store.revive()
        assert running(store) == 1
        time.sleep(0.2)
    time.sleep(0.7)
    store.revive()
    assert running(store) == 0


class Failing:
    """A call of the database that fails so many times."""

    def __init__(self, times: int, message: str = "server closed the connection unexpectedly") -> None:
        self.left, self.message = times, message

    def __call__(self) -> str:
        self.left -= 1
        if self.left < 0:
            return "done"
        broken = sqlalchemy.exc.OperationalError("select", {}, Exception(self.message))
        raise optuna.exceptions.StorageInternalError("An exception is raised") from broken


def test_a_database_that_comes_back_is_waited_for(monkeypatch, capsys) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("layerprobe.search.database.time.sleep", pauses.append)
    monkeypatch.setattr("layerprobe.progress._quiet", False)  # which a test before may have set
    assert with_retry(Failing(8), "db")() == "done"
    assert pauses == [0.5, 1, 2, 4, 8, 15, 15, 15]
    assert capsys.readouterr().err.count("\n") == 1


def test_a_database_that_stays_away_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr("layerprobe.search.database.RECONNECT_SECONDS", 0.0)
    monkeypatch.setattr("layerprobe.search.database.time.sleep", lambda seconds: None)
    with pytest.raises(NotAvailableError, match=r"storage db has not answered .* the same command continues"):
        with_retry(Failing(100), "db")()


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("database or disk is full", "the disk is full"),
        ('could not extend file "base/5/1": No space left on device', "the disk is full"),
        ("attempt to write a readonly database", "readonly database"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line_at_once(message: str, told: str, monkeypatch) -> None:
    monkeypatch.setattr("layerprobe.search.database.time.sleep", lambda seconds: pytest.fail("it waited"))
    with pytest.raises(
        LayerprobeError, match=rf"storage db cannot be written: .*{told}; finished trainings are kept"
    ):
        with_retry(Failing(100, message), "db")()


def test_an_interrupted_training_does_not_wait_for_the_database(tmp_path: Path, monkeypatch) -> None:
    store = TrialStore.open(tmp_path / "study.db", {})
    monkeypatch.setattr("layerprobe.search.database.time.sleep", lambda seconds: pytest.fail("it waited"))

    def stopped(trial: Trial) -> Outcome:
        def gone(*args: object, **kwargs: object) -> None:
            raise sqlalchemy.exc.OperationalError("select", {}, Exception("connection refused"))

        monkeypatch.setattr(store._storage, "set_trial_state_values", with_retry(gone, "db"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.outcomes(TRIALS[:1], stopped)


def test_an_idle_worker_reads_the_database_less_than_thirty_times_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only sleeping moves: five minutes without work, from the first second on."""
    store = TrialStore.open(tmp_path / "study.db", {"budget": 1})
    clock, looks, plain = [0.0], [], store._trials

    class Clock:
        monotonic = staticmethod(lambda: clock[0])
        sleep = staticmethod(lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    monkeypatch.setattr(trials_module, "time", Clock)
    monkeypatch.setattr(store, "_trials", lambda: looks.append(clock[0]) or plain())
    store.serve(Counting(), lambda: clock[0] < 300)
    minutes = Counter(int(at // 60) for at in looks)
    assert max(minutes.values()) <= 30
    assert minutes[4] <= 12
    assert max(after - before for before, after in itertools.pairwise(looks)) < 6.01

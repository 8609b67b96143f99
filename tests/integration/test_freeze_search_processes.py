"""Searches that are killed, joined and shared: nothing finished is lost, the answer does not change."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from optuna.trial import TrialState
from postgres_server import Server

from layerprobe.search.trials import TrialStore

WORKER = Path(__file__).with_name("freeze_search_worker.py")
ARGUMENTS = {"made": "up", "budget": 60.0}


def start(
    storage: str | Path, workers: int, log: Path, answer: Path, *, pause: float = 0.1
) -> subprocess.Popen:
    command = [sys.executable, str(WORKER), str(storage), str(workers), str(log), str(answer), str(pause)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, start_new_session=True, env=environment, stderr=subprocess.DEVNULL)


def kill(process: subprocess.Popen) -> None:
    """kill -9 for the search and its helper processes, all at once."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finished(storage: str) -> set[str]:
    store = TrialStore.open(storage, ARGUMENTS)
    keys = {record.trial.key for record in store.records()}
    store.close()
    return keys


def running(store: TrialStore) -> int:
    """How many trials are marked as running."""
    return sum(frozen.state == TrialState.RUNNING for frozen in store._trials())


def started(log: Path) -> list[tuple[str, int]]:
    """Key and process of every training that began, in order."""
    if not log.exists():
        return []
    lines = (line.split(" ") for line in log.read_text().splitlines())
    return [(key, int(pid)) for _, key, pid in lines]


def undisturbed(folder: Path) -> dict:
    folder.mkdir()
    process = start(folder / "study.db", 1, folder / "log", folder / "answer.json", pause=0.0)
    assert process.wait(600) == 0
    counts = Counter(key for key, _ in started(folder / "log"))
    assert set(counts.values()) == {1}, "an undisturbed search trains every trial once"
    return json.loads((folder / "answer.json").read_text())


def killed_and_repeated(storage: str, folder: Path, *, kills: int, seed: int) -> None:
    """Kill a search with two workers at random moments; nothing finished may be trained again or lost.

    Every fourth time one of the two is killed first, and the other goes on alone until it is its turn.
    """
    draw = random.Random(seed)
    known: set[str] = set()
    for attempt in range(kills):
        log = folder / f"log-{attempt}"
        process = start(storage, 2, log, folder / "answer.json", pause=1.0)
        deadline = time.time() + 300
        while len({pid for _, pid in started(log)}) < 2 and process.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        assert process.poll() is None, "each kill must hit a running search"
        time.sleep(draw.uniform(0.0, 1.2))
        last = {pid: key for key, pid in started(log)}  # what each process trains
        victim = draw.choice(sorted(last)) if attempt % 4 == 3 and last else None
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
            time.sleep(draw.uniform(0.0, 1.2))
        kill(process)
        keys = [key for key, _ in started(log)]
        assert not set(keys) & known, f"trained again although finished: {sorted(set(keys) & known)}"
        twice = {key for key, count in Counter(keys).items() if count > 1}
        assert twice <= {last.get(victim)}, f"trained twice: {sorted(twice)}"
        now = finished(storage)
        assert known <= now, f"lost: {sorted(known - now)}"
        assert len(set(keys) - now) <= 2, "no more is lost than what was running"
        known = now
    assert not (folder / "answer.json").exists(), "each kill must hit a running search"
    log = folder / "log-last"
    process = start(storage, 2, log, folder / "answer.json")
    assert process.wait(600) == 0
    keys = [key for key, _ in started(log)]
    assert not set(keys) & known and len(keys) == len(set(keys))
    store = TrialStore.open(storage, ARGUMENTS)
    assert running(store) == 0
    keys = [record.trial.key for record in store.records()]
    assert len(keys) == len(set(keys)), "every trial is finished once"
    store.close()


@pytest.mark.slow
def test_a_killed_search_goes_on_and_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "undisturbed")
    killed_and_repeated(str(tmp_path / "study.db"), tmp_path, kills=2, seed=0)
    assert json.loads((tmp_path / "answer.json").read_text()) == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_at_twenty_random_moments(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "undisturbed")
    killed_and_repeated(str(tmp_path / "study.db"), tmp_path, kills=20, seed=1)
    assert json.loads((tmp_path / "answer.json").read_text()) == expected


@pytest.mark.slow
def test_two_searches_started_at_the_same_moment_share_the_work(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "undisturbed")
    answers = [tmp_path / f"answer-{side}.json" for side in range(2)]
    logs = [tmp_path / f"log-{side}" for side in range(2)]
    sides = [start(tmp_path / "study.db", 1, log, answer) for log, answer in zip(logs, answers, strict=True)]
    assert [side.wait(600) for side in sides] == [0, 0]
    assert [json.loads(answer.read_text()) for answer in answers] == [expected, expected]
    counts = Counter(key for log in logs for key, _ in started(log))
    assert set(counts.values()) == {1}, "no plan is trained twice"
    assert all(started(log) for log in logs), "both took part"


@pytest.mark.timeout(600)
def test_two_machines_share_one_postgresql_database(tmp_path: Path, postgres: str) -> None:
    expected = undisturbed(tmp_path / "undisturbed")
    answers = [tmp_path / f"answer-{side}.json" for side in range(2)]
    logs = [tmp_path / f"log-{side}" for side in range(2)]
    sides = [start(postgres, 1, log, answer) for log, answer in zip(logs, answers, strict=True)]
    assert [side.wait(600) for side in sides] == [0, 0]
    assert [json.loads(answer.read_text()) for answer in answers] == [expected, expected]
    counts = Counter(key for log in logs for key, _ in started(log))
    assert set(counts.values()) == {1} and all(started(log) for log in logs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_outlives_a_restart_of_its_database(tmp_path: Path, postgres_server: Server) -> None:
    """Stopped for twenty seconds while two workers train; nothing is lost, and the answer is the same."""
    expected = undisturbed(tmp_path / "undisturbed")
    log = tmp_path / "log"
    process = start(postgres_server.url, 2, log, tmp_path / "answer.json", pause=0.5)
    while len(started(log)) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    postgres_server.stop()
    time.sleep(20)
    assert process.poll() is None
    postgres_server.start()
    assert process.wait(300) == 0
    assert json.loads((tmp_path / "answer.json").read_text()) == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_at_twenty_random_moments_with_postgresql(tmp_path: Path, postgres: str) -> None:
    expected = undisturbed(tmp_path / "undisturbed")
    killed_and_repeated(postgres, tmp_path, kills=20, seed=2)
    assert json.loads((tmp_path / "answer.json").read_text()) == expected

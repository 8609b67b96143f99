"""Every long command, stopped by every signal at random moments: continued, it ends as the undisturbed one.

Nothing is left over, no process outlives its command by fifteen seconds, no lock stays. How many moments a pair of
command and signal gets stands in $LAYERPROBE_KILLS (default 10); what was done, as JSON lines, goes to the file named
in $LAYERPROBE_KILLS_LOG.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from families import save

MOMENTS = int(os.environ.get("LAYERPROBE_KILLS", "10"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TASK = ("--task", "digits", "--limit", "60", "--patch-size", "4", "--quiet")
TIMES = ["images_per_second", "seconds", "train_seconds", "call_seconds"]
SEARCH = ("freeze-search", "--budget", "5", "--bridge-steps", "2", "--steps", "4", "--batch-size", "8",
          "--seeds", "2", "--no-scores", "--workers", "2")  # fmt: skip
JOBS: dict[str, tuple[str, ...]] = {
    "features": ("features", "--batch-size", "1"),
    "bridge": ("bridge", "--steps", "60", "--batch-size", "16", "--checkpoint-every", "7"),
    "bridge-2": ("bridge", "--steps", "30", "--batch-size", "16", "--checkpoint-every", "7"),
    "search": SEARCH,
    "search-postgresql": SEARCH,
    "evaluate": (
        "evaluate",
        "--arms",
        "language,random",
        "--steps",
        "15",
        "--batch-size",
        "16",
        "--seeds",
        "2",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model; everything is imported by its side, so that a forked command starts at once."""
    import layerprobe as lp
    from layerprobe.plotting import bridge, search  # noqa: F401

    folder = save("llama", tmp_path_factory.mktemp("model") / "llama")
    lp.load_backbone(str(folder), patch_size=4, device="cpu").prepare(lp.load_task("digits", limit=60))
    return folder


def start(job: str, model: Path, folder: Path, storage: str | None) -> list[int]:
    """The command in a forked process of its own session, or in two that train together."""
    arguments = ["layerprobe", *JOBS[job], "--model", str(model), *TASK, "-o", str(folder)]
    if job == "features":
        arguments += ["--cache-dir", str(folder / "store")]
    if storage is not None:
        arguments += ["--storage", storage]
    world = 2 if job == "bridge-2" else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                # Of Ctrl-C, the command's own answer is tested: until it begins, the process just dies of it.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.setsid()
                silent = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(silent, 1)
                os.dup2(silent, 2)
                if world > 1:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
                    )  # fmt: skip
                sys.argv = arguments
                from layerprobe.cli.main import main

                signal.signal(signal.SIGINT, signal.default_int_handler)
                main()
            except SystemExit as leave:
                code = int(leave.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def wait(children: list[int], seconds: float) -> list[int | None]:
    """Exit codes within some seconds, None for what still runs."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.005)
    return [codes.get(child) for child in children]


def living(session: int) -> list[int]:
    """Processes of a session, zombies aside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def result(job: str, folder: Path) -> dict[str, object]:
    """What the command made, without what tells the time."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if (
            path.name.startswith("study.db") or path.name == "lock"
        ):  # SQLite's own, and the store's, which stays
            continue
        if path.suffix == ".csv":
            frame = pd.read_csv(path)
            if "metric" in frame:
                frame = frame[
                    ~frame["metric"].isin(TIMES) & ~frame["metric"].astype(str).str.endswith("seconds")
                ]
            if path.name == "trials.csv":  # numbered in the order in which workers took them
                frame = frame[["plan", "lr", "repeat", "fidelity", "validation_accuracy", "test_accuracy"]]
                frame = frame.sort_values(list(frame.columns))
            dropped = [
                c for c in frame if c in TIMES or "second" in c or c in ("worker", "finished", "number")
            ]
            found[name] = frame.drop(columns=dropped).to_csv(index=False)
        elif path.suffix in (".safetensors", ".npy") or path.name in ("config.json", "labels.csv"):
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> Iterator[Callable[[str], str | None]]:
    """Of a search in PostgreSQL, a database of its own for each run."""

    def address(name: str) -> str | None:
        if request.node.callspec.params["job"] != "search-postgresql":
            return None
        import psycopg

        url = request.getfixturevalue("postgres")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return url.rpartition("/")[0] + f"/{name}"

    yield address


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job", JOBS)
def test_stopped_at_random_moments(
    job: str, model: Path, tmp_path: Path, storage: Callable[[str], str | None]
) -> None:
    began = time.monotonic()
    assert set(wait(start(job, model, tmp_path / "whole", storage("whole")), 600)) == {0}, log_of(
        tmp_path / "whole"
    )
    seconds, expected = time.monotonic() - began, result(job, tmp_path / "whole")
    draw = random.Random(job)
    hits = 0
    for number in SIGNALS:
        for moment in range(MOMENTS):
            name = f"{number.name.lower()}-{moment}"
            folder, place = tmp_path / name, storage(name)
            children = start(job, model, folder, place)
            at = draw.uniform(0, seconds)
            early = wait(children, at)
            for child, code in zip(children, early, strict=True):
                if code is None:
                    os.kill(child, number)
            codes = [a if a is not None else b for a, b in zip(early, wait_for(children, early), strict=True)]
            assert None not in codes, f"{name}: still runs thirty seconds after {number.name}"
            allowed = {0, -int(number), 128 + int(number), 1 if job == "bridge-2" else 0}
            assert set(codes) <= allowed, f"{name}: {codes} {log_of(folder)}"
            hits += codes != [0] * len(codes)
            deadline = time.monotonic() + 15
            while (
                left := [pid for child in children for pid in living(child)]
            ) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not left, f"{name}: {left} outlive their command"
            if set(codes) != {0} or job not in ("bridge", "bridge-2"):
                assert set(wait(start(job, model, folder, place), 600)) == {0}, f"{name}: {log_of(folder)}"
            now = result(job, folder)
            assert now.keys() == expected.keys(), f"{name}: {sorted(now.keys() ^ expected.keys())}"
            differ = [key for key in expected if now[key] != expected[key]]
            assert not differ, f"{name}: {differ}"
    note(job=job, signals=len(SIGNALS), moments=MOMENTS, stopped=hits, undisturbed_seconds=round(seconds, 1))


def wait_for(children: list[int], early: list[int | None]) -> list[int | None]:
    rest = [child for child, code in zip(children, early, strict=True) if code is None]
    codes = iter(wait(rest, 30))
    return [None if code is not None else next(codes) for code in early]


def log_of(folder: Path) -> str:
    path = folder.with_suffix(".log")
    return path.read_text(errors="replace")[-1500:] if path.exists() else ""


def note(**facts: object) -> None:
    if target := os.environ.get("LAYERPROBE_KILLS_LOG"):
        with Path(target).open("a") as stream:
            stream.write(json.dumps(facts) + "\n")

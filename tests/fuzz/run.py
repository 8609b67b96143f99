"""Change valid files, read them, count what goes wrong: `make fuzz`, or python tests/fuzz/run.py N [SEED] [-o FILE].

Every input is read by a child process. Wrong is: a traceback, a message of more than one line or over 300 characters, a
control character in it, more than 20 seconds, more than 1.5 GiB, a file opened for writing outside the run folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", MPLBACKEND="Agg", OMP_NUM_THREADS="1")

SECONDS = 20
BYTES = int(1.5 * 2**30)
READ, REFUSED, WRONG = 0, 3, 1


@dataclass(frozen=True)
class Outcome:
    """What one input came to: `verdict` is read, refused, traceback, message, hang, memory or outside."""

    kind: str
    number: int
    change: str
    verdict: str
    text: str
    seconds: float
    peak_bytes: int


def one_input(kind: str, number: int, seed: int, work: Path) -> Outcome:
    """Change the example of a kind in a folder of its own, and read it in a child."""
    from mutate import mutate, seed_of

    folder = work / "inputs" / f"{kind}-{number}"
    shutil.copytree(work / "seeds" / kind, folder)
    change = mutate(folder, random.Random(seed_of(kind, number, seed)))
    said = work / f"said-{number}"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _read_and_leave(kind, folder, work, said)
    status, usage = 0, None
    while usage is None:
        pid, status, found = os.wait4(child, os.WNOHANG)
        if pid:
            usage = found
        elif time.monotonic() - began > SECONDS:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
        else:
            time.sleep(0.002)
    seconds, peak = time.monotonic() - began, usage.ru_maxrss * 1024
    text = said.read_text(errors="replace") if said.exists() else ""
    said.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    verdict = _verdict(os.waitstatus_to_exitcode(status), text, seconds, peak)
    return Outcome(kind, number, change, verdict, text, seconds, peak)


def _verdict(code: int, text: str, seconds: float, peak: int) -> str:
    if seconds > SECONDS:
        return "hang"
    if peak > BYTES:
        return "memory"
    if code == 4:
        return "outside"
    if code not in (READ, REFUSED):
        return "traceback"
    if code == REFUSED and (len(text) > 300 or not text.isprintable() or not text):
        return "message"
    return "read" if code == READ else "refused"


def _read_and_leave(kind: str, folder: Path, work: Path, said: Path) -> None:
    """In the child: read, write down what was said, leave with a code."""
    from seeds import READERS

    from layerprobe.errors import LayerprobeError
    from layerprobe.progress import error_line

    code, text = READ, ""
    opened: list[str] = []
    places = tuple(
        os.fspath(path) for path in (folder, work / "cache", Path(tempfile.gettempdir()), "/dev/null")
    )

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = arguments[0]
            if isinstance(path, (str, bytes)) and not os.fsdecode(path).startswith(
                (*places, "/proc", "/dev/shm")
            ):
                opened.append(os.fsdecode(path))

    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    sys.addaudithook(watch)
    try:
        READERS[kind](folder)
    except LayerprobeError as error:
        # As the command line shows it.
        code, text = REFUSED, error_line(error)
        text = text.replace(os.fspath(folder.parent), "…")
    except BaseException:
        code, text = WRONG, traceback.format_exc()
    if opened and code != WRONG:
        code, text = 4, opened[0]
    said.write_text(text, errors="backslashreplace")
    os._exit(code)


def prepare(work: Path) -> None:
    """The examples, and a process that has everything imported, so that a child costs milliseconds."""
    os.environ["LAYERPROBE_CACHE"] = os.fspath(work / "cache")
    tempfile.tempdir = os.fspath(work / "tmp")
    (work / "tmp").mkdir()
    (work / "inputs").mkdir()
    import seeds
    import torch

    torch.set_num_threads(1)
    seeds.make_seeds(work / "seeds")
    for kind in seeds.READERS:  # a child that reads an unchanged example succeeds
        folder = work / "inputs" / kind
        shutil.copytree(work / "seeds" / kind, folder)
        child = os.fork()
        if child == 0:
            _read_and_leave(kind, folder, work, work / "said")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == READ, f"the example of {kind} is not read: {(work / 'said').read_text()}"
        shutil.rmtree(folder)


def run(n: int, seed: int, work: Path) -> list[Outcome]:
    """`n` inputs, spread over all kinds, two at a time."""
    import seeds

    kinds = list(seeds.READERS)
    inputs = [(kinds[i % len(kinds)], i, seed, work) for i in range(n)]
    pool = multiprocessing.get_context("fork").Pool(2)
    with contextlib.closing(pool):
        outcomes = pool.starmap(one_input, inputs, chunksize=1)
    pool.join()  # only then their processor time is counted
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description="Change valid files, read them, count what goes wrong.")
    parser.add_argument("n", type=int, help="inputs, spread over all formats")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("-o", "--output", type=Path, help="write the figures into this file as well")
    options = parser.parse_args()
    n, seed = options.n, options.seed
    began, processor = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory(prefix="layerprobe-fuzz-") as name:
        work = Path(name)
        prepare(work)
        outcomes = run(n, seed, work)
    counts = Counter(outcome.verdict for outcome in outcomes)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = {
        "inputs": n,
        "seed": seed,
        **{
            verdict: counts[verdict]
            for verdict in ("read", "refused", "traceback", "message", "hang", "memory", "outside")
        },
        "by_format": dict(Counter(outcome.kind for outcome in outcomes)),
        "peak_mebibytes": max(outcome.peak_bytes for outcome in outcomes) >> 20,
        "slowest_seconds": round(max(outcome.seconds for outcome in outcomes), 2),
        "seconds": round(time.monotonic() - began),
        "processor_seconds": round(used.ru_utime + used.ru_stime - processor.ru_utime - processor.ru_stime),
    }
    for outcome in outcomes:
        if outcome.verdict not in ("read", "refused"):
            sys.stderr.write(
                f"\n{outcome.verdict}: {outcome.kind} {outcome.number}: {outcome.change}\n{outcome.text[-1500:]}\n"
            )
    figures = json.dumps(summary, indent=1) + "\n"
    sys.stdout.write(figures)
    if options.output:
        options.output.write_text(figures, encoding="utf-8")
    sys.exit(any(counts[verdict] for verdict in ("traceback", "message", "hang", "memory", "outside")))


if __name__ == "__main__":
    main()

"""Several processes fill one feature store: the bytes of one process, whoever dies when."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from families import save

import layerprobe as lp
from layerprobe.hooks import feature_store
from layerprobe.hooks.feature_store import STRIPES, FeatureStore, list_stores
from layerprobe.hooks.stripes import MOST_STRIPES, begun, stripe_rows

KILLS = 10


def extract(llama: Path, cache: Path, rank: int, world: int, limit: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    feature_store.RECORD_SECONDS = 0.02
    backbone = lp.load_backbone(str(llama), patch_size=2, device="cpu")
    task = lp.load_task("digits", limit=limit)
    lp.extract_features(backbone, task, "train", batch_size=2, cache_dir=cache, quiet=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


def start(llama: Path, cache: Path, *, rank: int = 0, world: int = 1, limit: int = 1000) -> BaseProcess:
    """A copy of this process, which has loaded what takes long to load, that extracts features."""
    made = multiprocessing.get_context("fork").Process(
        target=extract, args=(llama, cache, rank, world, limit)
    )
    made.start()
    return made


def ended(*processes: BaseProcess) -> list[int | None]:
    for one in processes:
        one.join()
    return [one.exitcode for one in processes]


def files(cache: Path) -> dict[str, bytes]:
    """Every file of features and their checksums, by its place in the store."""
    kept = sorted([*cache.glob("*/*.npy"), *cache.glob("*/checksums.json")])
    return {str(path.relative_to(cache)): path.read_bytes() for path in kept}


def parts(cache: Path) -> int:
    """Bytes of stripes on disk."""
    total = 0
    for path in cache.glob(f"*/{STRIPES}/*/*.npy*"):
        try:
            total += path.stat().st_blocks
        except FileNotFoundError:
            return -1
    return total


@pytest.mark.parametrize(
    ("n_rows", "batch_size"), [(1, 256), (10, 4), (64 * 3, 3), (10_001, 3), (50_000, 256)]
)
def test_stripes_are_whole_batches_and_cover_all_rows(n_rows: int, batch_size: int) -> None:
    stripes = stripe_rows(n_rows, batch_size)
    assert [row for rows in stripes for row in range(n_rows)[rows]] == list(range(n_rows))
    assert len(stripes) <= MOST_STRIPES
    assert all(rows.start % batch_size == 0 for rows in stripes)


def test_two_processes_end_with_the_bytes_of_one(llama: Path, tmp_path: Path) -> None:
    assert ended(start(llama, tmp_path / "one", limit=100)) == [0]
    both = [start(llama, tmp_path / "two", rank=rank, world=2, limit=100) for rank in range(2)]
    assert ended(*both) == [0, 0]
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert not list(tmp_path.glob(f"two/*/{STRIPES}"))


@pytest.mark.slow
def test_a_process_killed_at_any_moment_costs_no_byte(llama: Path, tmp_path: Path) -> None:
    """The other one does its work; where both are killed, a single process continues their stripes."""
    assert ended(start(llama, tmp_path / "one")) == [0]
    expected, draw = files(tmp_path / "one"), random.Random()

    def start_both(cache: Path) -> list[BaseProcess]:
        """Two processes that have begun to write."""
        both = [start(llama, cache, rank=rank, world=2) for rank in range(2)]
        while not parts(cache):
            assert both[0].is_alive()
            time.sleep(0.005)
        return both

    undisturbed = start_both(tmp_path / "two")
    began = time.monotonic()
    assert ended(*undisturbed) == [0, 0]
    seconds, interrupted = time.monotonic() - began, 0
    for number in range(KILLS):
        cache = tmp_path / f"killed{number}"
        both = start_both(cache)
        time.sleep(draw.uniform(0, 0.8 * seconds))
        victims = both if number % 3 == 2 else [both[number % 2]]
        for victim in victims:
            victim.kill()
        interrupted += -signal.SIGKILL in ended(*both)
        if victims == both:
            assert ended(start(llama, cache)) == [0]
        assert files(cache) == expected, f"after kill {number}"
    assert interrupted > KILLS // 2


COMMANDS = {
    "features": [],
    "probe": ["--controls", "pixels,random,labels", "--C", "0.01,1"],
    "attribute": ["--images", "20", "--methods", "skip,mean_ablation,update,gradient_x_activation"],
}


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=() if name == "features" else pytest.mark.slow) for name in COMMANDS]
)
def test_the_command_on_two_processes(command: str, llama: Path, tmp_path: Path) -> None:
    """The numbers are those of one process to the last bit, and the stores have the same bytes."""

    def run(cache: str, *more: str, launcher: tuple[str, ...] = ()) -> dict:
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "layerprobe", command, "--model", str(llama), "--task", "digits",
             "--json", "--limit", "100", "--patch-size", "2", "--batch-size", "8", "--device", "cpu",
             *COMMANDS[command], *more],
            env={**os.environ, "OMP_NUM_THREADS": "1", "LAYERPROBE_CACHE": str(tmp_path / cache)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)

    one, two = run("one"), run("two", "--workers", "2")
    assert two["rows"] == one["rows"]
    assert files(tmp_path / "two" / "features") == files(tmp_path / "one" / "features")
    if command == "probe":
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        assert run("three", launcher=torchrun)["rows"] == one["rows"]
        assert not list((tmp_path / "three" / "shared").iterdir())


def test_a_store_with_stripes_is_listed_as_unfinished(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, {"task": "t"}, n_rows=4, dtype="float32")
    with store.writer([], batch_size=2):
        pass
    assert not begun(store)
    (store.folder / STRIPES / "a").mkdir(parents=True)
    (store.folder / STRIPES / "a" / "x").write_bytes(b"12345")
    assert begun(store)
    (row,) = list_stores(tmp_path)
    assert row["unfinished"]
    assert row["bytes"] > 5

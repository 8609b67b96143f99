"""Debiased CKA of 13 × 13 layers of width 768: time, memory and accuracy against peers and against the floor.

    OMP_NUM_THREADS=1 python benchmarks/similarity.py --output results/similarity
    python benchmarks/similarity.py --only time --sizes 2000          # one part

One thread on every side, processor time rather than wall time, sides interleaved within one run; a ratio is
the median over rounds of the ratio within the round. The features are float32 .npy files, memory-mapped by
layerprobe and held in memory for the peer. Peers (optional): pytorch-cka==1.1.3 and calibrated-similarity.

Parts
-----
time : layerprobe (values and standard errors) against `cka.cka_from_features` (values), and against the floor:
    the multiplications that the Gram form needs, at the measured rate of float32 matrix products.
memory : peak anonymous memory of a comparison, above what the process held before (mapped files not counted).
accuracy : largest deviation from float64, plain and with columns offset by 300 σ and features scaled by 1e-3.
permutations : processor time per permutation of the whole matrix, against `calibrate_layers`, whose similarity
    function is given debiased CKA in its cheapest form (feature space, float32).
"""

from __future__ import annotations

from common import circumstances, processor_time, version_of  # before numpy and torch

# isort: split
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerprobe.files import write_json
from layerprobe.metrics.similarity.all_pairs import pairwise_cka
from layerprobe.metrics.similarity.measures import debiased_linear_cka
from layerprobe.metrics.similarity.permutation import permutation_null
from layerprobe.tables import tidy, write_frame

LAYERS, WIDTH, COMMON = 13, 768, 64
PARTS = ("time", "memory", "accuracy", "permutations")
Row = dict[str, Any]


def make_features(folder: Path, n: int, *, awkward: bool = False) -> None:
    """Two models of 13 layers as .npy files: shared directions grow with depth.

    `awkward`: eight columns of every layer carry 300 σ, and every second layer is scaled by 1e-3.
    """
    rng = np.random.default_rng(0)
    common = rng.standard_normal((n, COMMON), dtype=np.float32)
    for side in "ab":
        for layer in range(LAYERS):
            mixing = rng.standard_normal((COMMON, WIDTH), dtype=np.float32)
            x = 0.3 * layer / LAYERS * (common @ mixing) + rng.standard_normal((n, WIDTH), dtype=np.float32)
            if awkward:
                x[:, rng.choice(WIDTH, 8, replace=False)] += np.float32(300 * x.std())
                x *= np.float32(1e-3 if layer % 2 else 1.0)
            np.save(folder / f"{side}{layer}.npy", x)


def load(folder: Path, side: str, mode: str | None) -> list[np.ndarray]:
    return [np.load(folder / f"{side}{layer}.npy", mmap_mode=mode) for layer in range(LAYERS)]


def product_rate() -> float:
    """Best multiplications per second of a float32 matrix product of friendly shape."""
    x, y = torch.randn(1024, WIDTH), torch.randn(1024, WIDTH)
    seconds = min(processor_time(lambda: torch.mm(x, y.T))[0] for _ in range(20))
    return 1024 * 1024 * WIDTH / seconds


def bench_time(n: int, rounds: int) -> list[Row]:
    version = version_of("pytorch-cka")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_features(folder, n)
        a, b = load(folder, "a", "r"), load(folder, "b", "r")
        ours, theirs, rates = [], [], []
        for _ in range(rounds):
            rates.append(product_rate())
            seconds, found = processor_time(lambda: pairwise_cka(a, b))
            ours.append(seconds)
            if version is not None:
                from cka import cka_from_features

                x, y = ([torch.from_numpy(part) for part in load(folder, side, None)] for side in "ab")
                seconds, peer = processor_time(lambda x=x, y=y: cka_from_features(x, y))
                theirs.append(seconds)
                del x, y
    floor = 2 * LAYERS * n * n / 2 * WIDTH + LAYERS * LAYERS * n * n / 2
    rows = [
        row("cpu_seconds", statistics.median(ours), n, subject=f"layerprobe ({found.method})"),
        row("ratio_to_floor", statistics.median(o * r / floor for o, r in zip(ours, rates, strict=True)), n),
    ]
    if version is None:
        return [*rows, row("ratio_to_peer", None, n, reason="pytorch-cka==1.1.3 is not installed")]
    ratios = [o / t for o, t in zip(ours, theirs, strict=True)]
    # On benign features the peer's own float32 error is small enough to show that both compute the same.
    difference = float(np.abs(found.values - peer.numpy()).max())
    return [
        *rows,
        row("cpu_seconds", statistics.median(theirs), n, subject=f"pytorch-cka {version}"),
        row("ratio_to_peer", statistics.median(ratios), n, low=min(ratios), high=max(ratios), rounds=rounds),
        row("largest_difference_to_peer", difference, n),
    ]


def bench_memory(n: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        make_features(Path(name), n)
        done = subprocess.run(
            [sys.executable, __file__, "--child-memory", name],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ,
        )
    found = json.loads(done.stdout)
    return [
        row("peak_mib_above_inputs", found["mib"], n, subject=f"layerprobe ({found['method']})"),
        row(
            "cpu_seconds", found["seconds"], n, subject=f"layerprobe ({found['method']}), measured for memory"
        ),
    ]


def child_memory(folder: Path) -> None:
    a, b = load(folder, "a", "r"), load(folder, "b", "r")
    pairwise_cka([a[0][:600]], [b[0][:600]])  # loads what the libraries load lazily
    before, peak, stop = anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds, found = processor_time(lambda: pairwise_cka(a, b))
    stop.set()
    watcher.join()
    print(json.dumps({"mib": peak - before, "seconds": seconds, "method": found.method}))


def anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this part needs Linux: /proc/self/status has no RssAnon")


def bench_accuracy(n: int, cells: int) -> list[Row]:
    rng = np.random.default_rng(1)
    rows = []
    for awkward in (False, True):
        kind = "columns offset by 300 σ, half the layers × 1e-3" if awkward else "plain"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_features(folder, n, awkward=awkward)
            a, b = load(folder, "a", "r"), load(folder, "b", "r")
            pairs = [(int(i), int(j)) for i, j in rng.integers(0, LAYERS, (cells, 2))]
            exact = np.array([debiased_linear_cka(a[i], b[j]) for i, j in pairs])
            results = {f"layerprobe ({m})": pairwise_cka(a, b, method=m).values for m in ("gram", "features")}
            version = version_of("pytorch-cka")
            if version is not None:
                from cka import cka_from_features

                x, y = ([torch.from_numpy(part) for part in load(folder, side, None)] for side in "ab")
                results[f"pytorch-cka {version}"] = cka_from_features(x, y).double().numpy()
                del x, y
        for subject, values in results.items():
            error = float(np.abs(np.array([values[cell] for cell in pairs]) - exact).max())
            reason = None if np.isfinite(error) else "not a number"
            rows.append(
                row(
                    "largest_error",
                    error if reason is None else None,
                    n,
                    subject=subject,
                    kind=kind,
                    reason=reason,
                )
            )
    return rows


def bench_permutations(n: int) -> list[Row]:
    version = version_of("calibrated-similarity")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_features(folder, n)
        a, b = load(folder, "a", "r"), load(folder, "b", "r")
        ours, null = processor_time(lambda: permutation_null(a, b, n_permutations=1000))
        # All shifts come at once; the bar speaks of 1000, so the surplus is not counted in our favour.
        per_permutation = ours / 1000
        rows = [
            row("cpu_seconds", ours, n, subject=f"layerprobe, {null.n_permutations} permutations of 13 × 13"),
            row("cpu_seconds_per_permutation", per_permutation, n, subject="layerprobe, of 1000 asked for"),
            row("sd_over_theory", float(null.samples.std() / np.sqrt(2 / (n * (n - 3)))), n),
        ]
        if version is None:
            return [*rows, row("ratio_to_peer", None, n, reason="calibrated-similarity is not installed")]
        from calibrated_similarity import calibrate_layers

        x, y = ([torch.from_numpy(part) for part in load(folder, side, None)] for side in "ab")
        # K permutations cost K + 1 matrices; the difference of two K is the price of permutations alone.
        one, _ = processor_time(lambda: calibrate_layers(x, y, feature_space_cka, K=1))
        three, _ = processor_time(lambda: calibrate_layers(x, y, feature_space_cka, K=3))
    theirs = (three - one) / 2
    return [
        *rows,
        row("cpu_seconds_per_permutation", theirs, n, subject=f"calibrated-similarity {version}"),
        row("ratio_to_peer", per_permutation / theirs, n, subject="permutations"),
    ]


def feature_space_cka(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Debiased CKA for `calibrate_layers`: three d×d products, no Gram matrix."""
    n = len(x)
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    k, m = x.square().sum(dim=1), y.square().sum(dim=1)

    def numerator(left: torch.Tensor, right: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (
            (left.T @ right).square().sum() - n / (n - 2) * (p @ q) + p.sum() * q.sum() / ((n - 1) * (n - 2))
        )

    return numerator(x, y, k, m) / (numerator(x, x, k, k) * numerator(y, y, m, m)).sqrt()


def row(metric: str, value: float | None, n: int, **more: Any) -> Row:
    return {"metric": metric, "value": value, "n": n, **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 8000], help="images of the timing")
    parser.add_argument("--memory-sizes", type=int, nargs="+", default=[8000, 32000])
    parser.add_argument("--rounds", type=int, default=7, help="rounds at n ≤ 2000; a third of that above")
    parser.add_argument("--output", type=Path, help="folder for benchmark.csv and one JSON a part")
    parser.add_argument("--child-memory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child_memory:
        child_memory(arguments.child_memory)
        return
    sizes = {"time": arguments.sizes, "memory": arguments.memory_sizes}
    for part in arguments.only:
        for n in sizes.get(part, [2000]):
            rows = run(part, n, arguments.rounds)
            for item in rows:
                show(part, item)
            if arguments.output:
                keep(arguments.output, part, n, rows)


def run(part: str, n: int, rounds: int) -> list[Row]:
    if part == "time":
        return bench_time(n, rounds if n <= 2000 else max(2, rounds // 3))
    if part == "memory":
        return bench_memory(n)
    return bench_accuracy(n, cells=24) if part == "accuracy" else bench_permutations(n)


def show(part: str, item: Row) -> None:
    value = "undefined" if item["value"] is None else f"{item['value']:.4g}"
    notes = ", ".join(
        f"{key} {note:.3g}" if isinstance(note, float) else f"{note}"
        for key, note in item.items()
        if key not in ("metric", "value", "n") and note is not None
    )
    print(f"{part:<13} n={item['n']:<6} {item['metric']:<28} {value:>10}  {notes}", flush=True)


def keep(folder: Path, part: str, n: int, rows: list[Row]) -> None:
    """One JSON a part and size, with its circumstances, and one table of all that lie in the folder."""
    facts = {
        **circumstances("pytorch-cka", "calibrated-similarity"),
        "layers": LAYERS,
        "width": WIDTH,
        "threads": 1,
    }
    write_json(folder / f"benchmark_{part}_{n}.json", {"provenance": facts, "rows": rows})
    found = [
        {"part": path.stem.split("_")[1], **item}
        for path in sorted(folder.glob("benchmark_*.json"))
        for item in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]
    write_frame(tidy(found).dropna(axis=1, how="all"), folder / "benchmark.csv")


if __name__ == "__main__":
    main()

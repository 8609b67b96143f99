"""How quick and how small is `layerprobe outliers`? Against bare reading of the same bytes, and against weightlens.

    python benchmarks/outliers.py -o results/outliers            # 2 GB of temporary files
    python benchmarks/outliers.py -o results/outliers --seven-b  # 15 GB, adds the full Llama-7B shape

Checkpoints are made first (Llama shapes, random Gaussian weights, written piece by piece) in a temporary folder
and deleted at the end. Every measurement runs in a process of its own. CPU time is that of the process, all threads;
the best of several interleaved repeats counts. weightlens (any version; 0.3.0 was the aim) is measured when its
program `lens` is found or given with --lens; otherwise that line says why it is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import operator
import os
import resource
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
ENGINES = ("torch", "numba")
BARS = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}

SHAPES = {
    "small": {"hidden": 2048, "inner": 5632, "vocabulary": 8000, "blocks": 2},
    "timing": {"hidden": 4096, "inner": 11008, "vocabulary": 8000, "blocks": 1},
    "float32": {"hidden": 4096, "inner": 11008, "vocabulary": 8000, "blocks": 1},
    "7b": {"hidden": 4096, "inner": 11008, "vocabulary": 32000, "blocks": 32},
}

MANY = 92_000
"""As many tensors as DeepSeek-V3 has."""


def llama_tensors(
    hidden: int, inner: int, vocabulary: int, blocks: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        yield prefix + "input_layernorm.weight", (hidden,)
        for name in ("q", "k", "v", "o"):
            yield f"{prefix}self_attn.{name}_proj.weight", (hidden, hidden)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def make_checkpoint(folder: Path, shape: dict[str, int], dtype: str, shards: int = 1) -> int:
    """Write random weights of a Llama shape; returns the bytes of all tensors. Holds 64 MiB at most."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1 << 23, dtype=np.float32) * np.float32(0.02)
    if dtype == "BF16":
        values = ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    tensors = list(llama_tensors(**shape))
    per_shard = -(-len(tensors) // shards)
    index: dict[str, str] = {}
    total = 0
    for number in range(shards):
        own = tensors[number * per_shard : (number + 1) * per_shard]
        name = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header, end = {}, 0
        for tensor, extents in own:
            size = int(np.prod(extents)) * values.itemsize
            header[tensor] = {"dtype": dtype, "shape": list(extents), "data_offsets": [end, end + size]}
            index[tensor] = name
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for _, extents in own:
                left = int(np.prod(extents))
                while left:
                    # Pieces of one Gaussian sample from random places: new to the counter, cheap to make.
                    count = min(left, 1 << 22)
                    start = int(rng.integers(0, values.size - count + 1))
                    stream.write(values[start : start + count].data)
                    left -= count
        total += end
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": shape["blocks"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def make_many(folder: Path, count: int) -> None:
    """Write a mixture of experts as DeepSeek-V3 has it, of `count` tensors of 4 × 4 entries."""
    folder.mkdir(parents=True)
    names = (
        f"model.layers.{block}.mlp.experts.{expert}.{part}_proj.weight"
        for block in range(count)
        for expert in range(256)
        for part in ("gate", "up", "down")
    )
    header = {
        name: {"dtype": "BF16", "shape": [4, 4], "data_offsets": [32 * i, 32 * (i + 1)]}
        for i, name in enumerate(itertools.islice(names, count))
    }
    values = np.random.default_rng(0).standard_normal(16 * count, dtype=np.float32).view(np.uint32)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + (values >> np.uint32(16)).astype(np.uint16).tobytes()
    )


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def child(what: str, folder: Path, engine: str, repeats: int) -> dict[str, Any]:
    """What runs in a process of its own: `cpu`, `quick` (σ statistics only) or `wall`."""
    from layerprobe.analyzers.outlier_scan import scan
    from layerprobe.checkpoints import CHUNK_BYTES, open_checkpoint
    from layerprobe.metrics.outliers import OutlierRules

    rules = OutlierRules.sigma_only() if what == "quick" else OutlierRules()
    checkpoint = open_checkpoint(folder)
    # Compiling, importing and the first touch of the engine are start-up, not speed.
    scan(checkpoint.select(["model.norm.weight", "*layers.0*q_proj*"]), rules=rules, engine=engine, threads=1)
    buffer = mmap.mmap(-1, CHUNK_BYTES)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for _ in range(repeats):
        if what == "wall":
            for threads in (1, 2):
                start = time.perf_counter()
                scan(checkpoint, rules=rules, engine=engine, threads=threads)
                note(f"wall_{threads}", time.perf_counter() - start)
            continue
        start = cpu_seconds()
        for tensor in checkpoint.tensors:
            for _chunk in tensor.chunks(buffer):
                pass
        note("read", cpu_seconds() - start)
        start = cpu_seconds()
        scan(checkpoint, rules=rules, engine=engine, threads=1)
        note("scan", cpu_seconds() - start)
    return {name: min(values) for name, values in found.items()} | {"bytes": checkpoint.nbytes}


def run_child(what: str, folder: Path, engine: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder), "--engine", engine]
    done = subprocess.run(
        [*command, "--repeats", str(repeats)],
        env={**os.environ, **ONE_THREAD},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def run_program(command: list[str], **environment: str) -> dict[str, float]:
    """Wall and CPU seconds and peak resident MiB of a program."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, env={**os.environ, **ONE_THREAD, **environment}, stdout=said, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{shlex.join(command)} failed: {said.read().decode()[-2000:]}")
    return {
        "wall": time.perf_counter() - start,
        "cpu": used.ru_utime + used.ru_stime,
        "rss_mib": used.ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20),
    }


def layerprobe(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "layerprobe", *arguments]


class Report:
    """Lines as they are measured: printed at once, kept for the file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def line(self, what: str, value: float | None, unit: str, bar: str = "", **more: Any) -> None:
        """One measurement, and whether it keeps to its `bar`, such as `<= 300`; without a bar it is only told."""
        sign, _, limit = bar.partition(" ")
        reached = BARS[sign](value, float(limit)) if bar else None
        row = {"what": what, "value": value, "unit": unit, "bar": bar, "reached": reached, **more}
        row["load"] = round(os.getloadavg()[0], 1)
        self.rows.append(row)
        shown = "–" if value is None else f"{value:.3g}"
        verdict = {True: "reached", False: "MISSED", None: ""}[reached]
        print(f"{what:<66} {shown:>8} {unit:<14} {bar:<10} {verdict}", flush=True)


def measure(report: Report, folders: dict[str, Path], repeats: int, lens: str | None, scratch: Path) -> None:
    scans: dict[str, dict[str, Any]] = {}
    for engine, most in (("torch", 6.5), ("numba", 3.5)):
        found = scans[engine] = run_child("cpu", folders["timing"], engine, repeats)
        ratio = found["scan"] / found["read"]
        what = f"bfloat16, {engine}: CPU as a multiple of bare pread"
        report.line(what, ratio, "x", f"<= {most}", **found)
    for engine in ENGINES:
        found = run_child("wall", folders["timing"], engine, max(3, repeats // 2))
        ratio = found["wall_1"] / found["wall_2"]
        report.line(f"bfloat16, {engine}: wall time, 1 thread against 2", ratio, "x", ">= 1.6", **found)
    for engine, what, least in (("numba", "cpu", 1.2), ("torch", "quick", 0.8), ("torch", "cpu", None)):
        found = run_child(what, folders["float32"], engine, repeats)
        rate = found["bytes"] / 1e9 / found["scan"]
        part = "σ statistics only" if what == "quick" else "everything"
        bar = f">= {least}" if least else ""
        report.line(f"float32, {engine}, {part}", rate, "GB per CPU-s", bar, **found)
    peaks = {}
    for engine in ENGINES:
        for name in ("small", "7b") if "7b" in folders else ("small",):
            used = run_program(
                layerprobe("outliers", "--model", str(folders[name]), "--engine", engine, "-q")
            )
            peaks[engine, name] = used["rss_mib"]
            what = f"peak memory of the command, {engine}, {_gigabytes(folders[name]):.2f} GB"
            report.line(what, used["rss_mib"], "MiB", "<= 300", **used)
        if "7b" in folders:
            growth = peaks[engine, "7b"] / peaks[engine, "small"]
            report.line(f"peak memory, {engine}, large against small", growth, "x", "<= 1.2")
    if "7b" in folders:
        cache = as_hub_cache(folders["7b"], scratch / "hub")
        for engine in ("auto", "torch"):
            command = layerprobe("outliers", "--model", "llama-7b", "--engine", engine, "-q")
            runs = [run_program(command, HF_HUB_CACHE=str(cache)) for _ in range(2)]
            best = min(runs, key=lambda used: used["wall"])
            what = f"layerprobe outliers --model llama-7b ({engine}), warm cache, wall"
            report.line(what, best["wall"], "s", "< 10" if engine == "auto" else "", **best)
    many_tensors(report, scratch)
    against_weightlens(report, folders, scans, lens, scratch)


def many_tensors(report: Report, scratch: Path) -> None:
    """What a tensor costs that holds next to nothing: tables of all of them are written, too."""
    folder = scratch / "many"
    if not folder.exists():
        make_many(folder, MANY)
    with tempfile.TemporaryDirectory() as output:
        used = run_program(layerprobe("outliers", "--model", str(folder), "-q", "-o", f"{output}/out"))
    what = f"layerprobe outliers -o of {MANY:,} tensors"
    report.line(f"{what}, wall", used["wall"], "s", "<= 60", **used)
    report.line(f"{what}, CPU", used["cpu"], "s")
    report.line(f"{what}, peak memory", used["rss_mib"], "MiB", "<= 400", **used)


def against_weightlens(
    report: Report,
    folders: dict[str, Path],
    scans: dict[str, dict[str, Any]],
    lens: str | None,
    scratch: Path,
) -> None:
    lens = lens or shutil.which("lens")
    if lens is None:
        reason = "weightlens is not installed (pip install weightlens==0.3.0, or --lens PATH)"
        print(f"weightlens: skipped, {reason}")
        report.line("CPU of weightlens as a multiple of ours", None, "x", reason=reason)
        return
    tiny = scratch / "tiny"
    if not tiny.exists():
        make_checkpoint(tiny, {"hidden": 64, "inner": 64, "vocabulary": 64, "blocks": 1}, "BF16")
    times = {}
    for name, folder, count in (("start-up", tiny, 3), ("file", folders["timing"], 2)):
        command = [lens, "analyze", str(folder / "model.safetensors"), "--num-workers", "1"]
        times[name] = min(run_program(command)["cpu"] for _ in range(count))
    net = times["file"] - times["start-up"]
    for engine, least in (("torch", 25), ("numba", 50)):
        ours = scans[engine]["scan"]
        what = f"CPU of weightlens (start-up subtracted) against ours, {engine}"
        report.line(what, net / ours, "x", f">= {least}", weightlens_cpu=net, ours_cpu=ours)


def as_hub_cache(folder: Path, cache: Path) -> Path:
    """A Hugging Face cache in which huggyllama/llama-7b is this checkpoint."""
    repository = cache / "models--huggyllama--llama-7b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for file in folder.iterdir():
        link = snapshot / file.name
        if not link.exists():
            link.hardlink_to(file)  # a link that leaves the cache would not be followed
    return cache


def _gigabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, help="folder for benchmark.json and benchmark.md")
    parser.add_argument("--seven-b", action="store_true", help="also the 13.5 GB shape")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--lens", help="the program of weightlens, perhaps in another environment")
    parser.add_argument("--scratch", type=Path, help="where the checkpoints go; kept when given, and reused")
    parser.add_argument("--child", choices=("cpu", "quick", "wall"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.folder, arguments.engine, arguments.repeats)))
        return
    scratch = arguments.scratch or Path(tempfile.mkdtemp(prefix="layerprobe-benchmark-"))
    report = Report()
    try:
        folders = {}
        for name in ("small", "timing", "float32", *(("7b",) if arguments.seven_b else ())):
            folders[name] = scratch / name
            if not folders[name].exists():
                dtype = "F32" if name == "float32" else "BF16"
                make_checkpoint(folders[name], SHAPES[name], dtype, shards=3 if name == "7b" else 1)
        measure(report, folders, arguments.repeats, arguments.lens, scratch)
    finally:
        if arguments.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)
    if arguments.output:
        write(report, arguments.output, arguments)


def write(report: Report, folder: Path, arguments: argparse.Namespace) -> None:
    import importlib.metadata

    import torch

    from layerprobe.files import write_json, write_text
    from layerprobe.provenance import machine, versions

    command = "python benchmarks/outliers.py -o results/outliers" + (
        " --seven-b" if arguments.seven_b else ""
    )
    peer = None
    if lens := arguments.lens or shutil.which("lens"):
        python = Path(lens).parent / "python"
        ask = "import importlib.metadata as m; print(m.version('weightlens'))"
        peer = subprocess.run(
            [str(python), "-c", ask], capture_output=True, text=True, check=False
        ).stdout.strip()
    facts = {
        "command": command,
        "repeats": arguments.repeats,
        "machine": {**machine(), "torch_threads": 1},
        "versions": {**versions(), "weightlens": peer, "numpy": np.__version__, "torch": torch.__version__},
        "safetensors": importlib.metadata.version("safetensors"),
    }
    write_json(
        folder / "benchmark.json",
        {"schema": "layerprobe.benchmark/v1", "provenance": facts, "rows": report.rows},
    )
    lines = [
        "# Benchmark of `layerprobe outliers`",
        "",
        f"`{command}`; best of {arguments.repeats} interleaved repeats, CPU time of the process. "
        f"{facts['machine']['processor']}, {facts['machine']['cores']} cores; Python {facts['machine']['python']}, "
        f"torch {torch.__version__}, numba {facts['versions']['numba']}, weightlens {peer or 'absent'}. "
        "`load` is the machine's load average at the time: above the number of cores, others were at work, "
        "which slows wall time most and CPU time somewhat.",
        "",
        "| what | measured | bar | | load |",
        "| --- | ---: | --- | --- | ---: |",
    ]
    for row in report.rows:
        value = "–" if row["value"] is None else f"{row['value']:.3g} {row['unit']}"
        verdict = {True: "reached", False: "**missed**", None: row.get("reason", "")}[row["reached"]]
        lines.append(f"| {row['what']} | {value} | {row['bar']} | {verdict} | {row['load']} |")
    write_text(folder / "benchmark.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

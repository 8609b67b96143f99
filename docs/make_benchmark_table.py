"""Write the tables of benchmarks in docs/benchmarks.md and README.md, from what the benchmarks wrote into results/.

python docs/make_benchmark_table.py

A benchmark that has left no file yet has no row.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- made by docs/make_benchmark_table.py -->", "<!-- end of the benchmarks -->"
COLUMNS = ("what", "against", "measured", "spread and basis", "command and all figures")


SHOWN = (
    ("outlier statistics of bfloat16 weights, numba", "weightlens", "outliers of bfloat16 weights"),
    ("`layerprobe outliers --model llama-7b`", "", "`outliers --model llama-7b`, two cores"),
    ("debiased CKA", "pytorch-cka", "debiased CKA of 13 × 13 layers"),
    ("linear probes, 8 strengths, MiniLM", "scikit-learn", "linear probes, 8 strengths"),
    ("conductance", "captum at its best", "conductance of 6 blocks"),
    ("bridge training", "a bare PyTorch loop", "bridge training of MiniLM"),
)
"""Start of `what`, start of `against`, and words of the rows that README.md shows."""


class Row(NamedTuple):
    """One line of the table."""

    what: str
    against: str
    measured: str
    basis: str


def outliers(found: dict[str, Any]) -> Iterator[Row]:
    rows = {row["what"]: row for row in found["rows"]}
    basis = (
        f"ours best of {found['provenance']['repeats']} runs, theirs best of 2 less start-up; spread not kept"
    )
    peer = f"weightlens {found['provenance']['versions']['weightlens']}"
    for engine in ("numba", "torch"):
        row = rows.get(f"CPU of weightlens (start-up subtracted) against ours, {engine}")
        if row:
            yield Row(f"outlier statistics of bfloat16 weights, {engine}", peer, times(row), basis)
        row = rows.get(f"peak memory of the command, {engine}, 13.48 GB")
        if row:
            size = "peak memory of `outliers` on a 13.48 GB checkpoint"
            yield Row(f"{size}, {engine}", "–", f"{row['value']:.0f} MiB", "single measurement")
    row = rows.get("layerprobe outliers --model llama-7b (auto), warm cache, wall")
    if row:
        yield Row(
            "`layerprobe outliers --model llama-7b`, files in the page cache, two cores",
            "–",
            f"{row['value']:.1f} s",
            "best of 2 runs",
        )


def similarity(found: dict[str, Any]) -> Iterator[Row]:
    rows = {(row["metric"], row.get("subject")): row for row in found["rows"]}
    ratio = rows["ratio_to_peer", None]
    peer = next(subject for _, subject in rows if subject and not subject.startswith("layerprobe"))
    layers = found["provenance"]["layers"]
    yield Row(
        f"debiased CKA of {layers} × {layers} layers with standard errors; the peer gives values alone",
        peer,
        f"{1 / ratio['value']:.2f} times less CPU time",
        f"{1 / ratio['high']:.2f} to {1 / ratio['low']:.2f} over {ratio['rounds']:.0f} rounds, "
        f"n = {ratio['n']:,} images",
    )


def probes(found: dict[str, Any]) -> Iterator[Row]:
    for key, name in (("minilm", found.get("features", "")), ("gaussian_clusters", "Gaussian clusters")):
        if key not in found:
            continue
        for ratio, peer in (
            ("ratio_sklearn_same_objective", "scikit-learn lbfgs, stopped at the same objective"),
            ("ratio_warm_start", "the same with warm start"),
        ):
            layers = list(
                found[key]["ratio_sklearn_per_layer" if "same" in ratio else f"{ratio}_per_layer"].values()
            )
            spread = f"{min(layers):.1f} to {max(layers):.1f} over {len(layers)} layers"
            yield Row(
                f"linear probes, {len(found['Cs'])} strengths, {name}",
                f"{peer}, {found['versions']['scikit-learn']}",
                f"{found[key][ratio]:.1f} times less CPU time",
                f"{spread if len(layers) > 1 else 'one set of features'}, one run",
            )
    if "ridge" in found:
        ridge = found["ridge"]
        yield Row(
            "ridge sweep with leave-one-out",
            f"RidgeClassifierCV, {found['versions']['scikit-learn']}",
            f"{ridge['ratio']:.1f} times less CPU time",
            "median of 5 rounds, spread not kept",
        )


def transfer(found: dict[str, Any]) -> Iterator[Row]:
    seconds, size = found["cpu_seconds"], found["arguments"]
    for name, peer in (
        ("logme fixed point, authors' stop", "the authors' fixed point as they stop it"),
        ("logme fixed point, converged", "the authors' fixed point, converged"),
    ):
        yield Row(
            f"LogME with exact evidence, {size['n']:,} × {size['d']} features, {size['classes']} classes",
            peer,
            *ratio_over_rounds(seconds[name], seconds["logme exact"]),
        )


def attribution(found: dict[str, Any]) -> Iterator[Row]:
    seconds = found["cpu_seconds"]
    for name in found["times_faster"]:
        yield Row(
            f"conductance of {found['n_blocks']} blocks, {found['arguments']['images']} images",
            f"{name}, {found['versions']['captum']}",
            *ratio_over_rounds(seconds[name], seconds["one pass"]),
        )


def features(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        low, _, high = row["quartiles_percent"]
        extra = row["extra_peak_bytes"]
        version = found["versions"].get(row["way"])
        yield Row(
            f"forward pass of {found['model']} with {row['way']}" + (f" {version}" if version else ""),
            "the bare forward pass",
            f"{row['overhead_percent']:+.1f} % time"
            + (f", {extra / 2**20:.1f} MiB more" if extra is not None else ""),
            f"quartiles {low:+.1f} to {high:+.1f} % over {found['rounds']} rounds",
        )


def bridge(found: dict[str, Any]) -> Iterator[Row]:
    names = {
        "bare": "a bare PyTorch loop",
        "hf-trainer": f"Hugging Face Trainer, {found['versions']['transformers']}",
    }
    settings = found["settings"]
    for name, peer in names.items():
        if name not in found["loops"]:
            continue
        yield Row(
            f"bridge training of {settings['model']}, {settings['batch']} images a step",
            peer,
            f"{found['loops'][name]['layerprobe_speed_ratio']:.2f} times its speed",
            f"median of {settings['rounds']} rounds, spread not kept",
        )


SOURCES: tuple[tuple[str, Callable[[dict[str, Any]], Iterator[Row]], str], ...] = (
    ("results/outliers/benchmark.json", outliers, "benchmarks/outliers.py --seven-b"),
    ("results/similarity/benchmark_time_2000.json", similarity, "benchmarks/similarity.py"),
    ("results/probes/benchmark.json", probes, "benchmarks/probes.py"),
    ("results/transfer/benchmark.json", transfer, "benchmarks/transfer.py"),
    ("results/attribution/benchmark.json", attribution, "benchmarks/attribution.py"),
    ("results/features/benchmark_hooks.json", features, "benchmarks/hooks.py"),
    ("results/bridge/benchmark-minilm.json", bridge, "benchmarks/bridge.py"),
)


def times(row: dict[str, Any]) -> str:
    return f"{row['value']:.1f} times less CPU time"


def ratio_over_rounds(theirs: list[float], ours: list[float]) -> tuple[str, str]:
    """Ratio of the medians, and the range of the rounds' own ratios."""
    each = [other / own for other, own in zip(theirs, ours, strict=True)]
    ratio = statistics.median(theirs) / statistics.median(ours)
    return (
        f"{ratio:.1f} times less CPU time",
        f"{min(each):.1f} to {max(each):.1f} over {len(each)} rounds",
    )


def measured(root: Path = REPOSITORY) -> Iterator[tuple[Row, str, str, dict[str, Any]]]:
    """Every row, with the file that holds it, the script that wrote it, and what the file says of the machine."""
    for path, rows, script in SOURCES:
        if (root / path).exists():
            found = json.loads((root / path).read_text(encoding="utf-8"))
            for row in rows(found):
                yield row, path, script, found.get("provenance", found)


def table(root: Path = REPOSITORY) -> str:
    """The table of docs/benchmarks.md in Markdown, and a sentence on the machine."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    machines = set()
    for row, path, script, about in measured(root):
        lines.append(f"| {' | '.join(row)} | [`python {script}`](../{path}) |")
        machines.add(
            f"{about['machine']['processor']}, {about['machine']['cores']} cores, torch {about['versions']['torch']}"
        )
    where = (
        f"Measured on {'; '.join(sorted(machines))}; processor time on one thread where nothing else is said."
    )
    return "\n".join([where, "", *lines])


def short_table(root: Path = REPOSITORY) -> str:
    """The rows of README.md."""
    found = {(row.what, row.against): (row, path, script) for row, path, script, _ in measured(root)}
    lines = ["| what | against | measured | command |", "| --- | --- | --- | --- |"]
    for start, peer, words in SHOWN:
        key = next(((w, a) for w, a in found if w.startswith(start) and a.startswith(peer)), None)
        if key is not None:
            row, path, script = found[key]
            lines.append(
                f"| {words} | {row.against} | {row.measured} | [`{Path(script.split()[0]).name}`]({path}) |"
            )
    return "\n".join(lines)


def with_table(page: str, made: str) -> str:
    """A page with the table between its two marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


if __name__ == "__main__":
    for name, made in (("docs/benchmarks.md", table()), ("README.md", short_table())):
        page = REPOSITORY / name
        page.write_text(with_table(page.read_text(encoding="utf-8"), made), encoding="utf-8")

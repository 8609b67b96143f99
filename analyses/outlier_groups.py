"""Do language- and vision-pretrained models differ in their ratio of outlier parameters, and where?

    python analyses/outlier_groups.py --data ../shared        # into results/outliers

The same from the command line, without the README:

    layerprobe compare --group language=minilm,../shared/models/stories260k,../shared/models/babyllama-char105 \
        --group vision=../shared/models/vit-mnist,../shared/models/vit-cifar10 -o results/outliers

Five trained models; the weights are read as files. Nothing is fitted or chosen: the rule (beyond 3σ of an entry's
own tensor) and the parts were fixed before these numbers were made.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from layerprobe.analyzers.outlier_comparison import OutlierComparison, compare_outliers
from layerprobe.analyzers.outliers import OutlierReport, gaussian_tail, outlier_report
from layerprobe.cli.output import save_figure
from layerprobe.files import write_text
from layerprobe.plotting.outliers import plot_outlier_heatmap, plot_outlier_tails
from layerprobe.tables import write_frame

GROUPS = {"language": ("minilm", "stories260k", "babyllama-char105"), "vision": ("vit-mnist", "vit-cifar10")}
LEVELS = ("block", "block_group", "group", "model")
PARTS = ("all", "attention in", "attention out", "mlp in", "mlp out")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/")
    parser.add_argument("--output", type=Path, default=Path("results/outliers"))
    arguments = parser.parse_args()
    reports: dict[str, OutlierReport] = {}
    for name in (name for members in GROUPS.values() for name in members):
        local = arguments.data / "models" / name
        found = outlier_report(local if local.is_dir() else name, quiet=True)
        reports[name] = dataclasses.replace(found, model=name)
    groups = {group: [reports[name] for name in members] for group, members in GROUPS.items()}
    comparison = compare_outliers(groups=groups)
    arguments.output.mkdir(parents=True, exist_ok=True)
    comparison.save(arguments.output)
    save_figure(comparison.plot, arguments.output / "compare.png")
    frames = {name: report.to_frame() for name, report in reports.items()}
    for name, frame in frames.items():
        save_figure(lambda frame=frame: plot_outlier_heatmap(frame), arguments.output / f"heatmap_{name}.png")
    everything = pd.concat(list(frames.values()), ignore_index=True)
    write_frame(everything[everything["level"].isin(LEVELS)], arguments.output / "levels.csv")
    blocks = everything[(everything["level"] == "group") & (everything["group"] == "blocks")]
    save_figure(lambda: plot_outlier_tails(blocks), arguments.output / "tails.png")
    write_text(arguments.output / "README.md", readme(reports, comparison))


def readme(reports: dict[str, OutlierReport], comparison: OutlierComparison) -> str:
    made = comparison.provenance
    lines = [
        "# Outlier parameters of five trained models",
        "",
        "`python analyses/outlier_groups.py --data ../shared` made everything here except `benchmark.*`; this page, "
        f"too, is made from the numbers. {made['machine']['processor']}, Python {made['machine']['python']}, "
        f"layerprobe {made['versions']['layerprobe']}, numpy {made['versions']['numpy']}.",
        "",
        "## The answer",
        "",
        comparison.summary(),
        "",
        "Block weights are the matrices inside the blocks. Each entry is judged within its own tensor; intervals are "
        "95 % bootstrap intervals over models and blocks. Five models are few: the numbers describe these models, and "
        "the least p-value they could give stands beside the one they gave.",
        "",
        "## The models",
        "",
        "| model | group | block weights | beyond 3σ | beyond 6σ | kurtosis | farthest entry |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group, members in GROUPS.items():
        for name in members:
            part = reports[name].pool(group="blocks")
            lines.append(
                f"| {name} | {group} | {part.n:,} | {100 * part.counts['3sigma'] / part.n:.3f} % "
                f"| {1e6 * part.counts['6sigma'] / part.n:.1f} ppm | {part.values['kurtosis']:.2f} "
                f"| {part.values['max_sigma']:.1f} σ |"
            )
    lines += [
        f"| (Gaussian) | | | {100 * gaussian_tail(3):.3f} % | {1e6 * gaussian_tail(6):.3f} ppm | 3.00 | |",
        "",
        "## Where the groups differ",
        "",
        "Geometric means of the models' shares beyond 3σ, their ratio with its interval, and the exact "
        "permutation p-value.",
        "",
        "| part | depth | language | vision | ratio | 95 % interval | p |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in comparison.rows:
        if row["level"] == "group" and row["metric"] == "ratio_of_ratios_3sigma" and row["part"] in PARTS:
            if row["depth"] != "all" and row["part"] != "all":
                continue
            lines.append(
                f"| {row['part']} | {row['depth']} | {100 * row['ratio']:.3f} % | {100 * row['ratio_y']:.3f} % "
                f"| {row['value']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {row['pvalue']:.2g} |"
            )
    lines += [
        "",
        "## Pair by pair",
        "",
        "All block weights, beyond 3σ; interval over blocks; Hedges' g of the blocks' log ratios.",
        "",
        "| models | shares | ratio | 95 % interval | g |",
        "| --- | --- | ---: | --- | ---: |",
    ]
    lines += [_pair(row) for row in comparison.rows if _is_main_pair(row)]
    lines += [
        "",
        "## Files",
        "",
        "`compare.csv`, `compare.json`: every part, depth and pair, with definitions. `levels.csv`: all quantities "
        "per block, group and model. `compare.png`, `tails.png`, `heatmap_*.png`: the figures. `benchmark.md`, "
        "`benchmark.json`: speed and memory (`benchmarks/outliers.py`).",
    ]
    return "\n".join(lines) + "\n"


def _is_main_pair(row: dict[str, Any]) -> bool:
    main = ("pair", "ratio_of_ratios_3sigma", "all", "all")
    return (row["level"], row["metric"], row["part"], row["depth"]) == main


def _pair(row: dict[str, Any]) -> str:
    return (
        f"| {row['model']} : {row['model_y']} | {100 * row['ratio']:.3f} % : {100 * row['ratio_y']:.3f} % "
        f"| {row['value']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {row['effect']:.2f} |"
    )


if __name__ == "__main__":
    main()

"""Do language- and vision-pretrained models differ in their ratio of outlier parameters, and where?

    python analyses/outlier_gap.py --quick                     # seconds: MiniLM against its untrained twin
    python analyses/outlier_gap.py --data ../shared            # seconds: three language, two vision models
    python analyses/outlier_gap.py --model gpt2,llama-7b --vision vit-base,dinov2-base

The same from the command line, without the page: `layerprobe compare --group language=gpt2,llama-7b --group
vision=vit-base,dinov2-base`. The weights are read as files. Nothing is fitted or chosen: the rule (beyond 3σ of an
entry's own tensor) and the parts were fixed before these numbers were made. Groups are compared by a
permutation test over models, the unit that was sampled; every model also stands beside its untrained twin.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from study import Answer, Setup, Size, answer_rows, is_vision, md_table, publish, run, setup, short
from transformers.utils.logging import disable_progress_bar

from layerprobe.analyzers.compare import OutlierComparison, compare_outliers
from layerprobe.analyzers.outliers import OutlierReport, gaussian_tail, outlier_report
from layerprobe.backbones import load_backbone
from layerprobe.plotting.outliers import plot_outlier_comparison, plot_outlier_heatmap, plot_outlier_tails
from layerprobe.plotting.studies import plot_claims
from layerprobe.tables import write_frame

QUICK = Size(("minilm",), (), None, None)
FULL = Size(("minilm", "stories260k", "babyllama-char105"), (), None, None)
VISION = "vit-mnist,vit-cifar10"
LEVELS = ("block_group", "group", "model")
PARTS = ("all", "attention in", "attention out", "mlp in", "mlp out")
MAIN = "ratio_of_ratios_3sigma"
TOLERANCE = 1e-6
"""Relative, between two machines: counts are exact, the untrained twin is drawn from a seed."""


def main(argv: Sequence[str] | None = None) -> None:
    of_vision = f"comma-separated vision models; default {VISION} of DATA, with --quick none"
    s = setup("outlier_gap", __doc__, QUICK, FULL, argv, vision=of_vision)
    vision = [v for v in (s.arguments.vision or ("" if s.quick else VISION)).split(",") if v]
    groups = {"language": s.models, "vision": vision}
    reports = {name: report(s, name) for name in (*s.models, *vision)}
    twins = {name: twin_report(s, name) for name in reports}
    comparisons = {name: compare_outliers(reports[name], twins[name], quiet=True) for name in reports}
    answers = [twin_claim(name, comparisons[name], reports[name]) for name in reports]
    frames = [c.to_frame() for c in comparisons.values()]
    sections: dict[str, list[str]] = {
        "The models": ["Exact counts over the stored weights.", "", *models_table(groups, reports)]
    }
    if vision:
        grouped = compare_outliers(
            groups={group: [reports[name] for name in members] for group, members in groups.items()},
            quiet=True,
        )
        answers = group_claims(grouped, groups) + answers
        frames.insert(0, grouped.to_frame())
        sections |= sections_of(grouped)
        told = grouped.summary()
    else:
        told = next(iter(comparisons.values())).summary()
    weights = {name: found.to_frame() for name, found in reports.items()}
    levels = pd.concat(list(weights.values()), ignore_index=True)
    levels = levels[levels["level"].isin(LEVELS)]
    write_frame(levels.dropna(axis=1, how="all"), s.output / "levels.csv")
    blocks = levels[(levels["level"] == "group") & (levels["group"] == "blocks")]
    tails = "How the tail falls: share of block weights beyond kσ" if vision else ""
    twin = "Trained against untrained, block weights beyond 3σ: each model with its twin"
    figures: dict[str, tuple[Callable[[], Any], str]] = {
        f"heatmap_{short(name)}.png": (lambda frame=frame: plot_outlier_heatmap(frame), "")
        for name, frame in weights.items()
    }
    if vision:
        figures["compare.png"] = (
            lambda: plot_outlier_comparison(grouped.to_frame()),
            "Language against vision, by part and depth",
        )
    figures["tails.png"] = (lambda: plot_outlier_tails(blocks), tails)
    figures["twins.png"] = (lambda: twins_figure(answer_rows(s, answers)), twin)
    publish(
        s,
        rows=kept(pd.concat(frames, ignore_index=True)),
        answers=answers,
        headline=told,
        setting=(
            "Block weights are the matrices inside the blocks. Each entry is judged within its own tensor, mean and "
            "deviation over the whole tensor, in float64. Intervals are 95 % bootstrap intervals over models and "
            "blocks (of a single model: over blocks). Few models are few: the numbers describe these models, and "
            "the least p-value that they could give stands beside the one they gave. A twin is the same architecture "
            "untrained (its usual initialisation, seed 0); its blocks are independent draws, so the interval over "
            "blocks covers the draw."
        ),
        sections=sections,
        figures=figures,
        facts={"tolerance": TOLERANCE, "groups": {k: [short(m) for m in v] for k, v in groups.items()}},
    )


def report(s: Setup, name: str) -> OutlierReport:
    found = outlier_report(s.path(name, "models"), quiet=True)
    return dataclasses.replace(found, model=short(name))


def twin_report(s: Setup, name: str) -> OutlierReport:
    """The report of the same architecture untrained, written to a temporary folder as a checkpoint."""
    backbone = load_backbone(s.path(name, "models"), init="random", seed=0, device="cpu")
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        backbone.model.save_pretrained(folder)
        found = outlier_report(folder, quiet=True)
    return dataclasses.replace(found, model=f"{short(name)}, untrained")


def group_claims(comparison: OutlierComparison, groups: dict[str, list[str]]) -> list[Answer]:
    found = []
    models = [short(name) for members in groups.values() for name in members]
    for row in comparison.rows:
        if (row["level"], row["metric"]) != ("group", MAIN) or row["part"] not in PARTS or not row["value"]:
            continue
        if row["depth"] == "all" or row["part"] == "all":
            where = "all block weights" if row["part"] == "all" else row["part"]
            where += "" if row["depth"] == "all" else f", {row['depth']} third"
            found.append(
                Answer(
                    "group",
                    f"language : vision, {where}",
                    *(row["value"], end(row["low"]), end(row["high"])),
                    "95 % bootstrap interval over models and blocks",
                    n=len(models),
                    counted="models",
                    n_seeds=0,
                    model=", ".join(models),
                    task="",
                    unit="times",
                    null=1.0,
                    pvalue=row["pvalue"],
                )
            )
    return found


def end(value: float | None) -> float:
    """An end of an interval; NaN where too few models give none, and then nothing is claimed."""
    return float("nan") if value is None else value


def twin_claim(name: str, comparison: OutlierComparison, found: OutlierReport) -> Answer:
    place = {"level": "pair", "metric": MAIN, "part": "all", "depth": "all"}
    row = next(row for row in comparison.rows if place.items() <= row.items())
    kind = "vision" if is_vision(name) else "language"
    return Answer(
        "twin",
        f"trained : untrained, {short(name)} ({kind})",
        *(row["value"], end(row["low"]), end(row["high"])),
        "95 % bootstrap interval over blocks",
        n=found.pool(group="blocks").n,
        counted=f"weights in {found.n_blocks} blocks",
        n_seeds=0,
        model=short(name),
        task="",
        unit="times",
        null=1.0,
    )


def kept(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that the page uses: every measure of groups, the 3σ and 6σ ratios of pairs."""
    ratio = frame["metric"].str.startswith("ratio_of_ratios_") & frame["part"].isin(PARTS)
    wanted = (frame["level"] == "group") | ((frame["level"] == "pair") & ratio)
    return frame[wanted & frame["part"].isin(PARTS)].dropna(axis=1, how="all")


def models_table(groups: dict[str, list[str]], reports: dict[str, OutlierReport]) -> list[str]:
    rows: list[dict[str, Any]] = []
    for group, members in groups.items():
        for name in members:
            part = reports[name].pool(group="blocks")
            rows.append(
                {
                    "model": short(name),
                    "group": group,
                    "block weights": f"{part.n:,}",
                    "beyond 3σ": f"{100 * part.counts['3sigma'] / part.n:.3f} %",
                    "beyond 6σ": f"{1e6 * part.counts['6sigma'] / part.n:.1f} ppm",
                    "kurtosis": f"{part.values['kurtosis']:.2f}",
                    "farthest entry": f"{part.values['max_sigma']:.1f} σ",
                }
            )
    gauss = {"beyond 3σ": f"{100 * gaussian_tail(3):.3f} %", "beyond 6σ": f"{1e6 * gaussian_tail(6):.3f} ppm"}
    blank = {"group": "", "block weights": "", "farthest entry": ""}
    rows.append({**rows[0], **blank, "model": "(Gaussian)", "kurtosis": "3.00", **gauss})
    return md_table(rows)


def sections_of(comparison: OutlierComparison) -> dict[str, list[str]]:
    groups, pairs = [], []
    for row in comparison.rows:
        if row["metric"] != MAIN or row["value"] is None:
            continue
        span = "–" if row["low"] is None else f"{row['low']:.2f} to {row['high']:.2f}"
        if row["level"] == "group" and row["part"] in PARTS and "all" in (row["depth"], row["part"]):
            groups.append(
                {
                    "part": row["part"],
                    "depth": row["depth"],
                    "language": f"{100 * row['ratio']:.3f} %",
                    "vision": f"{100 * row['ratio_y']:.3f} %",
                    "ratio": f"{row['value']:.2f}",
                    "95 % interval": span,
                    "p": f"{row['pvalue']:.2g}",
                }
            )
        if (row["level"], row["part"], row["depth"]) == ("pair", "all", "all"):
            pairs.append(
                {
                    "models": f"{row['model']} : {row['model_y']}",
                    "shares": f"{100 * row['ratio']:.3f} % : {100 * row['ratio_y']:.3f} %",
                    "ratio": f"{row['value']:.2f}",
                    "95 % interval": span,
                    "Hedges' g": "–" if row["effect"] is None else f"{row['effect']:.2f}",
                }
            )
    lead = (
        "Geometric means of the models' shares beyond 3σ, their ratio, and the exact permutation p over "
        f"{len(comparison.reports)} models."
    )
    return {
        "Where the groups differ": [lead, "", *md_table(groups)],
        "Pair by pair": [
            "All block weights beyond 3σ; interval over blocks; g of the blocks' log ratios.",
            "",
            *md_table(pairs),
        ],
    }


def twins_figure(claims: pd.DataFrame) -> Any:
    frame = claims[claims["key"] == "twin"]
    frame = frame.assign(claim=frame["claim"].str.removeprefix("trained : untrained, "))
    ax = plot_claims(frame)
    ax.set_xlabel("times as many weights beyond 3σ as untrained\n(bars: 95 % bootstrap interval over blocks)")
    return ax


if __name__ == "__main__":
    run(main)

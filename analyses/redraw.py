"""The figures below results/, drawn anew from the tables beside them; nothing is trained.

    python analyses/redraw.py                 # all
    python analyses/redraw.py bridge_cka      # those in folders whose path holds the word

The heat maps of outliers count the weights of the models in ../shared again, which takes seconds.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from layerprobe.analyzers.outliers import outlier_report
from layerprobe.cli.output import save_figure
from layerprobe.files import read_json
from layerprobe.plotting.bridge import plot_accuracy_against
from layerprobe.plotting.layer_scores import attribution_figure
from layerprobe.plotting.outliers import plot_outlier_comparison, plot_outlier_heatmap, plot_outlier_tails
from layerprobe.plotting.probes import plot_probe_accuracy
from layerprobe.plotting.search import plot_pareto, plot_ranking, plot_strips
from layerprobe.plotting.similarity import plot_cka
from layerprobe.plotting.studies import plot_claims
from layerprobe.tables import read_frame

RESULTS = Path("results")
MODELS = Path("../shared/models")
CURVES = ("bridge_cka", "depth_and_data", "depth_curves", "partial_bridge", "score_truth")
"""Studies whose figure is made of their table alone."""
CLAIMS = ("bridge_labels", "language_controls", "recipe")
"""Studies whose figure shows their claims."""

Drawing = tuple[Path, Callable[[], Any]]


def drawings() -> Iterator[Drawing]:
    """Every figure and how it is drawn."""
    for folder in sorted(path.parent for path in RESULTS.rglob("table.csv")):
        name = folder.parent.name if folder.name == "quick" else folder.name
        yield from _of_study(name, folder)
    for found in sorted(RESULTS.rglob("*.csv")):
        yield from _of_table(found)


def _of_study(name: str, folder: Path) -> Iterator[Drawing]:
    frame, answers = read_frame(folder / "table.csv"), read_frame(folder / "answers.csv")
    if name in CURVES:
        yield folder / f"{name}.png", lambda: importlib.import_module(name).figure(frame)
    elif name in CLAIMS:
        yield folder / f"{name}.png", lambda: plot_claims(answers)
    elif name == "lr_fairness":
        yield folder / f"{name}.png", lambda: importlib.import_module(name).figure(frame, answers)
    elif name == "outlier_gap":
        levels = read_frame(folder / "levels.csv")
        blocks = levels[(levels["level"] == "group") & (levels["group"] == "blocks")]
        yield folder / "twins.png", lambda: importlib.import_module(name).twins_figure(answers)
        yield folder / "tails.png", lambda: plot_outlier_tails(blocks)
        if (frame["level"] == "group").any():
            yield folder / "compare.png", lambda: plot_outlier_comparison(frame)
        for model in dict.fromkeys(blocks["model"]):
            if model == "minilm" or (MODELS / model).is_dir():
                path = model if model == "minilm" else str(MODELS / model)
                yield (
                    folder / f"heatmap_{model}.png",
                    lambda path=path: plot_outlier_heatmap(outlier_report(path, quiet=True).to_frame()),
                )


def _of_table(path: Path) -> Iterator[Drawing]:
    frame: pd.DataFrame = read_frame(path)
    folder = path.parent
    if path.name == "evaluate.csv":
        for cost in ("train_flops", "trainable_parameters"):
            yield folder / f"accuracy_{cost}.png", lambda cost=cost: plot_accuracy_against(frame, cost)
    elif path.name == "probe.csv":
        yield folder / "probe.png", lambda: plot_probe_accuracy(frame)
    elif path.name == "cka.csv":
        yield folder / "cka.png", lambda: plot_cka(frame)
    elif path.name == "attribute.csv":
        yield folder / "attribution.png", lambda: attribution_figure(frame)
    elif path.name == "plans.csv":
        facts = read_json(folder / "search.json", what="search")
        yield folder / "pareto.png", lambda: plot_pareto(frame)
        yield folder / "plans.png", lambda: plot_strips(frame, parts=len(facts["units"].split(",")))
    elif path.name == "baselines.csv":
        facts = read_json(folder / "search.json", what="search")
        yield folder / "ranking.png", lambda: plot_ranking(frame, chance=facts["chance"])


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    wanted = sys.argv[1:] or [""]
    for path, draw in drawings():
        if path.exists() and any(word in str(path.parent) for word in wanted):
            save_figure(draw, path)
            print(path)


if __name__ == "__main__":
    main()

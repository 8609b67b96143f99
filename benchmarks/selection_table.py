"""What other projects would train, judged on tables in which every plan was really trained.

    python benchmarks/selection_table.py --data ../shared -o results/selectors

Every rule gives an order of the blocks (`selection_rules.py`, the transfer scores of layerprobe, Uni-Layer where it is
installed), and its plan of k blocks is the first k of them. Tables of results/freeze_search/tables are taken as they
are there; a table whose model or images are not in the folder of `--data` keeps the rules that need neither.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from replay import ExhaustiveTable, Truth
from selection_rules import best_blocks, evenly_spaced, outlier_share, spectrum_blocks

from layerprobe import load_backbone, load_task
from layerprobe.analyzers.transfer import TRAINABLE_SCORES
from layerprobe.backbones import Backbone
from layerprobe.errors import LayerprobeError
from layerprobe.files import read_json, write_json, write_text
from layerprobe.metrics.intervals import mean_interval, paired_seed_interval
from layerprobe.provenance import machine, versions
from layerprobe.search.evaluator import by_block, layer_scores
from layerprobe.search.space import Mask, mask_of, strip
from layerprobe.tables import render_table, write_frame
from layerprobe.tasks import Task
from layerprobe.training import TaskTensors
from layerprobe.training.classifier import Classifier
from layerprobe.training.finetune import start_from_probe

TABLES = Path("results/freeze_search/tables")
IMAGES, BATCH = 320, 32
"""Uni-Layer captures 10 batches by default."""

RULES = {
    "first k": "LLaMA-Factory 0.9.5, freeze_trainable_layers < 0",
    "last k": "LLaMA-Factory 0.9.5, freeze_trainable_layers > 0",
    "evenly spaced": "LLaMA-Factory 0.9.5, use_llama_pro",
    "Spectrum": "singular values above the noise, QuixiAI/spectrum 1996495, mean rank of a block's matrices",
    "outlier share": "OWL's ratio (arXiv 2310.05175), by which OWS (arXiv 2405.18380) draws layers",
    "rgn": "gradient over weight norm (auto-RGN, arXiv 2210.11466)",
    "gradient_snr": "gradient signal over its spread between batches",
    "taylor": "weight times gradient (first-order saliency)",
    "fisher": "squared gradients (GPS and FISH choose single weights by gradients)",
    "Uni-Layer": "GradientNorm, its default for insertion points, uni-layer 0.7.0, summed over a block's layers",
}
"""Rule -> where it is from. LISA draws other layers every few steps, so that no plan says what it trains."""


def orders(
    table: ExhaustiveTable, about: dict[str, Any], data: Path
) -> dict[str, Callable[[int], list[int]]]:
    """Rule -> its blocks of a given number."""
    n = table.space.n_blocks
    found: dict[str, Callable[[int], list[int]]] = {
        "first k": lambda k: list(range(k)),
        "last k": lambda k: list(range(n - k, n)),
        "evenly spaced": lambda k: evenly_spaced(n, k),
    }
    scores = {name: value.tolist() for name, (value, _) in table.scores.items() if name in RULES}
    try:
        scores |= measured(about, data, n)
    except LayerprobeError as error:
        print(f"{table.name}: only rules without a model: {error}", file=sys.stderr)
    return found | {name: (lambda k, v=values: best_blocks(v, k)) for name, values in scores.items()}


def measured(about: dict[str, Any], data: Path, n_blocks: int) -> dict[str, list[float]]:
    """Rule -> one score a block, of the model as it comes and the table's own split of the images."""
    task = load_task(str(data / "data" / about["task"]), limit=sum(about["counts"].values()), seed=0)
    options = (
        {} if about["patch_size"] is None else {"patch_size": about["patch_size"], "stem": about["stem"]}
    )
    backbone = load_backbone(str(data / "models" / about["model"]), seed=0, device="cpu", **options).prepare(
        task
    )
    weights: dict[tuple[int, str], torch.Tensor] = {
        (block, name): parameter.detach()
        for block, module in enumerate(backbone.blocks)
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2
    }
    found = {
        "Spectrum": spectrum_blocks(weights, n_blocks),
        "outlier share": [
            outlier_share(w for (block, _), w in weights.items() if block == index)
            for index in range(n_blocks)
        ],
    }
    wide = by_block(layer_scores(backbone, task, seed=0, quiet=True), n_blocks)
    for name in TRAINABLE_SCORES:
        values = wide.get(f"transfer_{name}")
        if values is not None and np.isfinite(values.astype(float)).all():
            found[name] = values.astype(float).tolist()
    return found | uni_layer(backbone, task)


def uni_layer(backbone: Backbone, task: Task) -> dict[str, list[float]]:
    """Its gradient norm of each block, of a classifier whose head is fitted as in the table; empty without it."""
    try:
        from uni_layer import LayerAnalyzer
        from uni_layer.metrics import GradientNorm
    except ImportError:
        return {}
    tensors = TaskTensors.of(backbone, task)
    pixels, labels = tensors.pixels["train"], tensors.labels["train"]
    classifier = Classifier(backbone, tensors.n_classes, seed=0)
    start_from_probe(classifier, pixels, labels)
    classifier.requires_grad_(True)
    loader = [
        (pixels[rows], torch.as_tensor(labels[rows]))
        for rows in np.arange(min(IMAGES, len(labels) // BATCH * BATCH)).reshape(-1, BATCH)
    ]
    with redirect_stdout(sys.stderr):
        analyzer = LayerAnalyzer(classifier, device="cpu")
        layers = analyzer.compute_metrics([GradientNorm()], loader, num_batches=len(loader), verbose=False)
    totals = [0.0] * backbone.n_blocks
    for layer, values in layers.items():
        for index, block in enumerate(backbone.layout.block_names):
            if f"{layer}.".endswith(f"{block}.") or f".{block}." in f".{layer}":
                totals[index] += float(values["gradient_norm"])
    if min(totals) <= 0:
        raise LayerprobeError(f"Uni-Layer measured no gradient of some block: {totals}")
    return {"Uni-Layer": totals}


def judged(table: ExhaustiveTable, rules: dict[str, Callable[[int], list[int]]]) -> list[dict[str, Any]]:
    """One row a rule and size: test accuracy of its plan, of the best plan of that size, of any plan of that size."""
    truth, n = Truth.of(table), table.space.n_blocks
    rows = []
    for k in range(1, n):
        plans = [mask for mask in table.masks if sum(mask) == k]
        best = max(plans, key=lambda mask: truth.validation[mask])
        chance = np.mean([table.test(mask) for mask in plans], axis=0)
        for rule, order in rules.items():
            mask: Mask = mask_of(order(k), n)
            test, top = table.test(mask), table.test(best)
            rows.append(
                {
                    "table": table.name,
                    "rule": rule,
                    "size": k,
                    "plan": strip(mask),
                    "best": strip(best),
                    "test_accuracy": float(test.mean()),
                    "regret": float(np.mean(top - test)),
                    "chance_regret": float(np.mean(top - chance)),
                    "regret_per_seed": " ".join(f"{100 * value:.3f}" for value in top - test),
                    "chance_per_seed": " ".join(f"{100 * value:.3f}" for value in top - chance),
                }
            )
    return rows


def over_sizes(frame: pd.DataFrame) -> pd.DataFrame:
    """Per table and rule the mean over sizes in points, with a t interval over unseen seeds."""
    rows = []
    for (table, rule), part in frame.groupby(["table", "rule"], sort=False):
        seeds, chance = (
            np.mean([list(map(float, text.split())) for text in part[f"{what}_per_seed"]], axis=0)
            for what in ("regret", "chance")
        )
        found, any_plan = mean_interval(seeds), mean_interval(chance)
        rows.append(
            {
                "table": table,
                "rule": rule,
                "regret": found.value,
                "low": found.low,
                "high": found.high,
                "n_seeds": len(seeds),
                "chance_regret": any_plan.value,
                "chance_low": any_plan.low,
                "chance_high": any_plan.high,
            }
        )
    return pd.DataFrame(rows)


def over_tables(tables: pd.DataFrame) -> pd.DataFrame:
    """Per rule the mean over tables, and how much better than a random plan of that size, with t intervals."""
    rows = []
    for rule, part in tables.groupby("rule", sort=False):
        row: dict[str, Any] = {"rule": rule, "regret": part["regret"].mean(), "n_tables": len(part)}
        if len(part) > 1:
            found = mean_interval(part["regret"])
            gain = paired_seed_interval(part["chance_regret"], part["regret"])
            row |= {"low": found.low, "high": found.high}
            row |= {"against_random": gain.value, "gain_low": gain.low, "gain_high": gain.high}
        rows.append(row)
    return pd.DataFrame(rows).sort_values("regret", ignore_index=True)


def alike(choices: pd.DataFrame) -> str:
    """Which rules choose the same plans everywhere, as a sentence; nothing where none do."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for rule, part in choices.groupby("rule", sort=False):
        groups.setdefault(tuple(part["table"] + part["plan"]), []).append(str(rule))
    same = [" and ".join((", ".join(group[:-1]), group[-1])) for group in groups.values() if len(group) > 1]
    return "".join(f" {group} choose the same plans on every table." for group in same)


def page(choices: pd.DataFrame, tables: pd.DataFrame, rules: pd.DataFrame, command: str) -> str:
    """README.md, from the numbers alone."""

    def shown(row: Any, low: str, high: str, value: str = "regret") -> str:
        known = pd.notna(row.get(low))
        ends = f" ({row[low]:+.2f} to {row[high]:+.2f})" if known else ""
        return f"{row[value]:+.2f}{ends}" if pd.notna(row.get(value)) else "–"

    total = [
        {
            "rule": row["rule"],
            "regret, points": shown(row, "low", "high"),
            "better than a random plan by, points": shown(row, "gain_low", "gain_high", "against_random"),
            "tables": row["n_tables"],
            "from": RULES[row["rule"]],
        }
        for row in rules.to_dict("records")
    ]
    single = [
        {"rule": rule, **{row["table"]: shown(row, "low", "high") for row in part.to_dict("records")}}
        for rule, part in tables.groupby("rule", sort=False)
    ]
    chance = tables.drop_duplicates("table")
    single.append(
        {
            "rule": "any plan of the size",
            **{
                row["table"]: shown(row, "chance_low", "chance_high", "chance_regret")
                for row in chance.to_dict("records")
            },
        }
    )
    better = rules[rules["gain_low"] > 0]["rule"].tolist() if "gain_low" in rules else []
    worse = rules[rules["gain_high"] < 0]["rule"].tolist() if "gain_high" in rules else []
    n_seeds = sorted(tables["n_seeds"].unique().tolist())
    answer = (
        f"Over {tables['table'].nunique()} tables {', '.join(better) or 'no rule'} is shown to choose better than a "
        f"random plan of the same size, and {', '.join(worse) or 'none'} worse (95 % t intervals over tables, not "
        f"corrected for {len(rules)} rules; {' or '.join(map(str, n_seeds))} unseen seeds a table)."
    ) + alike(choices)
    return "\n\n".join(
        [
            "# What other projects' rules would train, on tables of every plan",
            answer,
            f"```console\n$ {command}\n```",
            "This page is made by that command from the numbers; it takes every table that is there. Regret: test "
            "accuracy of the plan that is best on validation among those of k trained blocks, minus that of the rule's "
            "plan of k blocks, on seeds that selected nothing; mean over k = 1 to L − 1, in points. It may be "
            "negative, for the best on validation need not be the best on test images. All plans trained with rates "
            "of their own.",
            "In brackets: 95 % t intervals over tables.",
            render_table(total, "markdown"),
            "## By table",
            "In brackets: 95 % t intervals over the unseen seeds.",
            render_table(single, "markdown"),
            "Files: `choices.csv` (one row a table, rule and size), `tables.csv`, `rules.csv`, `about.json` (versions, "
            "hardware).\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", type=Path, help=f"default: every table in {TABLES}")
    parser.add_argument("--data", type=Path, default=Path("../shared"), help="holds models/ and data/")
    parser.add_argument("--output", "-o", type=Path, default=None)
    arguments = parser.parse_args()
    try:
        rows = []
        for folder in arguments.tables or sorted(path.parent for path in TABLES.glob("*/table.json")):
            table = ExhaustiveTable.load(folder)
            about = read_json(folder / "table.json", what="exhaustive table")
            rows += judged(table, orders(table, about, arguments.data))
    except LayerprobeError as error:
        sys.exit(f"error: {error}")
    choices = pd.DataFrame(rows)
    tables = over_sizes(choices)
    rules = over_tables(tables)
    command = shlex.join(["python", *sys.argv])
    text = page(choices, tables, rules, command)
    print(text)
    if (folder := arguments.output) is not None:
        for name, frame in (("choices", choices), ("tables", tables), ("rules", rules)):
            write_frame(frame, folder / f"{name}.csv")
        write_json(folder / "about.json", {"command": command, "versions": versions(), "machine": machine()})
        write_text(folder / "README.md", text)


if __name__ == "__main__":
    main()

"""The page of a freeze search: the answer first, then the evidence, then how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerprobe.errors import BrokenFileError
from layerprobe.files import read_json
from layerprobe.plans import FreezePlan
from layerprobe.reading import Schema, check_fields, check_plain
from layerprobe.report import page as html
from layerprobe.report.page import PROVENANCE_FIELDS
from layerprobe.tables import cell_text, read_frame, render_table, strict_rows

SCHEMA = "layerprobe.search/v1"

ARM_NAMES = {
    "plan": "the chosen plan",
    "all": "all blocks trained",
    "none": "no block (stem and head only)",
    "norms": "norms only",
    "first-5": "first five blocks",
    "last-5": "last five blocks",
    "first-half": "first half",
    "last-half": "last half",
    "rgn-half": "blocks of large gradient-to-weight ratio",
    "auto-rgn": "all blocks, rates by gradient-to-weight ratio",
    "greedy": "greedy forward selection, same budget",
    "attention": "attention of every block",
    "mlp": "all but attention of every block",
    "first-equal": "first blocks, about the plan's parameters",
    "last-equal": "last blocks, about the plan's parameters",
    "random-equal": "random blocks, about the plan's parameters",
    "everywhere-equal": "adapters everywhere, about the plan's parameters",
}

_NUMBER = (float, type(None))
SEARCH_FIELDS: dict[str, Schema] = {
    "model": str, "task": str, "answer": str, "objective": str, "strategy": str, "trainings": int, "spent": float,
    "budget": float, "chance": float, "seeds": int, "train_seconds": float, "bridge_steps": int, "steps": int,
    "noise": _NUMBER,
    "provenance?": ({"backbone?": (dict, type(None)), **PROVENANCE_FIELDS}, type(None)),
}  # fmt: skip
ROW_FIELDS: dict[str, dict[str, Schema]] = {
    "baselines": {
        "arm": str, "trainable_parameters": _NUMBER, "lr": _NUMBER, "test_accuracy": _NUMBER, "low": _NUMBER,
        "high": _NUMBER, "p_better_than_plan?": _NUMBER, "minus_plan?": _NUMBER, "minus_plan_low?": _NUMBER,
        "minus_plan_high?": _NUMBER,
    },
    "layers": {
        "block": int, "part?": str, "in_plan": (bool, int), "train_gain": _NUMBER, "train_gain_stderr": _NUMBER,
    },
    "trials": {"validation_accuracy": _NUMBER},
}  # fmt: skip
"""What is read of `search.json` and of the tables beside it."""

FIGURE_CAPTIONS = {
    "pareto": "Expected validation accuracy against trainable parameters, every plan that was trained, given all "
    "trainings of the search. Selection looked at these numbers; the test table above was not looked at.",
    "ranking": "Test accuracy of the plan and the baselines on unseen seeds, with 95 % intervals.",
    "plans": "The best plans by expected validation accuracy: which blocks each of them trains.",
}


def search_sections(folder: Path) -> tuple[str, list[str]]:
    """Title and sections of the page for a folder that holds `search.json` and its tables.

    Raises
    ------
    BrokenFileError
        a file of the run is missing or of another schema.
    """
    file = folder / "search.json"
    found = read_json(file, what="search", inside=folder)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise BrokenFileError(f"{file} is not of the schema {SCHEMA}")
    check_fields(found, SEARCH_FIELDS, file)
    check_plain(folder / "plan.json", what="freeze plan", inside=folder)
    plan = FreezePlan.load(folder / "plan.json")
    try:
        baselines, layers, trials = (_rows(folder, name) for name in ROW_FIELDS)
        sections = [
            f"<h1>Which blocks of {html.text(found['model'])} to train for {html.text(found['task'])}</h1>",
            f'<p class="answer">{html.text(found["answer"])}</p>',
            html.strip(_states(layers)),
            _facts(found, plan, layers),
            "<h2>Against the baselines, on unseen seeds</h2>",
            _baselines(baselines, found),
            "<h2>Block by block</h2>",
            _layers(layers),
            "<h2>Figures</h2>",
            *_figures(folder),
            "<h2>Trials</h2>",
            _trials(trials, found),
            "<h2>What to do with the plan</h2>",
            _next_steps(folder, found),
            html.repeat_section(found.get("provenance") or {}),
        ]
    except KeyError as error:
        raise BrokenFileError(f"the run in {folder} lacks the entry {error}; run the search again") from error
    return f"layerprobe: {found['model']} on {found['task']}", sections


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.csv"
    return check_fields(strict_rows(read_frame(path, inside=folder)), [ROW_FIELDS[name]], path)


def _states(layers: list[dict[str, Any]]) -> list[str]:
    """Per block: trained, frozen, or the name of the part that is trained."""
    states = []
    for block in sorted({row["block"] for row in layers}):
        rows = [row for row in layers if row["block"] == block]
        chosen = [row for row in rows if row["in_plan"]]
        whole = "trained" if chosen else "frozen"
        states.append(
            whole if len(chosen) in (0, len(rows)) else " and ".join(str(r["part"]) for r in chosen)
        )
    return states


def _facts(found: Mapping[str, Any], plan: FreezePlan, layers: list[dict[str, Any]]) -> str:
    trainable = plan.trained_parameters
    share = trainable / max(1, plan.counts["trainable_parameters"] + plan.counts["frozen_parameters"])
    states = _states(layers)
    partly = sum(state not in ("trained", "frozen") for state in states)
    also = f" and part of {partly}" if partly else ""
    does = "places adapters on" if plan.adapters else "trains"
    frugal = "fewest trainable parameters within one standard error of the best"
    rule = frugal if found["objective"] == "frugal" else "highest expected validation accuracy"
    bridge = (
        f"a random-label bridge of {html.text(found['bridge_steps'])} steps and "
        if found["bridge_steps"]
        else ""
    )
    return (
        f"<p>The plan {does} {states.count('trained')} of {len(states)} blocks{also}, {cell_text(trainable)} "
        f"parameters of the backbone ({html.percent(share)} %), beside the image stem and the head. Plans were valued "
        f"by validation accuracy after {bridge}fine-tuning for {html.text(found['steps'])} steps under each plan "
        f"({html.text(found['strategy'])} strategy, {html.text(found['trainings'])} trainings, "
        f"{cell_text(round(float(found['spent']), 2))} of {cell_text(float(found['budget']))} full trainings spent); "
        f"the rule is <em>{rule}</em>. One training varies by {_points(found['noise'])} points around its plan and "
        f"seed. Chance is {html.percent(float(found['chance']))}&nbsp;%.</p>"
    )


def _points(share: float | None) -> str:
    return "an unknown number of" if share is None else html.percent(share)


def _baselines(rows: list[dict[str, Any]], found: Mapping[str, Any]) -> str:
    shown = [
        {
            "arm": ARM_NAMES.get(row["arm"], row["arm"]),
            "trained parameters": row["trainable_parameters"],
            "rate": row["lr"],
            "test accuracy, %": _estimate(row["test_accuracy"], row["low"], row["high"]),
            "plan minus this, points": _estimate(*_turned(row), sign=True),
            "P(plan better)": _complement(row.get("p_better_than_plan")),
        }
        for row in rows
    ]
    return (
        render_table(shown, "html", mark=ARM_NAMES["plan"])
        + f'<p class="soft">In brackets: 95 % intervals, which hold the noise between seeds (pooled over all arms) '
        f"and the sampling of test images. Each arm has its own learning rate, chosen on validation; "
        f"{html.text(found['seeds'])} seeds that selected nothing. The chance in which plan the search chose is not "
        "in them.</p>"
    )


def _estimate(value: float | None, low: float | None, high: float | None, *, sign: bool = False) -> str:
    return (
        f"{html.percent(value, sign=sign)} ({html.interval(low, high, sign=sign)})"
        if value is not None
        else "–"
    )


def _complement(share: float | None) -> float | None:
    return None if share is None else round(1 - float(share), 3)


def _turned(row: Mapping[str, Any]) -> list[float | None]:
    """Plan minus arm with its interval, from the columns of arm minus plan."""
    known = (row.get(f"minus_plan{end}") for end in ("", "_high", "_low"))
    return [None if value is None else -float(value) for value in known]


def _layers(rows: list[dict[str, Any]]) -> str:
    names = {"train_gain": "gain from training it, points", "train_gain_stderr": "± s.e."}
    left_out = ("block", "part", "in_plan", "site", "train_gain_low", "train_gain_high")
    shown = []
    for row in rows:
        state = "trained" if row["in_plan"] else "frozen"
        part = {"part": row["part"]} if row.get("part") else {}
        line: dict[str, Any] = {"block": row["block"], **part, "in the plan": state}
        for column, value in row.items():
            if column in names:
                line[names[column]] = html.percent(value, sign=column == "train_gain")
            elif column not in left_out:
                line[column.removeprefix("transfer_")] = value
        shown.append(line)
    columns = shown[0] if shown else {}
    kept = [column for column in columns if any(row[column] not in (None, "–") for row in shown)]
    gain = (
        "The gain is the expected gain from training the block, averaged over plans of the others, given all trainings "
        "of the search. "
        if names["train_gain"] in kept
        else "There were too few trials to tell the gain from training each block. "
    )
    return (
        render_table(shown, "html", columns=kept) + f'<p class="soft">{gain}'
        "The other columns are transfer scores of two kinds that are never mixed: readable (what the block's output "
        "says about the task already) and trainable (what gradients say training it would change). "
        "They propose plans; training decides.</p>"
    )


def _figures(folder: Path) -> list[str]:
    figures = [
        html.figure(
            path, folder, FIGURE_CAPTIONS.get(path.stem, path.stem.replace("_", " ").replace("-", " "))
        )
        for path in [*sorted(folder.glob("*.png")), *sorted((folder / "bridge").glob("*.png"))]
    ]
    return figures or ['<p class="soft">none were drawn</p>']


def _trials(rows: list[dict[str, Any]], found: Mapping[str, Any]) -> str:
    columns = [
        "number", "plan", "lr", "repeat", "fidelity", "validation_accuracy", "test_accuracy", "seconds", "reason",
    ]  # fmt: skip
    failed = sum(row["validation_accuracy"] is None for row in rows)
    seconds = cell_text(round(float(found["train_seconds"])))
    note = f"{len(rows)} trainings in {seconds} seconds of training" + (
        f"; {failed} failed." if failed else "."
    )
    return f"<p>{note}</p>" + html.folded("every training", render_table(rows, "html", columns=columns))


def _next_steps(folder: Path, found: Mapping[str, Any]) -> str:
    model, task, run = found["model"], found["task"], folder.name
    backbone = (found.get("provenance") or {}).get("backbone") or {}
    # The flags that let images enter a language backbone as they did in the search.
    stem = f" --stem {backbone.get('stem')} --patch-size {backbone.get('patch_size')}"
    how = stem if backbone.get("modality") == "language" else ""
    lines = [
        f"layerprobe plan show {run}/plan.json",
        f"layerprobe bridge --model {model} --task {task} --plan {run}/plan.json{how} -o BRIDGE",
        f"layerprobe evaluate --model BRIDGE --task {task} --seeds 3",
        f"layerprobe plan export {run}/plan.json --to regex",
    ]
    kept = (
        f"<p>The bridge-trained backbone of this plan is in <code>{html.text(run)}/bridge/final/backbone</code> "
        "and loads with <code>AutoModel.from_pretrained</code>.</p>"
        if (folder / "bridge").is_dir()
        else ""
    )
    return kept + f"<pre>{html.text(chr(10).join(lines))}</pre>"

"""The page of a freeze search: the answer and the figure that carries it, how sure it is, then the evidence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from layerprobe.errors import UsageError
from layerprobe.layers import name_blocks
from layerprobe.metrics.inference import detectable_with
from layerprobe.plans import FreezePlan
from layerprobe.plotting.search import plot_differences, plot_trials
from layerprobe.report import page as html
from layerprobe.report.drawing import drawn
from layerprobe.report.search_run import SearchRun, name_of
from layerprobe.search.space import REPORT_REPEAT
from layerprobe.tables import cell_text, share_text

HEADS = {
    "probe": "the head starts from a logistic regression on the frozen features",
    "random": "the head starts from random weights",
}
TRIAL_COLUMNS = (
    "number", "plan", "lr", "repeat", "fidelity", "validation_accuracy", "test_accuracy", "seconds", "reason",
)  # fmt: skip
MORE_SEEDS = (3, 5, 8, 12, 20)
SHOWN_PLANS = 8
WORTH = 0.85
"""More seeds are proposed where they make the difference that would be found smaller than this share of today's."""


def search_sections(folder: Path) -> tuple[str, list[str]]:
    """Title and sections of the page for a folder that holds `search.json`; errors as of `SearchRun.read`."""
    run = SearchRun.read(folder)
    sections = [
        html.heading(run.question, run.found["answer"]),
        html.strip(run.states(run.recommended["plan"])),
        _share(run.plan),
        main_figure(run),
        "<h2>How sure, and what it would take to be surer</h2>",
        _sureness(run),
        "<h2>Every way of training, on unseen seeds</h2>",
        _baselines(run),
        "<h2>Block by block</h2>",
        _layers(run),
        "<h2>What the search tried</h2>",
        _trials(run),
        "<h2>What to do next</h2>",
        _next_steps(run),
        "<h2>How it was measured</h2>",
        _method(run),
        html.repeat_section(run.found["provenance"]),
    ]
    return run.question, sections


def _share(plan: FreezePlan) -> str:
    """How much trains, once, with its base."""
    if plan.adapters:
        size = cell_text(plan.trained_parameters)
        return f"<p>Adapters hold {size} parameters; stem and head train besides.</p>"
    trained, blocks = plan.block_counts
    if not trained:
        return "<p>Only the image stem and the head train; the backbone stays as it is.</p>"
    return (
        f"<p>{share_text(trained / max(1, blocks))} of the blocks' parameters train ({cell_text(trained)} of "
        f"{cell_text(blocks)}); stem and head train besides.</p>"
    )


def main_figure(run: SearchRun, *, name: str = "differences") -> str:
    """How far the other ways of training are from the recommended one."""
    mine = run.recommended
    rows: list[dict[str, Any]] = []
    for row in run.baselines:
        value, low, high = run.difference(row)
        if row is mine or run.same_plan(row) or value is None:
            continue
        wide = html.interval(low, high) == html.NOT_ESTIMABLE
        ends = {"low": None, "high": None} if wide else {"low": low, "high": high}
        about = {"arm": row["arm"], "name": name_of(row), "test_accuracy": row["test_accuracy"]}
        rows.append({**about, "difference": value, **ends})
    if not rows:
        return '<p class="soft">There are no differences to draw: too few trainings came through.</p>'
    frame = pd.DataFrame(rows).astype({"difference": float, "low": float, "high": float})
    margin = run.found["margin"] if run.found["kind"] == "no difference" else None
    what = f"training {_trained_in_words(run.states(mine['plan']))}"
    caption = (
        "Test accuracy of other ways of training minus that of the recommended one "
        f"({html.percent(mine['test_accuracy'])} %), on {run.found['seeds']} seeds that selected nothing, with 95 % "
        "intervals. An interval that holds 0 leaves open which is better."
    )
    if margin:
        caption += (
            f" Grey: the excluded difference, ±{100 * margin:.1f} points; two one-sided tests at 5 % rule out a larger "
            "one between best found, all and none, so 95 % intervals may leave it."
        )
    return drawn(
        lambda ax: plot_differences(frame, what, margin=margin, ax=ax),
        caption,
        name=name,
        height=1.4 + 0.36 * len(frame),
    )


def _trained_in_words(states: list[str]) -> str:
    whole = [index for index, state in enumerate(states) if state == "trained"]
    halves = [f"{i} ({state})" for i, state in enumerate(states) if state not in ("trained", "frozen")]
    return ", ".join(([name_blocks(whole)] if whole else []) + halves) or "no block"


def _sureness(run: SearchRun) -> str:
    found = run.found
    noise, seeds = found["noise"], found["seeds"]
    if not noise:
        return "<p>Too few trainings came through to say how much two trainings of one plan differ.</p>"
    judged = len({row["plan"] for row in run.baselines if row["arm"] in ("plan", "all", "none")})
    images = found.get("image_stderr") or 0.0
    rows: list[list[str]] = []
    mark = None
    for n_seeds in sorted({*MORE_SEEDS, seeds}):
        finds = detectable_with(n_seeds, noise=noise, image_stderr=images, arms=max(2, judged))
        if n_seeds == seeds:
            mark = len(rows)
        note = " (this run)" if n_seeds == seeds else ""
        size = html.NOT_ESTIMABLE if finds > 1 else f"{100 * finds:.1f} points"
        rows.append([f"{n_seeds}{note}", size, _cost(run, judged * n_seeds)])
    low, high = run.recommended["low"], run.recommended["high"]
    sampling = (
        " Seeds and the sampling of test images together leave the accuracy of the recommended plan at "
        f"{html.interval(low, high)} % (95 % interval); more seeds do not narrow the images' part."
        if low is not None and high is not None
        else ""
    )
    more = max(2 * seeds, 8)
    line = found["provenance"].get("command_line")
    surer = (
        html.commands(
            f"{_without_folder(line)} --seeds {more} --max-seeds {more} -o {html.quoted(run.folder.name + '-surer')}"
        )
        if line
        else f"<p>From Python: <code>freeze_search(…, seeds={more}, max_seeds={more})</code>.</p>"
    )
    now, then = (
        detectable_with(n, noise=noise, image_stderr=images, arms=max(2, judged)) for n in (seeds, more)
    )
    advice = f"<p>To be surer, with {more} seeds:</p>{surer}"
    if then > WORTH * now:
        advice = (
            "<p>More seeds would hardly help: the test images are the limit. A larger test split would.</p>"
        )
    columns = ["unseen seeds", "detectable difference", "training time"]
    table = html.table(columns, rows, mark=mark) + (
        '<p class="soft">The detectable difference is found in 8 of 10 cases where it is there; a smaller one is '
        "easily missed.</p>"
    )
    return (
        f"<p>One training varies by {html.percent(noise)} points around its plan and seed (standard deviation; what a "
        f"seed does to all plans alike is left out).{sampling}</p>{table}{advice}"
    )


def _without_folder(line: str) -> str:
    """A command without the folder that it writes to."""
    return re.sub(r"\s(?:-o|--output)[= ](?:'[^']*'|\S+)", "", line)


def _cost(run: SearchRun, trainings: int) -> str:
    seconds = [row["seconds"] for row in run.baselines if row.get("seconds")]
    if not seconds:
        return "–"
    total = trainings * sum(seconds) / len(seconds)
    return f"{total / 60:.0f} min" if total >= 90 else f"{total:.0f} s"


def _baselines(run: SearchRun) -> str:
    mine = run.recommended
    rows, mark = [], None
    for index, row in enumerate(run.baselines):
        if row is mine:
            mark, against = index, "recommended"
        elif run.same_plan(row):
            against = "same plan"
        else:
            against = html.estimate(*run.difference(row), sign=True)
        probe = row["arm"] in ("probe", "pixels")
        picture = "–" if probe else html.strip(run.states(row["plan"]), legend=False)
        accuracy = html.estimate(row["test_accuracy"], row["low"], row["high"])
        lr = "–" if row["lr"] is None else f"{row['lr']:g}"
        rows.append([html.text(name_of(row)), picture, accuracy, against, lr])
    columns = ["way of training", "blocks", "test accuracy, %", "minus recommended, points", "learning rate"]
    return (
        html.table(columns, rows, mark=mark)
        + f'<p class="soft">In brackets: 95 % intervals, which hold the noise between seeds (pooled with best found, '
        "all and none) and the sampling of test images; for the probes, of the images alone. "
        f"{html.text(run.found['seeds'])} seeds that selected nothing. Each way has its own learning rate, chosen on "
        "validation, as is the strength of each probe. <em>Best plan found</em> is what the search expects to be best "
        "from all its trainings; it need not be one of them. The chance in which plan the search found is not in the "
        "intervals. Recommended, and kept in <code>plan.json</code>, is the smallest of best found, all and none that "
        "nothing beats.</p>"
    )


def _layers(run: SearchRun) -> str:
    accuracies = [row["test_accuracy"] for row in run.baselines if row["test_accuracy"] is not None]
    scale = max([*accuracies, run.found["chance"] + 0.01]) - run.found["chance"]
    gains = [row["train_gain"] for row in run.layers if row["train_gain"] is not None]
    reach = max((abs(gain) for gain in gains), default=0.0)
    known = [_gain_known(row, scale) for row in run.layers]
    rows = []
    for row, shown in zip(run.layers, known, strict=True):
        state = "trained" if row["in_plan"] else "frozen"
        gain = html.NOT_ESTIMABLE
        if shown:
            value, low, high = row["train_gain"], row["train_gain_low"], row["train_gain_high"]
            gain = html.estimate(value, low, high, sign=True) + html.bar(value, reach)
        part = f" {row['part']}" if row.get("part") else ""
        rows.append([f"{row['block']}{part}", state, gain])
    said = (
        "The expected gain in validation accuracy from training the block, averaged over plans of the others, given "
        "all trainings of the search; in brackets its 95 % interval."
        if any(known)
        else "There were too few trainings to tell the gain from training each block."
    )
    columns = ["block", "in the plan", "gain from training it, points"]
    body = html.table(
        columns if any(known) else columns[:2], rows if any(known) else [row[:2] for row in rows]
    )
    return body + f'<p class="soft">{said}</p>' + _scores(run.layers)


def _gain_known(row: Mapping[str, Any], scale: float) -> bool:
    value, low, high = row["train_gain"], row["train_gain_low"], row["train_gain_high"]
    return value is not None and low is not None and high is not None and high - low <= scale


def _scores(rows: list[dict[str, Any]]) -> str:
    names = [name for name in (rows[0] if rows else {}) if str(name).startswith("transfer_")]
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    if not names:
        return ""
    shown = [
        {name: row[name] for name in ("block", "part") if row.get(name) is not None}
        | {name.removeprefix("transfer_"): row.get(name) for name in names}
        for row in rows
    ]
    words = (
        '<p class="soft">Readable scores say what the block\'s output tells of the task already; trainable ones what '
        "gradients say that training it would change. They are never mixed. They propose plans; training decides.</p>"
    )
    return html.folded("transfer scores of each block", words + html.records_table(shown))


def _trials(run: SearchRun) -> str:
    found = run.found
    failed = sum(row["validation_accuracy"] is None for row in run.trials)
    searched = [row for row in run.trials if row["repeat"] < REPORT_REPEAT]
    frame = pd.DataFrame(searched)
    caption = (
        f"The {len(searched)} trainings of pilot and search in the order in which they finished; they spent "
        f"{found['spent']:.3g} of {found['budget']:.3g} full trainings, and validation accuracy alone was looked at. "
        f"{len(run.trials) - len(searched)} more, on unseen seeds, judged the answer. All together: "
        f"{cell_text(round(float(found['train_seconds'])))} seconds of training"
        + (f", {failed} failed." if failed else ".")
    )
    try:
        picture = drawn(lambda ax: plot_trials(frame, chance=found["chance"], ax=ax), caption, name="trials")
    except UsageError:
        picture = "<p>No training has a validation accuracy.</p>"
    best = sorted(run.plans, key=lambda row: row["validation_accuracy"] or 0.0, reverse=True)
    shown = best[:SHOWN_PLANS] + [row for row in best[SHOWN_PLANS:] if row["chosen"]]
    rows = [
        [
            html.strip(run.states(row["plan"]), legend=False),
            html.estimate(row["validation_accuracy"], row["low"], row["high"]),
            cell_text(row["trainable_parameters"]),
            cell_text(row["n_trainings"]),
        ]
        for row in shown
    ]
    mark = next((index for index, row in enumerate(shown) if row["chosen"]), None)
    columns = ["plan", "expected validation accuracy, %", "trained parameters", "trainings"]
    table = html.table(columns, rows, mark=mark)
    return (
        picture
        + html.folded(f"the best of {len(run.plans)} plans, given all trainings", table)
        + html.folded("every training", html.records_table(run.trials, TRIAL_COLUMNS))
    )


def _next_steps(run: SearchRun) -> str:
    found, folder = run.found, run.folder
    backbone = found["provenance"]["backbone"]
    # The flags that let images enter a language backbone as they did in the search.
    stem = (
        f" --stem {html.quoted(backbone.get('stem'))} --patch-size {html.quoted(backbone.get('patch_size'))}"
    )
    how = stem if backbone.get("modality") == "language" else ""
    model, task, plan = (html.quoted(v) for v in (found["model"], found["task"], f"{folder.name}/plan.json"))
    kept = (
        "<p>The bridge-trained backbone of this plan loads with <code>AutoModel.from_pretrained</code>: "
        f"<code>{html.text(folder.name)}/bridge/final/backbone</code></p>"
        if (folder / "bridge").is_dir()
        else ""
    )
    return (
        kept
        + "<p>Look at the plan, and hand it to your own trainer:</p>"
        + html.commands(f"layerprobe plan show {plan}", f"layerprobe plan export {plan} --to regex")
        + "<p>Or train on random labels under it first (a bridge), and measure what that brings:</p>"
        + html.commands(
            f"layerprobe bridge --model {model} --task {task} --plan {plan}{how} -o BRIDGE",
            f"layerprobe evaluate --model BRIDGE --task {task} --seeds 3",
        )
    )


def _method(run: SearchRun) -> str:
    found = run.found
    settings, pilot = found["provenance"]["arguments"], found["pilot"]
    frugal = "the fewest trained parameters within one standard error of the best"
    plateau = pilot["plateau"]
    bridge = f"{found['bridge_steps']} steps on random labels, then " if found["bridge_steps"] else ""
    facts = {
        "one training": f"{bridge}{found['steps']} steps on the task's labels",
        "head": HEADS.get(settings["head"], settings["head"]),
        "pilot, all blocks": "; ".join(
            f"{100 * a:.1f} % after {n} steps" for n, a in pilot["accuracies"].items()
        ),
        "plateau": (
            "not asked for: the number of steps was given"
            if plateau is None
            else f"{100 * plateau:.1f} %, "
            + (
                "reached to 95 %"
                if pilot["reached"]
                else "not reached: longer trainings may change the answer"
            )
        ),
        "learning rates": ", ".join(f"{lr:g}" for lr in pilot["lrs"]),
        "search": f"{found['strategy']}, {found['trainings']} trainings in all, "
        f"{found['spent']:.3g} of {found['budget']:.3g} full trainings spent",
        "stopping margin": f"{100 * settings['margin']:.1f} points: the search ends when no plan is likely to be "
        "better by as much",
        "choice": frugal if found["objective"] == "frugal" else "the highest expected validation accuracy",
        "chance": f"{html.percent(float(found['chance']))} %",
    }
    rows = [[html.text(key), html.text(value)] for key, value in facts.items()]
    return f'<div class="words">{html.table(["setting", "value"], rows)}</div>'

"""Is training some blocks better than training all, and which: the first, the last, a run of blocks, a searched plan?

    python analyses/partial_bridge.py --quick                  # about a minute: MiniLM, digits, four plans
    python analyses/partial_bridge.py --data ../shared         # seconds; reads results/freeze_search/tables
    python analyses/partial_bridge.py --model gpt2 --task cifar100 --limit 5000     # trains, for hours

Fine-tuning under each plan, at one budget. Every plan has its own learning rate, chosen on validation;
test images judge on seeds that selected nothing. Where a table of every plan exists it is read; with --model and
--task the first-k, last-k and contiguous plans are trained. The searched plan is the frugal one: fewest parameters
within one standard error of the best on validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from study import Answer, Setup, Size, against, mean_row, publish, run, setup, short, tally
from trainings import TABLES, ExhaustiveTable, Trainings, frugal_plan, table_folders

from layerprobe.files import read_json
from layerprobe.plotting import style as look
from layerprobe.plotting.studies import draw_levels
from layerprobe.search.space import Mask, strip
from layerprobe.tables import tidy
from layerprobe.tasks.catalog import TASKS

QUICK = Size(("minilm",), ("digits",), 200, 4,
             lrs=(1e-4, 1e-3), seeds=2, batch_size=16, bridge_steps=0, finetune_steps=12)  # fmt: skip
FULL = Size((), (), 2000, 8,
            lrs=(1e-4, 3e-4, 1e-3), seeds=3, batch_size=32, bridge_steps=0, finetune_steps=200)  # fmt: skip
LOOKS = {
    "first k": (look.GREEN, "^"),
    "last k": (look.YELLOW, "v"),
    "contiguous": (look.PINK, "D"),
    "all": (look.BLUE, "o"),
    "none": (look.GREY, "s"),
    "other": ("#BBBBBB", "."),
}
TOLERANCE = 0.15
"""Of a share, between two machines: short trainings are chaotic."""


def main(argv: Sequence[str] | None = None) -> None:
    of_tables = f"comma-separated folders of tables; default all in {TABLES}"
    s = setup("partial_bridge", __doc__, QUICK, FULL, argv, tables=of_tables)
    train = s.quick or bool(s.arguments.model)
    sources = (
        [trained(s, m, t) for t in s.tasks for m in s.models]
        if train
        else [stored(f) for f in table_folders(s)]
    )
    rows: list[dict[str, Any]] = []
    answers: list[Answer] = []
    for table, masks, facts in sources:
        rows += measured(table, masks, facts)
        answers += claims(table, masks, facts)
    frame = tidy(rows)
    seeds = sorted({f"{a.n_seeds} seeds" for a in answers})
    publish(
        s,
        rows=frame,
        answers=answers,
        headline=headline(answers),
        setting=(
            "; ".join(
                f"{t.name}: {f['setting']}, rates {', '.join(f'{lr:g}' for lr in t.lrs)}"
                for t, _, f in sources
            )
            + f". {' or '.join(seeds)} select, as many others judge; intervals are paired over the judging seeds. "
            "The best partial plan and the searched plan are chosen on validation alone, among "
            + ("the plans trained here." if train else "all plans of a table.")
        ),
        figures={
            "partial_bridge.png": (
                lambda: figure(frame),
                "Test accuracy against the share of the blocks' parameters that train; bars: 95 % t intervals over "
                "unseen seeds; ring: the searched plan; grey: means of all other plans",
            )
        },
        facts={"tolerance": TOLERANCE},
    )


Source = tuple[ExhaustiveTable, list[Mask], dict[str, Any]]


def stored(folder: Path) -> Source:
    table = ExhaustiveTable.load(folder)
    about = read_json(folder / "table.json", what="exhaustive table")
    setting = (
        f"{about['counts']} images, patch {about['patch_size']}, {about['bridge_steps']} + {about['finetune_steps']} "
        f"steps of {about['batch_size']}"
    )
    shots = f", {about['shots']} a class" if about.get("shots") else ""
    facts = {
        "model": about["model"],
        "task": f"{about['task']}{shots}, {about['finetune_steps']} steps",  # tables may differ in these alone
        "n": about["counts"]["test"],
        "setting": setting,
    }
    if about["task"] in TASKS:
        facts["chance"] = 1 / TASKS[about["task"]].n_classes
    return table, table.masks, facts


def trained(s: Setup, model: str, name: str) -> Source:
    task = s.task(name)
    runs = Trainings(s, f"{short(model)}-{short(name)}", s.load(model, task), task, **vars(s.settings))
    n = runs.space.n_blocks
    spans = [(0, 0), *((start, stop) for start in range(n) for stop in range(start + 1, n + 1))]
    if s.quick:
        spans = [(0, 0), (0, n // 2), (n - n // 2, n), (0, n)]
    masks = [tuple(start <= index < stop for index in range(n)) for start, stop in spans]
    counts = {key: len(split) for key, split in task.splits.items()}
    setting = (
        f"{counts} images, patch {s.patch}, {s.settings.finetune_steps} steps of {s.settings.batch_size}"
    )
    facts = {"model": short(model), "task": short(name), "n": len(task.test), "setting": setting}
    return runs.plans(masks), masks, facts | {"chance": 1 / task.n_classes}


def family_of(mask: Mask) -> str:
    text, n = strip(mask), len(mask)
    k = sum(mask)
    if k in (0, n):
        return "none" if k == 0 else "all"
    if text == "#" * k + "." * (n - k):
        return "first k"
    if text == "." * (n - k) + "#" * k:
        return "last k"
    return "contiguous" if "#" * k in text else "other"


def measured(table: ExhaustiveTable, masks: list[Mask], facts: dict[str, Any]) -> list[dict[str, Any]]:
    plan = frugal_plan(table, masks)
    total = sum(table.space.unit_params)
    rows = []
    for mask in masks:
        about = {
            "model": facts["model"],
            "task": facts["task"],
            "pair": table.name,
            "plan": strip(mask),
            "family": family_of(mask),
            "trained_blocks": sum(mask),
            "trainable_share": table.space.params(mask) / total,
            "lr": table.own_lr(mask),
            "chosen": mask == plan,
            "chance": facts.get("chance"),
        }
        validation = {"metric": "validation_accuracy_mean", "split": "validation"}
        rows.append(mean_row(table.validation(mask).tolist(), **about, **validation))
        test = {"metric": "test_accuracy_mean", "split": "test", "n": facts["n"]}
        rows.append(mean_row(table.test(mask).tolist(), **about, **test))
    return rows


def claims(table: ExhaustiveTable, masks: list[Mask], facts: dict[str, Any]) -> list[Answer]:
    space = table.space
    where = f"({facts['model']}, {facts['task']})"
    about: dict[str, Any] = {"n": facts["n"], "model": facts["model"], "task": facts["task"]}
    everything, nothing = table.test(space.all), table.test(space.none)
    partial = [mask for mask in masks if 0 < sum(mask) < space.n_blocks]
    best = frugal_plan(table, partial, tolerant=False)
    plan = frugal_plan(table, masks)
    claim = f"best partial {strip(best)} − all {where}"
    found = [against("partial − all", claim, table.test(best), everything, **about)]
    if plan != space.all:
        claim = f"searched plan {strip(plan)} − all {where}"
        found.append(against("plan − all", claim, table.test(plan), everything, **about))
    first = {sum(m): table.test(m) for m in partial if family_of(m) == "first k"}
    last = {sum(m): table.test(m) for m in partial if family_of(m) == "last k"}
    sizes = sorted(first.keys() & last.keys())
    a, b = (np.mean([side[k] for k in sizes], axis=0) for side in (first, last))
    found.append(against("first − last", f"first k − last k, mean over k {where}", a, b, **about))
    found.append(against("all − none", f"all − none {where}", everything, nothing, **about))
    return found


def headline(answers: list[Answer]) -> str:
    words = {
        "partial − all": "Best partial plan (chosen on validation) against all blocks",
        "plan − all": "Searched plan (fewest parameters within one standard error) against all blocks",
        "first − last": "First k against last k blocks",
        "all − none": "All blocks against none",
    }
    lines = []
    for key, text in words.items():
        group = [a for a in answers if a.key == key]
        if len(group) > 1:
            lines.append(f"- {tally(group, text)}")
        if group:
            big = max(group, key=lambda a: abs(a.value))
            lead = f"- {text}: {big.verdict}; " if len(group) == 1 else "  Largest in size: "
            lines.append(f"{lead}{big.sentence}.")
    return "\n".join(lines)


def figure(frame: pd.DataFrame) -> Any:
    means = frame[frame["metric"] == "test_accuracy_mean"]
    pairs = list(dict.fromkeys(means["pair"]))
    columns = min(2, len(pairs))
    lines = -(-len(pairs) // columns)
    figure, flat = look.new_panels(lines, columns, max(look.PRINT_WIDTH, 4.2 * columns), 3.3 * lines + 0.8)
    for ax, pair in zip(flat, pairs, strict=False):
        part = means[means["pair"] == pair]
        for family in ("other", *[f for f in LOOKS if f != "other"]):
            rows = part[part["family"] == family].sort_values("trainable_share")
            if rows.empty:
                continue
            colour, marker = LOOKS[family]
            x, y = 100 * rows["trainable_share"].astype(float), 100 * rows["value"].astype(float)
            if family == "other":
                ax.plot(x, y, marker, color=colour, ms=7, label="other plans")
                continue
            # Families share sizes; a small shift keeps their bars apart.
            x = x + {"first k": -1.0, "last k": 1.0}.get(family, 0.0)
            low, high = (rows[end].astype(float).clip(0, 1) for end in ("low", "high"))  # t knows no bounds
            reach = [y - 100 * low, 100 * high - y]
            bars = {"yerr": reach, "capsize": 2, "elinewidth": 0.8}
            joined = "-" if family in ("first k", "last k") else "none"
            ax.errorbar(x, y, **bars, color=colour, marker=marker, ms=6, lw=1.2, ls=joined, label=family)
        chosen = part[part["chosen"].astype(bool)]
        shift = {"first k": -1.0, "last k": 1.0}.get(chosen["family"].iloc[0], 0.0)
        x, y = 100 * chosen["trainable_share"].astype(float) + shift, 100 * chosen["value"].astype(float)
        ax.plot(x, y, "o", ms=15, mfc="none", mec=look.ORANGE, mew=2, label="searched plan")
        if part["chance"].notna().any():
            draw_levels(ax, {"chance": float(part["chance"].iloc[0])})
        ax.set_title(f"{pair}, n = {int(part['n'].iloc[0]):,} test images", loc="left", fontsize=10)
    for ax in flat[len(pairs) :]:
        ax.set_axis_off()
    figure.supxlabel("share of the blocks' parameters that train (%)", fontsize=10)
    figure.supylabel(
        f"test accuracy (%), bars: 95 % t interval over {int(means['n_seeds'].max())} seeds", fontsize=10
    )
    look.name_panels(figure, flat[: len(pairs)], ncols=4)
    return figure


if __name__ == "__main__":
    run(main)

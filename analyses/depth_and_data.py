"""How does the best plan move with the amount of downstream data: 1 %, 10 %, 100 % of the images?

    python analyses/depth_and_data.py --quick                  # about a minute: MiniLM, digits, 10 % and 100 %
    python analyses/depth_and_data.py --data ../shared         # about 7 minutes on one core
    python analyses/depth_and_data.py --model gpt2 --task cifar100 --limit 30000

Four plans (none, first half, last half, all blocks), each valued by fine-tuning at equal steps on
the first 1 %, 10 % and 100 % of the training images (every prefix holds the classes in proportion). A plan's rate and
the best plan are chosen on validation; test images judge on seeds that selected nothing. Validation and test images are
the same at every share, so only the training data changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from study import Answer, Setup, Size, against, mean_row, publish, run, setup, short
from trainings import ExhaustiveTable, Trainings, frugal_plan

from layerprobe.plotting import style as look
from layerprobe.plotting.studies import plot_lines
from layerprobe.search.space import Mask, mask_of
from layerprobe.tables import tidy
from layerprobe.tasks import Task

PLANS = {"none": look.GREY, "first half": look.GREEN, "last half": look.YELLOW, "all": look.BLUE}
TRAINING = {"bridge_steps": 0, "finetune_steps": 200, "batch_size": 32, "lrs": (3e-3, 1e-2), "seeds": 3}
QUICK = Size(("minilm",), ("digits",), 200, 4, shares=(0.1, 1.0), plans=("none", "first half", "all"),
             training=TRAINING | {"finetune_steps": 12, "batch_size": 16, "lrs": (3e-4,), "seeds": 2})  # fmt: skip
FULL = Size(("stories260k",), ("mnist",), 2000, 7, shares=(0.01, 0.1, 1.0), plans=tuple(PLANS),
            training=TRAINING)  # fmt: skip
"""`seeds` to select by, and as many unseen ones to judge by."""
TOLERANCE = 0.15
"""Of a share, between two machines: short trainings are chaotic."""


def main(argv: Sequence[str] | None = None) -> None:
    s = setup("depth_and_data", __doc__, QUICK, FULL, argv)
    rows: list[dict[str, Any]] = []
    answers: list[Answer] = []
    said: list[str] = []
    sizes = {}
    for name in s.tasks:
        task = s.task(name)
        sizes[short(name)] = {key: len(split) for key, split in task.splits.items()}
        for model in s.models:
            found = {share: valued(s, model, name, task, share) for share in s.settings.shares}
            best = {share: best_plan(table, plans) for share, (table, plans, _) in found.items()}
            rows += [
                row | {"chance": 1 / task.n_classes} for row in table_rows(found, best, model, name, task)
            ]
            answers += claims(found, best, model, name, len(task.test))
            said += [moved(found, best, f"{short(model)}, {short(name)}", task)]
    frame = tidy(rows)
    used = s.settings.training
    rates = ", ".join(f"{lr:g}" for lr in used["lrs"])
    shown = [a for a in answers if a.key in ("best − all", "order", "moves")]
    publish(
        s,
        rows=frame,
        answers=answers,
        headline="\n".join([*said, "", *(f"- {a.verdict}: {a.sentence}." for a in shown)]),
        setting=(
            f"Images at 100 %: {sizes}. Patch {s.patch}, PCA stem. Fine-tuning from a probed head: "
            f"{used['finetune_steps']} steps of {used['batch_size']} images at every share, rates "
            f"{rates} for each plan separately; {used['seeds']} seeds select, as "
            "many others judge. The best plan has the fewest parameters within one standard error of the best "
            "validation accuracy. Validation keeps its size at every share, so that few training images do not mean "
            "few labels in all."
        ),
        figures={
            "depth_and_data.png": (
                lambda: figure(frame),
                "Test accuracy of each plan by share of the training images; bars: 95 % t intervals over unseen seeds; "
                "ring: the plan that validation chose",
            )
        },
        facts={"tolerance": TOLERANCE},
    )


Valued = tuple[ExhaustiveTable, dict[str, Mask], int]
"""The plans at one share of the training images, by name, and how many images that is."""


def part_of(task: Task, share: float) -> Task:
    """The task with the first `share` of its training images, at least one per class."""
    n = max(task.n_classes, round(share * len(task.train)))
    return dataclasses.replace(task, splits={**task.splits, "train": task.train.subset(range(n))})


def valued(s: Setup, model: str, name: str, task: Task, share: float) -> Valued:
    part = part_of(task, share)
    label = f"{short(model)}-{short(name)}-{share:g}"
    runs = Trainings(s, label, s.load(model, part), part, **s.settings.training)
    n, half = runs.space.n_blocks, runs.space.n_blocks // 2
    spans = {"none": range(0), "first half": range(half), "last half": range(n - half, n), "all": range(n)}
    plans = {key: mask_of(span, n) for key, span in spans.items() if key in s.settings.plans}
    return runs.plans(list(plans.values())), plans, len(part.train)


def best_plan(table: ExhaustiveTable, plans: dict[str, Mask]) -> str:
    chosen = frugal_plan(table, list(plans.values()))
    return next(name for name, mask in plans.items() if mask == chosen)


def table_rows(
    found: dict[float, Valued], best: dict[float, str], model: str, name: str, task: Task
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for share, (table, plans, n_train) in found.items():
        for plan, mask in plans.items():
            about = {
                "model": short(model),
                "task": short(name),
                "share": share,
                "n_train": n_train,
                "plan": plan,
                "lr": table.own_lr(mask),
                "chosen": plan == best[share],
                "trainable_parameters": table.space.params(mask),
            }
            judged = (("validation", table.validation(mask), 0), ("test", table.test(mask), 1000))
            for split, values, first in judged:
                row = {**about, "metric": f"{split}_accuracy", "split": split, "n": len(task.splits[split])}
                rows += [{**row, "value": float(v), "seed": first + i} for i, v in enumerate(values)]
                rows.append(mean_row(values.tolist(), **row | {"metric": f"{split}_accuracy_mean"}))
    return rows


def claims(found: dict[float, Valued], best: dict[float, str], model: str, task: str, n: int) -> list[Answer]:
    about: dict[str, Any] = {"n": n, "model": model, "task": task}
    answers = []
    gaps, tests = {}, {}
    for share, (table, plans, _) in found.items():
        test = {plan: table.test(mask) for plan, mask in plans.items()}
        where = f"at {share:.0%}".replace("%", " %")
        if best[share] != "all":
            claim = f"best plan ({best[share]}) − all, {where}"
            answers.append(against("best − all", claim, test[best[share]], test["all"], **about))
        if best[share] != "none":  # else it is the claim above, the other way round
            answers.append(against("all − none", f"all − none, {where}", test["all"], test["none"], **about))
        tests[share] = test
        other = "last half" if "last half" in test else "all"
        gaps[share] = test["first half"] - test[other]
        claim = f"first half − {other}, {where}"
        answers.append(against("first − last", claim, test["first half"], test[other], **about))
    low, high = min(gaps), max(gaps)
    when = f"at {low:.0%}, minus the same at {high:.0%}".replace("%", " %")
    answers.append(against("order", f"(first half − {other}) {when}", gaps[low], gaps[high], **about))
    few, many = best[low], best[high]
    if few != many:
        pair = [tests[share][few] - tests[share][many] for share in (low, high)]
        answers.append(against("moves", f"({few} − {many}) {when}", *pair, **about))
    return answers


def moved(found: dict[float, Valued], best: dict[float, str], where: str, task: Task) -> str:
    lines, unseen = [], 0
    for share, (table, plans, n_train) in found.items():
        test = table.test(plans[best[share]])
        unseen = len(test)
        lines.append(
            f"at {100 * share:g} % ({n_train:,} images) {best[share]} (test {100 * float(np.mean(test)):.1f} %)"
        )
    verb = (
        "stays"
        if len(set(best.values())) == 1
        else "differs (whether the order of plans does is tested below)"
    )
    return (
        f"{where}: the plan that validation chooses {verb}: {'; '.join(lines)}. "
        f"n = {len(task.test):,} test images, {unseen} unseen seeds."
    )


def figure(frame: pd.DataFrame) -> Any:
    means = frame[frame["metric"] == "test_accuracy_mean"]
    pairs = list(dict.fromkeys(zip(means["model"], means["task"], strict=True)))
    figure, panels = look.new_panels(1, len(pairs), look.PRINT_WIDTH * len(pairs), 4.2)
    for ax, (model, task) in zip(panels, pairs, strict=True):
        part = means[(means["model"] == model) & (means["task"] == task)]
        part = part.assign(place=np.log10(part["share"].astype(float)))
        plot_lines(part, "place", "plan", ax=ax, colours=PLANS, bars=True, shift=0.05)
        plans = list(dict.fromkeys(part["plan"]))
        for _, row in part[part["chosen"].astype(bool)].iterrows():
            place = row["place"] + 0.05 * (plans.index(row["plan"]) - (len(plans) - 1) / 2)
            ax.plot(place, 100 * row["value"], "o", ms=14, mfc="none", mec=look.ORANGE, mew=2)
        ticks = part.drop_duplicates("share").sort_values("share")
        ax.set_xticks(
            ticks["place"],
            [f"{100 * a:g} %\n({int(b):,})" for a, b in zip(ticks["share"], ticks["n_train"], strict=True)],
        )
        ax.set_ylim(0, min(100.0, ax.get_ylim()[1]))
        ax.set_title(f"{model}, {task}, n = {int(part['n'].iloc[0]):,} test images", loc="left", fontsize=10)
        ax.set_xlabel("share of the training images (number); ring: chosen on validation")
        ax.set_ylabel(f"test accuracy (%)\nbars: 95 % t interval over {int(part['n_seeds'].max())} seeds")
        look.show_chance(ax, 100 * float(part["chance"].iloc[0]))
        look.name_lines(ax)
    return figure


if __name__ == "__main__":
    run(main)

"""Does the conclusion change when every arm gets its own learning rate instead of one rate for all?

    python analyses/lr_fairness.py --quick                     # about a minute: MiniLM, digits
    python analyses/lr_fairness.py --data ../shared            # about 6 minutes on one core
    python analyses/lr_fairness.py --model gpt2 --task cifar100 --limit 5000

Rothermel et al. 2021 (arXiv 2107.12460) showed that the headline about frozen pretrained transformers (Lu et al.
2021) rested on one learning rate for all arms. Here the same three comparisons are made at every common rate of a grid,
and with each arm at its own rate, which validation images choose; test images judge. Fine-tuning, one budget for all,
three paired seeds; the untrained network is drawn anew with every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from study import Answer, Setup, Size, against, answer_rows, mean_row, publish, run, setup, short
from trainings import Trainings, trial_rows

from layerprobe.plotting import style as look
from layerprobe.plotting.studies import plot_claims, plot_lines
from layerprobe.search.space import REPORT_REPEAT, Trial, mask_of
from layerprobe.tables import tidy
from layerprobe.tasks import Task

QUICK = Size(("minilm",), ("digits",), 200, 4,
             lrs=(1e-4, 1e-3), seeds=2, batch_size=16, bridge_steps=0, finetune_steps=12)  # fmt: skip
FULL = Size(("stories260k",), ("mnist",), 2000, 7,
            lrs=(3e-4, 1e-3, 3e-3, 1e-2), seeds=3, batch_size=32, bridge_steps=0, finetune_steps=200)  # fmt: skip
ARMS = {"all": look.BLUE, "first half": look.GREEN, "none": look.GREY, "untrained, all": look.PINK}
CONTRASTS = (("all", "untrained, all"), ("first half", "all"), ("none", "all"))
OWN = "own"
TOLERANCE = 0.15
"""Of a share, between two machines: short trainings are chaotic."""


def main(argv: Sequence[str] | None = None) -> None:
    s = setup("lr_fairness", __doc__, QUICK, FULL, argv)
    rows: list[dict[str, Any]] = []
    answers: list[Answer] = []
    said: list[str] = []
    sizes = {}
    for name in s.tasks:
        task = s.task(name)
        sizes[short(name)] = {key: len(split) for key, split in task.splits.items()}
        for model in s.models:
            found = trainings(s, model, name, task)
            own = own_rates(found)
            rows += [row | {"chance": 1 / task.n_classes} for row in table(found, own, model, name)]
            here = claims(found, own, model, name, len(task.test))
            answers += here
            said += conclusions(here, own, f"{short(model)}, {short(name)}", s.settings.lrs)
    frame = tidy(rows)
    grid = ", ".join(f"{lr:g}" for lr in s.settings.lrs)
    publish(
        s,
        rows=frame,
        answers=answers,
        headline="\n".join(said),
        setting=(
            f"Images: {sizes}. Patch {s.patch}, PCA stem. Every arm: fine-tuning from a probed "
            f"head, {s.settings.finetune_steps} steps of {s.settings.batch_size} images; the arm "
            f"says which blocks train (stem and head always do). Rates {grid}; an arm's "
            "own rate has the best mean validation accuracy over the seeds."
        ),
        figures={
            "lr_fairness.png": (
                lambda: figure(frame, answer_rows(s, answers)),
                "Above: each arm by learning rate, 95 % t intervals over seeds. Below: the three comparisons at each "
                "common rate, and with own rates",
            )
        },
        facts={"tolerance": TOLERANCE},
    )


def trainings(s: Setup, model: str, name: str, task: Task) -> dict[str, dict[Trial, Any]]:
    """Arm → trial → outcome: every rate with every seed, judged on test."""
    lrs, seeds = s.settings.lrs, range(s.settings.seeds)
    label = f"{short(model)}-{short(name)}"
    runs = Trainings(s, label, s.load(model, task), task, **vars(s.settings))
    n = runs.space.n_blocks
    masks = {"all": runs.space.all, "first half": mask_of(range(n // 2), n), "none": runs.space.none}
    found = {
        arm: runs.outcomes(
            [Trial(mask=mask, lr=lr, repeat=REPORT_REPEAT + seed) for lr in lrs for seed in seeds]
        )
        for arm, mask in masks.items()
        if not (s.quick and arm == "first half")
    }
    found["untrained, all"] = {}
    for seed in seeds:
        untrained = s.load(model, task, init="random", seed=seed)
        runs = Trainings(s, f"{label}-untrained-{seed}", untrained, task, **vars(s.settings))
        trials = [Trial(mask=runs.space.all, lr=lr, repeat=REPORT_REPEAT + seed) for lr in lrs]
        found["untrained, all"] |= runs.outcomes(trials)
    return found


def by_rate(outcomes: dict[Trial, Any], what: str) -> dict[float, list[float]]:
    """Rate → value per seed; a diverged run counts as 0."""
    rates: dict[float, list[float]] = {}
    for trial in sorted(outcomes, key=lambda t: (t.lr, t.repeat)):
        rates.setdefault(trial.lr, []).append(getattr(outcomes[trial], what) or 0.0)
    return rates


def own_rates(found: dict[str, dict[Trial, Any]]) -> dict[str, float]:
    """Arm → the rate with the best mean validation accuracy."""
    rates = {}
    for arm, outcomes in found.items():
        validation = by_rate(outcomes, "validation_accuracy")
        rates[arm] = max(validation, key=lambda lr: sum(validation[lr]))
    return rates


def table(
    found: dict[str, dict[Trial, Any]], own: dict[str, float], model: str, task: str
) -> list[dict[str, Any]]:
    rows = []
    for arm, outcomes in found.items():
        about = {"model": short(model), "task": short(task), "arm": arm}
        rows += trial_rows(outcomes, **about)
        n = next(iter(outcomes.values())).n_test
        for lr, values in by_rate(outcomes, "test_accuracy").items():
            mean = {"metric": "test_accuracy_mean", "split": "test", "lr": lr, "n": n, "own": lr == own[arm]}
            rows.append(mean_row(values, **about, **mean))
    return rows


def claims(
    found: dict[str, dict[Trial, Any]], own: dict[str, float], model: str, task: str, n: int
) -> list[Answer]:
    test = {arm: by_rate(outcomes, "test_accuracy") for arm, outcomes in found.items()}
    answers = []
    for a, b in CONTRASTS:
        if a not in test or b not in test:
            continue
        about: dict[str, Any] = {"n": n, "model": model, "task": task}
        for lr in test[a]:
            claim = f"{a} − {b}, both at {lr:g}"
            answers.append(against(f"{a} − {b}", claim, test[a][lr], test[b][lr], **about))
        claim = f"{a} − {b}, own rates {own[a]:g} and {own[b]:g}"
        answers.append(against(f"{a} − {b} {OWN}", claim, test[a][own[a]], test[b][own[b]], **about))
    return answers


def conclusions(
    answers: list[Answer], own: dict[str, float], where: str, grid: tuple[float, ...]
) -> list[str]:
    lines = []
    for a, b in CONTRASTS:
        common = [x for x in answers if x.key == f"{a} − {b}"]
        fair = [x for x in answers if x.key == f"{a} − {b} {OWN}"]
        if not fair:
            continue
        other = [x for x in common if x.verdict != fair[0].verdict]
        rates = "; ".join(f"{x.claim.rsplit(' ', 1)[1]}: {x.verdict}" for x in common)
        changed = (
            f"the conclusion changes at {len(other)} of {len(common)} common rates"
            if other
            else "the conclusion is the same at every common rate"
        )
        edges = [arm for arm in (a, b) if own[arm] in (grid[0], grid[-1])]
        edge = f" The own rate of {' and '.join(edges)} lies at an edge of the grid." if edges else ""
        lines.append(
            f"- {where}: {fair[0].verdict} with own rates; {changed} ({rates}). {fair[0].sentence}.{edge}"
        )
    return lines


def figure(frame: pd.DataFrame, claimed: pd.DataFrame) -> Any:
    means = frame[frame["metric"] == "test_accuracy_mean"]
    first = means[["model", "task"]].iloc[0]
    means = means[(means["model"] == first["model"]) & (means["task"] == first["task"])]
    claimed = claimed[(claimed["model"] == first["model"]) & (claimed["task"] == first["task"])]
    heights = [3.4, 0.9 + 0.3 * len(claimed)]
    figure, (above, below) = look.stacked_axes(look.PRINT_WIDTH, heights)
    plot_lines(means, "lr", "arm", ax=above, colours=ARMS)
    look.log_axis(above, "x")
    rates = sorted(set(means["lr"].astype(float)))
    above.set_xticks(rates, [f"{rate:g}" for rate in rates])
    above.set_ylim(0, min(100.0, above.get_ylim()[1]))
    above.set_xlabel("learning rate (ring: the arm's own)")
    for arm, rows in means[means["own"].astype(bool)].groupby("arm"):
        above.plot(
            rows["lr"], 100 * rows["value"].astype(float), "o", ms=13, mfc="none", mec=ARMS[str(arm)], mew=2
        )
    above.set_ylabel(f"test accuracy (%)\nband: 95 % t interval, {int(means['n_seeds'].max())} seeds")
    above.set_title(
        f"{first['model']}, {first['task']}, n = {int(means['n'].iloc[0]):,} test images",
        loc="left",
        fontsize=10,
    )
    look.show_chance(above, 100 * float(means["chance"].iloc[0]))
    look.name_lines(above)
    plot_claims(claimed, ax=below)
    return figure


if __name__ == "__main__":
    run(main)

"""What makes a fine-tuning learn in little time: an ablation of the recipe at equal processor time.

    python analyses/recipe.py --quick               # MiniLM, digits, seconds a training
    python analyses/recipe.py --data ../shared      # about 40 minutes on one core

All blocks train. Every variant changes one thing of the recipe and gets the same processor time, which it turns into as
many steps as it can make; so a slower step is paid for. Each takes its learning rate from a grid, chosen on validation
with the first seed. An interrupted call continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from study import Answer, Setup, Size, answer_rows, md_table, publish, run, setup, short
from trainings import mean_in_words, outcome_rows, own_rate, pooled_claims

from layerprobe.cli.output import save_figure
from layerprobe.metrics.inference import PooledArms
from layerprobe.metrics.intervals import wilson_interval
from layerprobe.plotting.studies import plot_claims
from layerprobe.tables import tidy
from layerprobe.tasks import Task
from layerprobe.training import FineTuneConfig, TaskTensors, block_plan, train_and_score

RECIPE = {"head": "probe", "stem": "pca"}
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "random head, ×1": {"head": "random"},
    "random head, ×10": {"head": "random", "head_lr": 10.0},
    "random stem": {"stem": "random"},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "weak augmentation": {"augment": "weak"},
    "bfloat16 autocast": {"precision": "bfloat16"},
}
"""Variant → what it changes; `stem` is how the patch embedding starts, the others are of `FineTuneConfig`."""
PROBE_STEPS = 6
"""Steps of a short training, beside one of twice as many, that measure the time of a step."""
QUICK = Size(("minilm",), ("digits",), 200, 4)
FULL = Size(("stories260k:mnist", "minilm:digits", "minilm:cifar10"), (), None, None)
PATCHES = {"mnist": 7, "digits": 2, "cifar10": 8}
"""Pixels a side: 16 tokens an image in each of them."""
SECONDS = {"mnist": 20.0, "digits": 12.0}
"""Processor seconds of a training's steps."""
TARGETS = {"mnist": (90.0, 0.95), "digits": (120.0, 0.95), "cifar10": (450.0, 0.50)}
"""Processor seconds of one training with its evaluation, and the test accuracy that it should reach."""
LONG_ALONE = ("cifar10",)
"""Tasks without the ablation, which is costly there: the recipe at the smallest rate, for the time of `TARGETS`."""
SHARE = 0.85
"""Of these seconds, what the steps get; probe, decoding and evaluation take the rest."""
LRS = {"stories260k": (1e-3, 3e-3), "minilm": (1e-4, 3e-4)}
SEEDS = (0, 1)
TOLERANCE = 0.2


def main(argv: Sequence[str] | None = None) -> None:
    s = setup("recipe", __doc__ or "", quick=QUICK, full=FULL, argv=argv)
    pairs = [tuple(model.split(":")) for model in s.models if ":" in model]
    pairs += [(model, task) for model in s.models if ":" not in model for task in s.tasks]
    rows: list[dict[str, Any]] = []
    answers: list[Answer] = []
    sections: dict[str, list[str]] = {}
    headlines, targets = [], []
    for model, name in pairs:
        task = s.task(name)
        found, facts, own_rows, target = trainings(s, model, name, task)
        targets += target
        if not found:
            continue
        rows += own_rows
        pooled = PooledArms(found, n_images=len(task.test))
        compared = [(f"{words} − recipe", words, "recipe") for words in VARIANTS if words != "recipe"]
        answers += pooled_claims(
            pooled, compared, key=lambda words: words, model=model, task=name, n=len(task.test)
        )
        where = f"{short(model)}, {short(name)}"
        sections[f"Test accuracy: {where}, {seconds(s, name):g} CPU-s"] = accuracy_table(pooled, facts)
        headlines.append(headline(pooled, facts, where, len(task.test)))
    if targets:
        sections["The recipe with more time, one training (seed 0)"] = md_table(targets)
    save_figure(lambda: plot_claims(answer_rows(s, answers)), s.output / "recipe.png")
    publish(
        s,
        rows=tidy(rows),
        answers=answers,
        headline=" ".join(headlines),
        setting=setting(s),
        sections=sections,
        figures={"recipe.png": "Each variant against the recipe at equal processor time; 95 % intervals."},
        facts={
            "recipe": RECIPE,
            "variants": VARIANTS,
            "seconds": SECONDS,
            "targets": TARGETS,
            "seeds": seeds(s),
            "lrs": LRS,
        },
    )


def seconds(s: Setup, name: str) -> float:
    return 2.0 if s.quick else SECONDS.get(short(name), 60.0)


def seeds(s: Setup) -> tuple[int, ...]:
    return SEEDS[:2] if s.quick else SEEDS


def trainings(
    s: Setup, model: str, name: str, task: Task
) -> tuple[
    dict[str, dict[int, float]], dict[str, dict[str, float]], list[dict[str, Any]], list[dict[str, Any]]
]:
    """Per variant: seed → test accuracy at its own rate; rate, steps and processor seconds; a row a training; and a
    row for the recipe with the time of `TARGETS`."""
    loaded: dict[str, Any] = {}

    def one(words: str, lr: float, seed: int, budget: float) -> dict[str, Any]:
        given = {"batch_size": 32, "augment": "none", **RECIPE, **VARIANTS[words]}
        stem = given.pop("stem")

        def fit(steps: int, *, test: bool) -> tuple[dict[str, Any], float]:
            if stem not in loaded:
                loaded.clear()
                known = PATCHES.get(short(name))
                patch = {} if s.patch or known is None else {"patch_size": known}
                backbone = s.load(model, task, stem=stem, **patch)
                loaded[stem] = backbone, TaskTensors.of(backbone, task)
            backbone, images = loaded[stem]
            config = FineTuneConfig(lr=lr, seed=seed, steps=steps, **given)
            everything = block_plan(backbone, range(backbone.n_blocks))
            began = time.process_time()
            outcome = train_and_score(backbone, images, everything, bridge=None, finetune=config, test=test)
            return outcome.to_dict(), time.process_time() - began

        def measured() -> dict[str, float]:
            fit(PROBE_STEPS, test=False)  # decodes the images
            # The least of three: on a shared core other work can only add to the processor time.
            short_run, long_run = (
                min(fit(n, test=False)[1] for _ in range(3)) for n in (PROBE_STEPS, 5 * PROBE_STEPS)
            )
            return {"step": max((long_run - short_run) / (4 * PROBE_STEPS), 1e-4)}

        def train() -> dict[str, Any]:
            outcome, spent = fit(n_steps, test=True)
            return outcome | {"cpu_seconds": spent, "steps": n_steps}

        key = f"{short(model)}-{short(name)}-{words}".replace(" ", "-").replace(",", "")
        speed = s.kept(f"{key}-speed", measured, **given, stem=stem)
        n_steps = max(2, round(budget / speed["step"]))
        return s.kept(f"{key}-{lr:g}-{seed}-{budget:g}", train, **given, stem=stem)

    found: dict[str, dict[int, float]] = {}
    facts: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    lrs = LRS.get(short(model), LRS["minilm"])
    for words in () if short(name) in LONG_ALONE and not s.quick else VARIANTS:
        lr, runs = own_rate(
            lambda lr, seed, words=words: one(words, lr, seed, seconds(s, name)), lrs, seeds(s), most=len(lrs)
        )
        own = {seed: outcome for (rate, seed), outcome in runs.items() if rate == lr}
        found[words] = {seed: outcome["test_accuracy"] or 0.0 for seed, outcome in own.items()}
        mean = {
            key: sum(outcome[key] for outcome in own.values()) / len(own) for key in ("steps", "cpu_seconds")
        }
        facts[words] = {"lr": lr, **mean}
        rows += outcome_rows(runs, lr, model=short(model), task=short(name), arm=words)
    targets = []
    if not s.quick and short(name) in TARGETS:
        limit, bar = TARGETS[short(name)]
        outcome = one("recipe", facts["recipe"]["lr"] if facts else lrs[0], 0, SHARE * limit)
        n, right = len(task.test), outcome["test_accuracy"]
        low, high = (100 * end for end in wilson_interval(right * n, n))
        targets.append(
            {
                "model, task": f"{short(model)}, {short(name)}",
                "target": f"{100 * bar:.0f} % in {limit:.0f} CPU-s",
                "test accuracy %": f"{100 * right:.1f} ({low:.1f} to {high:.1f})",
                "CPU-s, evaluation included": f"{outcome['cpu_seconds']:.0f}",
                "steps": f"{outcome['steps']}",
                "reached": "yes" if right >= bar and outcome["cpu_seconds"] <= limit else "no",
            }
        )
    return found, facts, rows, targets


def accuracy_table(pooled: PooledArms, facts: dict[str, dict[str, float]]) -> list[str]:
    rows = []
    for words in VARIANTS:
        about = facts[words]
        rows.append(
            {
                "variant": words,
                "test accuracy %": mean_in_words(pooled, words),
                "lr": f"{about['lr']:g}",
                "steps": f"{about['steps']:.0f}",
                "CPU-s, evaluation included": f"{about['cpu_seconds']:.0f}",
            }
        )
    return md_table(rows)


def headline(pooled: PooledArms, facts: dict[str, dict[str, float]], where: str, n: int) -> str:
    value = 100 * (pooled.mean("recipe").value or 0.0)
    best = max(VARIANTS, key=lambda words: pooled.mean(words).value or 0.0)
    top = (
        "the best"
        if best == "recipe"
        else f"the best is {best}, {100 * (pooled.mean(best).value or 0):.1f} %"
    )
    return (
        f"{where}: the recipe reaches {value:.1f} % test accuracy in {facts['recipe']['cpu_seconds']:.0f} CPU-s, "
        f"evaluation included ({top}; n = {n:,} test images, {pooled.mean('recipe').n} seeds)."
    )


def setting(s: Setup) -> str:
    return (
        "Recipe: all blocks, stem and head train; the head starts from a logistic regression on the frozen features, "
        "the stem from principal components of the patches; one learning rate for all; AdamW, batches of 32, no "
        "augmentation, no label smoothing, float32. Images have 16 tokens. A variant's steps are the processor time "
        f"that stands above divided by its measured time of a step; seeds {seeds(s)}; rates {LRS}."
    )


if __name__ == "__main__":
    run(main)

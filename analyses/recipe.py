"""What makes a fine-tuning learn in little time: an ablation of the recipe at equal processor time.

    python analyses/recipe.py --quick               # MiniLM, digits, seconds a training
    python analyses/recipe.py --data ../shared      # about 40 minutes on one core

All blocks train. Every variant changes one thing of the recipe and gets the same processor time, which it turns into as
many steps as it can make; so a slower step is paid for. Each takes its learning rate from a grid, chosen on validation
with the first seed. An interrupted call continues where it stopped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from arms import Arms
from study import Answer, Setup, Size, answer_rows, md_table, publish, run, setup, short

from layerprobe.metrics.intervals import wilson_interval
from layerprobe.plotting.studies import plot_claims
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
TARGETS: dict[str, tuple[float, float, dict[str, Any]]] = {
    "mnist": (90.0, 0.95, {}),
    "digits": (120.0, 0.95, {}),
    "cifar10": (900.0, 0.50, {"precision": "bfloat16", "augment": "weak"}),
}
"""Processor seconds of one training with its evaluation, the test accuracy that it should reach, and what it changes
in the recipe: many epochs of few images ask for augmentation."""
LONG_ALONE = ("cifar10",)
"""Tasks without the ablation, which is costly there: the recipe at the smallest rate, for the time of `TARGETS`."""
SHARE = 0.8
"""Of these seconds, what the steps get; probe, decoding and evaluation take the rest."""
LRS = {"stories260k": (1e-3, 3e-3), "minilm": (1e-4, 3e-4)}
SEEDS = (0, 1)
TOLERANCE = 0.2


def main(argv: Sequence[str] | None = None) -> None:
    s = setup("recipe", __doc__, QUICK, FULL, argv)
    pairs = [tuple(model.split(":")) for model in s.models if ":" in model]
    pairs += [(model, task) for model in s.models if ":" not in model for task in s.tasks]
    rows: list[dict[str, Any]] = []
    answers: list[Answer] = []
    sections: dict[str, list[str]] = {}
    headlines, targets = [], []
    for model, name in pairs:
        task = s.task(name)
        arms, target = trainings(s, model, name, task)
        targets += target
        if not arms.rows:
            continue
        rows += arms.rows
        answers += arms.claims([(f"{words} − recipe", words, "recipe") for words in list(VARIANTS)[1:]])
        sections[f"Test accuracy: {arms.where}, {seconds(s, name):g} CPU-s"] = accuracy_table(arms)
        headlines.append(headline(arms))
    if targets:
        sections["The recipe with more time, one training (seed 0)"] = md_table(targets)
    publish(
        s,
        rows=rows,
        answers=answers,
        headline=" ".join(headlines),
        setting=setting(s),
        sections=sections,
        figures={
            "recipe.png": (
                lambda: plot_claims(answer_rows(s, answers)),
                "Each variant against the recipe at equal processor time; 95 % intervals.",
            )
        },
        facts={
            "recipe": RECIPE,
            "variants": VARIANTS,
            "seconds": SECONDS,
            "targets": TARGETS,
            "seeds": SEEDS,
            "lrs": LRS,
        },
    )


def seconds(s: Setup, name: str) -> float:
    return 2.0 if s.quick else SECONDS.get(short(name), 60.0)


def trainings(s: Setup, model: str, name: str, task: Task) -> tuple[Arms, list[dict[str, Any]]]:
    """The variants as arms, and a row for the recipe with the time of `TARGETS`."""
    loaded: dict[str, Any] = {}

    def one(budget: float, words: str, lr: float, seed: int, **changes: Any) -> dict[str, Any]:
        given = {"batch_size": 32, "augment": "none", **RECIPE, **VARIANTS[words], **changes}
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

    arms = Arms(model, name, len(task.test))
    lrs = LRS.get(short(model), LRS["minilm"])
    for words in () if short(name) in LONG_ALONE and not s.quick else VARIANTS:
        arms.train(words, partial(one, seconds(s, name), words), lrs, SEEDS, most=len(lrs))
    targets = []
    if not s.quick and short(name) in TARGETS:
        limit, bar, changes = TARGETS[short(name)]
        outcome = one(SHARE * limit, "recipe", arms.rates.get("recipe", lrs[0]), 0, **changes)
        n, right = len(task.test), outcome["test_accuracy"]
        low, high = (100 * end for end in wilson_interval(right * n, n))
        targets.append(
            {
                "model, task": f"{short(model)}, {short(name)}",
                "beside the recipe": ", ".join(f"{key} {value}" for key, value in changes.items()) or "–",
                "target": f"{100 * bar:.0f} % in {limit:.0f} CPU-s",
                "test accuracy %": f"{100 * right:.1f} ({low:.1f} to {high:.1f})",
                "CPU-s, evaluation included": f"{outcome['cpu_seconds']:.0f}",
                "steps": f"{outcome['steps']}",
                "reached": "yes" if right >= bar and outcome["cpu_seconds"] <= limit else "no",
            }
        )
    return arms, targets


def mean_of(arms: Arms, words: str, what: str) -> float:
    """Mean over seeds, at the variant's own rate."""
    return statistics.mean(outcome[what] for outcome in arms.outcomes[words].values())


def accuracy_table(arms: Arms) -> list[str]:
    return md_table(
        [
            {
                "variant": words,
                "test accuracy %": arms.mean_in_words(words),
                "lr": f"{arms.rates[words]:g}",
                "steps": f"{mean_of(arms, words, 'steps'):.0f}",
                "CPU-s, evaluation included": f"{mean_of(arms, words, 'cpu_seconds'):.0f}",
            }
            for words in VARIANTS
        ]
    )


def headline(arms: Arms) -> str:
    reached = {words: 100 * (arms.pooled.mean(words).value or 0.0) for words in VARIANTS}
    best = max(reached, key=lambda words: reached[words])
    top = "the best" if best == "recipe" else f"the best is {best}, {reached[best]:.1f} %"
    return (
        f"{arms.where}: the recipe reaches {reached['recipe']:.1f} % test accuracy in "
        f"{mean_of(arms, 'recipe', 'cpu_seconds'):.0f} CPU-s, evaluation included ({top}; n = {arms.n_images:,} test "
        f"images, {len(SEEDS)} seeds)."
    )


def setting(s: Setup) -> str:
    return (
        "Recipe: all blocks, stem and head train; the head starts from a logistic regression on the frozen features, "
        "the stem from principal components of the patches; one learning rate for all; AdamW, batches of 32, no "
        "augmentation, no label smoothing, float32. Images have 16 tokens. A variant's steps are the processor time "
        f"that stands above divided by its measured time of a step; seeds {SEEDS}; rates {LRS}."
    )


if __name__ == "__main__":
    run(main)

"""Does a bridge that has learnt its random labels help, how much of it is the stem, and do the labels leak?

    python analyses/bridge_labels.py --quick               # MiniLM, digits, a few steps
    python analyses/bridge_labels.py --data ../shared      # stories260k, 300 MNIST images: half an hour on one core

So few images that every random label is learnt: a bridge that has not learnt its labels tells nothing (the recall of
each is in the table). Then all blocks are fine-tuned on the true labels of the same images. Against the bridge on
hashed labels stand: no bridge; no bridge and as many steps in all; a bridge of the stem and head alone; a bridge on
labels that are never the true class, which tells the network what an image is not. The random init is bridged, too.
Every arm takes its own learning rate, chosen on validation with the first seed from a grid that grows where the best
lies at an edge. An interrupted call continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from arms import Arms
from study import Answer, Setup, Size, answer_rows, md_table, publish, run, setup, short

from layerprobe.plotting.studies import plot_claims
from layerprobe.tasks import Task
from layerprobe.training import BridgeConfig, FineTuneConfig, TaskTensors, block_plan, train_and_score
from layerprobe.training.arms import LEAST_RECALL

ARMS = {
    "no bridge": ("pretrained", None, False),
    "no bridge, equal steps": ("pretrained", None, True),
    "hashed labels": ("pretrained", "hash", False),
    "hashed labels, stem alone": ("pretrained", "hash stem", False),
    "never the true label": ("pretrained", "complementary", False),
    "random init, no bridge": ("random", None, False),
    "random init, hashed labels": ("random", "hash", False),
}
"""Name → initial weights, labels of the bridge, whether fine-tuning takes the steps of the bridge, too."""
PAIRS = [
    ("bridge − no bridge", "hashed labels", "no bridge"),
    ("bridge − no bridge, equal steps", "hashed labels", "no bridge, equal steps"),
    ("bridge − bridge of the stem alone", "hashed labels", "hashed labels, stem alone"),
    ("never the true label − hashed labels", "never the true label", "hashed labels"),
    ("random init: bridge − no bridge", "random init, hashed labels", "random init, no bridge"),
]
SEEDS = (0, 1, 2, 3, 4)
QUICK = Size(("minilm",), ("digits",), 200, 4,
             images=60, steps={"bridge": 10, "finetune": 5}, seeds=SEEDS[:2], most_rates=3)  # fmt: skip
FULL = Size(("stories260k",), ("mnist",), 3000, 7,
            images=300, steps={"bridge": 500, "finetune": 200}, seeds=SEEDS, most_rates=5)  # fmt: skip
BRIDGE_LR = 3e-3
LRS = (1e-3, 3e-3, 1e-2)
SHARED = {"batch_size": 32, "head_lr": 10.0, "augment": "none"}
TOLERANCE = 0.15


def main(argv: Sequence[str] | None = None) -> None:
    s = setup("bridge_labels", __doc__, QUICK, FULL, argv)
    rows: list[dict[str, Any]] = []
    answers: list[Answer] = []
    sections: dict[str, list[str]] = {}
    headlines = []
    for name in s.tasks:
        task = s.task(name)
        train = task.train.subset(range(s.settings.images))
        task = replace(task, splits={**task.splits, "train": train})
        for model in s.models:
            arms = trainings(s, model, name, task)
            rows += arms.rows
            claimed = arms.claims(PAIRS)
            answers += claimed
            where = f"{arms.where}, {len(train)} images"
            sections[f"Test accuracy: {where}"] = accuracy_table(arms)
            headlines.append(headline(where, arms, claimed))
    publish(
        s,
        rows=rows,
        answers=answers,
        headline=" ".join(headlines),
        setting=setting(s),
        sections=sections,
        figures={
            "bridge_labels.png": (
                lambda: plot_claims(answer_rows(s, answers)),
                "What a random-label bridge adds; 95 % intervals.",
            )
        },
        facts={
            "training": s.settings.steps | SHARED,
            "lrs": LRS,
            "bridge_lr": BRIDGE_LR,
            "seeds": s.settings.seeds,
        },
    )


def trainings(s: Setup, model: str, name: str, task: Task) -> Arms:
    """Every arm; the recall of each bridge stands in the rows, too."""
    loaded: dict[tuple[str, int], Any] = {}
    length = s.settings.steps

    def one(arm: str, lr: float, seed: int) -> dict[str, Any]:
        init, labels, longer = ARMS[arm]

        def train() -> dict[str, Any]:
            at = init, 0 if init == "pretrained" else seed
            if at not in loaded:
                loaded.clear()
                backbone = s.load(model, task, init=init, seed=seed)
                loaded[at] = backbone, TaskTensors.of(backbone, task)
            backbone, images = loaded[at]
            everything = block_plan(backbone, range(backbone.n_blocks))
            bridge = labels and BridgeConfig(
                lr=BRIDGE_LR,
                steps=length["bridge"],
                seed=seed,
                random_classes=task.n_classes,
                random_labels=labels.split()[0],
                **SHARED,
            )
            total = length["finetune"] + length["bridge"] * longer
            outcome = train_and_score(
                backbone,
                images,
                block_plan(backbone, []) if labels == "hash stem" else everything,
                bridge=bridge or None,
                finetune=FineTuneConfig(lr=lr, steps=total, seed=seed, **SHARED),
                finetune_plan=everything,
                test=True,
            )
            return outcome.to_dict()

        key = f"{short(model)}-{short(name)}-{arm}-{lr:g}-{seed}".replace(" ", "-").replace(",", "")
        return s.kept(key, train, images=len(task.train), bridge_lr=BRIDGE_LR, **length, **SHARED)

    arms = Arms(model, name, len(task.test))
    about = {"metric": "bridge_recall", "split": "train", "n": len(task.train), "lr": BRIDGE_LR}
    for arm in ARMS:
        arms.train(arm, partial(one, arm), LRS, s.settings.seeds, most=s.settings.most_rates)
        place = {"model": arms.model, "task": arms.task, "arm": arm}
        arms.rows += [
            {**about, **place, "value": recall, "seed": seed} for seed, recall in recalls(arms, arm).items()
        ]
    return arms


def recalls(arms: Arms, arm: str) -> dict[int, float]:
    """Seed → accuracy on the random labels at the end of the bridge; empty for an arm without one."""
    found = {seed: outcome["bridge_accuracy"] for seed, outcome in arms.outcomes[arm].items()}
    return {seed: recall for seed, recall in found.items() if recall is not None}


def accuracy_table(arms: Arms) -> list[str]:
    rows = []
    for arm in ARMS:
        recall = list(recalls(arms, arm).values())
        rows.append(
            {
                "arm": arm,
                "test accuracy %": arms.mean_in_words(arm),
                "lr": f"{arms.rates[arm]:g}",
                "recall of random labels % (least)": (
                    f"{100 * np.mean(recall):.1f} ({100 * min(recall):.1f})" if recall else "–"
                ),
            }
        )
    return [
        *md_table(rows),
        "",
        arms.noise_in_words(),
        "",
        f"Nothing is claimed of a bridge that recalls less than {100 * LEAST_RECALL:.0f} % of its labels.",
    ]


def headline(where: str, arms: Arms, answers: list[Answer]) -> str:
    parts = [f"{a.claim}: {a.value:+.1f} points ({a.low:+.1f} to {a.high:+.1f})" for a in answers]
    learnt = min(recalls(arms, "hashed labels").values())
    gate = "" if learnt >= LEAST_RECALL else " too few for a claim;"
    return (
        f"{where}: the bridge learnt at least {100 * learnt:.0f} % of its labels;{gate} {'; '.join(parts)} "
        f"(n = {answers[0].n:,} test images, {answers[0].n_seeds} seeds)."
    )


def setting(s: Setup) -> str:
    used = s.settings.steps
    return (
        f"Bridge of {used['bridge']} steps of {SHARED['batch_size']} images at a learning rate of {BRIDGE_LR:g}, then "
        f"fine-tuning of all blocks for {used['finetune']} steps on the same images with their true labels (for equal "
        f"steps: {used['bridge'] + used['finetune']}). PCA stem, head at {SHARED['head_lr']:g} times the blocks' "
        f"learning rate, no augmentation; rates {LRS} and beyond where the best lies at an edge, each arm's own chosen "
        f"on validation with seed {s.settings.seeds[0]}; seeds {s.settings.seeds}. As many random labels as classes."
    )


if __name__ == "__main__":
    run(main)

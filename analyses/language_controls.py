"""Which part of "language pretraining" helps: what language taught, or the scale of the weights and the norms?

    python analyses/language_controls.py --quick               # MiniLM, digits, a few steps
    python analyses/language_controls.py --data ../shared      # stories260k, MNIST: about half an hour on one core

A model that was trained on language is compared with controls that keep a part of it: its entries shuffled within
each tensor; Gaussian matrices of the same mean and deviation with its norms and embeddings ("matched"); and the
library's own random init. Each trains none of its blocks, the last half, or all, beside stem and head. Every arm takes
its own learning rate, chosen on validation with the first seed from a grid that grows where the best lies at an edge;
controls are drawn anew with every seed. No bridge. An interrupted call continues where it stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

from arms import Arms
from study import Answer, Setup, Size, answer_rows, md_table, publish, run, setup, short

from layerprobe.plotting.studies import plot_claims
from layerprobe.tasks import Task
from layerprobe.training import FineTuneConfig, TaskTensors, block_plan, train_and_score

INITS = {
    "pretrained": "language",
    "shuffled": "shuffled",
    "matched": "matched",
    "random": "random init",
}
SCOPES = ("none", "last half", "all")
PAIRS = [
    (f"language − {words}, trained: {scope}", f"language, {scope}", f"{words}, {scope}")
    for scope in SCOPES
    for words in list(INITS.values())[1:]
]
"""Language against each control where the same blocks train."""
LRS = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2, 3, 4)
TRAINING = {"steps": 400, "batch_size": 32, "head_lr": 10.0, "augment": "none"}
QUICK = Size(("minilm",), ("digits",), 200, 4,
             training=TRAINING | {"steps": 10}, seeds=SEEDS[:2], most_rates=len(LRS))  # fmt: skip
FULL = Size(("stories260k",), ("mnist",), 3000, 7, training=TRAINING, seeds=SEEDS, most_rates=5)
"""The grid of an arm grows by factors of three, to `most_rates`, while its best rate lies at an edge."""
TOLERANCE = 0.15


def main(argv: Sequence[str] | None = None) -> None:
    s = setup("language_controls", __doc__, QUICK, FULL, argv)
    rows: list[dict[str, Any]] = []
    answers: list[Answer] = []
    sections: dict[str, list[str]] = {}
    headlines = []
    for name in s.tasks:
        task = s.task(name)
        for model in s.models:
            arms = trainings(s, model, name, task)
            rows += arms.rows
            claimed = arms.claims(PAIRS, key=lambda words: words.partition(",")[0])
            answers += claimed
            sections[f"Test accuracy: {arms.where}"] = accuracy_table(arms)
            headlines.append(headline(arms.where, claimed))
    publish(
        s,
        rows=rows,
        answers=answers,
        headline=" ".join(headlines),
        setting=setting(s),
        sections=sections,
        figures={
            "language_controls.png": (
                lambda: plot_claims(answer_rows(s, answers)),
                "Language against its controls, by what trains; 95 % intervals.",
            )
        },
        facts={"training": s.settings.training, "lrs": LRS, "seeds": s.settings.seeds},
    )


def trainings(s: Setup, model: str, name: str, task: Task) -> Arms:
    tensors: dict[tuple[str, int], Any] = {}

    def one(init: str, scope: str, lr: float, seed: int) -> dict[str, Any]:
        def train() -> dict[str, Any]:
            if (init, seed) not in tensors:
                tensors.clear()
                backbone = s.load(model, task, init=init, seed=seed)
                tensors[init, seed] = backbone, TaskTensors.of(backbone, task)
            backbone, images = tensors[init, seed]
            n = backbone.n_blocks
            blocks = {"none": range(0), "last half": range(n // 2, n), "all": range(n)}[scope]
            config = FineTuneConfig(lr=lr, seed=seed, **s.settings.training)
            outcome = train_and_score(
                backbone, images, block_plan(backbone, blocks), bridge=None, finetune=config, test=True
            )
            return outcome.to_dict()

        key = f"{short(model)}-{short(name)}-{init}-{scope}-{lr:g}-{seed}"
        return s.kept(key.replace(" ", "-"), train, **s.settings.training)

    arms = Arms(model, name, len(task.test))
    for init, words in INITS.items():
        for scope in SCOPES:
            arms.train(f"{words}, {scope}", partial(one, init, scope), LRS, s.settings.seeds,
                       most=s.settings.most_rates, init=init, scope=scope)  # fmt: skip
    return arms


def accuracy_table(arms: Arms) -> list[str]:
    rows = []
    for words in INITS.values():
        row: dict[str, Any] = {"weights": words}
        for scope in SCOPES:
            arm = f"{words}, {scope}"
            row[f"trained: {scope}"] = f"{arms.mean_in_words(arm)} at {arms.rates[arm]:g}"
        rows.append(row)
    return [*md_table(rows), "", arms.noise_in_words()]


def headline(where: str, answers: list[Answer]) -> str:
    """Two plain sentences: language against random init, then against the control that keeps most."""
    parts = []
    for scope, words in itertools.product(("all", "none"), ("random init", "shuffled")):
        answer = next(a for a in answers if a.claim == f"language − {words}, trained: {scope}")
        blocks = "all blocks train" if scope == "all" else "no block trains"
        interval = f"({answer.low:+.1f} to {answer.high:+.1f})"
        parts.append(f"{answer.value:+.1f} points {interval} against {words} where {blocks}")
    n, n_seeds = answers[0].n, answers[0].n_seeds
    return f"{where}: language weights have {'; '.join(parts)} (n = {n:,} test images, {n_seeds} seeds)."


def setting(s: Setup) -> str:
    used = s.settings.training
    return (
        f"Fine-tuning without a bridge: {used['steps']} steps of {used['batch_size']} images, PCA stem, head at "
        f"{used['head_lr']:g} times the blocks' learning rate, no augmentation; rates {LRS} and beyond where the best "
        f"lies at an edge, each arm's own chosen on validation with seed {s.settings.seeds[0]}; "
        f"seeds {s.settings.seeds}. Stem and head train in every arm; embeddings and outer norms in none."
    )


if __name__ == "__main__":
    run(main)

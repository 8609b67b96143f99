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

from collections.abc import Sequence
from functools import partial
from typing import Any

from study import Answer, Setup, Size, answer_rows, md_table, publish, run, setup, short
from trainings import mean_in_words, noise_in_words, outcome_rows, own_rate, pooled_claims

from layerprobe.cli.output import save_figure
from layerprobe.metrics.inference import PooledArms
from layerprobe.plotting.studies import plot_claims
from layerprobe.tables import tidy
from layerprobe.tasks import Task
from layerprobe.training import FineTuneConfig, TaskTensors, block_plan, train_and_score

INITS = {
    "pretrained": "language",
    "shuffled": "shuffled",
    "matched": "matched",
    "random": "random init",
}
SCOPES = ("none", "last half", "all")
LRS = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2, 3, 4)
TRAINING = {"steps": 400, "batch_size": 32, "head_lr": 10.0, "augment": "none"}
QUICK = Size(("minilm",), ("digits",), 200, 4,
             training=TRAINING | {"steps": 10}, seeds=SEEDS[:2], most_rates=len(LRS))  # fmt: skip
FULL = Size(("stories260k",), ("mnist",), 3000, 7, training=TRAINING, seeds=SEEDS, most_rates=5)
"""The grid of an arm grows by factors of three, to `most_rates`, while its best rate lies at an edge."""
TOLERANCE = 0.15


def main(argv: Sequence[str] | None = None) -> None:
    s = setup("language_controls", __doc__ or "", quick=QUICK, full=FULL, argv=argv)
    rows: list[dict[str, Any]] = []
    answers: list[Answer] = []
    sections: dict[str, list[str]] = {}
    headlines = []
    for name in s.tasks:
        task = s.task(name)
        for model in s.models:
            found, rates, own_rows = trainings(s, model, name, task)
            rows += own_rows
            pooled = PooledArms(found, n_images=len(task.test))
            claimed = claims(pooled, model, name, len(task.test))
            answers += claimed
            where = f"{short(model)}, {short(name)}"
            sections[f"Test accuracy: {where}"] = accuracy_table(pooled, rates)
            headlines.append(headline(pooled, claimed, where, len(task.test)))
    frame = tidy(rows)
    save_figure(lambda: plot_claims(answer_rows(s, answers)), s.output / "language_controls.png")
    publish(
        s,
        rows=frame,
        answers=answers,
        headline=" ".join(headlines),
        setting=setting(s),
        sections=sections,
        figures={"language_controls.png": "Language against its controls, by what trains; 95 % intervals."},
        facts={"training": s.settings.training, "lrs": LRS, "seeds": s.settings.seeds},
    )


def trainings(
    s: Setup, model: str, name: str, task: Task
) -> tuple[dict[str, dict[int, float]], dict[str, float], list[dict[str, Any]]]:
    """Arm → seed → test accuracy at the arm's own rate; arm → rate; and a row a training."""
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

    found: dict[str, dict[int, float]] = {}
    rates: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for init, words in INITS.items():
        for scope in SCOPES:
            arm = f"{words}, {scope}"
            rates[arm], runs = own_rate(
                partial(one, init, scope), LRS, s.settings.seeds, most=s.settings.most_rates
            )
            found[arm] = {
                seed: outcome["test_accuracy"] or 0.0
                for (lr, seed), outcome in runs.items()
                if lr == rates[arm]
            }
            about = {"model": short(model), "task": short(name), "arm": arm, "init": init, "scope": scope}
            rows += outcome_rows(runs, rates[arm], **about)
    return found, rates, rows


def claims(pooled: PooledArms, model: str, task: str, n: int) -> list[Answer]:
    """Language against each control where the same blocks train."""
    pairs = [
        (f"language − {words}, trained: {scope}", f"language, {scope}", f"{words}, {scope}")
        for scope in SCOPES
        for words in list(INITS.values())[1:]
    ]
    return pooled_claims(
        pooled, pairs, key=lambda words: words.partition(",")[0], model=model, task=task, n=n
    )


def accuracy_table(pooled: PooledArms, rates: dict[str, float]) -> list[str]:
    rows = []
    for words in INITS.values():
        row: dict[str, Any] = {"weights": words}
        for scope in SCOPES:
            arm = f"{words}, {scope}"
            row[f"trained: {scope}"] = f"{mean_in_words(pooled, arm)} at {rates[arm]:g}"
        rows.append(row)
    return [*md_table(rows), "", noise_in_words(pooled)]


def headline(pooled: PooledArms, answers: list[Answer], where: str, n: int) -> str:
    """Two plain sentences: language against random init, then against the control that keeps most."""
    parts = []
    for scope, words in (
        ("all", "random init"),
        ("all", "shuffled"),
        ("none", "random init"),
        ("none", "shuffled"),
    ):
        answer = next(a for a in answers if a.claim == f"language − {words}, trained: {scope}")
        blocks = "all blocks train" if scope == "all" else "no block trains"
        interval = f"({answer.low:+.1f} to {answer.high:+.1f})"
        parts.append(f"{answer.value:+.1f} points {interval} against {words} where {blocks}")
    return f"{where}: language weights have {'; '.join(parts)} (n = {n:,} test images, {answers[0].n_seeds} seeds)."


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

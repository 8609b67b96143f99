"""What can be read off each layer for vision: language, bridge-trained, vision-trained, untrained, raw pixels?

    python analyses/depth_curves.py --quick                    # about a minute: MiniLM, digits
    python analyses/depth_curves.py --data ../shared           # about 8 minutes on one core
    python analyses/depth_curves.py --model gpt2 --vision vit-base --task cifar100 --limit 5000

Linear probes of every block's output, C chosen on validation, accuracy on test images. For each language model:
its published weights, the same after a bridge training on random labels (everything trained), and the same
architecture untrained; three seeds of what is random (labels and order of the bridge, untrained weights; the stem is
PCA). A vision-trained model and raw pixels stand beside them. A claim compares the best layers (chosen on
validation) and needs both intervals to exclude zero: over test images (paired bootstrap of the mean over seeds) and
over seeds (t); the wider ends are shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from study import Answer, Setup, Size, is_vision, mean_row, publish, run, setup, short, tally

from layerprobe.analyzers.probe_record import LinearProbes
from layerprobe.analyzers.probes import probe_backbone
from layerprobe.metrics.intervals import paired_bootstrap, paired_seed_interval
from layerprobe.plotting import style as look
from layerprobe.plotting.studies import draw_levels, plot_lines
from layerprobe.tables import tidy
from layerprobe.tasks import Task
from layerprobe.training import BridgeConfig, bridge_train

QUICK = Size(("minilm",), ("digits",), 400, 4, seeds=(0,), steps=20, lr=3e-4)
FULL = Size(("stories260k", "babyllama-char105"), ("mnist", "cifar10", "cifar100"), 1000, 8,
            seeds=(0, 1, 2), steps=150, lr=3e-3)  # fmt: skip
"""The rate of the bridge is fixed beforehand, not tuned; another one can move its curve."""
BATCH = 32

ORIGINS = {"language": look.BLUE, "bridge": look.GREEN, "random init": look.PINK, "vision": look.YELLOW}
DRAWN = ("language − random", "bridge − language")
"""Claims in which something is random."""

TOLERANCE = 0.08
"""Of a share, between two machines: a short bridge training is chaotic, probes are not."""


def main(argv: Sequence[str] | None = None) -> None:
    of_vision = "vision-trained model to stand beside; default vit-mnist or vit-cifar10 of DATA, else none"
    s = setup("depth_curves", __doc__, QUICK, FULL, argv, vision=of_vision)
    rows: list[dict[str, Any]] = []
    answers: list[Answer] = []
    tasks: dict[str, Task] = {}
    for name in s.tasks:
        task = tasks[name] = s.task(name)
        vision = vision_of(s, name)
        seen = {} if vision is None else {"vision": [probed(s, vision, name, task, "vision", 0)]}
        for model in s.models:
            seeds = s.settings.seeds
            found = {
                origin: [probed(s, model, name, task, origin, seed) for seed in (seeds if drawn else (0,))]
                for origin, drawn in (("language", False), ("bridge", True), ("random init", True))
            } | seen
            rows += table(found, model, name)
            answers += claims(found, model, name)
    counts = {name: {k: len(v) for k, v in task.splits.items()} for name, task in tasks.items()}
    publish(
        s,
        rows=rows,
        answers=answers,
        headline=headline(answers),
        setting=(
            f"Images per split: {counts}. Patch {s.patch}, PCA stem, mean pooling. Bridge: {s.settings.steps} steps of "
            f"{BATCH} images on 10 random classes, all blocks trained, rate {s.settings.lr:g}. "
            f"{len(s.settings.seeds)} seed(s) of random weights and bridge; probes refitted on train "
            "and validation images with the C that validation chose. Best layers are chosen on validation, not on test."
        ),
        figures={
            "depth_curves.png": (
                lambda: figure(tidy(rows)),
                "Probe accuracy by relative depth (0: what enters the first block). Bands: 95 % t intervals over "
                "seeds, or Wilson intervals over images where nothing is random",
            )
        },
        facts={"tolerance": TOLERANCE},
    )


def vision_of(s: Setup, task: str) -> str | None:
    if s.arguments.vision:
        return str(s.arguments.vision)
    name = "vit-mnist" if short(task) == "mnist" else "vit-cifar10"
    return name if s.path(name, "models") != name else None


def probed(s: Setup, model: str, name: str, task: Task, origin: str, seed: int) -> dict[str, Any]:
    """Probes of one network: accuracies by layer and which test images are right, kept on disk."""
    steps, lr = s.settings.steps, s.settings.lr

    def make() -> dict[str, Any]:
        init = "random" if origin == "random init" else "pretrained"
        backbone = s.load(model, task, **({} if is_vision(model) else {"init": init, "seed": seed}))
        memorised = None
        if origin == "bridge":
            config = BridgeConfig(steps=steps, batch_size=BATCH, lr=lr, seed=seed)
            memorised = bridge_train(backbone, task, config=config).value("random_label_accuracy")
        probes = probe_backbone(
            backbone,
            task,
            pixels=origin == "language" and seed == 0,
            cache_dir=s.features,
            quiet=True,
        )
        kept = pack(probes) | {"memorised": memorised}
        return kept | {"pixels": pack(probes.controls["pixels"])} if probes.controls else kept

    return s.kept(
        f"{model} {name} {origin} {seed}",
        make,
        training=[steps, BATCH, lr] if origin == "bridge" else None,
        images=task.split_hash,
        part=[model, name, origin, seed],
    )


def pack(probes: LinearProbes) -> dict[str, Any]:
    return {
        "layers": [[layer.block, layer.site] for layer in probes.layers],  # type: ignore[union-attr]
        "accuracy": probes.test_accuracy.tolist(),
        "interval": probes.test_interval.tolist(),
        "best": probes.best_layer,
        "correct": ["".join("01"[int(hit)] for hit in row) for row in probes.correct],
        "chance": probes.majority,
        "n": probes.counts["test"],
    }


def table(found: dict[str, list[dict[str, Any]]], model: str, task: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    about = {"model": short(model), "task": short(task), "split": "test"}
    for origin, runs in found.items():
        n_layers = len(runs[0]["layers"])
        for index, (block, site) in enumerate(runs[0]["layers"]):
            place = {**about, "origin": origin, "block": block, "site": site, "depth": index / (n_layers - 1)}
            values = [run["accuracy"][index] for run in runs]
            for seed, value in enumerate(values):
                rows.append(
                    {**place, "metric": "probe_accuracy", "value": value, "n": runs[0]["n"], "seed": seed}
                )
            if len(values) > 1:
                mean = mean_row(values, metric="probe_accuracy_mean", n=runs[0]["n"])
            else:
                low, high = runs[0]["interval"][index]
                mean = {"metric": "probe_accuracy_mean", "value": values[0], "low": low, "high": high}
                mean |= {"n": runs[0]["n"], "n_seeds": 1}
            rows.append(place | mean)
        if runs[0].get("memorised") is not None:
            values = [run["memorised"] for run in runs]
            rows.append(
                {**about, "origin": origin, "metric": "random_label_accuracy", "split": "train"}
                | {"value": float(np.mean(values)), "n_seeds": len(values)}
            )
    first = found["language"][0]
    low, high = first["pixels"]["interval"][0]
    pixels = {"origin": "raw pixels", "value": first["pixels"]["accuracy"][0], "low": low, "high": high}
    beside = {**about, "metric": "probe_accuracy_mean", "n": first["n"]}
    return [*rows, beside | pixels, beside | {"origin": "chance", "value": first["chance"]}]


def claims(found: dict[str, list[dict[str, Any]]], model: str, task: str) -> list[Answer]:
    language, where = found["language"], f"{short(model)}, {short(task)}"
    best = {origin: [hits(run, run["best"]) for run in runs] for origin, runs in found.items()}
    pixels, entry = [hits(language[0]["pixels"], 0)], [hits(language[0], 0)]
    pairs = [
        ("language − random", best["language"], best["random init"], f"language − untrained ({where})"),
        ("bridge − language", best["bridge"], best["language"], f"bridge − language ({where})"),
        ("language − pixels", best["language"], pixels, f"language − raw pixels ({where})"),
        ("language − entry", best["language"], entry, f"best block − what enters it ({where})"),
    ]
    if "vision" in best:
        pairs.append(("vision − language", best["vision"], best["language"], f"vision − language ({where})"))
    return [difference(key, claim, a, b, model, task) for key, a, b, claim in pairs]


def hits(run: dict[str, Any], index: int) -> np.ndarray:
    return np.frombuffer(run["correct"][index].encode(), dtype=np.uint8) - ord("0")


def difference(
    key: str, claim: str, a: list[np.ndarray], b: list[np.ndarray], model: str, task: str
) -> Answer:
    """a − b in points: paired over images (mean of the seeds) and over seeds; the wider ends.

    What has no seed (language weights behind a PCA stem, pixels, the vision model) is one run, compared with
    each seed of the other side.
    """
    n_seeds = max(len(a), len(b)) if key in DRAWN else 0
    a, b = (side * (max(len(a), len(b)) // len(side)) for side in (a, b))
    images = paired_bootstrap(100.0 * np.mean(a, axis=0), 100.0 * np.mean(b, axis=0))
    low, high, kind = images.low, images.high, "95 % bootstrap interval over images"
    if len(a) > 1:
        seeds = paired_seed_interval([100 * x.mean() for x in a], [100 * x.mean() for x in b])
        low, high = min(low, seeds.low), max(high, seeds.high)
        kind = "wider of the 95 % intervals over images and over seeds"
    n = len(a[0])
    return Answer(
        key, claim, images.value, low, high, kind, n, "test images", n_seeds, short(model), short(task)
    )


def headline(answers: list[Answer]) -> str:
    kinds = {
        "language − random": "Language pretraining against no training",
        "bridge − language": "Random-label bridge against language pretraining alone",
        "language − pixels": "Language model against raw pixels",
        "language − entry": "Best block against what enters the first block",
        "vision − language": "Vision-trained model against language model",
    }
    said = []
    for key, words in kinds.items():
        group = [a for a in answers if a.key == key]
        if len(group) == 1:
            said.append(f"- {words}: {group[0].verdict}; {group[0].sentence}.")
        elif group:
            values = [a.value for a in group]
            spread = f"{min(values):+.1f} to {max(values):+.1f} points".replace("-", "−")
            images = sorted({a.n for a in group})
            drawn = f"{group[0].n_seeds} seeds" if group[0].n_seeds else "nothing random"
            seeds = f"{drawn}, n = {' or '.join(f'{n:,}' for n in images)} test images"
            said.append(f"- {tally(group, words)[:-1]}; differences from {spread}; {seeds} each.")
    return "Probe accuracy at the best layer:\n\n" + "\n".join(said)


def figure(frame: pd.DataFrame) -> Any:
    frame = frame[frame["metric"] == "probe_accuracy_mean"]
    models, tasks = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["task"]))
    size = (max(look.PRINT_WIDTH, 3.2 * len(tasks)), 2.9 * len(models) + 0.9)
    figure, panels = look.new_panels(len(models), len(tasks), *size, sharex=True)
    for ax, (model, task) in zip(panels, itertools.product(models, tasks), strict=True):
        part = frame[(frame["model"] == model) & (frame["task"] == task)]
        curves = part[part["origin"].isin(ORIGINS)]
        plot_lines(curves, "depth", "origin", ax=ax, colours=ORIGINS)
        flat = part.set_index("origin")["value"]
        draw_levels(ax, {name: float(flat[name]) for name in ("chance", "raw pixels")})
        ax.set_title(f"{model}, {task}, n = {int(curves['n'].iloc[0]):,}", loc="left", fontsize=10)
        ax.set_ylim(bottom=0)
    figure.supxlabel("relative depth (input → output)", fontsize=10)
    figure.supylabel("probe accuracy on test images (%)", fontsize=10)
    look.name_panels(figure, panels, ncols=6)
    return figure


if __name__ == "__main__":
    run(main)

"""What does the random-label bridge change in a language model, block by block, and does it move it towards vision?

    python analyses/bridge_cka.py --quick                      # about a minute: MiniLM, digits
    python analyses/bridge_cka.py --data ../shared             # about 4 minutes on one core
    python analyses/bridge_cka.py --model gpt2 --vision vit-base --task cifar100 --limit 5000

Debiased linear CKA between the same block before and after a bridge training, on the same test images, with
permutation p-values corrected for the search over all pairs of layers. Three plans (all blocks trained, the first half,
none: stem and head alone) and an untrained network as control, three seeds of stem, labels and data order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from study import Answer, Setup, Size, against, mean_row, publish, run, setup, short

from layerprobe.analyzers.features import Features, extract_features
from layerprobe.analyzers.similarity import CKAMatrix, cka_matrix
from layerprobe.backbones import Backbone
from layerprobe.plotting import style as look
from layerprobe.plotting.studies import plot_lines
from layerprobe.tables import percent, tidy
from layerprobe.tasks import Task
from layerprobe.training import BridgeConfig, block_plan, bridge_train

PLANS = {
    "all blocks": look.BLUE,
    "first half": look.GREEN,
    "none": look.GREY,
    "untrained, all blocks": look.PINK,
}
QUICK = Size(("minilm",), ("digits",), 300, 4,
             seeds=(0, 1), steps=20, lr=3e-4, permutations=200, plans=("all blocks", "none"))  # fmt: skip
FULL = Size(("stories260k",), ("cifar10",), 1000, 8,
            seeds=(0, 1, 2), steps=150, lr=3e-3, permutations=1000, plans=tuple(PLANS))  # fmt: skip
"""The rate is fixed and equal for all plans: what is compared is where a bridge changes a network, not how well."""
BATCH = 32
TOLERANCE = 0.15
"""Of a CKA value, between two machines: a short bridge training is chaotic."""


def main(argv: Sequence[str] | None = None) -> None:
    of_vision = "vision-trained model to compare with; default vit-cifar10 of DATA, else none"
    s = setup("bridge_cka", __doc__, QUICK, FULL, argv, vision=of_vision)
    seeds, plans = s.settings.seeds, s.settings.plans
    rows: list[dict[str, Any]] = []
    answers: list[Answer] = []
    memorised: dict[str, float] = {}
    sizes = {}
    for name in s.tasks:
        task = s.task(name)
        sizes[short(name)] = {key: len(split) for key, split in task.splits.items()}
        for model in s.models:
            parts = [part(s, model, name, task, plan, seed) for plan in plans for seed in seeds]
            measured = [row for one in parts for row in one]
            rows += measured + means(measured)
            answers += claims(measured, model, name)
            found = [
                r["value"]
                for r in measured
                if r["metric"] == "random_label_accuracy" and r["plan"] == plans[0]
            ]
            memorised[f"{short(model)}, {short(name)}"] = float(np.mean(found))
    frame = tidy(rows)
    learnt = "; ".join(f"{where}: {percent(share, 0)}" for where, share in memorised.items())
    publish(
        s,
        rows=frame,
        answers=answers,
        headline=headline(frame, answers),
        setting=(
            f"Images: {sizes}; CKA on the test images. Patch {s.patch}, PCA stem, mean pooling. Bridge: "
            f"{s.settings.steps} steps of {BATCH} images on 10 random classes, rate "
            f"{s.settings.lr:g}. Random labels recalled at the end with all blocks trained (a guess: "
            f"10 %): {learnt}. {len(seeds)} seeds; p-values from {s.settings.permutations} "
            "permutations of the images. The stem is trained under every "
            "plan, so also frozen blocks see other inputs afterwards."
        ),
        sections={"By block": by_block(frame)},
        figures={
            "bridge_cka.png": (
                lambda: figure(frame),
                "Similarity of each block before and after the bridge; bars: 95 % t intervals over seeds",
            )
        },
        facts={"tolerance": TOLERANCE},
    )


def part(s: Setup, model: str, name: str, task: Task, plan: str, seed: int) -> list[dict[str, Any]]:
    """One bridge training and its comparisons, as table rows, kept on disk."""
    steps, lr = s.settings.steps, s.settings.lr

    def make() -> list[dict[str, Any]]:
        init = "random" if plan.startswith("untrained") else "pretrained"
        backbone = s.load(model, task, init=init, seed=seed)
        before = features(s, backbone, task)
        blocks = {"none": [], "first half": range(backbone.n_blocks // 2)}.get(plan, range(backbone.n_blocks))
        config = BridgeConfig(steps=steps, batch_size=BATCH, lr=lr, seed=seed)
        trained = bridge_train(backbone, task, plan=block_plan(backbone, list(blocks)), config=config)
        after = features(s, backbone, task)
        same = cka_matrix(before, after, permutations=s.settings.permutations, seed=0)
        about = {"model": short(model), "task": short(name), "plan": plan, "seed": seed}
        rows = [about | row for row in diagonal(same)]
        changed = trained.to_frame()
        changed = changed[(changed["metric"] == "weight_change") & changed["block"].notna()]
        rows += [
            {**about, "metric": "weight_change", "block": int(b), "value": float(v)}
            for b, v in zip(changed["block"], changed["value"], strict=True)
        ]
        recalled = {"metric": "random_label_accuracy", "split": "train", "n": len(task.train)}
        rows.append({**about, **recalled, "value": trained.value("random_label_accuracy")})
        if (vision := vision_of(s)) is not None:
            other = features(s, s.load(vision, task), task)
            for moment, own in (("before", before), ("after", after)):
                rows.append({**about, "moment": moment, **nearest(own, other, vision)})
        return rows

    return s.kept(
        f"{model} {name} {plan} {seed}".replace(",", ""),
        make,
        training=[steps, BATCH, lr],
        images=task.split_hash,
        part=[model, name, plan, seed, vision_of(s)],
    )


def vision_of(s: Setup) -> str | None:
    if s.arguments.vision:
        return str(s.arguments.vision)
    return "vit-cifar10" if s.path("vit-cifar10", "models") != "vit-cifar10" else None


def features(s: Setup, backbone: Backbone, task: Task) -> Features:
    return extract_features(backbone, task, "test", cache_dir=s.features, quiet=True)


def diagonal(matrix: CKAMatrix) -> list[dict[str, Any]]:
    """The cells that compare a layer with itself, as the matrix's own table has them."""
    frame = matrix.to_frame()
    same = (frame["block"].fillna(-1) == frame["block_y"].fillna(-1)) & (frame["site"] == frame["site_y"])
    names = ["block", "site", "metric", "value", "stderr", "n", "low", "high", "pvalue", "pvalue_max"]
    rows = frame.loc[same, names].astype(object).where(lambda cells: cells.notna(), None)
    return [{**row, "split": "test"} for row in rows.to_dict("records")]


def nearest(own: Features, vision: Features, name: str) -> dict[str, Any]:
    """Mean over the blocks of the CKA with the closest layer of a vision model."""
    closest = cka_matrix(own, vision, permutations=20, seed=0).closest()
    blocks = closest[closest["block"].notna()]
    return {
        "metric": "cka_closest_vision",
        "model_y": short(name),
        "value": float(blocks["value"].astype(float).mean()),
        "n": int(blocks["n"].iloc[0]),
        "split": "test",
    }


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds by plan and layer."""
    frame = pd.DataFrame([row for row in rows if row["metric"] in ("cka_debiased", "weight_change")])
    found = []
    for (metric, plan, block), part in frame.groupby(
        ["metric", "plan", frame["block"].map(lambda b: -1 if pd.isna(b) else int(b))], sort=False
    ):
        first = {k: part.iloc[0][k] for k in ("model", "task", "split", "n") if not pd.isna(part.iloc[0][k])}
        place = {"block": None if block < 0 else block, "site": "embed" if block < 0 else "resid_post"}
        name = {"metric": f"{metric}_mean", "plan": plan}
        found.append(mean_row(part["value"].astype(float).tolist(), **first, **place, **name))
    return found


def claims(rows: list[dict[str, Any]], model: str, task: str) -> list[Answer]:
    frame = pd.DataFrame(rows)
    cka = frame[frame["metric"] == "cka_debiased"]
    blocks = cka[cka["block"].notna()].pivot_table(index=["plan", "seed"], columns="block", values="value")
    blocks = blocks.astype(float)
    n = int(cka["n"].iloc[0])
    where = f"{short(model)}, {short(task)}"
    about: dict[str, Any] = {"n": n, "model": model, "task": task, "scale": 1.0, "unit": "CKA"}
    every = blocks.loc["all blocks"]
    claim = f"first − last block, all trained ({where})"
    found = [against("first − last", claim, every.iloc[:, 0], every.iloc[:, -1], **about)]
    mean = {plan: blocks.loc[plan].mean(axis=1) for plan in blocks.index.unique(level="plan")}
    for key, words, a, b in (
        ("untrained", "language − untrained", "all blocks", "untrained, all blocks"),
        ("half", "first half − all trained", "first half", "all blocks"),
        ("none", "stem alone − all trained", "none", "all blocks"),
    ):
        if a in mean and b in mean:
            found.append(against(key, f"{words}, mean over blocks ({where})", mean[a], mean[b], **about))
    if "none" in mean:
        # With every block frozen the stem alone has changed: what is left of a fall is the blocks' own doing.
        fall = [values.iloc[:, 0] - values.iloc[:, -1] for values in (every, blocks.loc["none"])]
        claim = f"first − last block, all trained, minus the same with the stem alone ({where})"
        found.append(against("own", claim, *fall, **about))
    near = frame[frame["metric"] == "cka_closest_vision"]
    if len(near):
        wide = near[near["plan"] == "all blocks"].pivot_table(index="seed", columns="moment", values="value")
        what = f"closeness to vision, after − before ({where})"
        found.append(against("vision", what, wide["after"], wide["before"], **about))
    return found


def headline(frame: pd.DataFrame, answers: list[Answer]) -> str:
    every = frame[(frame["metric"] == "cka_debiased") & frame["block"].notna()]
    worst = float(every["pvalue_max"].astype(float).max())
    share = float((every["pvalue_max"].astype(float) <= 0.05).mean())
    lines = [
        "Debiased CKA of a block with itself before the bridge; differences over paired seeds. "
        f"{percent(share, 0)} of {len(every)} comparisons (blocks, plans, seeds) are more similar than chance at "
        f"p ≤ 0.05 after correction for the search over cells (largest p {worst:.2g}):",
        "",
    ]
    return "\n".join(lines + [f"- {'shown' if a.shown else a.verdict}: {a.sentence}." for a in answers])


def by_block(frame: pd.DataFrame) -> list[str]:
    means = frame[frame["metric"].isin(["cka_debiased_mean", "weight_change_mean"])]
    lines = [
        "CKA with the same layer before the bridge, mean over seeds (95 % t interval), and the block's "
        "‖W₁ − W₀‖ / ‖W₀‖.",
        "",
        "| model | task | plan | layer | CKA | weight change |",
        "| --- | --- | --- | --- | --- | ---: |",
    ]
    for _, row in means[means["metric"] == "cka_debiased_mean"].iterrows():
        block = row["block"]
        moved = means[
            (means["metric"] == "weight_change_mean")
            & (means["model"] == row["model"])
            & (means["plan"] == row["plan"])
            & (means["block"] == block)
        ]
        change = "" if pd.isna(block) or moved.empty else f"{moved['value'].iloc[0]:.3f}"
        layer = "embed" if pd.isna(block) else f"block {int(block)}"
        lines.append(
            f"| {row['model']} | {row['task']} | {row['plan']} | {layer} | {row['value']:.3f} "
            f"({row['low']:.3f} to {row['high']:.3f}) | {change} |"
        )
    return lines


def figure(frame: pd.DataFrame) -> Any:
    means = frame[frame["metric"] == "cka_debiased_mean"]
    pairs = list(dict.fromkeys(zip(means["model"], means["task"], strict=True)))
    figure, panels = look.new_panels(1, len(pairs), max(look.PRINT_WIDTH, 4.0 * len(pairs)), 4.2, sharey=True)
    for ax, (model, task) in zip(panels, pairs, strict=True):
        part = means[(means["model"] == model) & (means["task"] == task)]
        part = part.assign(layer=part["block"].astype("float64").fillna(-1.0))
        plot_lines(part, "layer", "plan", ax=ax, colours=PLANS, scale=1.0, shift=0.07, bars=True)
        layers = sorted(part["layer"].unique())
        ax.set_xticks(layers, ["embed" if x < 0 else f"{x:.0f}" for x in layers])
        look.reference_line(ax, 0.0)
        ax.annotate("0: no likeness", (0, 0), (3, 2), ("axes fraction", "data"), "offset points", va="bottom")
        ax.set_ylim(-0.1, 1.1)
        ax.set_title(f"{model}, {task}, n = {int(part['n'].iloc[0]):,} test images", loc="left", fontsize=10)
        ax.set_xlabel(look.BLOCKS)
    panels[0].set_ylabel("debiased CKA, before with after")
    look.name_panels(figure, panels, title="trained in the bridge", ncols=2)
    return figure


if __name__ == "__main__":
    run(main)

"""What does each layer of three small language models hold of CIFAR-100, against random twins and a trained ViT?

    python analyses/cifar100_layers.py --data ../shared    # results/cifar100_layers, a quarter of an hour
    python analyses/cifar100_layers.py --data ../shared --model stories260k --limit 500

For every model: probe accuracy by depth with controls (pixels, random twin, random labels, chance), debiased CKA
with its random twin and with vit-cifar10, layer by layer with p-values (and of the random twin with vit-cifar10, the
control for that), and an attribution ranking of the blocks. C is chosen on validation and measured once on test.
Nothing else is selected. A call that was interrupted keeps what it has finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from study import Size, is_vision, run, setup, short

from layerprobe.analyzers.attribution import attribute_layers
from layerprobe.analyzers.features import Features, extract_features
from layerprobe.analyzers.probes import probe_backbone
from layerprobe.analyzers.similarity import cka_matrix
from layerprobe.backbones import Backbone
from layerprobe.cli.output import save_figure
from layerprobe.files import write_text
from layerprobe.plotting.layer_scores import attribution_figure
from layerprobe.plotting.probes import plot_probe_accuracy
from layerprobe.plotting.similarity import plot_cka
from layerprobe.tasks import Task

VISION = "vit-cifar10"
QUICK = Size(("minilm",), ("digits",), 200, 4)
FULL = Size(("minilm", "stories260k", "babyllama-char105", VISION), ("cifar100",), 2500, 4)
IMAGES_ATTRIBUTED = 128


def main(argv: Sequence[str] | None = None) -> None:
    s = setup("cifar100_layers", __doc__ or "", quick=QUICK, full=FULL, argv=argv)
    task = s.task(s.tasks[0])

    def load(name: str, init: str = "pretrained") -> Backbone:
        return s.load(name, task, init=init, **({} if is_vision(name) else {"stem": "random"}))

    for model in s.models:
        study(model, load, task, s.output / short(model), with_vision=not s.quick)
    write_text(s.output / "tables.md", tables(s.output, [short(model) for model in s.models]))


def study(name: str, load: Callable[..., Backbone], task: Task, folder: Path, *, with_vision: bool) -> None:
    """Probe, compare and attribute one model; parts whose record is there already are left alone."""
    backbone, twin = load(name), load(name, "random")
    if not (folder / "probe.json").exists():
        probes = probe_backbone(backbone, task, twin=twin, extras=["labels"], batch_size=128, quiet=False)
        save_figure(lambda: plot_probe_accuracy(probes.to_frame()), folder / "probe.png")
        probes.save(folder)
    pairs = {"twin": (backbone, twin)}
    if with_vision and not is_vision(name):
        vision = load(VISION)
        pairs |= {"vision": (backbone, vision), "twin_vision": (twin, vision)}
    for pair, (left, right) in pairs.items():
        if (folder / pair / "cka.json").exists():
            continue
        record = cka_matrix(_features(left, task), _features(right, task), permutations=1000, seed=0)
        save_figure(lambda record=record: plot_cka(record.to_frame()), folder / pair / "cka.png")
        record.save(folder / pair)
    if not (folder / "attribute.json").exists():
        attribution = attribute_layers(backbone, task, n_images=IMAGES_ATTRIBUTED, n_maps=0, quiet=False)
        save_figure(lambda: attribution_figure(attribution.to_frame()), folder / "attribution.png")
        attribution.save(folder)


def _features(backbone: Backbone, task: Task) -> Features:
    return extract_features(backbone, task, "test", batch_size=128, quiet=False)


def tables(output: Path, names: list[str]) -> str:
    """Every number of the page, as Markdown tables made from the saved records."""
    lines = ["# Tables", "", "    python analyses/cifar100_layers.py --data ../shared", ""]
    lines += ["made everything here from the records in the folders. One seed, one random twin.", ""]
    for name in names:
        folder = output / name
        lines += [f"## {name}", "", *_probe_table(pd.read_csv(folder / "probe.csv")), ""]
        for pair, title in (
            ("twin", "its random twin"),
            ("vision", VISION),
            ("twin_vision", f"(its random twin) {VISION}"),
        ):
            if (folder / pair / "cka.csv").exists():
                lines += [*_cka_table(pd.read_csv(folder / pair / "cka.csv"), title), ""]
        lines += [*_attribution_table(pd.read_csv(folder / "attribute.csv")), ""]
    return "\n".join(lines)


def _probe_table(frame: pd.DataFrame) -> list[str]:
    test = frame[(frame["metric"] == "probe_accuracy") & (frame["split"] == "test")]
    own, twin = test[test["control"].isna()], _by_layer(test[test["control"] == "random"])
    validation = frame[(frame["metric"] == "probe_accuracy") & (frame["split"] == "validation")]
    best = validation[validation["control"].isna()].groupby(["block", "site"], dropna=False)["value"].max()
    against = _by_layer(
        frame[(frame["metric"] == "probe_accuracy_minus_control") & (frame["control"] == "random")]
    )
    pixels = test[test["control"] == "pixels"].iloc[0]
    chance = test[test["control"] == "chance"].iloc[0]
    selectivity = _by_layer(frame[frame["metric"] == "selectivity"].drop_duplicates(["block", "site"]))
    lines = [
        f"Probe accuracy on {int(own['n'].iloc[0]):,} test images, %, with 95 % Wilson intervals; twin: the same "
        "architecture untrained; difference: paired bootstrap over images. Raw pixels "
        f"{_share(pixels)}; chance {100 * chance['value']:.1f}.",
        "",
        "| layer | accuracy | twin | difference, points | p | selectivity | chosen on validation |",
        "| --- | --- | --- | --- | ---: | ---: | --- |",
    ]
    chosen = best.idxmax()
    for _, row in own.iterrows():
        key = _layer(row)
        gap = against[key]
        mark = "best" if _layer({"block": chosen[0], "site": chosen[1]}) == key else ""
        lines.append(
            f"| {key} | {_share(row)} | {_share(twin[key])} "
            f"| {100 * gap['value']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}) | {gap['pvalue']:.2g} "
            f"| {selectivity[key]['value']:+.2f} | {mark} |"
        )
    return lines


def _cka_table(frame: pd.DataFrame, other: str) -> list[str]:
    lines = [
        f"Debiased CKA with {other}, n = {int(frame['n'].iloc[0]):,} test images: the closest layer of each, its 95 % "
        "interval, and p by permutation, corrected for the search over all cells.",
        "",
        "| layer | closest | CKA | 95 % interval | p |",
        "| --- | --- | ---: | --- | ---: |",
    ]
    for _, rows in frame.groupby(["block", "site"], dropna=False, sort=False):
        row = rows.loc[rows["value"].astype(float).idxmax()]
        there = _layer({"block": row["block_y"], "site": row["site_y"]})
        lines.append(
            f"| {_layer(row)} | {there} | {row['value']:.3f} | {row['low']:.3f} to {row['high']:.3f} "
            f"| {row['pvalue_max']:.2g} |"
        )
    return lines


def _attribution_table(frame: pd.DataFrame) -> list[str]:
    shown = {
        "attribution_skip": "skip, logits",
        "attribution_skip_accuracy_lost": "skip, share of images lost",
        "attribution_mean_ablation": "mean ablation, logits",
        "attribution_update": "update, logits",
    }
    frame = frame[frame["block"].notna()]
    lines = [
        f"Attribution for the class that a probe on the last layer predicts, {int(frame['n'].max()):,} test images, "
        "mean ± standard error (empty: a completeness error within 2 % could not be reached).",
        "",
        "| block | " + " | ".join(shown.values()) + " |",
        "| --- |" + " ---: |" * len(shown),
    ]
    for block, rows in frame.groupby("block"):
        cells = []
        for metric in shown:
            found = rows[rows["metric"] == metric]
            value = found["value"].iloc[0] if len(found) else float("nan")
            cells.append("" if pd.isna(value) else f"{value:.3g} ± {found['stderr'].iloc[0]:.2g}")
        lines.append(f"| {int(block)} | " + " | ".join(cells) + " |")
    return lines


def _by_layer(frame: pd.DataFrame) -> dict[str, pd.Series]:
    return {_layer(row): row for _, row in frame.iterrows()}


def _layer(row: pd.Series) -> str:
    return "embed" if pd.isna(row["block"]) else f"block {int(row['block'])}"


def _share(row: pd.Series) -> str:
    return f"{100 * row['value']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


if __name__ == "__main__":
    run(main)

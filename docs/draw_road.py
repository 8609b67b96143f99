"""Draw the road of the data, the figure of the page on concepts.

python docs/draw_road.py [OUTPUT.svg]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FIGURE = Path(__file__).parent / "assets" / "road.svg"
# Okabe and Ito's palette, lightened: distinguishable to colour-blind readers; every colour also has a caption.
INPUT, MEASURE, DECIDE, TRAIN = "#dbe7f3", "#d3ece4", "#fbe8c8", "#f6dbe9"

BOXES: dict[str, tuple[float, float, float, float, str, str]] = {
    # name: left, bottom, width, height, text, colour
    "weights": (0.1, 5.1, 1.7, 0.8, "checkpoint files", INPUT),
    "images": (0.1, 3.0, 1.7, 0.8, "images\nwith labels", INPUT),
    "backbone": (2.5, 3.0, 1.8, 0.8, "stem + backbone\nblocks 0 … L−1", INPUT),
    "features": (5.0, 3.0, 1.7, 0.8, "features of\nevery layer", INPUT),
    "outliers": (7.4, 5.1, 1.9, 0.8, "outlier\nparameters", MEASURE),
    "similarity": (7.4, 4.05, 1.9, 0.8, "similarity\n(debiased CKA)", MEASURE),
    "probes": (7.4, 3.0, 1.9, 0.8, "linear probes", MEASURE),
    "transfer": (7.4, 1.95, 1.9, 0.8, "transfer scores\nreadable, trainable", MEASURE),
    "attribution": (7.4, 0.9, 1.9, 0.8, "attribution", MEASURE),
    "search": (10.2, 1.95, 1.9, 0.8, "freeze search", DECIDE),
    "plan": (10.2, 4.05, 1.9, 0.8, "freeze plan\nplan.json", DECIDE),
    "train": (10.2, -0.3, 1.9, 1.15, "bridge training\n(random labels),\nfine-tuning", TRAIN),
    "evaluate": (7.4, -0.2, 1.9, 0.8, "evaluate, or\nback to the hooks", TRAIN),
    "others": (10.2, 5.1, 1.9, 0.8, "your own trainer,\naxolotl, PEFT …", TRAIN),
}


def draw() -> plt.Figure:
    """The figure: boxes in columns from left to right, one arrow a hand-over."""
    figure, ax = plt.subplots(figsize=(12.4, 6.6))
    ax.set_xlim(0, 12.3)
    ax.set_ylim(-0.5, 6.7)
    ax.axis("off")
    for left, bottom, width, height, text, colour in BOXES.values():
        shape = FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            fc=colour,
            ec="#555",
            lw=1.1,
        )
        ax.add_patch(shape)
        ax.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=12.5)
    for x, text in ((0.95, "in"), (8.35, "measured, layer by layer"), (11.15, "decided and trained")):
        ax.text(x, 6.3, text, ha="center", va="center", fontsize=13, color="#444", style="italic")

    arrow(ax, side("weights", "right"), side("outliers", "left"))
    arrow(ax, side("images", "right"), side("backbone", "left"))
    arrow(ax, side("backbone", "right"), side("features", "left"), "hooks")
    for name in ("similarity", "probes", "transfer"):
        arrow(ax, side("features", "right"), side(name, "left"))
    arrow(ax, (3.4, 3.0), side("attribution", "left"), bend="angle,angleA=-90,angleB=180,rad=6")
    arrow(ax, side("transfer", "right"), side("search", "left"))
    arrow(ax, (11.5, 1.95), (11.5, 0.85), "a plan", offset=0.42)
    arrow(ax, (10.8, 0.85), (10.8, 1.95), "its value", offset=-0.52)
    arrow(ax, side("search", "top"), side("plan", "bottom"), "the answer", offset=0.6)
    arrow(ax, side("plan", "top"), side("others", "bottom"))
    arrow(ax, side("train", "left", 0.2), side("evaluate", "right"))
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.995)
    return figure


def side(name: str, which: str, y: float | None = None) -> tuple[float, float]:
    """The middle of a side of a box; `y` puts a point of a left or right side elsewhere."""
    left, bottom, width, height, _, _ = BOXES[name]
    middle = bottom + height / 2 if y is None else y
    return {
        "left": (left, middle),
        "right": (left + width, middle),
        "top": (left + width / 2, bottom + height),
        "bottom": (left + width / 2, bottom),
    }[which]


def arrow(
    ax: plt.Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    *,
    offset: float = 0.0,
    bend: str = "arc3",
) -> None:
    """An arrow, with a word beside it (`offset` to the right) or above it."""
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=bend,
            arrowstyle="-|>",
            mutation_scale=14,
            color="#555",
            lw=1.3,
            shrinkA=1,
            shrinkB=1,
        )
    )
    if text:
        x, y = (start[0] + end[0]) / 2 + offset, (start[1] + end[1]) / 2 + (0.0 if offset else 0.18)
        ax.text(x, y, text, ha="center", va="center", fontsize=11.5, color="#444")


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURE
    output.parent.mkdir(parents=True, exist_ok=True)
    # A fixed salt and no date: the same drawing is the same file.
    with plt.rc_context({"svg.hashsalt": "layerprobe", "svg.fonttype": "path"}):
        options = {"metadata": {"Date": None}} if output.suffix == ".svg" else {"dpi": 100}
        draw().savefig(output, **options)


if __name__ == "__main__":
    main()

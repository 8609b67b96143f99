"""Figures of freeze plans: a strip of blocks, one row a plan. Frames come from `plan_frame`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerprobe.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLOURS = {"frozen": "#D9DEE4", "partial": "#F0C571", "trainable": "#D55E00"}
"""One colour per state; told apart by brightness as well as by hue."""


def plot_plan(frame: pd.DataFrame, *, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw plans as strips of blocks from input to output, coloured by what is trained.

    Parameters
    ----------
    frame : rows with `plan`, `block` (empty for what lies around the blocks), `state` (`frozen`,
        `partial`, `trainable`), `value` (trained parameters) and `n` (all of them), as `plan_frame`
        makes them; several frames may be concatenated. Plans stand in the order in which they come.
    ax : where to draw; by default a new figure sized for the strips.
    style : passed on to every cell (a matplotlib Rectangle).

    Returns
    -------
    The Axes. Beside each strip stands the share of the backbone's parameters that is trained.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    names = list(dict.fromkeys(frame["plan"]))
    inside = frame[frame["block"].notna()]
    if inside.empty:
        raise UsageError("no block to draw: the frame has no row with a block index")
    n_blocks = int(inside["block"].max()) + 1
    if ax is None:
        size = (max(4.5, 1.8 + 0.36 * n_blocks), 1.3 + 0.45 * len(names))
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    for row, name in enumerate(names):
        part = frame[frame["plan"] == name]
        for block, state in part.loc[part["block"].notna(), ["block", "state"]].itertuples(index=False):
            look = {"facecolor": COLOURS[state], "edgecolor": "white", "linewidth": 1.0, **style}
            ax.add_patch(Rectangle((int(block) - 0.5, row - 0.4), 1.0, 0.8, **look))
        share = part["value"].sum() / part["n"].sum()
        ax.text(n_blocks - 0.3, row, f"{share:.1%}", va="center", ha="left", fontsize="small")
    ax.set_xlim(-0.6, n_blocks + 0.06 * n_blocks + 0.9)
    ax.set_ylim(len(names) - 0.4, -0.6)
    step = max(1, -(-n_blocks // 16))
    ax.set_xticks(range(0, n_blocks, step))
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.set_xlabel("block, input to output; right: share of parameters trained")
    for side in ax.spines.values():
        side.set_visible(False)
    present = [state for state in COLOURS if (inside["state"] == state).any()]
    handles = [Patch(facecolor=COLOURS[state], label=state) for state in present]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3, frameon=False)
    return ax

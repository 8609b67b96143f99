"""How a backbone shows itself: in a line, and in a notebook."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from layerprobe.tables import render_table

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone


def backbone_in_words(backbone: Backbone) -> str:
    """One line; `backbone.model` shows every module."""
    return (
        f"Backbone({backbone.name!r}: {backbone.n_blocks} blocks of width {backbone.hidden_size}, "
        f"{backbone.n_parameters:,} parameters, {backbone.modality}, {backbone.init}, "
        f"{str(backbone.dtype).removeprefix('torch.')} on {backbone.device})"
    )


def backbone_as_html(backbone: Backbone) -> str:
    """The line, and what identifies it as a table."""
    about = backbone.describe()
    shown = (
        "model_id", "revision", "modality", "n_blocks", "hidden_size", "stem", "patch_size", "image_size", "attention",
        "pooling", "dtype",
    )  # fmt: skip
    rows = [{"entry": key, "value": str(about[key])} for key in shown if about.get(key) is not None]
    return f"<p>{html.escape(backbone_in_words(backbone))}</p>{render_table(rows, 'html')}"

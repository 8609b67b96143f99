"""The words that say how a backbone is made and read, checked before anything is loaded."""

from __future__ import annotations

from layerprobe.backbones.controls import CONTROLS
from layerprobe.backbones.image_input import STEM_KINDS
from layerprobe.errors import UnknownNameError, shortened

INITS = ("pretrained", "random", *CONTROLS)
POOLINGS = ("mean", "last", "cls")
ATTENTIONS = ("causal", "bidirectional")


def check_choices(*, init: str, stem: str, attention: str | None, pooling: str | None) -> None:
    """UnknownNameError for a word that `Backbone` would not take, before anything is loaded."""
    for what, value, allowed in (
        ("init", init, INITS),
        ("stem", stem, STEM_KINDS),
        ("attention", attention, ATTENTIONS),
        ("pooling", pooling, POOLINGS),
    ):
        if value is not None and value not in allowed:
            raise UnknownNameError(
                f"unknown {what} '{shortened(value, 60)}'; choose one of: {', '.join(allowed)}"
            )

"""The words that options and parameters take: where help texts and library find them, nothing heavy is imported."""

from __future__ import annotations

from layerprobe.errors import UnknownNameError, shortened

CONTROLS = {
    "shuffled": "the pretrained entries, permuted within each tensor",
    "matched": "Gaussian with each block matrix's mean and deviation; norms and embeddings as pretrained",
    "matched-reset": "the same, with the norms as a new model has them",
}
"""Values of `init` beside 'pretrained' and 'random'."""
INITS = ("pretrained", "random", *CONTROLS)
STEMS = ("random", "pca")
ATTENTIONS = ("causal", "bidirectional")
POOLINGS = ("mean", "last", "cls")
DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("float32", "bfloat16")
SPLITS = ("train", "validation", "test")
HEADS = ("probe", "own")
"""Whose prediction is explained."""
HEAD_STARTS = ("probe", "random")
AUGMENTATIONS = ("weak", "none")
RANDOM_LABELS = ("hash", "complementary")
SAVES = ("full", "trained")
"""What a bridge run keeps: the whole model, or what was trained and the name of its base."""
TRAINING_MODES = ("finetune", "fewshot")
MODES = (*TRAINING_MODES, "probe", "own-head")
SCOPES = ("arm", "plan", "all")


def check_choices(*, init: str, stem: str, attention: str | None, pooling: str | None) -> None:
    """UnknownNameError for a word that `Backbone` would not take, before anything is loaded."""
    for what, value, allowed in (
        ("init", init, INITS),
        ("stem", stem, STEMS),
        ("attention", attention, ATTENTIONS),
        ("pooling", pooling, POOLINGS),
    ):
        if value is not None and value not in allowed:
            raise UnknownNameError(
                f"unknown {what} '{shortened(value, 60)}'; choose one of: {', '.join(allowed)}"
            )

"""The defaults and presets of a search as plain data, so that help texts can say them without loading torch."""

from __future__ import annotations

from typing import Any

DEFAULT_LRS = (1e-4, 3e-4, 1e-3, 3e-3)
DEFAULT_BUDGET = 20.0
DEFAULT_STRATEGY = "racing"
DEFAULT_OBJECTIVE = "frugal"
DEFAULT_SEEDS = 3
DEFAULT_BRIDGE_STEPS = 30
DEFAULT_FINETUNE_STEPS = 120
DEFAULT_BATCH_SIZE = 32
DEFAULT_RANDOM_CLASSES = 10
DEFAULT_PRECISION = "float32"
DEFAULT_BASELINES = (
    "all",
    "none",
    "norms",
    "first-5",
    "last-5",
    "first-half",
    "last-half",
    "random-SEED",
    "rgn-half",
)
"""Arms of a report that names none, where the backbone and the scores allow them (`standard_arms`)."""

PRESETS: dict[str, dict[str, Any]] = {
    "quickstart": {
        "budget": 12.0,
        "bridge_steps": 20,
        "finetune_steps": 100,
        "batch_size": 32,
        "lrs": (1e-4, 3e-4),
        "fidelity": 0.5,
        "baselines": ("all", "none", "norms", "first-half", "last-half"),
        "keep_bridge": True,
    },
}
"""Settings that a preset replaces where the caller left the default."""

PRESET_LOADING: dict[str, dict[str, Any]] = {"quickstart": {"stem": "pca", "patch_size": 4, "workers": 2}}
"""The same for the command line: how the backbone meets the images, and how many processes."""


def preset_in_words(name: str) -> str:
    """What a preset sets, as options of the command line.

    >>> preset_in_words("quickstart").split("; ")[:2]
    ['--budget 12', '--bridge-steps 20']
    """
    settings = {**PRESETS[name], **PRESET_LOADING[name]}
    return "; ".join(_option(key, value) for key, value in settings.items())


def _option(key: str, value: Any) -> str:
    if key == "fidelity":  # no option of the command line: the length of the short runs
        return f"short runs of {value:g} of the steps"
    flag = "--" + key.replace("_", "-")
    return flag if value is True else f"{flag} {in_words(value)}"


def in_words(value: Any) -> str:
    """A value for a help text; with spaces in a list, so that a narrow terminal wraps it.

    >>> in_words((1e-4, 3e-3)), in_words(20.0)
    ('0.0001, 0.003', '20')
    """
    if isinstance(value, tuple):
        return ", ".join(in_words(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

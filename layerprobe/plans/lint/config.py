"""Another trainer's configuration file: read, and told by its keys whose it is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from layerprobe.errors import BrokenFileError, UnknownNameError, UsageError, did_you_mean
from layerprobe.files import read_json, read_yaml

MAX_BYTES = 4 << 20

KEYS: dict[str, tuple[str, ...]] = {
    "peft": (
        *("peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "r"),
        *("rank_pattern", "alpha_pattern", "modules_to_save", "lora_alpha", "lora_dropout"),
    ),
    "llama-factory": (
        *("finetuning_type", "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
        *("use_llama_pro", "lora_target", "lora_rank", "additional_target"),
    ),
    "ms-swift": (
        *(
            "tuner_type",
            "train_type",
            "freeze_parameters",
            "freeze_parameters_regex",
            "freeze_parameters_ratio",
        ),
        *(
            "trainable_parameters",
            "trainable_parameters_regex",
            "target_modules",
            "target_regex",
            "lora_rank",
        ),
        "modules_to_save",
    ),
    "axolotl": (
        *(
            "base_model",
            "unfrozen_parameters",
            "adapter",
            "lora_target_modules",
            "lora_target_linear",
            "lora_r",
        ),
        *("peft_layers_to_transform", "peft_layers_pattern", "lora_modules_to_save"),
    ),
    "finetuning-scheduler": ("params", "lr"),
}
"""Trainer -> the keys of its configuration that decide what is trained; those before are looked at first."""

_TELLING = {
    "peft": {"peft_type"},
    "llama-factory": {"finetuning_type", "freeze_trainable_layers", "freeze_extra_modules", "use_llama_pro"},
    "ms-swift": {"tuner_type", "train_type", "freeze_parameters_ratio", "trainable_parameters", "freeze_parameters",
                 "trainable_parameters_regex", "freeze_parameters_regex"},
    "axolotl": {"base_model", "unfrozen_parameters"},
}  # fmt: skip


def read_config(path: Path) -> dict[object, object]:
    """The entries of a YAML or JSON file.

    Raises
    ------
    UnknownNameError
        There is no such file.
    BrokenFileError
        It cannot be read, or holds no entries.
    """
    if not path.is_file():
        raise UnknownNameError(f"there is no configuration {path}")
    read = read_json if path.suffix == ".json" else read_yaml
    found = read(path, what="configuration", max_bytes=MAX_BYTES)
    if not isinstance(found, dict) or not found:
        raise BrokenFileError(f"{path} holds no configuration: it is not a list of keys with values")
    return found


def trainer_of(config: Mapping[object, object]) -> str:
    """Whose configuration it is; UsageError where its keys do not tell."""
    if all(isinstance(key, int) or str(key).isdigit() for key in config):
        return "finetuning-scheduler"
    for trainer, telling in _TELLING.items():
        if telling & {str(key) for key in config}:
            return trainer
    if {"target_modules", "r"} <= {str(key) for key in config}:
        return "peft"
    raise UsageError(
        f"the keys do not tell whose configuration this is; say so with --trainer {', '.join(KEYS)}"
    )


def check_trainer(trainer: str) -> None:
    """UnknownNameError for a trainer whose rule is not known here."""
    if trainer not in KEYS:
        raise UnknownNameError(
            f"unknown trainer '{trainer}'.{did_you_mean(trainer, KEYS)} Known: {', '.join(KEYS)}"
        )


def misspelt(config: Mapping[object, object], trainer: str) -> list[str]:
    """One sentence for each key that is nearly one of those that decide what is trained."""
    known = KEYS[trainer]
    found = []
    for key in map(str, config):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.87) if key not in known else []
        if near:
            found.append(f"'{key}' is no key of {trainer}, so it does nothing; '{near[0]}' was meant")
    return found

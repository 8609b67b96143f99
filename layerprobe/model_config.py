"""A model's `config.json`, read as data: what no model can be is refused before transformers builds one of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.files import read_json
from layerprobe.reading import Schema, check_fields

MAX_BYTES = 64 << 20
MAX_REPEATS = 2_000
"""Blocks, and what else a configuration asks to be built so many times; the deepest models have some hundreds."""
MAX_LABELS = 1_000_000
MAX_SIZE = 1 << 31
"""Width, vocabulary, positions."""

_REPEATS = re.compile(r"(num|n)_\w*(layers?|blocks?|experts|stages|groups)|\w*_layers|depths?|n_layer")
_SIZES = re.compile(
    r"\w*(size|dim|dims|width|rank|positions|channels|heads|d_model|d_ff|n_embd|n_head|n_inner)"
)
_FIELDS: dict[str, Schema] = {
    "model_type?": str,
    "architectures?": ([str], type(None)),
    "auto_map?": (dict, type(None)),
    "quantization_config?": (dict, type(None)),
}


def read_model_config(folder: Path, *, trust_remote_code: bool = True) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Parameters
    ----------
    trust_remote_code : bool
        Whether attention and other kernels may be those of a repository on the hub, which are its author's code.

    Raises
    ------
    BrokenFileError
        No JSON object, fields of another type, or sizes that no model has.
    UsageError
        It asks for kernels from the hub, and they are not trusted.
    """
    path = folder / "config.json"
    config = read_json(path, what="model configuration", inside=folder, max_bytes=MAX_BYTES)
    if not isinstance(config, dict):
        raise BrokenFileError(f"cannot read model configuration {path}: it is no JSON object")
    check_fields(config, _FIELDS, path)
    for key, value in numbers_and_texts(config):
        if isinstance(value, str):
            if not trust_remote_code and key.endswith("_implementation") and "/" in value:
                raise UsageError(
                    f"{path} asks for code from the hub ({key}: {value[:60]!r}); look at it, then pass "
                    "--trust-remote-code"
                )
            continue
        limit = MAX_REPEATS if _REPEATS.fullmatch(key) else MAX_LABELS if key == "num_labels" else MAX_SIZE
        lowest = 0 if limit < MAX_SIZE or _SIZES.fullmatch(key) else -MAX_SIZE
        # A size of -1 stands for none in some families.
        if not lowest - 1 <= value <= limit:
            shown = hex(value)[:20] if abs(value) > 1 << 63 else f"{value:,}"
            raise BrokenFileError(f"cannot read {path}: no model has {key} = {shown}")
    return config


def numbers_and_texts(value: object, key: str = "") -> list[tuple[str, Any]]:
    """Every whole number and text in a configuration, with the name of its field."""
    if isinstance(value, dict):
        return [pair for name, item in value.items() for pair in numbers_and_texts(item, str(name))]
    if isinstance(value, list):
        return [pair for item in value for pair in numbers_and_texts(item, key)]
    return [(key, value)] if type(value) in (int, str) else []

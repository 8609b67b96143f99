"""Which column holds the images, which the labels, and what the labels are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerprobe.errors import BrokenFileError, UnknownNameError, UsageError, did_you_mean

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")


@dataclass(frozen=True)
class ColumnChoice:
    """What the caller knows beforehand: names to try, and the label column the user insists on."""

    image: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    wanted_label: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns found, and the class names noted with the label column (None: not noted)."""

    image: str
    label: str
    class_names: list[str] | None


def choose_columns(schema: Any, choice: ColumnChoice, place: str) -> Columns:
    """Find the image and the label column in an Arrow schema, helped by its Hugging Face metadata.

    Raises
    ------
    UsageError : no such column, or several that would do.
    UnknownNameError : the label column the user asked for does not exist.
    """
    features = _hub_features(schema)
    image = _choose_image(schema, features, choice, place)
    label = _choose_label(schema, features, choice, image, place)
    return Columns(image, label, class_names(schema, label))


def class_names(schema: Any, label: str) -> list[str] | None:
    """The class names noted for a label column; None where there are none."""
    return _class_names(_hub_features(schema).get(label))


def _choose_image(schema: Any, features: dict[str, Any], choice: ColumnChoice, place: str) -> str:
    fits = [name for name in schema.names if _is_image(schema, name, features.get(name))]
    for name in (*choice.image, *_IMAGE_NAMES):
        if name in fits:
            return name
    if len(fits) == 1:
        return fits[0]
    found = f"several image columns ({_listed(fits)})" if fits else "no image column"
    raise UsageError(f"{place} has {found}; its columns are {_listed(schema.names)}")


def _choose_label(schema: Any, features: dict[str, Any], choice: ColumnChoice, image: str, place: str) -> str:
    fits = [name for name in schema.names if name != image and _is_label(schema, name)]
    if choice.wanted_label is not None:
        if choice.wanted_label not in fits:
            raise UnknownNameError(
                f"{place} has no label column '{choice.wanted_label}'."
                f"{did_you_mean(choice.wanted_label, fits)} Label columns: {_listed(fits) or 'none'}"
            )
        return choice.wanted_label
    for name in (*choice.label, *_LABEL_NAMES):
        if name in fits:
            return name
    named = [name for name in fits if _class_names(features.get(name)) is not None]
    for candidates in (named, fits):
        if len(candidates) == 1:
            return candidates[0]
    if not fits:
        raise UsageError(
            f"{place} has no label column (one whole number or text per image); "
            f"its columns are {_listed(schema.names)}"
        )
    raise UsageError(f"{place} has several label columns ({_listed(fits)}); choose one with TASK:COLUMN")


def _is_image(schema: Any, name: str, feature: Any) -> bool:
    import pyarrow.types as types

    if isinstance(feature, dict) and feature.get("_type") == "Image":
        return True
    kind = schema.field(name).type
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_label(schema: Any, name: str) -> bool:
    import pyarrow.types as types

    kind = schema.field(name).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind) for test in (types.is_integer, types.is_string, types.is_large_string, types.is_boolean)
    )


def _hub_features(schema: Any) -> dict[str, Any]:
    """The `features` that the `datasets` library writes into a schema's metadata; {} where it did not."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _class_names(feature: Any) -> list[str] | None:
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    return [str(name) for name in names] if isinstance(names, list) and names else None


def column_values(column: Any) -> np.ndarray:
    """An Arrow label column as int64 (null is −1) or as an object array of str (null is None)."""
    import pyarrow as pa
    import pyarrow.types as types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if types.is_integer(column.type) or types.is_boolean(column.type):
        return column.cast(pa.int64()).fill_null(-1).to_numpy().astype(np.int64)
    try:
        return np.array(column.to_pylist(), dtype=object)
    except UnicodeDecodeError as error:
        raise BrokenFileError(f"a text label is not valid UTF-8: {error}") from error


def number_labels(
    values: Sequence[np.ndarray], names: list[str] | None, place: str
) -> tuple[list[np.ndarray], list[str]]:
    """Labels 0, 1, … and their names, the same for all splits.

    With noted names the numbers stay as they are. Otherwise the classes are the sorted distinct
    values over all splits, so that labels 1 to 26, or texts, become 0 to 25.

    Parameters
    ----------
    values : per split, int64 (−1: no label) or object array of str (None: no label).

    Returns
    -------
    per split an int64 array (−1: no label), and the class names.

    Raises
    ------
    BrokenFileError : a number outside the noted names.
    """
    if names is not None:
        for split in values:
            if split.dtype == object or (len(split) and not -1 <= split.min() <= split.max() < len(names)):
                raise BrokenFileError(f"{place}: a label lies outside its {len(names)} class names")
        return [split.astype(np.int64) for split in values], names
    present = {value for split in values for value in set(split.tolist())} - {None, -1}
    ordered = sorted(present)
    number = {value: index for index, value in enumerate(ordered)}
    numbered = [
        np.array([number.get(value, -1) for value in split.tolist()], dtype=np.int64) for split in values
    ]
    return numbered, [str(value) for value in ordered]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)

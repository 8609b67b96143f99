"""What one training gave. Loads no torch, so that names of arms are checked at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np

from layerprobe.errors import BrokenFileError
from layerprobe.reading import Schema, check_fields


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one training under one plan gave; also the form in which a search stores it.

    Attributes
    ----------
    validation_accuracy, test_accuracy : float | None
        Shares in [0, 1]; None: not asked for, or the run failed (`reason`).
    bridge_accuracy : float | None
        Random-label train accuracy over the last tenth of the bridge; chance is 1/K.
    train_seconds : float
        Wall time of the steps alone.
    call_seconds : float
        Of the whole call, evaluation included.
    train_flops : float
        Matrix-product operations of the steps, see `layerprobe.training.classifier.training_flops`.
    trainable_parameters : int | None
        Of the backbone, in fine-tuning; stem and head are trained besides.
    test_correct : np.ndarray | None
        Bool, one per image, for paired comparisons; stored as hexadecimal digits.
    """

    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    bridge_accuracy: float | None = None
    train_seconds: float = 0.0
    call_seconds: float = 0.0
    train_flops: float = 0.0
    steps: int = 0
    trainable_parameters: int | None = None
    n_validation: int | None = None
    n_test: int | None = None
    lr: float | None = None
    seed: int | None = None
    reason: str | None = None
    test_correct: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def ranked_accuracy(self) -> float:
        """Validation accuracy; −inf where the run failed, so that it ranks last."""
        return -math.inf if self.validation_accuracy is None else self.validation_accuracy

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        bits = None if self.test_correct is None else np.packbits(self.test_correct).tobytes().hex()
        return {name: getattr(self, name) for name in _STORED} | {"test_correct": bits}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """What `to_dict` gave; of a subclass, with its own fields. BrokenFileError for anything else."""
        check_fields(stored, OUTCOME_FIELDS, STORED_PLACE)
        for name in ("validation_accuracy", "test_accuracy", "bridge_accuracy"):
            if stored.get(name) is not None and not 0 <= stored[name] <= 1:
                raise BrokenFileError(
                    f"cannot read {STORED_PLACE}: '{name}' must be in [0, 1], not {stored[name]:g}"
                )
        bits = stored.get("test_correct")
        right = None if bits is None else unpack_bits(bits, stored.get("n_test"))
        names = {item.name for item in fields(cls)} - {"test_correct"}
        return cls(**{name: value for name, value in stored.items() if name in names}, test_correct=right)


def unpack_bits(digits: str, n: int | None) -> np.ndarray:
    """The `n` truth values that hexadecimal `digits` hold; BrokenFileError where they hold another number."""
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
    except ValueError:
        bits = np.empty(0, np.uint8)
    if n is None or not 0 <= len(bits) - n < 8:
        raise BrokenFileError(
            f"cannot read {STORED_PLACE}: its bits of correct images are not those of {n} images"
        )
    return bits[:n].astype(bool)


STORED_PLACE = "a stored training"
_NUMBER: Schema = (float, type(None))
_COUNT: Schema = (int, type(None))
OUTCOME_FIELDS: dict[str, Schema] = {
    "validation_accuracy?": _NUMBER, "test_accuracy?": _NUMBER, "bridge_accuracy?": _NUMBER, "train_seconds?": float,
    "call_seconds?": float, "train_flops?": float, "steps?": int, "trainable_parameters?": _COUNT,
    "n_validation?": _COUNT, "n_test?": _COUNT, "lr?": _NUMBER, "seed?": _COUNT, "reason?": (str, type(None)),
    "test_correct?": (str, type(None)),
}  # fmt: skip

_STORED = tuple(item.name for item in fields(Outcome) if item.compare)

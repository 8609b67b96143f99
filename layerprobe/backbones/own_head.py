"""The image classifier that a checkpoint itself brought, its outputs matched to a task's classes by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from layerprobe.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from layerprobe.backbones.backbone import Backbone

_UNNAMED = re.compile(r"label_?(\d+)", re.IGNORECASE)
"""What transformers calls outputs that nobody named."""


class NamedClasses(Protocol):
    """What of a task says which classes it has: label i is called `classes[i]`."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> Sequence[str]: ...


def is_image_classifier(model: nn.Module) -> bool:
    """Whether transformers lists the model's class among its image classifiers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    known: set[str] = set()
    for names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        known.update((names,) if isinstance(names, str) else names)
    return type(model).__name__ in known


def own_head(backbone: Backbone, task: NamedClasses) -> Callable[[Tensor], Tensor]:
    """Pixels B×C×H×W → logits B×classes of the checkpoint's own classifier, in the order of the task's classes.

    Raises
    ------
    UsageError
        The checkpoint brings no image classifier, or its outputs are not the task's classes by their names.
    """
    full = backbone.with_own_head
    if full is None:
        raise UsageError(f"{backbone.name} brings no image classifier of its own; fine-tune or probe it")
    # The whole model's configuration: the image tower of a CLIP classifier has two classes by default.
    labels = getattr(full.config, "id2label", None) or {}
    # Keys that were set by hand may be text, and "10" sorts before "2".
    outputs = [str(labels.get(i, labels.get(str(i), ""))) for i in range(len(labels))]
    order = match_classes(
        outputs, task.classes, f"the classifier of {backbone.name}", f"the task {task.name}"
    )

    def logits(pixels: Tensor) -> Tensor:
        found = backbone.own_logits(pixels)
        if found.shape[1] != len(order):
            raise UsageError(
                f"the classifier of {backbone.name} has {found.shape[1]} outputs, its id2label {len(order)} names"
            )
        return found[:, order]

    return logits


def match_classes(outputs: Sequence[str], classes: Sequence[str], theirs: str, ours: str) -> list[int]:
    """For each of `classes`, the index of the output that has its name.

    Names agree as they are, else without regard to case, else by their letters and digits alone; LABEL_3 is
    the class called 3. An order of outputs is never assumed: classes of folders are sorted, those of a
    checkpoint stand as it was trained.

    Parameters
    ----------
    outputs, classes : Sequence[str]
        Names of the checkpoint's outputs and of the task's classes.
    theirs, ours : str
        What the two are called in a message.

    Raises
    ------
    UsageError
        The outputs have no names, or the names are not the same, one for one.
    """
    for spelling in (str, str.casefold, _letters, _number):
        place = {spelling(name): index for index, name in enumerate(outputs)}
        wanted = [spelling(name) for name in classes]
        if len(place) == len(outputs) and len(set(wanted)) == len(wanted) and place.keys() == set(wanted):
            return [place[name] for name in wanted]
    shown = f"{theirs} knows {_some(outputs)}, {ours} has {_some(classes)}"
    if not outputs or all(_UNNAMED.fullmatch(name) for name in outputs):
        raise UsageError(
            f"{shown}: outputs without names cannot be matched to classes; name them in the config's id2label, "
            "or fine-tune or probe it instead"
        )
    raise UsageError(f"{shown}: they are not the same by name; fine-tune or probe it instead")


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _number(name: str) -> str:
    unnamed = _UNNAMED.fullmatch(name)
    return unnamed[1] if unnamed else name


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} classes ({listed})"

"""Frozen means bit-identical: applied before training, proven after it, every time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from layerprobe.errors import PlanError
from layerprobe.plans import FreezePlan
from layerprobe.plans.apply import Verification
from layerprobe.plans.plan import FROZEN, TRAINABLE, parameter_table
from layerprobe.training.classifier import Classifier, digest


class Guard:
    """Applies `plan` to a classifier and remembers every tensor that must not change.

    These are the plan's frozen parameters, the buffers of its frozen blocks, and stem or head where the
    plan freezes them.
    """

    def __init__(self, plan: FreezePlan, classifier: Classifier) -> None:
        self.plan, self._classifier = plan, classifier
        backbone = classifier.backbone
        plan.apply(backbone.model, remember=False)
        if backbone.stem is not None:
            backbone.stem.requires_grad_(plan.states["stem"] == TRAINABLE)
        classifier.head.requires_grad_(plan.states["head"] == TRAINABLE)
        self.before = plan.fingerprint(backbone.model)
        self._held = self.before
        self._others_before = {name: digest(tensor) for name, tensor in self._others().items()}

    def look_again(self) -> None:
        """Take the digests anew, after the model was sharded: from now on, of the part that lies here."""
        self._held = self.plan.fingerprint(self._classifier.backbone.model)
        self._others_before = {name: digest(tensor) for name, tensor in self._others().items()}

    def verify(self, *, after: str) -> Verification:
        """Compare every frozen tensor with what it was; tells which trainable ones moved.

        Raises
        ------
        PlanError : a frozen tensor changed; names it and says after what.
        """
        found = self.plan.verify(self._classifier.backbone.model, self._held)
        now = self._others()
        changed = [name for name, before in self._others_before.items() if digest(now[name]) != before]
        if changed:
            raise PlanError(
                f"frozen, but changed after {after}: {len(changed)} tensors of stem and head ({changed[0]})"
            )
        return found

    def _others(self) -> dict[str, Tensor]:
        backbone = self._classifier.backbone
        found: dict[str, Tensor] = {}
        if backbone.stem is not None and self.plan.states["stem"] == FROZEN:
            found |= {f"stem.{name}": p for name, p in backbone.stem.state_dict().items()}
        if self.plan.states["head"] == FROZEN:
            found |= {f"head.{name}": p for name, p in self._classifier.head.state_dict().items()}
        return found


def all_trainable(backbone: Any) -> FreezePlan:
    """The plan that freezes nothing."""
    return block_plan(backbone, range(backbone.n_blocks), outside=TRAINABLE)


def block_plan(
    backbone: Any, trainable_blocks: Iterable[int], *, outside: str = FROZEN, stem: str = TRAINABLE
) -> FreezePlan:
    """The plan that trains these blocks; `outside` is the state of embeddings, positions and outer norms."""
    return FreezePlan.from_blocks(
        parameter_table(backbone.model),
        backbone.layout.parameter_groups,
        trainable_blocks,
        model_id=backbone.source.model_id,
        revision=backbone.source.revision,
        norms=outside,
        positions=outside,
        embeddings=outside,
        other=outside,
        stem=stem,
    )

"""What of a plan trains when, and the check that training left every frozen tensor bit-identical."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from layerprobe.backbones.resolve import TRAINED, ModelSource
from layerprobe.backbones.sharding import is_sharded
from layerprobe.errors import PlanError, UsageError
from layerprobe.files import tensor_digest
from layerprobe.plans import FreezePlan
from layerprobe.plans.adapters import has_adapters, present_ranks, remove_adapters
from layerprobe.plans.apply import ERROR
from layerprobe.plans.names import adapter_part, clean_name, is_adapter
from layerprobe.plans.plan import FROZEN, TRAINABLE
from layerprobe.plans.verify import Fingerprint, Verification
from layerprobe.training.classifier import Classifier, set_training
from layerprobe.training.config import BridgeConfig, TrainConfig, derive_seed, text_hash
from layerprobe.training.data import ImageTensors
from layerprobe.training.loop import FrozenPrefix, make_prefix

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone


class FrozenCheck:
    """Applies `plan` to a classifier and remembers every tensor that must not change: the plan's frozen
    parameters, the buffers of its frozen blocks, and stem or head where the plan freezes them.

    `before` are the digests of the whole model at the start.
    """

    def __init__(self, plan: FreezePlan, classifier: Classifier) -> None:
        self.plan, self._classifier = plan, classifier
        apply_to_backbone(plan, classifier.backbone, seed=classifier.seed)
        if classifier.backbone.stem is not None:
            classifier.backbone.stem.requires_grad_(plan.states["stem"] == TRAINABLE)
        classifier.head.requires_grad_(plan.states["head"] == TRAINABLE)
        self.take_digests()
        self.before = self._digests

    def take_digests(self) -> None:
        """Compare from now on with the tensors as they are; of a sharded model, with the part that lies here."""
        self._digests = self.plan.fingerprint(self._classifier.backbone.model)
        self._outside = {name: tensor_digest(tensor) for name, tensor in self._frozen_outside().items()}

    def origin(self) -> dict[str, Any]:
        """`before` as plain values, the same in all processes: of one read in parts, those of every part."""
        return self._of_all_processes(self.before)

    def rename_if_trained(self) -> None:
        """Give a backbone of files whose weights changed a revision of its own, which is part of every key.

        A model in memory hashes its weights itself.
        """
        backbone = self._classifier.backbone
        now, source = self.plan.fingerprint(backbone.model), backbone.source
        if not isinstance(source, ModelSource) or now == self.before:
            return
        digest = text_hash(json.dumps(self._of_all_processes(now), sort_keys=True))[:12]
        first = source.revision.partition("+trained-")[0]
        backbone.source = replace(source, revision=f"{first}+trained-{digest}", origin=TRAINED)
        backbone.loaded_with = None  # another process would load the weights before training

    def _of_all_processes(self, digests: Fingerprint) -> dict[str, Any]:
        own = digests.to_dict()
        if not is_sharded(self._classifier.backbone.model):
            return own
        parts: list[dict[str, Any]] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        return {str(rank): part for rank, part in enumerate(parts)}

    def verify(self, *, after: str) -> Verification:
        """Compare every frozen tensor with what it was; PlanError names one that changed and says after what."""
        found = self.plan.verify(self._classifier.backbone.model, self._digests)
        now = self._frozen_outside()
        changed = [name for name, before in self._outside.items() if tensor_digest(now[name]) != before]
        if changed:
            raise PlanError(
                f"frozen, but changed after {after}: {len(changed)} tensors of stem and head ({changed[0]})"
            )
        return found

    def _frozen_outside(self) -> dict[str, Tensor]:
        """The tensors of stem and head where the plan freezes them."""
        parts = {"stem": self._classifier.backbone.stem, "head": self._classifier.head}
        return {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            if module is not None and self.plan.states[part] == FROZEN
            for name, tensor in module.state_dict().items()
        }


def apply_to_backbone(plan: FreezePlan, backbone: Backbone, *, seed: int) -> None:
    """Set what trains in a backbone, and place the plan's adapters.

    What another plan's adapters have learnt before becomes part of the weights; adapters of PEFT that the model's
    owner put there stay as they are.
    """
    names = {clean_name(name): p for name, p in backbone.model.named_parameters()}
    if has_adapters(backbone.model) and present_ranks(names) != plan.adapters:
        remove_adapters(backbone.model, merge=True)
        names = {clean_name(name): p for name, p in backbone.model.named_parameters()}
    there = {
        name: FROZEN for name in names if is_adapter(name) and not (plan.adapters and adapter_part(name))
    }
    adapters = derive_seed(seed, "adapters")
    plan.apply(backbone.model, remember=False, outside=there or ERROR, seed=adapters)


class Phases:
    """What trains at a step: all of the plan; with `stem_steps`, first stem and head, then the plan but its stem."""

    def __init__(
        self,
        plan: FreezePlan,
        classifier: Classifier,
        optimizer: Optimizer,
        pixels: ImageTensors,
        config: TrainConfig,
        processes: int,
    ) -> None:
        self.prefix: FrozenPrefix | None = None
        self.stem_steps = config.stem_steps if isinstance(config, BridgeConfig) else 0
        if self.stem_steps and processes > 1:
            raise UsageError(
                f"stem_steps needs one process, not {processes}: what trains must not change once the model is spread "
                "over several"
            )
        self._plan, self._classifier, self._optimizer = plan, classifier, optimizer
        self._pixels, self._config = pixels, config
        self._phase: str | None = None

    def enter(self, step: int) -> FrozenPrefix | None:
        """Set what trains at `step`; the frozen prefix to use from then on."""
        phase = "all" if not self.stem_steps else "stem" if step < self.stem_steps else "blocks"
        if phase == self._phase:
            return self.prefix
        self._phase = phase
        backbone = self._classifier.backbone
        if phase != "all":
            apply_to_backbone(self._plan, backbone, seed=self._classifier.seed)
            if phase == "stem":
                backbone.model.requires_grad_(False)
            if backbone.stem is not None:
                backbone.stem.requires_grad_(self._plan.states["stem"] == TRAINABLE and phase == "stem")
        set_training(self._classifier)
        self._optimizer.zero_grad()
        if not is_sharded(backbone.model):
            self.prefix = make_prefix(self._classifier, self._pixels, self._config)
        return self.prefix

"""A model object that the caller already has: found inside its wrappers, read where it is, left as it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layerprobe.backbones.layout import takes_images_or_embeddings
from layerprobe.errors import UnknownNameError, UsageError, did_you_mean
from layerprobe.files import tensor_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class MemorySource:
    """A model in memory; `resolve.ModelIdentity` says what the fields are."""

    name: str
    model_id: str
    model: PreTrainedModel = field(repr=False)
    origin: str = "memory"
    run: None = None
    known: dict[tuple[int, ...], str] = field(default_factory=dict, repr=False, compare=False)
    """The last state that was hashed, and its hash."""

    @property
    def revision(self) -> str:
        """`memory-` and 12 hex digits, over configuration, names, shapes and every byte of the weights.

        Reads all weights once where nothing changed since the last call, and hashes them where something did.
        """
        tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in self.model.state_dict().items()}
        state = tuple(_checksum(tensor) for tensor in tensors.values())
        if state not in self.known:
            digest = hashlib.sha256(
                json.dumps(self.model.config.to_dict(), sort_keys=True, default=str).encode()
            )
            for name, tensor in tensors.items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor_digest(tensor)}".encode())
            self.known.clear()
            self.known[state] = f"memory-{digest.hexdigest()[:12]}"
        return self.known[state]


def _checksum(tensor: Tensor) -> int:
    """A number that an optimizer's step changes, also one through `.data`, which leaves no other trace."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(flat) // 8 * 8
    total = int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())
    return hash((total, tensor._version, tensor.data_ptr()))


def memory_source(model: PreTrainedModel) -> MemorySource:
    """What identifies a model in memory: its class, and the name it was loaded by where it has one."""
    kind = type(model).__name__
    return MemorySource(name=kind, model_id=getattr(model.config, "_name_or_path", "") or kind, model=model)


def unwrap(model: nn.Module, tower: str | None) -> PreTrainedModel:
    """The model of transformers inside torch.compile, DistributedDataParallel and PEFT, or its part `tower`.

    Adapters of PEFT stay in place and are part of what is measured.

    Parameters
    ----------
    tower : str | None
        Dotted name of the part that images go through (`vision_tower`), where the model has several.

    Raises
    ------
    UnknownNameError
        No part of that name.
    UsageError
        Not a model of transformers, soft prompts, or weights without values.
    """
    inner: nn.Module = model
    while True:
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = cast(nn.Module, inner._orig_mod)
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = _without_peft(inner)
        else:
            break
    if tower is not None:
        parts = {name for name, part in inner.named_modules() if name and takes_images_or_embeddings(part)}
        if tower not in parts:
            listed = ", ".join(sorted(parts)) or "none"
            raise UnknownNameError(
                f"{type(inner).__name__} has no model '{tower}'.{did_you_mean(tower, parts)} Models in it: {listed}"
            )
        inner = inner.get_submodule(tower)
    if not hasattr(inner, "main_input_name") or not hasattr(inner, "config"):
        raise UsageError(
            f"{type(inner).__name__} is no model of transformers (PreTrainedModel), so its blocks and its input are "
            "not known; pass such a model, or the name of one"
        )
    if next(inner.parameters()).is_meta:
        raise UsageError(f"{type(inner).__name__} has no values (meta device); load its weights first")
    return cast("PreTrainedModel", inner)


def _without_peft(model: nn.Module) -> nn.Module:
    """The model that a PeftModel wraps, its adapters in place."""
    configs = model.peft_config
    soft = [str(one.peft_type) for one in dict(configs).values() if one.is_prompt_learning]  # type: ignore[arg-type]
    if soft:
        kind = soft[0].rpartition(".")[2]
        raise UsageError(
            f"this PEFT model learns a prompt ({kind}), which stands before text and is nothing to images; pass the "
            "model without it"
        )
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    return inner


def is_compiled(model: nn.Module) -> bool:
    """Whether any module of it runs through torch.compile, whose graphs pass hooks by."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


@contextlib.contextmanager
def run_eagerly(on: bool) -> Iterator[None]:
    """Within: compiled modules run as they were written, where `on`."""
    if not on:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield

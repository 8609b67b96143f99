"""What a bridge run keeps beside or instead of a whole model: trained tensors and adapters, put into the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from layerprobe.backbones.resolve import ModelSource, inside
from layerprobe.errors import BrokenFileError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

TRAINED_FILE = "trained.safetensors"
"""The trained tensors of the base model, by their names, where a run keeps no whole model."""
ADAPTERS_FILE = "adapters.safetensors"
"""Both factors of every adapter: `h.3.attn.c_attn.lora_A` and `…lora_B`."""


def put_into(model: nn.Module, source: ModelSource) -> None:
    """Give a model the trained tensors of its bridge run, and add what the run's adapters have learnt to its weights.

    Raises
    ------
    BrokenFileError
        A file that cannot be read, or tensors that are none of this model's.
    """
    run = source.run or {}
    root = Path(source.name).expanduser()
    for key, put in (("trained_file", _replace), ("adapters_file", _add)):
        if not run.get(key):
            continue
        path = inside(root, str(run[key]), root)
        tensors = read_tensors(path)
        try:
            put(model, tensors, run)
        except (KeyError, AttributeError, RuntimeError) as error:
            raise BrokenFileError(
                f"{path} does not fit {type(model).__name__}: {first_line(error)}"
            ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; BrokenFileError where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BrokenFileError(f"cannot read {path}: {error}") from error


@torch.no_grad()
def _replace(model: nn.Module, tensors: Mapping[str, Tensor], run: Mapping[str, Any]) -> None:
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise RuntimeError(f"{name} is {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
        own[name].copy_(tensor)


@torch.no_grad()
def _add(model: nn.Module, tensors: Mapping[str, Tensor], run: Mapping[str, Any]) -> None:
    scale = float(run.get("adapter_scale", 1.0))
    for name in [name for name in tensors if name.endswith(".lora_A")]:
        module = model.get_submodule(name.removesuffix(".lora_A"))
        first, second = tensors[name].float(), tensors[name.removesuffix("A") + "B"].float()
        update = scale * (second @ first)
        weight = cast(Tensor, module.weight)
        # nn.Linear keeps (out, in); GPT-2's Conv1D keeps (in, out) and says so in `nf`.
        weight.copy_(weight.float() + (update.T if hasattr(module, "nf") else update))

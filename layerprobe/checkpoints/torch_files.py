"""Reading `.bin`, `.pth` and `.pt` through `torch.load(weights_only=True, mmap=True)`: data, never code."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.checkpoints.safetensors import RAW_DTYPES, StoredTensor
from layerprobe.errors import BrokenFileError

if TYPE_CHECKING:
    from torch import Tensor


def read_torch(file: Path) -> list[StoredTensor]:
    """The tensors of one pickled checkpoint, mapped into memory rather than read.

    Nested mappings such as {"state_dict": …} are flattened with dots. Two names over the same storage
    are one weight: the later carries `alias_of`.

    Raises
    ------
    BrokenFileError : not a torch file, truncated, or one that would need to run code.
    """
    import torch

    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files older than torch 1.6 are no zip archive and cannot be mapped.
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise BrokenFileError(
            f"cannot read {file}: {first} (only tensors are loaded, never pickled code)"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BrokenFileError(f"cannot read {file}: {first}") from error
    tensors: list[StoredTensor] = []
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in _flatten(loaded):
        dtype = str(tensor.dtype).removeprefix("torch.")
        storage = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), dtype)
        alias = seen.setdefault(storage, name) if tensor.numel() else name
        skip = None if dtype in RAW_DTYPES else f"{dtype} tensor: quantised codes or indices, not weights"
        if tensor.layout != torch.strided or tensor.is_quantized:
            skip = f"{tensor.layout} {dtype} tensor: its stored values are not a dense weight"
        tensors.append(
            StoredTensor(
                name=name,
                dtype=dtype,
                shape=tuple(tensor.shape),
                file=file,
                offset=0,
                nbytes=tensor.numel() * tensor.element_size(),
                skip=skip,
                alias_of=None if alias == name else alias,
                source=_raw(tensor) if skip is None else None,
            )
        )
    if not tensors:
        raise BrokenFileError(f"cannot read {file}: it holds no tensors")
    return tensors


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield prefix, value.detach()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))


def _raw(tensor: Tensor) -> np.ndarray:
    """The flat values; the codes of dtypes below 32 bits."""
    import torch

    flat = tensor.reshape(-1)
    unsigned = {1: torch.uint8, 2: torch.uint16}.get(flat.element_size())
    return (flat.view(unsigned) if unsigned is not None else flat).numpy()

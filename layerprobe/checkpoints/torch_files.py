"""Reading `.bin`, `.pth` and `.pt` through `torch.load(weights_only=True, mmap=True)`: data, never code."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.checkpoints.safetensors import RAW_DTYPES, StoredTensor
from layerprobe.checkpoints.states import choose_state, safe_shape
from layerprobe.errors import BrokenFileError, first_line
from layerprobe.files import dtype_name

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_DTYPES = frozenset(
    ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float8_e8m0fnu")
)
"""Dtypes that are no weights by themselves and may be codes, scales or indices."""


def read_torch(file: Path, state_name: str | None = None) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors of one pickled checkpoint, mapped into memory rather than read, and what else was in it.

    Of a training checkpoint the model's state is read, or the one named `state_name`. Nested mappings and lists are
    flattened with dots. Two names over the same storage are one weight: the later carries `alias_of`.

    Raises
    ------
    BrokenFileError
        Not a torch file, truncated, or one that would need to run code.
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
        raise BrokenFileError(
            f"cannot read {file}: {first_line(error)} (only tensors are loaded, never pickled code)"
        ) from error
    except Exception as error:  # whatever the reader meets in a damaged file is the file's fault
        raise BrokenFileError(f"cannot read {file}: {first_line(error)}") from error
    state = choose_state(loaded, state_name, file)
    seen: dict[tuple[Any, ...], str] = {}
    tensors = [_stored(file, name, tensor, seen) for name, tensor in state.tensors]
    if not tensors:
        raise BrokenFileError(f"cannot read {file}: it holds no tensors")
    return tensors, state.left_out


def _stored(file: Path, name: str, tensor: Tensor, seen: dict[tuple[Any, ...], str]) -> StoredTensor:
    dtype = dtype_name(tensor.dtype)
    made = StoredTensor(
        name=name,
        dtype=dtype,
        shape=safe_shape(tensor),
        file=file,
        offset=0,
        nbytes=0,
        skip=_odd(tensor, dtype),
    )
    if made.skip is not None:
        return made
    storage = (tensor.data_ptr(), made.shape, tensor.stride(), dtype)
    alias = seen.setdefault(storage, name) if tensor.numel() else name
    integer = None if dtype in RAW_DTYPES else f"{dtype} tensor: quantised codes or indices, not weights"
    return replace(
        made,
        nbytes=tensor.numel() * tensor.element_size(),
        skip=integer,
        alias_of=None if alias == name else alias,
        source=_raw(tensor, dtype),
    )


def _odd(tensor: Tensor, dtype: str) -> str | None:
    """Why a tensor has no dense real values, or None."""
    import torch

    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        return f"{kind} {dtype} tensor: its stored values are not a dense weight"
    if tensor.is_meta:
        return f"{dtype} tensor on the meta device: it has no values"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"{dtype} tensor of class {type(tensor).__name__}: its stored values are not a dense weight"
    if dtype in RAW_DTYPES or dtype in PLAIN_DTYPES:
        return None
    return f"{dtype} tensor: not floating-point weights"


def _raw(tensor: Tensor, dtype: str) -> np.ndarray:
    """The flat values; the codes of dtypes below 32 bits."""
    import torch

    flat = tensor.resolve_neg().reshape(-1)
    if dtype in RAW_DTYPES or dtype == "float8_e8m0fnu":
        unsigned = {1: torch.uint8, 2: torch.uint16}.get(flat.element_size())
        return (flat.view(unsigned) if unsigned is not None else flat).numpy()
    return flat.numpy()

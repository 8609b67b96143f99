"""Matrices that hold several modules side by side (GPT-2's c_attn, Phi-3's qkv_proj), cut into their parts."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from layerprobe.checkpoints.naming import Place
from layerprobe.checkpoints.tensors import RAW_DTYPES, StoredTensor

_SIDE_BY_SIDE = re.compile(r"(?:^|\.)(?:c_attn|qkv|to_qkv|qkv_proj|in_proj|in_proj_weight)(?:\.weight)?$")
# `query_key_value` (GPT-NeoX, BLOOM, Falcon) interleaves q, k and v head by head and is left whole.


def fused_parts(tensor: StoredTensor, place: Place) -> list[tuple[str, StoredTensor]]:
    """(kind, part) for a fused matrix whose parts lie one after the other; else an empty list.

    A part is named like its matrix with the kind in brackets. Grouped-query matrices (more columns than
    thirds) are cut by q having as many outputs as inputs, k and v sharing the rest.
    """
    if len(tensor.shape) != 2 or tensor.skip is not None or tensor.alias_of is not None:
        return []
    outputs, inputs = reversed(tensor.shape) if place.transposed else tensor.shape
    kinds: tuple[str, ...]
    if place.kind == "gate_up" and outputs % 2 == 0:
        kinds, sizes = ("gate", "up"), [outputs // 2] * 2
    elif place.kind == "qkv" and _SIDE_BY_SIDE.search(tensor.name) and inputs < outputs <= 3 * inputs:
        rest = outputs - inputs
        if rest % 2:
            return []
        kinds, sizes = ("q", "k", "v"), [inputs, rest // 2, rest // 2]
    else:
        return []
    parts, start = [], 0
    for kind, size in zip(kinds, sizes, strict=True):
        parts.append((kind, _cut(tensor, kind, start, start + size, columns=place.transposed)))
        start += size
    return parts


def _cut(tensor: StoredTensor, kind: str, start: int, stop: int, *, columns: bool) -> StoredTensor:
    name = f"{tensor.name}[{kind}]"
    rows, width = tensor.shape
    itemsize = np.dtype(RAW_DTYPES[tensor.dtype]).itemsize
    if columns:
        source = tensor.source
        if source is not None:
            source = np.ascontiguousarray(source.reshape(rows, width)[:, start:stop]).reshape(-1)
            return dataclasses.replace(
                tensor, name=name, shape=(rows, stop - start), nbytes=source.nbytes, source=source
            )
        nbytes = rows * (stop - start) * itemsize
        return dataclasses.replace(
            tensor, name=name, shape=(rows, stop - start), nbytes=nbytes, columns=(width, start, stop)
        )
    size = (stop - start) * width
    source = None if tensor.source is None else tensor.source[start * width : stop * width]
    return dataclasses.replace(
        tensor,
        name=name,
        shape=(stop - start, width),
        offset=tensor.offset + start * width * itemsize,
        nbytes=size * itemsize,
        source=source,
    )

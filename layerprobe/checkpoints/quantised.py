"""Which stored tensors are quantised matrices, and which are their scales, zero points and tables.

A module that holds integer codes is quantised, whatever made it: its codes become one matrix that is decoded as it is
read, or one row that says why not, and nothing else in it but a bias is a weight. Only layouts whose every tensor is
understood are decoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layerprobe.checkpoints.dequantise import (
    CannotDequantise,
    Dequantised,
    GptqMatrix,
    PackedRows,
    ScaledCodes,
    Spread,
    TableCodes,
    stored_array,
)
from layerprobe.checkpoints.safetensors import StoredTensor
from layerprobe.checkpoints.tensor_roles import module_kind

Module = dict[str, StoredTensor]
"""The tensors of one module by the rest of their names."""

_LEAF = re.compile(r"^(?:(?P<module>.*?)\.)?(?P<leaf>weight[.:].+|[^.]+)$")
_PACKED = frozenset(
    ("I8", "U8", "I16", "U16", "I32", "U32", "int8", "uint8", "int16", "uint16", "int32", "uint32")
    + ("F4", "F6_E2M3", "F6_E3M2", "float4_e2m1fn_x2")
)
_INDICES = re.compile(r"^(?:Qidxs\w*|codes|indices)$")
"""Codes of 64 bits (QuIP#): other tensors of such integers are indices of positions."""
_SCALE = re.compile(r"^(?:\w*scales?(?:_\w+)?|SCB)$")
_ACTIVATION = re.compile(
    r"(?:^|\.)(?:(?:input|output|act|activation|q|k|v|kv|qkv|prob)_(?:scale|scale_ub|zero_point|zero|global_scale)"
    r"|\w*scaling_factor|\w*_amax|pre_quant_scale|scaled_fp8)$"
)
_ABOUT_INPUTS = re.compile(
    r"^(?:(?:input|output|q|k|v)_(?:scale|zero_point)|input_scale_ub|activation_scale)$"
)
_STATE = re.compile(
    r"^weight\.(?:absmax|nested_\w+|quant_\w+)|^qzeros$|^g_idx$|_(?:shape|zero_point|g_idx|scales)$"
)
_BIAS = re.compile(r"(?:^|(?<!weight)_)bias$")
_FLOAT8_METHODS = frozenset(("fp8", "fbgemm_fp8", "modelopt", "compressed_tensors"))
_METHODS = _FLOAT8_METHODS | frozenset(
    ("gptq", "awq", "auto_round", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
)
"""The names in a configuration whose layouts are decoded here."""


@dataclass(frozen=True)
class _Settings:
    """What the configuration says of the quantisation."""

    method: str | None
    values: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Settings:
        inner = config.get("text_config")
        for place in (config, inner if isinstance(inner, dict) else {}):
            found = place.get("quantization_config") or place.get("compression_config")
            if isinstance(found, dict):
                method = found.get("quant_method")
                return cls(str(method).lower().replace("-", "_") if method else None, found)
        return cls(None, {})

    def number(self, key: str) -> int | None:
        value = self.values.get(key)
        return value if type(value) is int and value > 0 else None

    def text(self, *keys: str) -> str:
        """The first of these that is stated, in lower case; else an empty text."""
        return next((str(self.values[key]).lower() for key in keys if self.values.get(key)), "")

    @property
    def block(self) -> tuple[int, ...] | None:
        value = self.values.get("weight_block_size")
        if isinstance(value, list) and value and all(type(n) is int and n > 0 for n in value):
            return tuple(value)
        return None


def dequantised(tensors: Sequence[StoredTensor], config: Mapping[str, Any]) -> list[StoredTensor]:
    """The same tensors, quantised ones as the matrices that they stand for, their scales and tables skipped.

    Codes and scales that do not define a matrix are skipped with the reason.
    """
    settings = _Settings.of(config)
    if settings.method is None and not any(_may_be_codes(tensor) for tensor in tensors):
        return list(tensors)
    modules: dict[str, Module] = {}
    for tensor in tensors:
        match = _LEAF.match(tensor.name)
        module, leaf = (match["module"] or "", match["leaf"]) if match is not None else ("", tensor.name)
        modules.setdefault(module, {})[leaf] = tensor
    scaled = settings.method in _FLOAT8_METHODS or any(map(_has_scaled_float8, modules.values()))
    coded = {
        name: [leaf for leaf in module if name and _are_codes(leaf, module, scaled)]
        for name, module in modules.items()
    }
    if settings.method is None and not any(coded.values()):
        return list(tensors)
    changed = {
        modules[name][leaf].name: _decoded(name, modules[name], leaf, settings)
        for name, codes in coded.items()
        for leaf in codes
    }
    for name, module in modules.items():
        owner = f"{name}.weight" if coded[name] else _quantised_parent(name, coded)
        for leaf, tensor in module.items() if owner else ():
            if tensor.name not in changed and tensor.skip is None and not _BIAS.search(leaf):
                changed[tensor.name] = replace(tensor, skip=f"quantisation state of {owner}, no weight")
    found = []
    for tensor in tensors:
        tensor = changed.get(tensor.name, tensor)
        if tensor.skip is None and _ACTIVATION.search(tensor.name):
            tensor = replace(tensor, skip="scale of quantised activations, no weight")
        found.append(tensor)
    return found


def _may_be_codes(tensor: StoredTensor) -> bool:
    return _is_packed(tensor.name.rpartition(".")[2], tensor) or tensor.dtype.startswith("float8")


def _is_packed(leaf: str, tensor: StoredTensor) -> bool:
    return tensor.dtype in _PACKED or (tensor.dtype in ("I64", "int64") and _INDICES.match(leaf) is not None)


def _has_scaled_float8(module: Module) -> bool:
    return any(map(_SCALE.match, module)) and any(
        tensor.dtype.startswith("float8") and not _SCALE.match(leaf) for leaf, tensor in module.items()
    )


def _are_codes(leaf: str, module: Module, scaled: bool) -> bool:
    """Whether a tensor holds the codes of a weight. Without scales anywhere, float8 is a dtype like any other."""
    tensor = module[leaf]
    if len(tensor.shape) < 2 or _SCALE.match(leaf) or _STATE.search(leaf) or _BIAS.search(leaf):
        return False
    if tensor.dtype.startswith("float8"):
        return scaled
    weight = module.get("weight")
    if not _is_packed(leaf, tensor) or (weight is not None and weight is not tensor and weight.skip is None):
        return False  # nothing packed, or the weight lies beside it in floating point
    return module_kind(tensor.name, tensor.shape) != "buffer"


def _quantised_parent(name: str, coded: Mapping[str, list[str]]) -> str | None:
    """The weight of the module around this one, where that is quantised (tables that are modules of their own)."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.weight" if coded.get(parent) and "lora" not in leaf.lower() else None


def _decoded(name: str, module: Module, leaf: str, settings: _Settings) -> StoredTensor:
    codes = module[leaf]
    try:
        if settings.method is not None and settings.method not in _METHODS:
            raise CannotDequantise(f"the quantisation method '{settings.method}' is not known here")
        matrix, own = _layout(module, leaf)(module, leaf, settings)
    except CannotDequantise as reason:
        return replace(codes, skip=f"quantised codes ({codes.dtype}), not decoded: {reason}")
    return replace(
        codes,
        name=f"{name}.{own}",
        dtype="float32",
        stored_as=codes.dtype,
        shape=matrix.shape,
        skip=None,
        source=matrix,
    )


Layout = Callable[[Module, str, _Settings], tuple[Dequantised, str]]


def _layout(module: Module, leaf: str) -> Layout:
    if leaf == "qweight":
        return _gptq_or_awq
    if leaf == "weight_packed":
        return _packed
    if leaf == "weight" and "weight.absmax" in module:
        return _table
    if module[leaf].dtype in ("I8", "int8") or module[leaf].dtype.startswith("float8"):
        return _scaled
    raise CannotDequantise("no layout that is known: " + ", ".join(sorted(module)))


def _only(module: Module, leaf: str, *known: str) -> None:
    """Refuse a module in which anything else could change the matrix."""
    own = {other for other in module if not _BIAS.search(other) and not _ABOUT_INPUTS.match(other)}
    if leaf not in ("weight", "qweight", "weight_packed"):
        # Several matrices in one module (experts): each with what begins like it.
        own = {other for other in own if other.startswith(leaf)}
    if more := sorted(own - {leaf, *known}):
        raise CannotDequantise(f"'{more[0]}' beside the codes is not understood")


def _scaled(module: Module, leaf: str, settings: _Settings) -> tuple[Dequantised, str]:
    codes = module[leaf]
    names = [f"{leaf}_scale", f"{leaf}_scale_inv", "scale_weight", "scale", "SCB"]
    found = [name for name in names if name in module]
    zero = module.get(f"{leaf}_zero_point")
    _only(module, leaf, *names, f"{leaf}_zero_point", f"{leaf}_shape", f"{leaf}_input_scale", "weight_format")
    if len(found) != 1:
        raise CannotDequantise("its scale is missing" if not found else f"several scales: {', '.join(found)}")
    if "weight_format" in module and int(_small(module["weight_format"]).reshape(-1)[0]) != 0:
        raise CannotDequantise("its rows are stored in an order that is particular to a GPU")
    scale = Spread(module[found[0]], codes.shape, settings.block)
    if zero is not None and (zero.shape != module[found[0]].shape or zero.dtype not in ("I8", "int8")):
        raise CannotDequantise(f"zero points of dtype {zero.dtype} and shape {list(zero.shape)}")
    zeros = None if zero is None else Spread(zero, codes.shape, settings.block)
    return ScaledCodes(codes, scale, zeros, divisor=127.0 if found[0] == "SCB" else 1.0), leaf


def _gptq_or_awq(module: Module, leaf: str, settings: _Settings) -> tuple[Dequantised, str]:
    _only(module, leaf, "qzeros", "scales", "g_idx")
    if any(n not in module or len(module[n].shape) != 2 for n in ("qzeros", "scales")):
        raise CannotDequantise("no zero points and scales beside the codes")
    codes, zeros, scales = module[leaf], module["qzeros"], module["scales"]
    if codes.dtype not in ("I32", "int32") or zeros.dtype not in ("I32", "int32") or len(codes.shape) != 2:
        raise CannotDequantise(f"codes of dtype {codes.dtype} and zero points of dtype {zeros.dtype}")
    if codes.shape[1] * 8 == scales.shape[1] and zeros.shape[1] == codes.shape[1] and "g_idx" not in module:
        if settings.number("bits") not in (None, 4) or settings.text("version", "format") not in ("", "gemm"):
            raise CannotDequantise("of AWQ, 4 bits in the order 'gemm' are decoded")
        return GptqMatrix(module, 4, awq=True, zero_offset=0, group=settings.number("group_size")), "weight"
    if codes.shape[1] != scales.shape[1]:
        raise CannotDequantise("codes and scales have different outputs")
    order = module.get("g_idx")
    bits = 32 * zeros.shape[1] / scales.shape[1] if order is None else 32 * codes.shape[0] / order.size
    if bits not in (2, 3, 4, 8):
        raise CannotDequantise(f"{bits:g} bits a code")
    form = settings.text("checkpoint_format", "packing_format") or "gptq"
    if form not in ("gptq", "gptq_v2", "auto_round:auto_gptq"):
        raise CannotDequantise(f"the GPTQ format '{form}' is not decoded here")
    # The first format stores zero points less one.
    offset = 0 if form == "gptq_v2" else 1
    group = settings.number("group_size")
    return GptqMatrix(module, int(bits), awq=False, zero_offset=offset, group=group), "weight"


def _packed(module: Module, leaf: str, settings: _Settings) -> tuple[Dequantised, str]:
    _only(module, leaf, "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    if not {"weight_scale", "weight_shape"} <= module.keys() or module[leaf].dtype not in ("I32", "int32"):
        raise CannotDequantise(f"no scale and shape beside codes of dtype {module[leaf].dtype}")
    shape = tuple(int(n) for n in _small(module["weight_shape"]).reshape(-1))
    words = module[leaf].shape
    fitting = [
        bits for bits in (2, 4, 8)
        if len(shape) == 2 and words == (shape[0], -(-shape[1] * bits // 32))
    ]  # fmt: skip
    if len(fitting) != 1:
        raise CannotDequantise(f"codes of shape {list(words)} for a matrix of {list(shape)}")
    return PackedRows(module, (shape[0], shape[1]), fitting[0]), "weight"


def _table(module: Module, leaf: str, settings: _Settings) -> tuple[Dequantised, str]:
    state = next((n for n in module if n.startswith("weight.quant_state.bitsandbytes__")), None)
    known = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
    _only(module, leaf, *known, state or leaf)
    if state is None or "weight.quant_map" not in module:
        raise CannotDequantise("its table (quant_map) or its shape (quant_state) is missing")
    try:
        facts = json.loads(_small(module[state]).tobytes())
        shape, block = [int(n) for n in facts["shape"]], int(facts["blocksize"])
        nested = None
        if "weight.nested_absmax" in module:
            nested = int(facts["nested_blocksize"]), float(facts["nested_offset"])
    except (ValueError, KeyError, TypeError) as error:
        raise CannotDequantise(f"'{state}' is not readable") from error
    if block < 1 or not shape or min(shape) < 1:
        raise CannotDequantise(f"'{state}' claims shape {shape} and blocks of {block}")
    return TableCodes(module, shape, block, nested), "weight"


def _small(tensor: StoredTensor) -> np.ndarray:
    if tensor.size == 0 or tensor.size > 1 << 16:
        raise CannotDequantise(f"'{tensor.name}' has {tensor.size:,} entries")
    return np.asarray(stored_array(tensor))

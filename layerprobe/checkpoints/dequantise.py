"""Quantised matrices by their codes and scales, decoded a few rows at a time.

Every class here is a flat sequence of float32 entries in row-major order: it has a `size` and takes a slice, like
the array of a tensor that lies in memory. Products are rounded once, to float32. Only what a slice needs is read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache

import numpy as np

from layerprobe.checkpoints.safetensors import RAW_DTYPES, StoredTensor

_INTEGERS = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "I64": "<i8",
    "uint8": "u1", "int8": "i1", "uint16": "<u2", "int16": "<i2", "uint32": "<u4", "int32": "<i4", "int64": "<i8",
}  # fmt: skip
_POWERS_OF_TWO = ("F8_E8M0", "float8_e8m0fnu")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""AWQ keeps column j of each eight in nibble `_AWQ_ORDER[j]`."""


class CannotDequantise(Exception):
    """The stored tensors do not define the matrix; the message is the reason of a skipped row."""


def stored_array(tensor: StoredTensor) -> np.ndarray:
    """The raw array of a stored tensor (codes below 32 bits), mapped, not read; BrokenFileError as of `chunks`."""
    if tensor.source is not None:
        return np.asarray(tensor.source).reshape(tensor.shape)
    if tensor.nbytes == 0 and tensor.size:
        raise CannotDequantise(f"'{tensor.name}' has no plain values")
    name = "u1" if tensor.dtype in _POWERS_OF_TWO else (_INTEGERS | RAW_DTYPES).get(tensor.dtype)
    if name is None:
        raise CannotDequantise(f"'{tensor.name}' holds {tensor.dtype}")
    if tensor.size == 0:
        return np.empty(tensor.shape, name)
    try:
        return np.memmap(tensor.file, name, "r", tensor.offset, tensor.shape)
    except (OSError, ValueError) as error:
        raise tensor.broken(str(error)) from error


def numbers(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Raw values of a stored tensor as floating point, exactly: float32 where it was at most that, else float64."""
    if dtype == "float16":
        return raw.view(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in _POWERS_OF_TWO:
        return np.ldexp(1.0, raw.astype(np.int32) - 127)
    if dtype.startswith("float8"):
        return _float8_values(dtype)[raw]
    return np.asarray(raw, np.float32 if dtype == "float32" else np.float64)


@cache
def _float8_values(dtype: str) -> np.ndarray:
    import torch

    codes = torch.arange(256, dtype=torch.uint8)
    values: np.ndarray = codes.view(getattr(torch, dtype)).to(torch.float32).numpy()
    return values


def unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """The unsigned codes of `bits` bits in 32-bit words, lowest bits first, along `axis` of a matrix."""
    words = np.ascontiguousarray(words).view("<u4")
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        mask = np.uint32((1 << bits) - 1)
        if axis == 0:
            found = (words[:, None, :] >> shifts[None, :, None]) & mask
            return found.reshape(-1, words.shape[1])
        return ((words[:, :, None] >> shifts) & mask).reshape(words.shape[0], -1)
    # Codes of three bits run across the borders of words.
    rows = np.ascontiguousarray(words.T if axis == 0 else words)
    stream = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : stream.shape[1] // bits * bits].reshape(rows.shape[0], -1, bits)
    codes = stream @ (1 << np.arange(bits, dtype=np.uint32))
    return codes.T if axis == 0 else codes


def block_length(size: int, blocks: int, stated: int | None = None) -> int:
    """How many entries of an axis share one scale, where `size` entries have `blocks` scales.

    >>> block_length(576, 5), block_length(4096, 32), block_length(300, 3, stated=128)
    (128, 128, 128)
    """
    if blocks in (1, size):
        return size // blocks
    if stated and math.ceil(size / stated) == blocks:
        return stated
    exact = {size // blocks} if blocks and size % blocks == 0 else set()
    power = {1 << math.ceil(math.log2(size / blocks))} if 0 < blocks < size else set()
    fitting = {n for n in exact | power if math.ceil(size / n) == blocks}
    if len(fitting) != 1:
        raise CannotDequantise(f"{blocks} scales for {size} entries, and the block size is not stated")
    return fitting.pop()


class Dequantised(ABC):
    """A matrix of float32 entries that is decoded as it is read; more axes than two are rows of the last one."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.size = math.prod(self.shape)

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.size)
        if start >= stop:
            return np.empty(0, np.float32)
        width = self.shape[-1]
        first = start // width
        rows = self.rows(first, -(-stop // width))
        flat = np.ascontiguousarray(rows, np.float32).reshape(-1)
        return flat[start - first * width : stop - first * width]

    @abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`."""


class Spread:
    """Scales (or zero points) of a tensor, each of which holds for a block of it."""

    def __init__(
        self, scale: StoredTensor, shape: tuple[int, ...], stated: Sequence[int] | None = None
    ) -> None:
        self.scale = scale
        self.width = shape[-1]
        self.outer = shape[:-1]
        if math.prod(scale.shape) == 1:
            self.stored: tuple[int, ...] = (1,) * len(shape)
        elif len(scale.shape) == len(shape) or scale.shape == shape[: len(scale.shape)]:
            self.stored = scale.shape + (1,) * (len(shape) - len(scale.shape))
        else:
            raise CannotDequantise(f"scales of shape {list(scale.shape)} for a matrix of {list(shape)}")
        blocks = (None,) * len(shape) if stated is None else (*(None,) * (len(shape) - len(stated)), *stated)
        self.blocks = [
            block_length(size, n, block) for size, n, block in zip(shape, self.stored, blocks, strict=True)
        ]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The values for rows `start` to `stop`, which broadcast over the row."""
        raw = stored_array(self.scale).reshape(self.stored)
        places = np.unravel_index(np.arange(start, stop), self.outer)
        index = tuple(place // block for place, block in zip(places, self.blocks, strict=False))
        values = numbers(np.ascontiguousarray(raw[index]), self.scale.dtype)
        if values.shape[1] in (1, self.width):
            return values
        return np.repeat(values, self.blocks[-1], axis=1)[:, : self.width]


def group_index(inputs: int, groups: int, order: StoredTensor | None, stated: int | None) -> np.ndarray:
    """Which scale of a row holds for which input."""
    if order is not None and order.size == inputs:
        index = np.asarray(stored_array(order)).reshape(-1).astype(np.int64)
        if index.min(initial=0) >= 0:
            if index.max(initial=0) >= groups:
                raise CannotDequantise(f"'{order.name}' names a group that has no scale")
            return index
    return np.arange(inputs) // block_length(inputs, groups, stated)


class ScaledCodes(Dequantised):
    """(code − zero point) · scale, for 8-bit codes that are stored one by one."""

    def __init__(
        self, codes: StoredTensor, scale: Spread, zero: Spread | None = None, *, divisor: float = 1.0
    ) -> None:
        super().__init__(codes.shape)
        self.codes, self.scale, self.zero, self.divisor = codes, scale, zero, divisor

    def rows(self, start: int, stop: int) -> np.ndarray:
        raw = stored_array(self.codes).reshape(-1, self.shape[-1])[start:stop]
        values = numbers(raw, self.codes.dtype) if self.codes.dtype.startswith("float8") else raw.astype("f4")
        if self.zero is not None:
            values = values - self.zero.rows(start, stop)
        scale = self.scale.rows(start, stop)
        return values * (scale if self.divisor == 1 else scale.astype(np.float64) / self.divisor)


class GptqMatrix(Dequantised):
    """GPTQ (codes packed along the inputs) and AWQ (along the outputs, interleaved): both lie inputs × outputs."""

    def __init__(
        self, module: dict[str, StoredTensor], bits: int, *, awq: bool, zero_offset: int, group: int | None
    ) -> None:
        self.codes, self.scales, self.zeros = module["qweight"], module["scales"], module["qzeros"]
        per_word = 32 // bits if awq else 1
        inputs = self.codes.shape[0] if awq else self.codes.shape[0] * 32 // bits
        super().__init__((self.codes.shape[1] * per_word, inputs))
        self.bits, self.awq, self.zero_offset = bits, awq, zero_offset
        groups = self.scales.shape[0]
        if self.scales.shape[1] != self.shape[0] or self.zeros.shape[0] != groups:
            raise CannotDequantise("codes, zero points and scales do not fit one another")
        self.group = group_index(inputs, groups, module.get("g_idx"), group)

    def _columns(self, packed: StoredTensor, start: int, stop: int) -> np.ndarray:
        """Columns of a tensor that is packed along its columns."""
        # 32 codes fill whole words, whatever their number of bits.
        first, last = start // 32, -(-stop // 32)
        words = stored_array(packed)[:, first * self.bits : last * self.bits]
        codes = unpacked(words, self.bits, axis=1)
        if self.awq:
            codes = codes.reshape(codes.shape[0], -1, 8)[:, :, _AWQ_ORDER].reshape(codes.shape[0], -1)
        return codes[:, start - first * 32 : stop - first * 32]

    def rows(self, start: int, stop: int) -> np.ndarray:
        zeros = self._columns(self.zeros, start, stop).astype(np.float32) + self.zero_offset
        raw = np.ascontiguousarray(stored_array(self.scales)[:, start:stop])
        scales = numbers(raw, self.scales.dtype)
        if self.awq:
            codes = self._columns(self.codes, start, stop)
        else:
            codes = unpacked(stored_array(self.codes)[:, start:stop], self.bits, axis=0)
        return ((codes.astype(np.float32) - zeros[self.group]) * scales[self.group]).T


class PackedRows(Dequantised):
    """compressed-tensors' packed integers: outputs × inputs, signed codes stored with an offset."""

    def __init__(self, module: dict[str, StoredTensor], shape: tuple[int, int], bits: int) -> None:
        super().__init__(shape)
        self.codes, self.scale = module["weight_packed"], module["weight_scale"]
        self.zero, self.bits = module.get("weight_zero_point"), bits
        if self.scale.shape[:1] != shape[:1] or len(self.scale.shape) != 2:
            raise CannotDequantise(f"scales of shape {list(self.scale.shape)} for a matrix of {list(shape)}")
        self.group = group_index(shape[1], self.scale.shape[1], module.get("weight_g_idx"), None)

    def rows(self, start: int, stop: int) -> np.ndarray:
        codes = unpacked(stored_array(self.codes)[start:stop], self.bits, axis=1)[:, : self.shape[1]]
        values = codes.astype(np.float32) - (1 << (self.bits - 1))
        if self.zero is not None:
            values = values - self._zeros(self.zero, start, stop)[:, self.group]
        raw = np.ascontiguousarray(stored_array(self.scale)[start:stop])
        return values * numbers(raw, self.scale.dtype)[:, self.group]

    def _zeros(self, zero: StoredTensor, start: int, stop: int) -> np.ndarray:
        raw = stored_array(zero)
        if raw.shape == self.scale.shape:
            return raw[start:stop].astype(np.float32)
        # Packed along the outputs.
        per_word = 32 // self.bits
        codes = unpacked(raw[start // per_word : -(-stop // per_word)], self.bits, axis=0)
        kept = codes[start % per_word :][: stop - start].astype(np.float32)
        return kept - (1 << (self.bits - 1))


class TableCodes(Dequantised):
    """bitsandbytes' 4 bits: two codes a byte (the upper half first), a table of 16 values, maxima of flat blocks.

    `nested` is the offset where the block maxima are themselves codes of a second table.
    """

    def __init__(
        self,
        module: dict[str, StoredTensor],
        shape: Sequence[int],
        block: int,
        nested: tuple[int, float] | None,
    ) -> None:
        super().__init__(shape)
        self.codes, self.absmax = module["weight"], module["weight.absmax"]
        self.table = numbers(stored_array(module["weight.quant_map"]), "float32").reshape(-1)
        self.block, self.nested = block, nested
        self.inner = module.get("weight.nested_absmax"), module.get("weight.nested_quant_map")
        blocks = -(-self.size // block)
        if self.table.size != 16 or self.codes.size * 2 < self.size or self.absmax.size != blocks:
            raise CannotDequantise("codes, table and block maxima do not fit one another")

    def rows(self, start: int, stop: int) -> np.ndarray:
        width = self.shape[-1]
        first, last = start * width, stop * width
        raw = np.asarray(stored_array(self.codes)).reshape(-1)[first // 2 : -(-last // 2)].view(np.uint8)
        codes = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)[first % 2 :][: last - first]
        scale = self._maxima(first // self.block, (last - 1) // self.block + 1)
        index = np.arange(first, last) // self.block - first // self.block
        return (self.table[codes] * scale[index]).reshape(-1, width)

    def _maxima(self, start: int, stop: int) -> np.ndarray:
        raw = stored_array(self.absmax).reshape(-1)[start:stop]
        outer, table = self.inner
        if self.nested is None or outer is None or table is None:
            return numbers(raw, self.absmax.dtype)
        block, offset = self.nested
        maxima = numbers(stored_array(outer).reshape(-1), outer.dtype)
        values = numbers(stored_array(table).reshape(-1), table.dtype)
        # bitsandbytes works this out in float32, and so do the models.
        return values[raw] * maxima[np.arange(start, stop) // block] + np.float32(offset)

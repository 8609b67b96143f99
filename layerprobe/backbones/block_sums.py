"""Whether what attention and MLP write adds up to what a block adds to the residual stream.

A block is read as: a stream of terms; attention's output joins it, then the MLP's, or both at once; each may be
scaled by channel or normalised before it joins, and the stream may be normalised before, between and after
(post-norm). Norms are recognised by what they receive, not by their names: a module without matrices that was
called on exactly that tensor. Scales need no module: a sum may carry one factor per channel and term.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.layout import Layout, attention_path, first_tensor

TOLERANCE = 1e-3
_ROWS, _CHANNELS = 96, 64
"""Tokens and channels that a sum is tested on."""
_FLOOR = 1e-6
"""Rounding of float32, relative to a hidden state."""
_MLP_WORDS = ("mlp", "moe", "feedforward", "ffn", "expert")


@dataclass(kw_only=True)
class BlockRecord:
    """What one block received and returned, and what its inner modules did; rows × width, rows are tokens."""

    name: str
    inside: str | None
    """The attention module, relative to the block."""
    mlp_like: frozenset[str]
    """Modules whose class is an MLP's, relative to the block."""
    size: tuple[int, int] | None = None
    """Tokens of all images, and width."""
    entered: Tensor | None = None
    left: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """By path: outputs of the modules that could be a writer."""
    plain: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Inputs and outputs of modules without matrices."""


class BlockRecorder:
    """Hooks that fill one `BlockRecord` a block while the `with` block lasts."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.records: list[BlockRecord] = []
        self._handles: list[Any] = []
        for name, block in zip(layout.block_names, layout.blocks(model), strict=True):
            record = BlockRecord(name=name, inside=attention_path(block), mlp_like=_mlp_paths(block))
            self.records.append(record)
            self._hook(block, record)

    def _hook(self, block: nn.Module, record: BlockRecord) -> None:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = first_tensor(args, kwargs)
            record.entered, record.size = _rows(hidden), _size(hidden)

        def leave(_module: nn.Module, _args: object, output: object) -> None:
            record.left = _rows(output, record.size)

        self._handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        for path, module in block.named_modules():
            if path and not isinstance(module, nn.ModuleList):
                self._handles.append(module.register_forward_hook(_inner(record, path, module)))
        self._handles.append(block.register_forward_hook(leave))

    def __enter__(self) -> BlockRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _mlp_paths(block: nn.Module) -> frozenset[str]:
    """Modules of the block whose class is an MLP's or experts', and all inside them.

    What their class name has in common with the block's is the model's name (Qwen3Moe…) and says nothing.
    """
    kinds = {
        path: type(module).__name__.removeprefix(
            os.path.commonprefix([type(module).__name__, type(block).__name__])  # noqa: RUF071  letters
        )
        for path, module in block.named_modules()
        if path
    }
    found = [
        path
        for path, kind in kinds.items()
        if any(word in kind.lower().replace("_", "") for word in _MLP_WORDS)
    ]
    return frozenset(path for path in kinds if any(_is_in(path, outer) for outer in found))


def _inner(record: BlockRecord, path: str, module: nn.Module) -> Callable[..., None]:
    plain = not any(True for _ in module.children()) and all(p.ndim < 2 for p in module.parameters())

    def hook(_module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        written = _rows(output, record.size)
        if written is None:
            return
        if plain and args and (read := _rows(args[0], record.size)) is not None:
            record.plain.append((read, written))
        elif not plain:
            record.outputs[path] = written

    return hook


def _rows(value: object, size: tuple[int, int] | None = None) -> Tensor | None:
    """Some tokens and channels of a hidden state, float64; None where it is none, or not of that size."""
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    if not isinstance(value, Tensor) or value.ndim not in (2, 3) or not value.is_floating_point():
        return None
    if size not in (None, _size(value)):
        return None
    rows = value.detach().reshape(-1, value.shape[-1])
    n_rows, width = rows.shape
    return rows[:: max(n_rows // _ROWS, 1), :: max(width // _CHANNELS, 1)].double().cpu()


def _size(value: Tensor) -> tuple[int, int]:
    return value.shape[:-1].numel(), value.shape[-1]


def find_writers(layout: Layout, records: Sequence[BlockRecord]) -> Layout:
    """The layout with writers that add up; where a block has none, without both sites in all blocks."""
    attention, mlp = [], []
    for record, inside, outside in zip(records, layout.attention_outputs, layout.mlp_outputs, strict=True):
        found = None if record.entered is None or record.left is None else _writers(record, inside, outside)
        if found is None:
            reason = f"what attention and MLP of {record.name} write does not add up to what the block adds"
            none = (None,) * layout.n_blocks
            return replace(layout, attention_outputs=none, mlp_outputs=none, withheld=reason)
        attention.append(found[0])
        mlp.append(found[1])
    return replace(layout, attention_outputs=tuple(attention), mlp_outputs=tuple(mlp))


def _writers(
    record: BlockRecord, inside: str | None, outside: str | None
) -> tuple[str | None, str | None] | None:
    """The modules whose outputs explain the block, as full names; None where no choice does."""
    start = len(record.name) + 1
    first = _attention_candidates(record, inside[start:] if inside else None)
    then = _mlp_candidates(record, outside[start:] if outside else None)
    sums = _Sums(record)
    for a, m in itertools.product(first, then):
        if not sums.explain([record.outputs[path] for path in (a, m) if path]):
            continue
        names = [f"{record.name}.{path}" if path else None for path in (a, m)]
        # What alone writes in a block may be an MLP, a state space or a convolution; only its class tells.
        is_mlp = a is not None or m in record.mlp_like
        return (names[0] if record.inside else None), (names[1] if is_mlp else None)
    return None


def _attention_candidates(record: BlockRecord, leaf: str | None) -> list[str | None]:
    """The linear map that the module tree suggests, then the modules around it and all others in attention; in a
    block without attention what may stand in its place, a state space or a convolution."""
    if record.inside is None:
        return [None, *(path for path in record.outputs if "." not in path and path not in record.mlp_like)]
    within = [path for path in record.outputs if _is_in(path, record.inside)]
    outwards = [path for path in _outwards(leaf) if path in within]
    return [*outwards, *(path for path in within if path not in outwards), None]


def _mlp_candidates(record: BlockRecord, leaf: str | None) -> list[str | None]:
    """The same outside attention; for a block that mixes experts the module around them comes before its parts."""
    without = [
        path
        for path in record.outputs
        if record.inside is None or not (_is_in(path, record.inside) or _is_in(record.inside, path))
    ]
    outwards = [path for path in _outwards(leaf) if path in without]
    others = sorted((path for path in without if path not in outwards), key=lambda path: path.count("."))
    return [*outwards, *others, None]


def _outwards(leaf: str | None) -> list[str]:
    """A path, then that of the module around it, and so on."""
    parts = leaf.split(".") if leaf else []
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _is_in(path: str, outer: str) -> bool:
    return f"{path}.".startswith(f"{outer}.")


class _Sums:
    """The search for an order of norms and scales in which writers explain a block."""

    def __init__(self, record: BlockRecord) -> None:
        assert record.entered is not None and record.left is not None
        self.entered, self.left, self.plain = record.entered, record.left, record.plain

    def explain(self, writers: list[Tensor]) -> bool:
        """Whether the writers, in this or the other order, lead from the block's input to its output."""
        starts = [[state] for state in self._chain(self.entered)]
        orders = [writers] if len(writers) < 2 else [writers, writers[::-1]]
        return any(self._reach(start, order) for order in orders for start in starts)

    def _reach(self, terms: list[Tensor], writers: list[Tensor]) -> bool:
        if not writers:
            if is_sum(self.left, terms):
                return True
            ends = (after for before, after in self.plain if is_sum(before, terms))
            return any(_close(state, self.left) for end in ends for state in self._chain(end))
        for value in self._chain(writers[0]):
            joined = [*terms, value]
            if self._reach(joined, writers[1:]):
                return True
            normed = [after for before, after in self.plain if writers[1:] and is_sum(before, joined)]
            if any(self._reach([state], writers[1:]) for state in normed):
                return True
        return False

    def _chain(self, value: Tensor) -> Iterator[Tensor]:
        """The value, and what modules without matrices made of it, one after another."""
        seen = [value]
        for state in seen:
            yield state
            for before, after in self.plain:
                if _close(before, state) and not any(_close(after, known) for known in seen):
                    seen.append(after)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-6 * b.abs().max())


def is_sum(target: Tensor, terms: Sequence[Tensor]) -> bool:
    """Whether rows × width `target` is the sum of `terms`, each with a factor per channel and none left out.

    The remainder may be 1e-3 of what all terms but the first contribute.
    """
    terms = [term for index, term in enumerate(terms) if index == 0 or bool(term.any())]
    if any(term.shape != target.shape for term in terms):
        return False
    if _fits(target, terms):
        return True
    sizes = [float(term.norm()) or 1.0 for term in terms]
    columns = torch.stack([term / size for term, size in zip(terms, sizes, strict=True)])
    gram = torch.einsum("irc,jrc->cij", columns, columns)
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=1e-13)
    factors = torch.einsum("cij,jrc,rc->ic", inverse, columns, target)
    scaled = list(columns * factors.unsqueeze(1))
    smallest = min(float(part.norm()) for part in scaled)
    return smallest > _FLOOR * float(target.norm()) and _fits(target, scaled)


def _fits(target: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether the parts add up, to `TOLERANCE` of what all but the first contribute."""
    total = torch.stack(list(parts)).sum(dim=0)
    added = total - parts[0] if len(parts) > 1 else total
    return bool((target - total).norm() <= TOLERANCE * added.norm() + _FLOOR * target.norm())

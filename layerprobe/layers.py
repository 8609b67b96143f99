"""Names of places in a transformer: `embed`, `block.12.mlp_out`, and selections such as `0:8,-1`.

Blocks count from 0. The output of the embedding (for images: of the stem) is `embed`, never "layer 0".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from layerprobe.errors import UnknownNameError, UsageError, did_you_mean

SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""Where a block can be read: its input, what attention adds, what the MLP adds, its output."""

EMBED = "embed"


@dataclass(frozen=True, order=True)
class LayerRef:
    """One place in a backbone: a block and a site, or the embedding output (`block` is None).

    >>> LayerRef.parse("block.12.mlp_out")
    LayerRef(block=12, site='mlp_out')
    >>> str(LayerRef(3)), str(LayerRef.parse("embed"))
    ('block.3.resid_post', 'embed')
    """

    block: int | None
    site: str = "resid_post"

    def __post_init__(self) -> None:
        if self.block is None:
            if self.site != EMBED:
                raise UsageError(f"a place outside the blocks can only be '{EMBED}', not '{self.site}'")
        elif self.site not in SITES:
            raise UnknownNameError(
                f"unknown site '{self.site}'.{did_you_mean(self.site, SITES)} Sites: {', '.join(SITES)}"
            )

    def __str__(self) -> str:
        return EMBED if self.block is None else f"block.{self.block}.{self.site}"

    @classmethod
    def parse(cls, text: str) -> LayerRef:
        """Read `embed`, `block.3` (its `resid_post`) or `block.3.attn_out`; raises UnknownNameError."""
        if text == EMBED:
            return cls(None, EMBED)
        match = re.fullmatch(r"block\.(\d+)(?:\.(\w+))?", text)
        if match is None:
            raise UnknownNameError(
                f"'{text}' names no layer; write '{EMBED}' or 'block.<index>.<site>' with a site of "
                + ", ".join(SITES)
            )
        return cls(int(match[1]), match[2] or "resid_post")


def parse_blocks(text: str, n_blocks: int, *, model: str = "this backbone") -> list[int]:
    """Block indices from a selection such as `0:8,-1`: items and half-open ranges, negative from the end.

    The result is sorted, without repeats. `all` is every block, `none` (or nothing) is none.

    Raises
    ------
    UnknownNameError : a block that does not exist.
    UsageError : text that is no selection.

    >>> parse_blocks("0:3,-1", 12)
    [0, 1, 2, 11]
    """
    text = text.strip()
    if text == "all":
        return list(range(n_blocks))
    if text in ("", "none"):
        return []
    chosen: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)?\s*(:)?\s*(-?\d+)?\s*", item)
        if match is None or not item.strip() or (match[2] is None and match[3] is not None):
            raise UsageError(f"'{item}' is no block selection; examples: 0:8,-1   3   all   none")
        if match[2] is None:
            chosen.add(_checked(int(match[1]), n_blocks, model))
            continue
        start = 0 if match[1] is None else _checked(int(match[1]), n_blocks, model)
        if match[3] is None:
            stop = n_blocks
        else:
            end = int(match[3])
            stop = end if end >= 0 else end + n_blocks
            if not 0 <= stop <= n_blocks:
                raise UnknownNameError(_no_block(end, n_blocks, model))
        chosen.update(range(start, stop))
    return sorted(chosen)


def _checked(index: int, n_blocks: int, model: str) -> int:
    if not -n_blocks <= index < n_blocks:
        raise UnknownNameError(_no_block(index, n_blocks, model))
    return index % n_blocks


def _no_block(index: int, n_blocks: int, model: str) -> str:
    return (
        f"block {index} does not exist: {model} has {n_blocks} blocks (0 to {n_blocks - 1}; -1 is the last)"
    )


def format_blocks(blocks: Sequence[int]) -> str:
    """The shortest selection that `parse_blocks` reads back.

    >>> format_blocks([0, 1, 2, 5])
    '0:3,5'
    """
    if not blocks:
        return "none"
    runs: list[list[int]] = []
    for index in sorted(set(blocks)):
        if runs and index == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    return ",".join(str(a) if b == a + 1 else f"{a}:{b}" for a, b in runs)

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

UNITS = ("block", "attention,mlp")
"""How finely plans tell blocks apart: as a whole, or attention and all the rest of a block."""


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

    def block(number: str, end: int) -> int:
        if not -n_blocks <= int(number) < end:
            raise UnknownNameError(
                f"block {number} does not exist: {model} has {n_blocks} blocks (0 to {n_blocks - 1}; "
                "-1 is the last)"
            )
        return int(number) + (n_blocks if int(number) < 0 else 0)

    chosen: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(?:(-?\d+)|(-?\d+)?\s*:\s*(-?\d+)?)\s*", item)
        if match is None:
            raise UsageError(f"'{item}' is no block selection; examples: 0:8,-1   3   all   none")
        single, start, stop = match.groups()
        if single is not None:
            chosen.add(block(single, n_blocks))
        else:
            first = block(start, n_blocks) if start else 0
            chosen.update(range(first, block(stop, n_blocks + 1) if stop else n_blocks))
    return sorted(chosen)


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


def name_blocks(blocks: Sequence[int]) -> str:
    """Blocks for people to read; runs of more than four are shortened.

    >>> name_blocks([0, 1, 2, 5]), name_blocks([2, *range(4, 12)]), name_blocks([])
    ('0, 1, 2 and 5', '2 and 4 to 11', 'none')
    """
    runs: list[list[int]] = []
    for index in sorted(set(blocks)):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = [
        part
        for run in runs
        for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 4 else [str(index) for index in run])
    ]
    if not parts:
        return "none"
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)

"""What a search searches over: masks of trainable blocks, constraints on them, and what a training costs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.layers import name_blocks

if TYPE_CHECKING:
    import numpy as np

Mask = tuple[bool, ...]
"""One entry per block, from input to output; True = the block is trained."""

REPORT_REPEAT = 1000
"""Repeats from here on are the report's: their seeds were never used to select anything."""


@dataclass(frozen=True, order=True, kw_only=True)
class Trial:
    """One training: which blocks train, at which learning rate, seed and length.

    `repeat` counts the common seeds: equal repeats share random labels, data order and stem, so that plans
    are compared in pairs. `fidelity` is the share of the settings' steps, in (0, 1]; a shorter run has a complete
    annealed schedule of its own. `norms` adds the layer norms (the norms-only
    baseline); `auto_rgn` gives every block a learning rate of its own (the baseline of that name).
    """

    mask: Mask
    lr: float
    repeat: int = 0
    fidelity: float = 1.0
    norms: bool = False
    auto_rgn: bool = False

    @property
    def is_plan(self) -> bool:
        """Whether the mask alone says what is trained and how: no baseline of another kind."""
        return not self.norms and not self.auto_rgn

    @property
    def name(self) -> str:
        """The mask as text, with what a baseline adds to it."""
        return strip(self.mask) + "+norms" * self.norms + "+auto-rgn" * self.auto_rgn

    @property
    def key(self) -> str:
        """The identity under which a result is stored and found again."""
        return f"{self.name}/lr{self.lr:.6g}/r{self.repeat}/f{self.fidelity:.6g}"

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Trial:
        """The trial whose fields a database row holds."""
        return cls(
            mask=tuple(map(bool, stored["mask"])),
            lr=float(stored["lr"]),
            repeat=int(stored["repeat"]),
            fidelity=float(stored["fidelity"]),
            norms=bool(stored["norms"]),
            auto_rgn=bool(stored.get("auto_rgn", False)),
        )


def strip(mask: Mask) -> str:
    """A mask as text, one character per block.

    >>> strip((True, True, False))
    '##.'
    """
    return "".join("#" if trained else "." for trained in mask)


def parse_strip(text: str) -> Mask:
    """The mask that `strip` wrote."""
    return tuple(character == "#" for character in text)


def blocks_of(mask: Mask) -> list[int]:
    """Indices of the trained blocks."""
    return [index for index, trained in enumerate(mask) if trained]


def mask_of(blocks: Iterable[int], n_blocks: int) -> Mask:
    """The mask that trains exactly `blocks`."""
    chosen = set(blocks)
    return tuple(index in chosen for index in range(n_blocks))


def describe_mask(mask: Mask) -> str:
    """A mask in words: 'all blocks', 'no block', 'blocks 0, 1 and 5'."""
    if all(mask):
        return "all blocks"
    if not any(mask):
        return "no block"
    chosen = blocks_of(mask)
    return f"block {chosen[0]}" if len(chosen) == 1 else f"blocks {name_blocks(chosen)}"


def trial_seed(seed: int, repeat: int) -> int:
    """Seed of a repeat, from the search's seed alone: common to all plans, whatever order they run in."""
    digest = hashlib.blake2b(f"{seed}/{repeat}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a plan must obey. Blocks count from 0.

    Attributes
    ----------
    min_frozen : int
        At least this many blocks stay frozen.
    max_trainable_params : int | None
        At most this many of the backbone's parameters train.
    must_freeze, must_train : tuple[int, ...]
        Blocks that are never, or always, trained.
    """

    min_frozen: int = 0
    max_trainable_params: int | None = None
    must_freeze: tuple[int, ...] = ()
    must_train: tuple[int, ...] = ()


@dataclass(frozen=True)
class Space:
    """All plans of one backbone under constraints.

    Attributes
    ----------
    block_params : tuple[int, ...]
        Number of parameters of each block, from input to output.
    constraints : Constraints
        See `Constraints`; contradictions raise UsageError at once.
    """

    block_params: tuple[int, ...]
    constraints: Constraints = field(default_factory=Constraints)

    def __post_init__(self) -> None:
        n, c = self.n_blocks, self.constraints
        if n < 1:
            raise UsageError("a search needs a backbone with at least one block")
        absent = [index for index in (*c.must_freeze, *c.must_train) if not 0 <= index < n]
        if absent:
            raise UnknownNameError(
                f"block {absent[0]} does not exist: the backbone has {n} blocks (0 to {n - 1})"
            )
        both = sorted(set(c.must_freeze) & set(c.must_train))
        if both:
            raise UsageError(
                f"contradicting constraints: block {both[0]} is in both must-freeze and must-train"
            )
        if c.min_frozen < 0 or c.min_frozen > n:
            raise UsageError(f"min-frozen is {c.min_frozen}, but the backbone has {n} blocks")
        if len(c.must_train) > n - c.min_frozen:
            raise UsageError(
                f"contradicting constraints: {len(c.must_train)} blocks must train, but "
                f"min-frozen {c.min_frozen} leaves room for {n - c.min_frozen} of {n}"
            )
        least = sum(self.block_params[index] for index in c.must_train)
        if c.max_trainable_params is not None and least > c.max_trainable_params:
            raise UsageError(
                f"contradicting constraints: the blocks that must train have {least:,} parameters, "
                f"more than max-trainable-params {c.max_trainable_params:,}"
            )

    @property
    def n_blocks(self) -> int:
        return len(self.block_params)

    @property
    def all(self) -> Mask:
        """The plan that trains every block, whether or not the constraints allow it."""
        return (True,) * self.n_blocks

    @property
    def none(self) -> Mask:
        """The plan that trains no block (stem and head only)."""
        return (False,) * self.n_blocks

    @property
    def free(self) -> list[int]:
        """Blocks that the constraints leave open."""
        fixed = {*self.constraints.must_freeze, *self.constraints.must_train}
        return [index for index in range(self.n_blocks) if index not in fixed]

    def params(self, mask: Mask) -> int:
        """Number of trainable backbone parameters under `mask`."""
        return sum(size for size, trained in zip(self.block_params, mask, strict=True) if trained)

    def allows(self, mask: Mask) -> bool:
        """Whether `mask` obeys the constraints."""
        c = self.constraints
        return (
            self.n_blocks - sum(mask) >= c.min_frozen
            and not any(mask[index] for index in c.must_freeze)
            and all(mask[index] for index in c.must_train)
            and (c.max_trainable_params is None or self.params(mask) <= c.max_trainable_params)
        )

    def count_upper(self) -> int:
        """2 to the number of open blocks: how many plans there are, other limits aside."""
        return 1 << len(self.free)

    def masks(self) -> Iterator[Mask]:
        """Every allowed plan, in a fixed order, fewest trained blocks first."""
        free = self.free
        for k in range(len(free) + 1):
            for chosen in itertools.combinations(free, k):
                mask = mask_of((*chosen, *self.constraints.must_train), self.n_blocks)
                if self.allows(mask):
                    yield mask

    def repair(self, mask: Mask, order: Sequence[int] | None = None) -> Mask:
        """An allowed plan near `mask`: forced blocks set, then blocks frozen from the end of `order`."""
        wanted = list(mask)
        for index in self.constraints.must_freeze:
            wanted[index] = False
        for index in self.constraints.must_train:
            wanted[index] = True
        for index in reversed(list(order) if order is not None else list(range(self.n_blocks))):
            if self.allows(tuple(wanted)):
                break
            if wanted[index] and index not in self.constraints.must_train:
                wanted[index] = False
        return tuple(wanted)

    def random_mask(self, rng: np.random.Generator) -> Mask:
        """A plan drawn with a uniform number of trained blocks, then repaired to the constraints."""
        k = int(rng.integers(0, self.n_blocks + 1))
        order = rng.permutation(self.n_blocks)
        return self.repair(mask_of(order[:k].tolist(), self.n_blocks), order.tolist())

    def cost(self, trial: Trial) -> float:
        """Cost of a trial in full trainings (all blocks trained for the same number of steps = 1).

        Counted in matrix products: forward and the gradient towards the stem always run (two of three),
        the weight gradient only for what trains. Measured seconds are kept with every trial beside it.
        """
        share = self.params(trial.mask) / max(1, sum(self.block_params))
        return (2.0 + share) / 3.0

"""What a search searches over: masks of trainable units, constraints on them, and what a training costs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerprobe.errors import BrokenFileError, UnknownNameError, UsageError, shortened
from layerprobe.layers import name_blocks
from layerprobe.reading import Schema, check_fields

if TYPE_CHECKING:
    import numpy as np

Mask = tuple[bool, ...]
"""One entry per unit (block, or half of one), from input to output; True = the unit is trained."""

REPORT_REPEAT = 1000
"""Repeats from here on are the report's: their seeds were never used to select anything."""


@dataclass(frozen=True, order=True, kw_only=True)
class Trial:
    """One training: which blocks train, at which learning rate, seed and length.

    `repeat` counts the common seeds: equal repeats share random labels and data order, so that plans are compared in
    pairs; how the stem starts is drawn once, with the backbone. `fidelity` is the share of the settings' steps, in
    (0, 1]; a shorter run has a complete annealed schedule of its own. `norms` adds the layer norms (the norms-only
    baseline); `auto_rgn` gives every block a learning rate of its own (the baseline of that name); `rank` is that of
    the adapters where it is not the settings' own, else 0.
    """

    mask: Mask
    lr: float
    repeat: int = 0
    fidelity: float = 1.0
    norms: bool = False
    auto_rgn: bool = False
    rank: int = 0

    @property
    def is_plan(self) -> bool:
        """Whether the mask alone says what is trained and how: no baseline of another kind."""
        return not self.norms and not self.auto_rgn and not self.rank

    @property
    def name(self) -> str:
        """The mask as text, with what a baseline adds to it."""
        rank = f"+rank{self.rank}" if self.rank else ""
        return strip(self.mask) + "+norms" * self.norms + "+auto-rgn" * self.auto_rgn + rank

    @property
    def key(self) -> str:
        """The identity under which a result is stored and found again."""
        return f"{self.name}/lr{self.lr:.6g}/r{self.repeat}/f{self.fidelity:.6g}"

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Trial:
        """The trial whose fields a database row holds; BrokenFileError where they are none, or of another key."""
        check_fields(dict(stored), TRIAL_FIELDS, "a trial in the search's database")
        names = (field.removesuffix("?") for field in TRIAL_FIELDS if field != "key")
        found = cls(
            **{**{name: stored[name] for name in names if name in stored}, "mask": tuple(stored["mask"])}
        )
        if found.key != stored["key"]:
            raise BrokenFileError(
                f"the search's database calls the trial {shortened(found.key, 80)} {shortened(stored['key'], 80)!r}"
            )
        return found


TRIAL_FIELDS: dict[str, Schema] = {
    "key": str, "mask": [bool], "lr": float, "repeat": int, "fidelity": float, "norms": bool, "auto_rgn?": bool,
    "rank?": int,
}  # fmt: skip


def training_cost(share: float) -> float:
    """Cost of a training in which a `share` of the parameters trains, as a share of that of them all.

    Counted in matrix products: forward and the gradient towards the stem always run (two of three), the weight gradient
    only for what trains.
    """
    return (2.0 + share) / 3.0


def strip(mask: Mask) -> str:
    """A mask as text, one character per unit.

    >>> strip((True, True, False))
    '##.'
    """
    return "".join("#" if trained else "." for trained in mask)


def parse_strip(text: str) -> Mask:
    """The mask that `strip` wrote."""
    return tuple(character == "#" for character in text)


def parts_of(units: str) -> tuple[str, ...]:
    """Names of a block's units by the setting `units`; empty where they are whole blocks.

    >>> parts_of("block"), parts_of("attention,mlp")
    ((), ('attention', 'mlp'))
    """
    return () if units == "block" else tuple(units.split(","))


def mask_of(units: Iterable[int], n_units: int) -> Mask:
    """The mask that trains exactly the units of these indices."""
    chosen = set(units)
    return tuple(index in chosen for index in range(n_units))


def marks(mask: Mask, parts: int = 1) -> str:
    """A mask for a terminal, one character per block of `parts` units.

    >>> marks((True, False)), marks((True, True, True, False, False, True, False, False), 2)
    ('■□', '■◧◨□')
    """
    if parts == 1:
        return "".join("■" if trained else "□" for trained in mask)
    halves = zip(mask[::2], mask[1::2], strict=True)
    return "".join("□◨◧■"[2 * first + second] for first, second in halves)


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
    unit_params : tuple[int, ...]
        Number of parameters that train with each unit, from input to output.
    constraints : Constraints
        See `Constraints`; contradictions raise UsageError at once.
    parts : tuple[str, ...]
        Names of the units of one block (`attention`, `mlp`); empty where the units are whole blocks.
    """

    unit_params: tuple[int, ...]
    constraints: Constraints = field(default_factory=Constraints)
    parts: tuple[str, ...] = ()

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
        least = self.params(mask_of(self.units_of(c.must_train), self.n_units))
        if c.max_trainable_params is not None and least > c.max_trainable_params:
            raise UsageError(
                f"contradicting constraints: the blocks that must train have {least:,} parameters, "
                f"more than max-trainable-params {c.max_trainable_params:,}"
            )

    @property
    def n_units(self) -> int:
        """Entries of a mask."""
        return len(self.unit_params)

    @property
    def n_parts(self) -> int:
        """Units of one block."""
        return len(self.parts) or 1

    @property
    def n_blocks(self) -> int:
        return self.n_units // self.n_parts

    @property
    def all(self) -> Mask:
        """The plan that trains every block, whether or not the constraints allow it."""
        return (True,) * self.n_units

    @property
    def none(self) -> Mask:
        """The plan that trains no block (stem and head only)."""
        return (False,) * self.n_units

    @property
    def free(self) -> list[int]:
        """Units that the constraints leave open."""
        fixed = set(self.units_of((*self.constraints.must_freeze, *self.constraints.must_train)))
        return [index for index in range(self.n_units) if index not in fixed]

    def units_of(self, blocks: Iterable[int], part: str | None = None) -> list[int]:
        """Indices of the units of these blocks; only the part of that name where one is given."""
        places = range(self.n_parts) if part is None else [self.parts.index(part)]
        return [block * self.n_parts + place for block in blocks for place in places]

    def names(self, mask: Mask) -> list[str]:
        """The trained units by name: `3` for a whole block, `3.attention` or `3.mlp` for half of one."""
        found = []
        for block in range(self.n_blocks):
            units = self.units_of([block])
            if all(mask[unit] for unit in units):
                found.append(str(block))
            else:
                found += [
                    f"{block}.{part}" for part, unit in zip(self.parts, units, strict=False) if mask[unit]
                ]
        return found

    def describe(self, mask: Mask) -> str:
        """A mask in words.

        >>> space = Space((1,) * 8, parts=("attention", "mlp"))
        >>> space.describe((True,) * 4 + (False, True) + (False,) * 2), space.describe((True, *(False,) * 7))
        ('blocks 0 and 1, 2.mlp', 'block 0.attention')
        >>> space.describe(space.all), space.describe(space.none)
        ('all blocks', 'no block')
        """
        if all(mask):
            return "all blocks"
        chosen = self.names(mask)
        if not chosen:
            return "no block"
        whole = [int(name) for name in chosen if name.isdecimal()]
        halves = [name for name in chosen if not name.isdecimal()]
        listed = ", ".join(([name_blocks(whole)] if whole else []) + halves)
        return f"block{'s' if len(chosen) > 1 else ''} {listed}"

    def trained_blocks(self, mask: Mask) -> float:
        """How many blocks are trained; half of one counts as a half."""
        return sum(mask) if self.n_parts == 1 else sum(mask) / self.n_parts

    def params(self, mask: Mask) -> int:
        """Number of trainable backbone parameters under `mask`."""
        return sum(size for size, trained in zip(self.unit_params, mask, strict=True) if trained)

    def allows(self, mask: Mask) -> bool:
        """Whether `mask` obeys the constraints."""
        c, n_parts = self.constraints, self.n_parts
        touched = sum(any(mask[start : start + n_parts]) for start in range(0, self.n_units, n_parts))
        return (
            self.n_blocks - touched >= c.min_frozen
            and not any(mask[index] for index in self.units_of(c.must_freeze))
            and all(mask[index] for index in self.units_of(c.must_train))
            and (c.max_trainable_params is None or self.params(mask) <= c.max_trainable_params)
        )

    def count_upper(self) -> int:
        """2 to the number of open units: how many plans there are, other limits aside."""
        return 1 << len(self.free)

    def masks(self) -> Iterator[Mask]:
        """Every allowed plan, in a fixed order, fewest trained units first."""
        free, always = self.free, self.units_of(self.constraints.must_train)
        for k in range(len(free) + 1):
            for chosen in itertools.combinations(free, k):
                mask = mask_of((*chosen, *always), self.n_units)
                if self.allows(mask):
                    yield mask

    def repair(self, mask: Mask, order: Sequence[int] | None = None) -> Mask:
        """An allowed plan near `mask`: forced blocks set, then units frozen from the end of `order`."""
        wanted, always = list(mask), self.units_of(self.constraints.must_train)
        for index in self.units_of(self.constraints.must_freeze):
            wanted[index] = False
        for index in always:
            wanted[index] = True
        for index in reversed(list(order) if order is not None else list(range(self.n_units))):
            if self.allows(tuple(wanted)):
                break
            if wanted[index] and index not in always:
                wanted[index] = False
        return tuple(wanted)

    def random_mask(self, rng: np.random.Generator) -> Mask:
        """A plan drawn with a uniform number of trained units, then repaired to the constraints."""
        k = int(rng.integers(0, self.n_units + 1))
        order = rng.permutation(self.n_units)
        return self.repair(mask_of(order[:k].tolist(), self.n_units), order.tolist())

    def cost(self, trial: Trial) -> float:
        """Cost of a trial in full trainings (all blocks trained for the same number of steps = 1).

        Measured seconds are kept with every trial beside it.
        """
        return training_cost(self.params(trial.mask) / max(1, sum(self.unit_params)))

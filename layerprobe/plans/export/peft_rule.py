"""Where PEFT places the adapters of a LoraConfig: its own rule, without PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PeftPlaces:
    """The fields of a LoraConfig that say where adapters go.

    As of peft 0.21.2, src/peft/tuners/tuners_utils.py (`check_target_module_exists`) and src/peft/utils/other.py
    (`get_pattern_key`).
    """

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    r: int = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, object]) -> PeftPlaces:
        """From the fields as JSON has them."""
        layers, rank, ranks = (config.get(key) for key in ("layers_to_transform", "r", "rank_pattern"))
        indices = [layers] if isinstance(layers, int) else layers if isinstance(layers, (list, tuple)) else []
        return cls(
            target_modules=_texts(config.get("target_modules")),
            exclude_modules=_texts(config.get("exclude_modules")),
            modules_to_save=_listed(config.get("modules_to_save")),
            layers_to_transform=frozenset(indices) if indices else None,
            layers_pattern=_listed(config.get("layers_pattern")),
            r=rank if isinstance(rank, int) else 8,
            rank_pattern=dict(ranks) if isinstance(ranks, dict) else {},
        )

    def takes(self, module: str) -> bool:
        """Whether a module of this name gets an adapter, if it is of a kind that can have one."""
        if self.exclude_modules and _is_named(module, self.exclude_modules):
            return False
        if any(re.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules:
            return _is_named(module, self.target_modules)
        if not _is_named(module, self.target_modules):
            return False
        return self.layers_to_transform is None or self.layer(module) in self.layers_to_transform

    def layer(self, module: str) -> int | None:
        """The index of the layer that a module lies in, as `layers_pattern` finds it."""
        patterns = [rf"(?:^|.*?\.){p}\.(?P<i>\d+)\." for p in self.layers_pattern] or [
            r".*?\.[^.]*\.(?P<i>\d+)\."
        ]
        match = next((found for p in patterns if (found := re.match(p, module))), None)
        return int(match["i"]) if match else None

    def rank(self, module: str) -> int:
        """The rank of the adapter on a module."""
        keys = (key for key in self.rank_pattern if re.match(rf"(.*\.)?({key})$", module))
        return self.rank_pattern.get(next(keys, module), self.r)


def _is_named(module: str, entries: str | tuple[str, ...]) -> bool:
    """A text is a regular expression for the whole name; entries of a list are the name or its end."""
    if isinstance(entries, str):
        return re.fullmatch(entries, module) is not None
    return module in entries or any(module.endswith(f".{entry}") for entry in entries)


def _texts(value: object) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _listed(value)


def _listed(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(value) if isinstance(value, (list, tuple, set)) else ()

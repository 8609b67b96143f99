"""The report on another trainer's configuration: what trains, what is wrong, and how it differs from a plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from layerprobe.layers import format_blocks
from layerprobe.plans.lint.config import check_trainer, misspelt, trainer_of
from layerprobe.plans.lint.rules import RULES, ModelNames, ParsedConfig
from layerprobe.plans.match import find_prefix
from layerprobe.plans.plan import PlanData, few
from layerprobe.tables import percent


@dataclass(frozen=True, kw_only=True)
class LintReport:
    """What a configuration trains.

    Attributes
    ----------
    trainer : str
        Whose rule was followed.
    trained : tuple[str, ...]
        Weights of the model that train, in its order.
    adapters : dict[str, int]
        Module -> rank of the adapter on it.
    problems : tuple[str, ...]
        What makes the configuration do nothing, everything or something else than it says; empty if nothing does.
    remarks : tuple[str, ...]
        What is worth knowing besides.
    differences : tuple[str, ...] | None
        From the plan it was compared with; None without one.
    """

    trainer: str
    trained: tuple[str, ...]
    adapters: dict[str, int]
    n_parameters: int
    n_trained: int
    problems: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    differences: tuple[str, ...] | None = None
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong, and nothing differs from the plan."""
        return not self.problems and not self.differences

    def lines(self) -> list[str]:
        """The report for a terminal."""
        share = self.n_trained / self.n_parameters if self.n_parameters else 0.0
        told = [f"{self.trainer}: trains {len(self.trained)} tensors, {self.n_trained:,} of {self.n_parameters:,} "
                f"parameters ({percent(share)})"]  # fmt: skip
        for what, layers in self.layers.items():
            told.append(f"{what}: {format_blocks(layers) if layers else 'none'}")
        if self.adapters:
            ranks = sorted(set(self.adapters.values()))
            told.append(f"adapters of rank {', '.join(map(str, ranks))} on {len(self.adapters)} modules")
        told += [f"problem: {text}" for text in self.problems]
        told += [f"note: {text}" for text in self.remarks]
        if self.differences is not None:
            told += [f"differs from the plan: {text}" for text in self.differences] or [
                "trains exactly the plan"
            ]
        return told


def lint_config(
    config: Mapping[object, object],
    model: ModelNames,
    *,
    trainer: str | None = None,
    plan: PlanData | None = None,
) -> LintReport:
    """Follow the trainer's own rule for `config` on the names of `model`.

    Raises
    ------
    UnknownNameError
        A trainer that is not known here.
    UsageError
        The keys do not tell whose configuration it is.
    """
    trainer = trainer or trainer_of(config)
    check_trainer(trainer)
    found = RULES[trainer]({str(key): value for key, value in config.items()}, model)
    problems = [*misspelt(config, trainer), *found.problems]
    trained = tuple(name for name in model.sizes if name in found.trained)
    if not trained and not found.adapters:
        problems.insert(0, "it trains nothing")
    elif len(trained) == len(model.sizes):
        problems.insert(0, "it trains everything")
    layers = {"layers whose weights train": _layers(trained)}
    if found.adapters:
        layers["layers with adapters"] = _layers(found.adapters)
    return LintReport(
        trainer=trainer,
        trained=trained,
        adapters=found.adapters,
        n_parameters=sum(model.sizes.values()),
        n_trained=sum(model.sizes[name] for name in trained),
        problems=tuple(dict.fromkeys(problems)),
        remarks=tuple(found.remarks),
        differences=None if plan is None else _differences(found, model, plan),
        layers=layers,
    )


def _layers(names: Mapping[str, int] | tuple[str, ...]) -> tuple[int, ...]:
    found = (re.search(r"\.(\d+)\.", f".{name}") for name in names)
    return tuple(sorted({int(match[1]) for match in found if match}))


def _differences(found: ParsedConfig, model: ModelNames, plan: PlanData) -> tuple[str, ...]:
    """Where a configuration and a plan disagree about the plan's own parameters and adapters."""
    prefix = find_prefix(plan.parameters.keys(), model.sizes)
    wanted = {prefix + name for name in plan.trainable}
    theirs = {name for name in found.trained if name.removeprefix(prefix) in plan.parameters}
    told = []
    if missing := [name for name in plan.parameters if prefix + name not in model.sizes]:
        told.append(f"the model lacks {len(missing)} parameters of it ({few(missing)})")
    if more := [name for name in model.sizes if name in theirs - wanted]:
        told.append(f"also trains {len(more)}: {few(more)}")
    if less := [name for name in model.sizes if name in wanted - theirs]:
        told.append(f"leaves out {len(less)}: {few(less)}")
    ranks = {prefix + module: rank for module, rank in plan.adapters.items()}
    if found.adapters != ranks:
        differ = [m for m in {**ranks, **found.adapters} if ranks.get(m) != found.adapters.get(m)]
        told.append(f"other adapters at {len(differ)} modules: {few(differ)}")
    return tuple(told)

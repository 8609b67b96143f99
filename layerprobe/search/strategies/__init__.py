"""Strategies by name. To add one: a class like `base.Strategy`, a line here, its name in `settings.STRATEGIES`."""

from __future__ import annotations

from collections.abc import Callable

from layerprobe.search.settings import check_strategy
from layerprobe.search.strategies.base import Strategy, run_strategy
from layerprobe.search.strategies.plain import NSGA2, TPE, Exhaustive, Family, Greedy, RandomPlans
from layerprobe.search.strategies.racing import Racing

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "racing": Racing,
    "exhaustive": Exhaustive,
    "prefix": lambda: Family("prefix"),
    "suffix": lambda: Family("suffix"),
    "contiguous": lambda: Family("contiguous"),
    "greedy": Greedy,
    "random": RandomPlans,
    "tpe": TPE,
    "nsga2": NSGA2,
}


def make_strategy(name: str) -> Strategy:
    """The strategy called `name`; UnknownNameError lists them."""
    check_strategy(name)
    return STRATEGIES[name]()


__all__ = ["STRATEGIES", "Strategy", "make_strategy", "run_strategy"]

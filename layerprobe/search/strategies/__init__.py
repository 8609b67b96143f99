"""Strategies by name. To add one: a class like `base.Strategy`, a line here, its name in `settings.STRATEGIES`."""

from __future__ import annotations

from collections.abc import Callable

from layerprobe.search.settings import check_strategy
from layerprobe.search.strategies.base import Strategy, run_strategy
from layerprobe.search.strategies.bayes import Bayes
from layerprobe.search.strategies.plain import TPE, Exhaustive, Greedy, RandomPlans

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "bayes": Bayes,
    "exhaustive": Exhaustive,
    "greedy": Greedy,
    "random": RandomPlans,
    "tpe": TPE,
}


def make_strategy(name: str) -> Strategy:
    """The strategy called `name`; UnknownNameError lists them."""
    check_strategy(name)
    return STRATEGIES[name]()


__all__ = ["STRATEGIES", "Strategy", "make_strategy", "run_strategy"]

"""Strategies by name. To add one: a class with `name`, `explore` and `shortlist`, and a line here."""

from __future__ import annotations

from collections.abc import Callable

from layerprobe.errors import UnknownNameError, did_you_mean
from layerprobe.search.strategies.base import Strategy, finals, frontier, run_strategy
from layerprobe.search.strategies.plain import Exhaustive, Family, Greedy, RandomPlans
from layerprobe.search.strategies.racing import Racing
from layerprobe.search.strategies.samplers import NSGA2, TPE

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
    if name not in STRATEGIES:
        raise UnknownNameError(
            f"unknown strategy '{name}'.{did_you_mean(name, STRATEGIES)} Strategies: {', '.join(STRATEGIES)}"
        )
    return STRATEGIES[name]()


__all__ = ["STRATEGIES", "Strategy", "finals", "frontier", "make_strategy", "run_strategy"]

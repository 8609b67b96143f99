"""Processes that share a search's model: who decides, who follows, and what cannot be asked of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from layerprobe.errors import UsageError
from layerprobe.search import follow_search, sharded
from layerprobe.search.settings import make_settings
from layerprobe.search.space import Trial

BACKBONE: Any = SimpleNamespace(model=None)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the first process has announced; those who follow take it from the front."""
    line: list[Any] = []

    def broadcast(items: list[Any]) -> None:
        if items == [None] and line:
            items[0] = line.pop(0)
        else:
            line.append(items[0])

    monkeypatch.setattr(sharded, "is_sharded", lambda _model: True)
    monkeypatch.setattr(sharded.dist, "broadcast_object_list", broadcast)
    return line


def test_those_who_follow_compute_what_was_announced_and_survive_known_mistakes(told: list[Any]) -> None:
    trials = [Trial(mask=mask, lr=1e-3) for mask in ((True, False), (False, True))]
    for what in (*trials, sharded.PROBES):
        sharded.announce(BACKBONE, what)
    told.append(None)
    seen: list[Any] = []

    def train(trial: Trial) -> None:
        seen.append(trial)
        raise UsageError("the first process meets it, too")

    sharded.follow({sharded.PROBES: lambda: seen.append("probes")}, train)
    assert seen == [*trials, "probes"]


def test_the_others_are_let_go_at_the_end_and_after_a_known_mistake(told: list[Any]) -> None:
    with sharded.leading(BACKBONE):
        pass
    assert told.pop() is None
    with pytest.raises(UsageError, match="two searches"), sharded.leading(BACKBONE):
        raise UsageError("two searches")
    assert told == [None]


@pytest.mark.parametrize(
    ("settings", "workers", "message"),
    [
        ({"use_scores": False}, 2, "leave --workers out"),
        ({}, 1, "pass --no-scores"),
        ({"use_scores": False, "keep_bridge": True, "bridge_steps": 5}, 1, "layerprobe bridge --shard"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    told: list[Any], settings: dict[str, Any], workers: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sharded.check_sharded(BACKBONE, make_settings(None, **settings), workers)
    sharded.check_sharded(BACKBONE, make_settings(None, use_scores=False), 1)


def test_nothing_is_announced_of_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "is_sharded", lambda _model: False)
    sharded.announce(BACKBONE, sharded.PROBES)  # no process group, no error
    sharded.check_sharded(BACKBONE, make_settings(None), 8)
    whole: Any = SimpleNamespace(model=nn.Linear(1, 1))
    with pytest.raises(UsageError, match="holds the whole model"):
        follow_search(whole, task=whole)

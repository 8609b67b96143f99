"""Settings: all mistakes at once, and the learning rate over the steps."""

from __future__ import annotations

import pytest

from layerprobe.errors import UsageError
from layerprobe.training import BridgeConfig
from layerprobe.training.config import TrainConfig


def test_the_rate_climbs_then_falls_to_its_end():
    config = TrainConfig(lr=2.0, warmup=0.2, final_lr=0.1)
    rates = [config.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[19] == rates[20] == 2.0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, rel=0.01)


def test_all_mistakes_in_the_settings_at_once():
    with pytest.raises(
        UsageError, match=r"lr must be a positive number, not -1; batch_size must be at least 1"
    ):
        BridgeConfig(lr=-1, batch_size=0)

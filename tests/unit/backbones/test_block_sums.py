"""Sums by channel: what counts as adding up, and what does not."""

from __future__ import annotations

import torch

from layerprobe.backbones.block_sums import is_sum

GENERATOR = torch.Generator().manual_seed(0)


def rows(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(96, 24, generator=GENERATOR, dtype=torch.float64) * scale


def test_plain_sums_and_sums_scaled_by_channel() -> None:
    stream, attention, mlp = rows(), rows(0.1), rows(0.1)
    scales = torch.rand(2, 24, generator=GENERATOR, dtype=torch.float64) + 0.5
    assert is_sum(stream + attention + mlp, [stream, attention, mlp])
    assert is_sum(stream + scales[0] * attention + scales[1] * mlp, [stream, attention, mlp])
    assert is_sum(0.7 * stream + attention, [stream, attention])


def test_the_tolerance_is_relative_to_what_is_added() -> None:
    stream, update = rows(1000.0), rows(1.0)
    assert is_sum(stream + update + rows(1e-4), [stream, update])
    assert not is_sum(stream + update + rows(0.1), [stream, update])


def test_a_term_that_is_missing_or_superfluous_or_of_another_origin_is_no_sum() -> None:
    stream, attention, mlp = rows(), rows(0.1), rows(0.1)
    assert not is_sum(stream + attention + mlp, [stream, attention])
    assert not is_sum(stream + attention, [stream, attention, mlp])
    assert not is_sum(stream + attention + mlp, [stream, attention, rows(0.1)])


def test_a_scale_by_token_is_no_scale_by_channel() -> None:
    stream, update = rows(), rows()
    gate = torch.rand(96, 1, generator=GENERATOR, dtype=torch.float64)
    assert not is_sum(stream + gate * update, [stream, update])


def test_a_writer_of_zeros_adds_nothing_and_is_let_be() -> None:
    stream, update = rows(), rows(0.1)
    assert is_sum(stream + update, [stream, torch.zeros_like(stream), update])

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.layers import SITES, LayerRef, format_blocks, parse_blocks


@given(st.integers(0, 99), st.sampled_from(SITES))
def test_layer_names_read_back(block: int, site: str) -> None:
    layer = LayerRef(block, site)
    assert LayerRef.parse(str(layer)) == layer


def test_embed_is_not_layer_zero() -> None:
    assert str(LayerRef.parse("embed")) == "embed"
    assert LayerRef.parse("block.3") == LayerRef(3, "resid_post")
    with pytest.raises(UnknownNameError, match="names no layer"):
        LayerRef.parse("layer.0")
    with pytest.raises(UnknownNameError, match=r"unknown site 'mlp_ou'. Did you mean 'mlp_out'"):
        LayerRef.parse("block.0.mlp_ou")


@given(st.sets(st.integers(0, 19)))
def test_selections_read_back(blocks: set[int]) -> None:
    assert parse_blocks(format_blocks(sorted(blocks)), 20) == sorted(blocks)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:3,-1", [0, 1, 2, 11]),
        ("all", list(range(12))),
        ("none", []),
        (":2", [0, 1]),
        ("-2:", [10, 11]),
        ("5,5", [5]),
    ],
)
def test_selections(text: str, expected: list[int]) -> None:
    assert parse_blocks(text, 12) == expected


def test_a_block_that_does_not_exist() -> None:
    with pytest.raises(
        UnknownNameError, match=r"block 40 does not exist: llama-7b has 32 blocks \(0 to 31; -1 is the last\)"
    ):
        parse_blocks("40", 32, model="llama-7b")
    with pytest.raises(UnknownNameError, match="block 13 does not exist"):
        parse_blocks("0:13", 12)
    with pytest.raises(UsageError, match="no block selection"):
        parse_blocks("first", 12)

"""`cka_matrix`: alignment by id, the record, the closest layer, and its figures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import layerprobe as lp
from layerprobe.analyzers import similarity as analyzer
from layerprobe.errors import UsageError
from layerprobe.layers import LayerRef
from layerprobe.metrics.similarity.measures import debiased_linear_cka
from layerprobe.plotting.similarity import plot_cka, plot_cka_closest
from layerprobe.tables import COLUMNS


@dataclass(eq=False)
class Held(Mapping):
    """The part of `Features` that a comparison needs."""

    arrays: dict[LayerRef, np.ndarray]
    ids: np.ndarray
    model: str
    revision: str = "r1"
    task: str = "digits"
    split: str = "test"
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[LayerRef]:
        return list(self.arrays)

    def __getitem__(self, key: LayerRef) -> np.ndarray:
        return self.arrays[key]

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def arrays(n: int, shares: list[float], d: int, seed: int) -> list[np.ndarray]:
    common = np.random.default_rng(7).normal(size=(n, 5))
    rng = np.random.default_rng(seed)
    return [share * common @ rng.normal(size=(5, d)) + rng.normal(size=(n, d)) for share in shares]


def held(model: str, shares: list[float], *, n: int = 200, d: int = 12, seed: int = 0) -> Held:
    layers = [LayerRef(None, "embed"), *(LayerRef(i) for i in range(len(shares) - 1))]
    ids = np.array([f"image-{i:03d}" for i in range(n)])
    return Held(dict(zip(layers, arrays(n, shares, d, seed), strict=True)), ids, model)


def test_the_record_holds_values_errors_and_pvalues_for_plain_lists() -> None:
    xs, ys = arrays(150, [0.0, 0.5, 1.0], 10, 1), arrays(150, [1.0, 0.0], 14, 2)
    record = lp.cka_matrix(xs, ys, permutations=200)
    expected = [[debiased_linear_cka(x, y) for y in ys] for x in xs]
    np.testing.assert_allclose(record.values, expected, atol=1e-9)
    assert record.stderr.shape == record.pvalue.shape == record.pvalue_max.shape == (3, 2)
    assert (record.pvalue_max >= record.pvalue).all()
    assert record.pvalue[2, 0] < 0.01 < record.pvalue_max[0, 1]
    low, high = record.interval()
    assert (low < record.values).all() and (record.values < high).all()
    frame = record.to_frame()
    assert list(frame.columns[: len(COLUMNS)]) == list(COLUMNS)
    assert set(frame["metric"]) == {"cka_debiased"} and len(frame) == 6
    assert {"block_y", "low", "high", "pvalue", "pvalue_max"} <= set(frame.columns)


def test_the_permutations_run_once_and_only_when_asked_for(monkeypatch) -> None:
    calls = []
    original = analyzer.permutation_null
    monkeypatch.setattr(analyzer, "permutation_null", lambda *a, **k: calls.append(1) or original(*a, **k))
    record = lp.cka_matrix(arrays(80, [0.5, 0.2], 6, 1), permutations=50)
    assert record.values.shape == record.stderr.shape and calls == []
    record.to_frame(), record.summary(), record.closest()
    assert len(calls) == 1


def test_features_in_another_order_are_aligned_by_id() -> None:
    a, b = held("minilm", [0.2, 0.8]), held("vit", [0.7, 0.4], d=9, seed=3)
    straight = lp.cka_matrix(a, b, permutations=50)
    shuffle = np.random.default_rng(0).permutation(200)
    turned = Held({key: value[shuffle] for key, value in b.arrays.items()}, b.ids[shuffle], b.model)
    np.testing.assert_allclose(lp.cka_matrix(a, turned, permutations=50).values, straight.values, atol=1e-9)
    np.testing.assert_allclose(lp.cka_matrix(a, turned, permutations=50).pvalue, straight.pvalue, atol=1e-9)


def test_rows_name_both_layers_and_both_models() -> None:
    frame = lp.cka_matrix(
        held("minilm", [0.2, 0.8]), held("vit", [0.7, 0.4, 0.1], seed=3), permutations=50
    ).to_frame()
    row = frame.iloc[5]
    assert (row["model"], row["block"], row["site"]) == ("minilm", 0, "resid_post")
    assert (row["model_y"], row["block_y"], row["site_y"]) == ("vit", 1, "resid_post")
    assert (row["task"], row["split"], row["revision"], row["n"]) == ("digits", "test", "r1", 200)
    assert frame.iloc[0]["site"] == frame.iloc[0]["site_y"] == "embed"


def test_different_images_are_refused_with_counts_and_an_example() -> None:
    a, b = held("minilm", [0.2]), held("vit", [0.7])
    b.ids = np.array([f"image-{i:03d}" for i in range(5, 205)])
    with pytest.raises(
        UsageError, match=r"5 only in the first, 5 only in the second \(for example 'image-000'\)"
    ):
        lp.cka_matrix(a, b)
    fewer = held("vit", [0.7], n=150)
    with pytest.raises(UsageError, match=r"200 and 150 ids, 50 only in the first"):
        lp.cka_matrix(a, fewer)


def test_other_bad_input_is_refused() -> None:
    x = arrays(50, [0.3], 4, 0)
    with pytest.raises(UsageError, match="holds no layers"):
        lp.cka_matrix([])
    with pytest.raises(UsageError, match="A must be features or a sequence"):
        lp.cka_matrix(3)
    with pytest.raises(UsageError, match="permutations must be at least 1"):
        lp.cka_matrix(x, permutations=0)
    with pytest.raises(UsageError, match="at least 4 images; got 3"):
        lp.cka_matrix([x[0][:3]])
    broken = held("minilm", [0.2, 0.8])
    broken.arrays[LayerRef(0)][18, 3] = np.inf
    with pytest.raises(
        UsageError, match=r"block\.0\.resid_post of minilm holds 1 non-finite values \(first: image 18\)"
    ):
        lp.cka_matrix(broken)


def test_the_closest_layer_is_the_largest_cell_and_never_the_layer_itself() -> None:
    a, b = held("minilm", [0.0, 0.3, 1.0]), held("vit", [1.0, 0.2], seed=5)
    record = lp.cka_matrix(a, b, permutations=300)
    nearest = record.closest()
    assert list(nearest["value"]) == pytest.approx(list(record.values.max(axis=1)))
    assert nearest["site_y"].iloc[2] == "embed" and nearest["pvalue_max"].iloc[2] < 0.01
    assert nearest["gap"].iloc[2] == pytest.approx(record.values[2, 0] - record.values[2, 1])
    assert nearest["gap_stderr"].gt(0).all()
    assert "2 of 3 layers of minilm" in record.summary() or "1 of 3 layers of minilm" in record.summary()
    alone = lp.cka_matrix(a, permutations=300)
    assert np.allclose(np.diag(alone.values), 1.0)
    assert (alone.closest()["value"] < 0.99).all()
    assert "another layer of minilm" in alone.summary()


def test_undefined_cells_are_rows_with_a_reason() -> None:
    a = held("minilm", [0.2, 0.8])
    a.arrays[LayerRef(0)] = np.ones((200, 3))
    record = lp.cka_matrix(a, held("vit", [0.7], seed=2), permutations=50)
    body = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert body["schema"] == "layerprobe.cka/v1"
    assert body["rows"][1]["value"] is None and body["rows"][1]["pvalue"] is None
    assert body["rows"][1]["reason"] == "block.0.resid_post of minilm is constant over the images"
    assert record.table()[1]["CKA"] is None
    nothing = lp.cka_matrix([np.ones((9, 2))], permutations=5)
    assert "undefined for every pair" in nothing.summary()


def test_one_seed_gives_one_table() -> None:
    xs = arrays(90, [0.4, 0.1], 5, 0)
    one, again = (lp.cka_matrix(xs, permutations=100, seed=3).to_frame() for _ in range(2))
    assert one.equals(again)


@pytest.mark.parametrize("intervals", [False, True])
def test_figures_draw_every_cell_and_mark_chance_and_the_closest(intervals: bool) -> None:
    import matplotlib.pyplot as plt

    a, b = held("minilm", [0.0, 0.6, 1.0]), held("vit", [1.0, 0.2], seed=5)
    record = lp.cka_matrix(a, b, permutations=100)
    frame = record.to_frame()
    axes = plot_cka(frame, intervals=intervals)
    (mesh,) = (drawn for drawn in axes.collections if drawn.get_array() is not None)
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(record.values.shape), record.values)
    bottom, top = axes.get_ylim()
    assert bottom < top and mesh.norm.vmax == 1.0
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embed", "0", "1"]
    assert axes.get_xlabel() == "layer of vit" and axes.get_ylabel() == "layer of minilm"
    chance = int((record.pvalue_max > 0.05).sum())
    assert sum(text.get_text() == "×" for text in axes.texts) == (0 if intervals else chance)
    values = [text.get_text() for text in axes.texts if re.search(r"\n±[\d.]+\)?$", text.get_text())]
    assert len(values) == (6 if intervals else 0)
    assert sum(text.startswith("(") for text in values) == (chance if intervals else 0)
    _, own = plt.subplots()
    assert plot_cka_closest(record.closest(), ax=own) is own
    plt.close("all")


def test_a_figure_of_nothing_is_refused() -> None:
    frame = lp.cka_matrix(arrays(30, [0.4], 5, 0), permutations=20).to_frame()
    with pytest.raises(UsageError, match="nothing to draw"):
        plot_cka(frame.iloc[:0])

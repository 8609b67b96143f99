"""`linear_probes` and the study around it: shapes, controls, honest selection, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import layerprobe
from layerprobe.analyzers.probe_record import LinearProbes
from layerprobe.analyzers.probes import linear_probes, pixel_features, probe_backbone
from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.layers import LayerRef
from layerprobe.plotting.probes import plot_few_shot, plot_probe_accuracy, plot_probe_strength

C_FEW = (1e-3, 1e-1, 10.0)


class FeaturesLike(dict[LayerRef, np.ndarray]):
    """A mapping with the attributes of `Features`."""

    def __init__(
        self, arrays: dict[LayerRef, np.ndarray], labels: Any, name: str, classes: list[str]
    ) -> None:
        super().__init__(arrays)
        self.labels, self.classes = np.asarray(labels), classes
        self.ids = np.array([f"{name}/{i}" for i in range(len(self.labels))])
        self.model, self.revision, self.task = "toy", "r1", "clusters"
        self.provenance: dict[str, Any] = {"backbone": "toy"}


def three_splits(
    sizes: tuple[int, int, int] = (160, 80, 120), k: int = 4, seed: int = 0
) -> list[FeaturesLike]:
    """Layer 0 is noise, layer 1 holds the class, layer 2 is constant."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(k, 6))
    splits = []
    for name, n in zip(("train", "validation", "test"), sizes, strict=True):
        y = np.r_[np.arange(k), rng.integers(0, k, n - k)]
        arrays = {
            LayerRef(None, "embed"): rng.normal(size=(n, 6)).astype(np.float32),
            LayerRef(0): (2 * centres[y] + rng.normal(size=(n, 6))).astype(np.float32),
            LayerRef(1): np.full((n, 6), 3.0, np.float32),
        }
        splits.append(FeaturesLike(arrays, y, name, [f"class {i}" for i in range(k)]))
    return splits


@pytest.fixture(scope="module")
def probed() -> LinearProbes:
    return linear_probes(
        *three_splits(), Cs=C_FEW, extras=["labels", "knn", "ridge", "mdl", "few-shot"], quiet=True
    )


def test_the_public_name_is_this_function() -> None:
    assert layerprobe.linear_probes is linear_probes


def test_shapes_and_what_the_layers_hold(probed: LinearProbes) -> None:
    assert probed.val_accuracy.shape == probed.suboptimality.shape == (3, 3)
    assert probed.test_accuracy[1] > 0.7 > 0.45 > probed.test_accuracy[0]
    assert np.isnan(probed.test_accuracy[2])
    assert probed.reasons[2] is not None
    assert "constant layer" in probed.reasons[2]
    assert probed.best_layer == 1
    assert probed.converged[:2].all()
    assert np.all(probed.suboptimality[:2] <= 1e-4)
    assert set(probed.best_C[:2]) <= set(C_FEW)


def test_noise_stays_at_chance_and_the_interval_says_so() -> None:
    splits = three_splits(sizes=(400, 400, 2000))
    record = linear_probes(*splits, Cs=C_FEW, quiet=True)
    low, high = record.test_interval[0]
    assert low - 0.02 < 0.25 < high + 0.02


def test_paired_comparison_sees_the_better_layer(probed: LinearProbes) -> None:
    difference = probed.compare(1, 0)
    assert difference.value == pytest.approx(probed.test_accuracy[1] - probed.test_accuracy[0])
    assert difference.low > 0
    with pytest.raises(UsageError, match=r"block\.1\.resid_post has no probe: constant layer"):
        probed.compare(2, 0)


def test_lists_with_labels_in_any_spelling_give_the_same_numbers(probed: LinearProbes) -> None:
    splits = three_splits()
    keys = list(splits[0])[:2]
    arrays = [[split[key] for key in keys] for split in splits]
    names = [np.array(["cat", "dog", "eel", "fox"])[split.labels] for split in splits]
    by_position = linear_probes(*arrays, *names, Cs=C_FEW, quiet=True)
    by_pair = linear_probes(*zip(arrays, names, strict=True), Cs=C_FEW, quiet=True)
    for record in (by_position, by_pair):
        assert record.layers == [0, 1]
        assert record.classes == ["cat", "dog", "eel", "fox"]
        assert np.array_equal(record.test_accuracy, probed.test_accuracy[:2])


def test_the_table_is_tidy_and_undefined_is_a_reason(probed: LinearProbes, tmp_path: Path) -> None:
    frame = probed.to_frame()
    tested = frame[(frame.metric == "probe_accuracy") & (frame.split == "test")]
    assert tested[tested.control.isna()].value.isna().tolist() == [False, False, True]
    assert tested.reason.notna().sum() == 1
    assert (tested.control == "chance").sum() == 1
    for metric in ("selectivity", "knn_accuracy", "ridge_accuracy", "mdl_compression", "few_shot_accuracy"):
        assert metric in set(frame.metric)
    selectivity = frame[(frame.metric == "selectivity") & (frame.block == 0)].value.item()
    control = frame[(frame.metric == "control_accuracy") & (frame.block == 0)].value.item()
    assert selectivity == pytest.approx(probed.test_accuracy[1] - control)
    probed.save(tmp_path)
    saved = json.loads((tmp_path / "probe.json").read_text(), parse_constant=pytest.fail)
    assert saved["schema"] == "layerprobe.probe/v1"
    assert len(saved["rows"]) == len(frame)
    assert "block.0.resid_post" in probed.summary()
    assert probed.table()[2]["accuracy, %"] is None


def test_one_seed_gives_one_table(probed: LinearProbes) -> None:
    again = linear_probes(
        *three_splits(), Cs=C_FEW, extras=["labels", "knn", "ridge", "mdl", "few-shot"], quiet=True
    )
    assert again.to_frame().equals(probed.to_frame())


def test_test_labels_cannot_influence_the_choice(probed: LinearProbes) -> None:
    splits = three_splits()
    splits[2].labels = np.random.default_rng(1).permutation(splits[2].labels)
    shuffled = linear_probes(*splits, Cs=C_FEW, quiet=True)
    assert np.array_equal(shuffled.best_C[:2], probed.best_C[:2])
    assert np.array_equal(shuffled.val_accuracy[:2], probed.val_accuracy[:2])
    assert shuffled.best_layer == probed.best_layer
    assert shuffled.test_accuracy[1] < 0.45


def _nan(splits: list[FeaturesLike]) -> None:
    splits[1][LayerRef(0)][7, 2] = np.nan


def _one_class(splits: list[FeaturesLike]) -> None:
    splits[0].labels = np.zeros_like(splits[0].labels)


def _missing_class(splits: list[FeaturesLike]) -> None:
    splits[0].labels = np.minimum(splits[0].labels, 2)


def _more_classes(splits: list[FeaturesLike]) -> None:
    for split in splits:
        split.classes = [str(i) for i in range(500)]


def _other_layers(splits: list[FeaturesLike]) -> None:
    del splits[2][LayerRef(1)]


def _other_width(splits: list[FeaturesLike]) -> None:
    splits[2][LayerRef(0)] = splits[2][LayerRef(0)][:, :5]


def _same_image(splits: list[FeaturesLike]) -> None:
    splits[2].ids[3] = splits[0].ids[5]


def _short(splits: list[FeaturesLike]) -> None:
    splits[0][LayerRef(0)] = splits[0][LayerRef(0)][:-1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_nan, r"block\.0\.resid_post of validation holds 1 non-finite values .first: image validation/7."),
        (_one_class, "all 160 training images are of class 'class 0'"),
        (_missing_class, "1 of 4 classes have no training image .first: 'class 3'."),
        (_more_classes, "500 classes but only 160 training images"),
        (_other_layers, "test holds embed, block.0.resid_post"),
        (_other_width, "has 6 features in train but 5 in test"),
        (_same_image, "image train/5 is in train and in test"),
        (_short, "has 159 rows, but there are 160 labels"),
    ],
)
def test_bad_input_is_named_in_one_line(spoil: Any, message: str) -> None:
    splits = three_splits()
    spoil(splits)
    with pytest.raises(UsageError, match=message) as caught:
        linear_probes(*splits, Cs=C_FEW, quiet=True)
    assert "\n" not in str(caught.value)


def test_a_class_without_test_images_is_told_not_refused() -> None:
    splits = three_splits()
    kept = splits[2].labels != 3
    splits[2] = FeaturesLike(
        {key: array[kept] for key, array in splits[2].items()},
        splits[2].labels[kept],
        "test",
        splits[2].classes,
    )
    record = linear_probes(*splits, Cs=C_FEW, quiet=True)
    assert record.provenance["classes_absent"] == {"test": ["class 3"]}


def test_other_refusals() -> None:
    splits = three_splits()
    arrays = [[split[LayerRef(0)]] for split in splits]
    with pytest.raises(UsageError, match="give their labels"):
        linear_probes(*arrays, quiet=True)
    with pytest.raises(UsageError, match="class 6 occurs in test but has no training image"):
        linear_probes(*arrays, splits[0].labels, splits[1].labels, splits[2].labels + 6, quiet=True)
    with pytest.raises(UnknownNameError, match=r"unknown extra 'knnn'\. Did you mean 'knn'"):
        linear_probes(*splits, extras=["knnn"], quiet=True)
    with pytest.raises(UsageError, match="refit is one of"):
        linear_probes(*splits, refit="all", quiet=True)


def test_figures_read_the_table(probed: LinearProbes) -> None:
    frame = probed.to_frame()
    for draw in (plot_probe_accuracy, plot_probe_strength, plot_few_shot):
        _, ax = plt.subplots()
        assert draw(frame, ax=ax) is ax
        assert ax.get_xlabel()
        assert "%" in ax.get_ylabel()
        plt.close(ax.figure)
    _, ax = plt.subplots()
    plot_probe_accuracy(frame, ax=ax)
    line = ax.get_lines()[0]
    assert np.allclose(line.get_ydata()[:2], 100 * probed.test_accuracy[:2])
    assert any("chance" in text.get_text() for text in ax.texts)
    plt.close(ax.figure)
    with pytest.raises(UsageError, match="nothing to draw"):
        plot_few_shot(frame[frame.metric == "probe_accuracy"])


def test_pixels_are_rows_in_0_to_1_of_one_size() -> None:
    images = [np.full((4, 4, 3), 255, np.uint8), np.zeros((8, 6, 3), np.uint8)]
    rows = pixel_features(SimpleNamespace(images=lambda: images), 4)
    assert rows.shape == (2, 48)
    assert rows.dtype == np.float32
    assert (rows[0] == 1).all()
    assert (rows[1] == 0).all()


def test_a_backbone_beside_its_twin_and_the_pixels(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    from layerprobe.backbones import load_backbone
    from layerprobe.tasks import load_task

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    rng = np.random.default_rng(0)
    for label, colour in enumerate(((220, 40, 40), (40, 220, 40), (40, 40, 220))):
        folder = tmp_path / "images" / f"colour{label}"
        folder.mkdir(parents=True)
        for i in range(30):
            pixels = np.clip(np.array(colour) + rng.normal(0, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    task = load_task(str(tmp_path / "images"))
    backbone = load_backbone(str(tmp_path / "vit"), device="cpu")
    twin = load_backbone(str(tmp_path / "vit"), device="cpu", init="random", seed=1)
    record = probe_backbone(
        backbone, task, twin=twin, extras=["labels"], Cs=C_FEW, cache_dir=tmp_path / "cache", quiet=True
    )
    assert list(record.controls) == ["pixels", "random"]
    assert record.controls["pixels"].test_accuracy[0] > 0.9
    assert len(record.controls["random"].layers) == 3
    frame = record.to_frame()
    against = frame[(frame["metric"] == "probe_accuracy_minus_control") & (frame["control"] == "random")]
    differences = record.test_accuracy - record.controls["random"].test_accuracy
    np.testing.assert_allclose(against["value"].astype(float), differences, atol=1e-12)
    assert (against["low"] <= against["value"]).all() and (against["value"] <= against["high"]).all()
    pixels = record.compare_control(0, "pixels")
    assert pixels is not None
    control = record.controls["pixels"].test_accuracy[0]
    assert pixels.value == pytest.approx(record.test_accuracy[0] - control)
    frame = record.to_frame()
    tested = frame[(frame.metric == "probe_accuracy") & (frame.split == "test")]
    assert tested.control.fillna("").tolist() == [
        "",
        "",
        "",
        "chance",
        "pixels",
        "random",
        "random",
        "random",
    ]
    assert "random init, %" in record.table()[0]
    assert "pixels" in record.summary()

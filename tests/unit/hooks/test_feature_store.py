from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerprobe.errors import BrokenFileError, LayerprobeError, UsageError
from layerprobe.hooks.feature_store import FeatureStore, encode, list_stores, prune_stores
from layerprobe.layers import LayerRef

KEY = {"backbone": {"model": "tiny"}, "task": "t", "split": "train"}
LAYERS = [LayerRef(0), LayerRef(1)]
ROWS = np.random.default_rng(0).normal(size=(10, 4)).astype("f4")


def fill(store: FeatureStore, until: int = 10, batch: int = 4) -> int:
    """Write batches until `until` rows; returns the row it started from."""
    with store.writer(LAYERS, batch_size=batch) as writer:
        start = writer.rows
        while writer.layers and writer.rows < until:
            rows = ROWS[writer.rows : min(writer.rows + batch, 10)]
            writer.append({layer: rows + layer.block for layer in LAYERS})
    return start


def test_what_is_written_is_found_again(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, n_rows=10, dtype="float32")
    assert not store.has(LAYERS[0])
    fill(store)
    again = FeatureStore(tmp_path, dict(reversed(KEY.items())), n_rows=10, dtype="float32")
    for layer in LAYERS:
        assert np.array_equal(again.read(layer), ROWS + layer.block)
    assert FeatureStore(tmp_path, {**KEY, "split": "test"}, n_rows=10, dtype="float32").folder != store.folder


def test_an_interrupted_run_continues_at_the_last_batch_with_the_same_bytes(tmp_path: Path) -> None:
    broken = FeatureStore(tmp_path / "a", KEY, n_rows=10, dtype="float32")
    fill(broken, until=8)
    assert not broken.has(LAYERS[0])
    assert fill(broken) == 8
    whole = FeatureStore(tmp_path / "b", KEY, n_rows=10, dtype="float32")
    fill(whole)
    for layer in LAYERS:
        name = f"{layer}.npy"
        assert (broken.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_another_batch_size_starts_anew(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, n_rows=10, dtype="float32")
    fill(store, until=8)
    assert fill(store, batch=3) == 0
    assert np.array_equal(store.read(LAYERS[1]), ROWS + 1)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, n_rows=10, dtype="float32")
    fill(store)
    path = store.folder / "block.0.resid_post.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BrokenFileError, match=r"cannot read features .*block\.0\.resid_post\.npy"):
        store.read(LAYERS[0])
    np.save(store.folder / "block.1.resid_post.npy", np.zeros((3, 4), "f4"))
    with pytest.raises(BrokenFileError, match=r"are \(3, 4\) float32, expected 10 rows"):
        store.read(LAYERS[1])
    np.save(path, np.array([object()]), allow_pickle=True)
    with pytest.raises(BrokenFileError):
        store.read(LAYERS[0])


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_bfloat16_reads_back_as_torch_rounds_it(values: list[float]) -> None:
    import tempfile

    tensor = torch.tensor(values, dtype=torch.float32)[:, None]
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder), KEY, n_rows=len(values), dtype="bfloat16")
        with store.writer([LAYERS[0]], batch_size=99) as writer:
            writer.append({LAYERS[0]: encode(tensor, "bfloat16")})
        assert np.array_equal(store.read(LAYERS[0]), tensor.bfloat16().float().numpy())


def test_unknown_dtype_and_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'int8' is none of them"):
        FeatureStore(tmp_path, KEY, n_rows=1, dtype="int8")
    store = FeatureStore(tmp_path, KEY, n_rows=10, dtype="float32")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(LayerprobeError, match="the disk is full"):
        fill(store)


def test_stores_are_listed_and_pruned(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, n_rows=10, dtype="float32")
    fill(store)
    (row,) = list_stores(tmp_path)
    assert (row["model"], row["split"], row["layers"], row["unfinished"]) == ("tiny", "train", 2, False)
    with pytest.raises(UsageError, match="no feature store 'nope'"):
        prune_stores(tmp_path, ["nope"])
    assert prune_stores(tmp_path, [row["folder"]]) == row["bytes"]
    assert list_stores(tmp_path) == []

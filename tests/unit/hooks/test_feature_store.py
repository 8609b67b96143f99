from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import every_fault
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
    with pytest.raises(BrokenFileError, match=r"features .*block\.0\.resid_post\.npy are damaged: 100 bytes"):
        store.read(LAYERS[0])
    np.save(store.folder / "block.1.resid_post.npy", np.zeros((3, 4), "f4"))
    with pytest.raises(BrokenFileError, match="are damaged"):
        store.read(LAYERS[1])


def test_a_file_of_other_columns_is_refused_whatever_its_checksum(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, n_rows=10, dtype="float32")
    fill(store)
    path = store.folder / "block.1.resid_post.npy"
    for other in (np.zeros((3, 4), "f4"), np.zeros((10, 5), "f4"), np.zeros((10, 4), "f8"), np.float32(0)):
        np.save(path, other)
        noted = json.loads((store.folder / "checksums.json").read_text())
        noted["layers"]["block.1.resid_post"] |= {
            "size": path.stat().st_size,
            "crc32": zlib.crc32(path.read_bytes()),
        }
        (store.folder / "checksums.json").write_text(json.dumps(noted))
        with pytest.raises(BrokenFileError, match=r"expected \(10, 4\) float32"):
            store.read(LAYERS[1])


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


def fresh(tmp_path: Path, at: int) -> Path:
    (folder := tmp_path / str(at)).mkdir()
    return folder


def fill_layers(root: Path, layers: list[LayerRef], batch: int, until: int = 10) -> None:
    store = FeatureStore(root, KEY, n_rows=10, dtype="float32")
    with store.writer(layers, batch_size=batch) as writer:
        while writer.layers and writer.rows < until:
            rows = ROWS[writer.rows : min(writer.rows + batch, 10)]
            writer.append({layer: rows + layer.block for layer in layers})


def assert_whole(root: Path, layers: list[LayerRef]) -> None:
    store = FeatureStore(root, KEY, n_rows=10, dtype="float32")
    for layer in layers:
        assert np.array_equal(store.read(layer), ROWS + layer.block)
    left = {path.name for path in store.folder.iterdir()}
    wanted = {f"{layer}.npy" for layer in layers}
    assert left >= wanted | {"key.json", "checksums.json"}
    assert not {name for name in left if name.endswith(".npy.part")}
    assert not (store.folder / "progress.json").exists()


@pytest.fixture
def records_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerprobe.hooks.feature_store.RECORD_SECONDS", 0)


@pytest.mark.parametrize("action", ["kill", "loss"])
@pytest.mark.usefixtures("records_every_batch")
def test_killed_at_any_operation_it_ends_with_the_same_bytes(tmp_path: Path, action: str) -> None:
    """Also in the last second, between the record of the last rows and the names of the files."""

    def work(root: Path) -> None:
        fill_layers(root, LAYERS, 4)

    n = 0
    for root in every_fault(work, lambda at: fresh(tmp_path, at), action):
        n += 1
        store = FeatureStore(root, KEY, n_rows=10, dtype="float32")
        for layer in LAYERS:  # whole, or not there
            if store.has(layer):
                assert np.array_equal(store.read(layer), ROWS + layer.block)
        fill_layers(root, LAYERS, 4)
        assert_whole(root, LAYERS)
    assert n > 20


@pytest.mark.usefixtures("records_every_batch")
def test_runs_of_other_layers_and_batch_sizes_leave_no_rows_unwritten(tmp_path: Path) -> None:
    """Run 1 killed, run 2 with other layers or another batch size killed anywhere, run 1 again."""
    for layers, batch in (([LayerRef(1), LayerRef(2)], 4), (LAYERS, 3)):

        def begun(at: int, batch: int = batch, layers: list[LayerRef] = layers) -> Path:
            root = fresh(tmp_path, at + 1000 * batch + 100_000 * len(layers[0].site) * (layers is LAYERS))
            fill_layers(root, LAYERS, 4, until=8)
            return root

        for root in every_fault(lambda root, la=layers, b=batch: fill_layers(root, la, b), begun):
            fill_layers(root, LAYERS, 4)
            assert_whole(root, LAYERS)


@pytest.mark.usefixtures("records_every_batch")
def test_a_full_disk_is_one_line_and_what_was_recorded_stays(tmp_path: Path) -> None:
    begun = 0
    for root in every_fault(
        lambda root: fill_layers(root, LAYERS, 4), lambda at: fresh(tmp_path, at), "full"
    ):
        store = FeatureStore(root, KEY, n_rows=10, dtype="float32")
        begun = max(begun, (store.progress() or (0,))[0])
        fill_layers(root, LAYERS, 4)
        assert_whole(root, LAYERS)
    assert begun == 10


@given(st.data())
def test_no_changed_byte_is_read(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder), KEY, n_rows=10, dtype="float32")
        fill(store)
        path = store.folder / f"{LAYERS[0]}.npy"
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with pytest.raises(BrokenFileError, match="are damaged"):
            store.read(LAYERS[0])
        path.write_bytes(bytes(content) + b"\0")
        with pytest.raises(BrokenFileError, match="are damaged"):
            store.read(LAYERS[0])
        path.unlink()
        assert not store.has(LAYERS[0])
        fill(store)
        assert np.array_equal(store.read(LAYERS[0]), ROWS)


def test_a_part_that_was_damaged_is_not_continued(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, n_rows=10, dtype="float32")
    fill(store, until=8)
    with (store.folder / f"{LAYERS[0]}.npy.part").open("rb+") as part:
        part.seek(130)
        part.write(b"\xff\xff")
    assert fill(store) == 0
    assert_whole(tmp_path, LAYERS)


def test_features_without_a_checksum_are_computed_again(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, n_rows=10, dtype="float32")
    fill(store)
    (store.folder / "checksums.json").write_text("{}")
    assert not store.has(LAYERS[0])
    with pytest.raises(BrokenFileError, match="were never finished"):
        store.read(LAYERS[0])
    fill(store)
    assert_whole(tmp_path, LAYERS)


def test_a_key_of_another_kind_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for text in (
        "[]",
        "3",
        '{"key": [], "rows": 1, "dtype": "float32"}',
        '{"key": {"backbone": []}, "rows": 1}',
    ):
        (tmp_path / "a/key.json").write_text(text)
        with pytest.raises(BrokenFileError, match=r"cannot read .*key\.json"):
            list_stores(tmp_path)


@pytest.mark.parametrize("row", [[0], [5], [2, 2, 2], [10**400], []])
@pytest.mark.parametrize("rows", [8, 10])
def test_a_record_of_other_rows_than_the_parts_hold_is_none(
    tmp_path: Path, row: list[int], rows: int
) -> None:
    store = FeatureStore(tmp_path, KEY, n_rows=10, dtype="float32")
    fill(store, until=8)
    record = json.loads((store.folder / "progress.json").read_text())
    record["layers"]["block.1.resid_post"]["row"] = row
    record["rows"] = rows
    (store.folder / "progress.json").write_text(json.dumps(record))
    assert store.progress() is None
    assert fill(store) == 0
    assert_whole(tmp_path, LAYERS)


def test_a_pipe_in_place_of_the_lock_is_not_waited_for(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY, n_rows=10, dtype="float32")
    store.folder.mkdir(parents=True)
    os.mkfifo(store.folder / "lock")
    fill(store)
    assert_whole(tmp_path, LAYERS)

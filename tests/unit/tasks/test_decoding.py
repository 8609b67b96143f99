"""Decoding: the same pixels and order for any number of workers, and each image decoded once per size."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layerprobe.backbones.image_input import Preprocessing
from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.tasks import Task, images, load_task
from layerprobe.tasks.pixel_store import PixelStore, pixels_root

RESIZE = Preprocessing(channels=3, size=(16, 16))


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty JPEGs of several sizes in two classes, and a cache of their own."""
    monkeypatch.setenv("LAYERPROBE_CACHE", str(tmp_path / "cache"))
    # As if they were too many to stay in memory.
    monkeypatch.setattr("layerprobe.tasks.task.KEEP_BYTES", 0)
    monkeypatch.setattr("layerprobe.tasks.duplicates.KEEP_BYTES", 0)
    draw = np.random.default_rng(0)
    for i in range(60):
        (folder := tmp_path / "photos" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        array = draw.integers(0, 256, (20 + i % 3, 30, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i}.jpg")
    return tmp_path / "photos"


def everything(task: Task, resizer: Preprocessing = RESIZE, batch_size: int = 7) -> torch.Tensor:
    return torch.cat(list(task.train.resized_batches(resizer, batch_size)))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of all images that are decoded in this process."""
    seen: list[str] = []
    plain = images.decode_image

    def counting(data: bytes, place: str) -> np.ndarray:
        seen.append(place)
        return plain(data, place)

    monkeypatch.setattr(images, "decode_image", counting)
    return seen


def test_order_and_bytes_are_the_same_for_any_number_of_workers(photos: Path) -> None:
    alone = load_task(str(photos), decode_workers=0, keep_decoded=False)
    expected = torch.from_numpy(np.stack([RESIZE.resized(image) for image in alone.train.images()]))
    assert torch.equal(everything(alone), expected)
    for workers in (1, 2):
        task = load_task(str(photos), decode_workers=workers, keep_decoded=False)
        assert task.train.ids.tolist() == alone.train.ids.tolist()
        assert task.split_hash == alone.split_hash
        for _ in range(2):  # the workers stay
            assert torch.equal(everything(task), expected)
        next(task.train.resized_batches(RESIZE, 7))  # a reader who leaves early
        assert torch.equal(everything(task), expected)
        outer = task.train.resized_batches(RESIZE, 7)
        next(outer)
        assert torch.equal(everything(task), expected)  # a second reader beside the first
        assert len(list(outer)) == -(-len(task.train) // 7) - 1


def test_the_next_command_decodes_nothing(photos: Path, decoded: list[str]) -> None:
    first = everything(load_task(str(photos), decode_workers=0))
    decoded.clear()
    task = load_task(str(photos), decode_workers=0)
    assert torch.equal(everything(task), first)
    part = task.train.subset([5, 3])
    assert torch.equal(part.resized(RESIZE, [0, 1]), first[[5, 3]])
    assert decoded == []
    everything(task, Preprocessing(channels=3, size=(8, 8)))
    assert len(decoded) == len(task.train)
    decoded.clear()
    everything(load_task(str(photos), decode_workers=0, keep_decoded=False))
    assert len(decoded) == len(task.train)


def test_workers_fill_what_others_read(photos: Path, decoded: list[str]) -> None:
    first = everything(load_task(str(photos), decode_workers=2))
    task = load_task(str(photos), decode_workers=0)
    decoded.clear()
    assert torch.equal(everything(task), first)
    assert decoded == []


def test_another_image_under_the_same_name_is_another_key(photos: Path) -> None:
    before = everything(load_task(str(photos), decode_workers=0))
    for path in sorted(photos.glob("*/*.jpg")):
        with Image.open(path) as image:
            turned = image.rotate(180)
        turned.save(path)
    after = load_task(str(photos), decode_workers=0)
    expected = np.stack([RESIZE.resized(image) for image in after.train.images()])
    assert np.array_equal(everything(after).numpy(), expected)
    assert not torch.equal(everything(after), before)


def test_a_broken_image_is_named_by_a_worker_as_without(photos: Path) -> None:
    task = load_task(str(photos), decode_workers=2)
    for path in photos.glob("*/*.jpg"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BrokenFileError, match=r"^cannot read the image .*\.jpg: "):
        everything(task)


def test_images_of_several_sizes_make_no_batch(photos: Path) -> None:
    plain = Preprocessing(channels=3, size=None)
    for workers in (0, 2):
        task = load_task(str(photos), decode_workers=workers)
        with pytest.raises(BrokenFileError, match="images of different sizes"):
            everything(task, plain)


def test_pixels_in_memory_are_not_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERPROBE_CACHE", str(tmp_path))
    everything(load_task("digits", limit=100, decode_workers=2))
    assert not pixels_root().exists()
    with pytest.raises(UsageError, match="decode_workers must be at least 0"):
        load_task("digits", decode_workers=-1)


def image(value: int) -> np.ndarray:
    return np.full((3, 4, 4), value, np.uint8)


def test_damaged_rows_are_not_read(tmp_path: Path) -> None:
    store = PixelStore(tmp_path, "a")
    for row in (0, 2):
        store.write(row, image(row + 1))
    store.write(1, image(9)[:, :3])  # of another shape
    again = PixelStore(tmp_path, "a")
    assert [again.has(row) for row in range(4)] == [True, False, True, False]
    assert np.array_equal(again.read(2), image(3))
    for damage in ("flip", "short"):
        path = store.folder / "pixels.bin"
        content = bytearray(path.read_bytes())
        content[20] ^= 1
        path.write_bytes(content if damage == "flip" else content[:40])
        found = PixelStore(tmp_path, "a")
        assert found.read(0) is None
        assert (found.read(2) is None) == (damage == "short")
    assert PixelStore(tmp_path, "b").read(0) is None
    (store.folder / "key.json").write_text(json.dumps({"key": "a", "shape": [3, 10**9, 4]}))
    assert PixelStore(tmp_path, "a").read(0) is None


def test_the_limit_holds_and_the_folders_used_longest_ago_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, key in enumerate(("new", "old")):
        store = PixelStore(tmp_path, key)
        store.make_room(4, 48)
        for row in range(4):
            store.write(row, image(row))
        os.utime(store.folder, (10**9 - age, 10**9 - age))
    taken = sum(512 * path.stat().st_blocks for path in tmp_path.glob("*/*"))
    monkeypatch.setenv("LAYERPROBE_PIXELS_GB", str(taken / 1e9))
    third = PixelStore(tmp_path, "third")
    third.make_room(4, 48)
    assert not third.full
    assert [PixelStore(tmp_path, key).has(0) for key in ("new", "old")] == [True, False]
    third.make_room(10**9, 48)
    assert third.full
    third.write(0, image(0))
    assert not third.has(0)
    assert PixelStore(tmp_path, "new").has(0)


def test_a_full_disk_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PixelStore(tmp_path, "a")
    store.write(0, image(1))

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    store.write(1, image(2))
    assert store.full
    assert store.read(1) is None
    assert np.array_equal(store.read(0), image(1))


def test_a_task_goes_to_another_process_without_its_files_and_workers(photos: Path) -> None:
    task = load_task(str(photos), decode_workers=1)
    expected = everything(task)
    again = pickle.loads(pickle.dumps(task))
    assert torch.equal(everything(again), expected)
    assert again.train.decoding._kept != {} and task.train.decoding._loader is not None


def test_workers_learn_that_nothing_more_may_be_kept(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(str(photos), decode_workers=1)
    everything(task)
    monkeypatch.setenv("LAYERPROBE_PIXELS_GB", "1e-9")
    for batch in task.test.resized_batches(RESIZE, 7):
        assert len(batch)
    (kept,) = task.train.decoding._kept.values()
    assert kept.full
    assert [kept.has(row) for row in task.test.rows[1:].tolist()] == [False] * (len(task.test) - 1)

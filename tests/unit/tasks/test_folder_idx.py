"""IDX files: sizes are checked before anything is allocated."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from task_files import picture, write_idx

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.tasks import load_task
from layerprobe.tasks.folder import read_idx


@pytest.mark.parametrize("name", ["a-idx3-ubyte", "a-idx3-ubyte.gz"])
def test_arrays_come_back(tmp_path: Path, name: str) -> None:
    array = np.stack([picture(n, gray=True) for n in range(5)])
    assert np.array_equal(read_idx(write_idx(tmp_path / name, array), ndim=3), array)


def header(*shape: int) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)


# Named cases: a gzip header holds the time, so ids made of the content would differ between workers.
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not an IDX file", id="empty"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"0" * 40, "not an IDX file", id="png"),
        pytest.param(header(3), "not an IDX file", id="one-dimension"),
        pytest.param(
            header(10, 4, 4) + bytes(159),
            "10×4×4 = 160 bytes, but the file has 175",
            id="one-byte-short",
        ),
        pytest.param(
            header(10, 4, 4) + bytes(161),
            "10×4×4 = 160 bytes, but the file has 177",
            id="one-byte-long",
        ),
        pytest.param(header(2**32 - 1, 2**32 - 1, 2**32 - 1), "truncated or damaged", id="huge"),
        pytest.param(
            gzip.compress(header(10, 4, 4) + bytes(159)),
            "160 bytes but holds 159",
            id="gzip-one-byte-short",
        ),
        pytest.param(
            gzip.compress(header(10, 4, 4) + bytes(161)),
            "160 bytes but holds more",
            id="gzip-one-byte-long",
        ),
        pytest.param(gzip.compress(header(2**31, 2**31, 2**31)), "truncated or damaged", id="gzip-huge"),
        pytest.param(
            gzip.compress(header(10, 4, 4) + bytes(range(160)))[:-30],
            "cannot read",
            id="gzip-cut-off",
        ),
        pytest.param(b"\x1f\x8bnot gzip", "cannot read", id="not-gzip"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(BrokenFileError, match=message) as error:
        read_idx(path, ndim=3)
    assert str(path) in str(error.value)


def write_pair(folder: Path, word: str, n: int, *, ending: str = "", first: int = 0) -> None:
    images = np.stack([picture(first + i, gray=True) for i in range(n)])
    write_idx(folder / f"{word}-images-idx3-ubyte{ending}", images)
    write_idx(folder / f"{word}-labels-idx1-ubyte{ending}", np.arange(n, dtype=np.uint8) % 3 + 1)


def test_a_folder_as_of_mnist(tmp_path: Path) -> None:
    write_pair(tmp_path, "train", 60, ending=".gz")
    write_pair(tmp_path, "t10k", 30, first=100)
    task = load_task(str(tmp_path))
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 54,
        "validation": 6,
        "test": 30,
    }
    assert (task.classes, task.channels, task.image_size) == (["1", "2", "3"], 1, 6)
    image = task.test.images([0])[0]
    row = next(i for i in range(100, 130) if np.array_equal(picture(i, gray=True), image))
    assert task.test.labels[0] == (row - 100) % 3


def test_packed_and_unpacked_side_by_side_count_once(tmp_path: Path) -> None:
    write_pair(tmp_path, "t10k", 30)
    write_pair(tmp_path, "t10k", 30, ending=".gz")
    assert sum(load_task(str(tmp_path)).report["official"].values()) == 30


def test_images_and_labels_must_pair(tmp_path: Path) -> None:
    write_pair(tmp_path, "t10k", 30)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(29, np.uint8))
    with pytest.raises(BrokenFileError, match="holds 30 images, t10k-labels-idx1-ubyte 29 labels"):
        load_task(str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UsageError, match="has no labels beside it; t10k-labels-idx1-ubyte was looked for"):
        load_task(str(tmp_path))

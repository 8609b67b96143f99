"""Parquet files: which column is the label, which numbers are classes, and tables beyond the memory limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from task_files import picture, png, write_parquet

from layerprobe.errors import BrokenFileError, UnknownNameError, UsageError
from layerprobe.tasks import load_task, parquet
from layerprobe.tasks.task import Task


def test_mapped_and_read_are_the_same(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(2):
        numbers = range(shard * 30, shard * 30 + 30)
        write_parquet(
            tmp_path / "x" / f"train-{shard:05d}-of-00002.parquet",
            [png(picture(i)) for i in numbers],
            {"label": [i % 3 for i in numbers], "other": [0] * 30},
            class_names={"label": ["a", "b", "c"]},
        )
    read = load_task(str(tmp_path / "x"))
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    monkeypatch.setenv("LAYERPROBE_CACHE", str(tmp_path / "cache"))
    mapped = load_task(str(tmp_path / "x"))
    assert list((hub_cache.parent / "datasets").rglob("*.arrow"))
    assert mapped.split_hash == read.split_hash
    assert mapped.classes == ["a", "b", "c"]
    for x, y in zip(mapped.train.images(), read.train.images(), strict=True):
        assert np.array_equal(x, y)


def test_a_broken_file_is_named_there_too(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(
        tmp_path / "x.parquet", [png(picture(i)) for i in range(9)], {"label": [0, 1, 2] * 3}
    )
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    with pytest.raises(BrokenFileError, match=r"x\.parquet"):
        load_task(str(tmp_path))


N = 60
FILES = [png(picture(number)) for number in range(2 * N)]


def labels_of(root: Path, labels: dict[str, object], **options: object) -> Task:
    write_parquet(root / "train.parquet", FILES[:N], labels, **options)
    return load_task(str(root))


def turns(*values: object) -> list[object]:
    return list(values) * (N // len(values))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"label": turns([0], [1, 2]), "source": turns("web", "lab")}, r"'label' holds lists, but an image needs one"),
        ({"labels": turns(0.5, 1.0), "class": turns(0, 1)}, "'labels' holds double, but an image needs one class"),
        ({"objects": turns([{"category": 1}]), "width": turns(640, 320)}, "if it is 'width', say so with TASK:width"),
        ({"objects": turns([{"category": 1}]), "image_id": list(range(N))}, "if it is 'image_id', say so with TASK:"),
        ({"species": turns("a", "b")}, "no column of .* is declared as class label; if it is 'species'"),
        ({"label": turns(0, 1), "target": turns(1, 0)}, r"several label columns \(label, target\); choose one"),
    ],
)  # fmt: skip
def test_a_label_column_is_not_guessed(tmp_path: Path, labels: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        labels_of(tmp_path, labels)


def test_a_column_that_is_asked_for_is_taken_or_refused_with_the_reason(tmp_path: Path) -> None:
    labels_of(tmp_path, {"label": turns(0, 1), "width": turns(640, 320), "tags": turns([1], [2])})
    task = load_task(f"{tmp_path}:width")
    assert (task.classes, task.report["label_column"]) == (["320", "640"], "width")
    with pytest.raises(UnknownNameError, match=r"no label column 'tags'\. Its column 'tags' holds lists"):
        load_task(f"{tmp_path}:tags")


def test_the_declared_column_is_the_label(tmp_path: Path) -> None:
    names = {"species": ["ant", "bee"]}
    task = labels_of(tmp_path, {"width": turns(640, 320), "species": turns(0, 1)}, class_names=names)
    assert (task.report["label_column"], task.classes) == ("species", ["ant", "bee"])
    with pytest.raises(UsageError, match=r"several label columns \(label, species\)"):
        labels_of(tmp_path, {"label": turns(1, 0), "species": turns(0, 1)}, class_names=names)
    names = {"label": ["x", "y"], "species": ["ant", "bee"]}
    task = labels_of(tmp_path, {"species": turns(0, 1), "label": turns(1, 0)}, class_names=names)
    assert task.classes == ["x", "y"]


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (pa.array(turns(-1, 1)), ["-1", "1"]),
        (pa.array(turns(-2, -1, 0, 1)), ["-2", "-1", "0", "1"]),
        (pa.array(turns(2**63 + 1, 7), pa.uint64()), ["7", str(2**63 + 1)]),
        (pa.array(turns(200, 7), pa.uint8()), ["7", "200"]),
        (pa.array(turns(True, False)), ["0", "1"]),
    ],
)
def test_numbers_of_every_kind_name_their_classes(
    tmp_path: Path, values: pa.Array, classes: list[str]
) -> None:
    task = labels_of(tmp_path, {"label": values})
    assert task.classes == classes
    stored = values.cast(pa.string()).to_pylist() if values.type != pa.bool_() else turns("1", "0")
    by_image = {picture(number).tobytes(): label for number, label in enumerate(stored)}
    for split in task.splits.values():
        for image, label in zip(split.images(), split.labels, strict=True):
            assert by_image[image.tobytes()] == classes[label]


def test_minus_one_among_others_is_no_label(tmp_path: Path) -> None:
    with pytest.raises(BrokenFileError, match=r"20 of 60 images have no label"):
        labels_of(tmp_path, {"label": turns(-1, 0, 1)})
    write_parquet(tmp_path / "test.parquet", FILES[N:], {"label": [-1] * N})
    task = labels_of(tmp_path, {"label": turns(3, 1)})
    assert task.classes == ["1", "3"]
    assert task.report["remarks"] == ["split test has no labels and was left out (60 images)"]
    with pytest.raises(BrokenFileError, match=r"30 of 60 images have no label"):
        labels_of(tmp_path, {"label": turns(-1, 1)})


def test_text_in_one_split_and_numbers_in_another(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", FILES[N:], {"label": turns(0, 1)})
    with pytest.raises(BrokenFileError, match="labels are text in one split and numbers in another"):
        labels_of(tmp_path, {"label": turns("0", "1")})


def test_equal_images_without_a_name(tmp_path: Path) -> None:
    """pyarrow makes a column of nothing but None one of its null type."""
    import pyarrow.parquet as pq

    file = {"bytes": png(picture(0)), "path": None}
    rows = [file, file, *({"bytes": png(picture(i)), "path": None} for i in range(1, 39))]
    pq.write_table(pa.table({"image": rows, "label": turns(0, 1)[:40]}), tmp_path / "train.parquet")
    assert sum(len(split) for split in load_task(str(tmp_path)).splits.values()) == 40

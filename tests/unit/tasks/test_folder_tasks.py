"""Tasks from folders: class folders and parquet files, and what can be wrong with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from task_files import picture, png, write_class_folders, write_parquet

from layerprobe.errors import BrokenFileError, UnknownNameError, UsageError
from layerprobe.tasks import duplicates, load_task


def samples(task) -> dict[str, tuple[str, int]]:
    return {
        str(sample): (name, int(label))
        for name, split in task.splits.items()
        for sample, label in zip(split.ids, split.labels, strict=True)
    }


def hub_like(folder: Path, n: int = 120, *, shards: int = 2, order: np.ndarray | None = None) -> Path:
    """A train split of n images and a test split of 40, in the schema of CIFAR-100."""
    order = np.arange(n) if order is None else order
    names = {"fine_label": ["cat", "dog", "emu"], "coarse_label": ["mammal", "bird"]}
    for shard, part in enumerate(np.array_split(order, shards)):
        write_parquet(
            folder / f"train-{shard:05d}-of-{shards:05d}.parquet",
            [png(picture(int(i))) for i in part],
            {"fine_label": [int(i) % 3 for i in part], "coarse_label": [int(i % 3 == 2) for i in part]},
            class_names=names,
            names=[f"{i}.png" for i in part],
        )
    rest = range(1000, 1040)
    write_parquet(
        folder / "test-00000-of-00001.parquet",
        [png(picture(i)) for i in rest],
        {"fine_label": [i % 3 for i in rest], "coarse_label": [int(i % 3 == 2) for i in rest]},
        class_names=names,
    )
    return folder


def test_parquet_in_the_hub_schema(tmp_path: Path) -> None:
    task = load_task("cifar100", data_dir=hub_like(tmp_path))
    assert task.classes == ["cat", "dog", "emu"]
    assert task.report["official"] == {"test": 40, "train": 120}
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 108,
        "validation": 12,
        "test": 40,
    }
    assert (task.channels, task.image_size, task.name) == (3, 6, "cifar100")
    by_pixels = {picture(i).tobytes(): i % 3 for i in [*range(120), *range(1000, 1040)]}
    for split in task.splits.values():
        found = [by_pixels[image.tobytes()] for image in split.images()]
        assert found == split.labels.tolist()


def test_label_columns_can_be_chosen(tmp_path: Path) -> None:
    hub_like(tmp_path)
    task = load_task(f"{tmp_path}:coarse_label")
    assert task.classes == ["mammal", "bird"]
    assert load_task(str(tmp_path), label="coarse_label").split_hash == task.split_hash
    assert load_task("cifar100:coarse_label", data_dir=tmp_path).split_hash == task.split_hash
    assert task.report["label_column"] == "coarse_label"
    fine = load_task(str(tmp_path))
    assert fine.classes == ["cat", "dog", "emu"]
    assert samples(fine).keys() == samples(task).keys()
    with pytest.raises(UnknownNameError, match=r"no label column 'coarse'\. Did you mean 'coarse_label'"):
        load_task(str(tmp_path), label="coarse")


def test_ids_and_cut_do_not_depend_on_row_order_or_shards(tmp_path: Path) -> None:
    a = load_task(str(hub_like(tmp_path / "a")))
    shuffled = np.random.default_rng(0).permutation(120)
    b = load_task(str(hub_like(tmp_path / "b", shards=5, order=shuffled)))
    assert a.split_hash == b.split_hash
    assert a.revision == b.revision
    for name in a.splits:
        assert np.array_equal(a.splits[name].ids, b.splits[name].ids)
        for x, y in zip(a.splits[name].images(), b.splits[name].images(), strict=True):
            assert np.array_equal(x, y)


def test_limits_are_nested_and_keep_ids_and_images(tmp_path: Path) -> None:
    folder = str(hub_like(tmp_path))
    whole = load_task(folder)
    all_samples = samples(whole)
    before: dict = {}
    for limit in (3, 10, 50, 107):
        task = load_task(folder, limit=limit)
        now = samples(task)
        assert len(task.train) == limit
        assert before.items() <= now.items() <= all_samples.items()
        assert all(len(np.unique(split.labels)) == 3 for split in task.splits.values())
        before = now
        where = {sample: row for row, sample in enumerate(whole.train.ids)}
        same = whole.train.images([where[sample] for sample in task.train.ids])
        assert all(np.array_equal(x, y) for x, y in zip(same, task.train.images(), strict=True))
    assert load_task(folder, limit=108).split_hash == whole.split_hash
    with pytest.raises(UsageError, match="limit 2 is below the 3 classes"):
        load_task(folder, limit=2)
    with pytest.raises(UsageError, match="limit must be at least 1, got 0"):
        load_task(folder, limit=0)


def test_seed_changes_the_cut_but_not_ids_nor_the_official_test(tmp_path: Path) -> None:
    folder = str(hub_like(tmp_path))
    a, b = load_task(folder), load_task(folder, seed=1)
    assert samples(a).keys() == samples(b).keys()
    assert set(a.test.ids) == set(b.test.ids)
    assert set(a.validation.ids) != set(b.validation.ids)
    assert a.split_hash != b.split_hash


def test_duplicates_are_counted_kept_together_and_kept_out_of_training(tmp_path: Path) -> None:
    # Image 5 twice in train (once stored otherwise), image 7 in train and twice in test,
    # image 9 in train under two labels.
    numbers = [*range(40), 5, 9]
    files = [png(picture(i), compress_level=9 if row >= 40 else 1) for row, i in enumerate(numbers)]
    write_parquet(tmp_path / "train.parquet", files, {"label": [*[i % 2 for i in range(40)], 1, 0]})
    rest = [7, 7, *range(100, 110)]
    write_parquet(
        tmp_path / "test.parquet", [png(picture(i)) for i in rest], {"label": [i % 2 for i in rest]}
    )
    task = load_task(str(tmp_path))
    assert task.report["duplicates"] == {
        "surplus": {"train": 2, "test": 1},
        "across": {"train and test": 1},
        "distinct_images_with_several_labels": 1,
        "dropped": {"train": 1, "test": 0},
    }
    assert len(task.test) == 12
    assert len(task.train) + len(task.validation) == 41
    assert len(set(samples(task))) == 41 + 12
    pixels = {name: {im.tobytes() for im in split.images()} for name, split in task.splits.items()}
    assert not pixels["train"] & pixels["validation"]
    assert not (pixels["train"] | pixels["validation"]) & pixels["test"]
    assert "dropped" in task.report["rule"]
    json.dumps(task.report, allow_nan=False)


def test_a_grey_picture_is_the_same_one_in_colour(tmp_path: Path) -> None:
    grey = [picture(i, gray=True) for i in range(40)]
    files = [png(image) for image in grey]
    write_parquet(tmp_path / "train.parquet", files, {"label": [i % 2 for i in range(40)]})
    tested = [np.repeat(grey[7][..., None], 3, axis=2), *(picture(i) for i in range(100, 109))]
    write_parquet(
        tmp_path / "test.parquet", [png(image) for image in tested], {"label": [i % 2 for i in range(1, 11)]}
    )
    task = load_task(str(tmp_path))
    assert task.report["duplicates"]["across"] == {"train and test": 1}
    assert task.report["duplicates"]["dropped"] == {"train": 1, "test": 0}


def test_a_lone_split_is_cut_with_equal_images_on_one_side(tmp_path: Path) -> None:
    numbers = [i // 2 for i in range(120)]  # every image twice, in different files
    files = [png(picture(n), compress_level=1 + 8 * (row % 2)) for row, n in enumerate(numbers)]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", files, {"label": [n % 3 for n in numbers]})
    task = load_task(str(tmp_path))
    assert task.report["duplicates"]["surplus"] == {"test": 60}
    assert min(len(split) for split in task.splits.values()) >= 15
    seen: dict[bytes, str] = {}
    for name, split in task.splits.items():
        for image in split.images():
            assert seen.setdefault(image.tobytes(), name) == name


def test_the_pass_is_remembered_and_tells_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(hub_like(tmp_path))
    first = load_task(folder, limit=50)
    monkeypatch.setattr(duplicates, "_look", lambda *_: pytest.fail("all images were read again"))
    again = load_task(folder, limit=50)
    assert again.split_hash == first.split_hash
    assert again.report == first.report
    for name in first.splits:
        for x, y in zip(first.splits[name].images(), again.splits[name].images(), strict=True):
            assert np.array_equal(x, y)
    monkeypatch.undo()
    os.utime(tmp_path / "test-00000-of-00001.parquet", (1, 1))
    looked = []
    original = duplicates._look
    monkeypatch.setattr(duplicates, "_look", lambda *a: looked.append(1) or original(*a))
    load_task(folder)
    assert looked == [1]


def test_a_damaged_memory_of_the_pass_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERPROBE_CACHE", str(tmp_path / "cache"))
    folder = str(hub_like(tmp_path / "data"))
    first = load_task(folder)
    (file,) = (tmp_path / "cache" / "tasks").iterdir()
    for content in (b"", b"nonsense", file.read_bytes()[:-200]):
        file.write_bytes(content)
        assert load_task(folder).split_hash == first.split_hash


def test_large_sets_are_decoded_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(hub_like(tmp_path))
    small = load_task(folder)
    monkeypatch.setenv("LAYERPROBE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(duplicates, "DECODE_BYTES", 1000)
    by_files = load_task(folder)
    assert by_files.report["equality"] == "files"
    assert by_files.split_hash == small.split_hash
    assert np.array_equal(by_files.test.images([3])[0], small.test.images([3])[0])
    monkeypatch.setenv("LAYERPROBE_CACHE", str(tmp_path / "third"))
    monkeypatch.setattr(duplicates, "READ_BYTES", 1000)
    by_names = load_task(folder)
    assert by_names.report["equality"] == "names"
    assert {name: len(split) for name, split in by_names.splits.items()} == {
        name: len(split) for name, split in small.splits.items()
    }


def test_files_that_name_no_split(tmp_path: Path) -> None:
    hub_like(tmp_path)
    extra = write_parquet(
        tmp_path / "extra.parquet", [png(picture(i)) for i in range(300, 330)], {"x": [0] * 30}
    )
    task = load_task(str(tmp_path))
    assert task.report["official"] == {"test": 40, "train": 120}
    assert task.report["remarks"] == ["extra.parquet, of no named split, left out"]
    extra.unlink()
    for path in tmp_path.glob("train*"):
        path.rename(path.with_name(path.name.replace("train", "part")))
    task = load_task(str(tmp_path))
    assert task.report["official"] == {"test": 40, "train": 120}
    assert "taken as train" in task.report["remarks"][0]


def test_class_folders_with_and_without_splits(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "whole", {"cat": 20, "dog": 20})
    task = load_task(str(tmp_path / "whole"))
    assert task.classes == ["cat", "dog"]
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 24,
        "validation": 6,
        "test": 10,
    }
    write_class_folders(tmp_path / "cut" / "train", {"cat": 20, "dog": 20})
    write_class_folders(tmp_path / "cut" / "val", {"cat": 4, "dog": 4}, first=100)
    (tmp_path / "cut" / "notes").mkdir()
    (tmp_path / "cut" / "train" / "dog" / ".hidden.png").write_bytes(b"")
    (tmp_path / "cut" / "train" / "fox").mkdir()
    task = load_task(str(tmp_path / "cut"))
    assert task.report["official"] == {"train": 40, "validation": 8}
    assert (len(task.validation), len(task.test)) == (4, 8)
    assert task.report["remarks"] == [
        "notes/ is no split and was left out",
        "train/fox/ holds no images and was left out",
    ]


def test_an_image_in_a_class_folder_keeps_the_id_it_has_in_parquet(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "folders", {"cat": 20, "dog": 20})
    files = [png(picture(i)) for i in range(40)]
    write_parquet(tmp_path / "parquet" / "data.parquet", files, {"label": ["cat"] * 20 + ["dog"] * 20})
    assert load_task(str(tmp_path / "folders")).split_hash == load_task(str(tmp_path / "parquet")).split_hash


def test_gray_and_colour_mixed_are_all_given_as_colour(tmp_path: Path) -> None:
    files = [png(picture(i, gray=i % 2 == 0)) for i in range(20)]
    write_parquet(tmp_path / "x.parquet", files, {"label": [i % 2 for i in range(20)]})
    task = load_task(str(tmp_path))
    assert task.channels == 3
    for split in task.splits.values():
        assert {image.shape for image in split.images()} == {(6, 6, 3)}


def test_images_of_different_sizes(tmp_path: Path) -> None:
    files = [png(picture(i, side=5 + i % 3)) for i in range(30)]
    write_parquet(tmp_path / "x.parquet", files, {"label": [i % 2 for i in range(30)]})
    task = load_task(str(tmp_path))
    assert task.image_size is None
    assert {image.shape for image in task.train.images()} == {(5, 5, 3), (6, 6, 3), (7, 7, 3)}


def test_a_class_missing_from_a_split_is_reported(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", {"ant": 20, "bee": 1})
    write_class_folders(tmp_path / "test", {"ant": 2, "cow": 2}, first=50)
    assert load_task(str(tmp_path)).report["missing_classes"] == {
        "train": ["cow"],
        "validation": ["bee", "cow"],
        "test": ["bee"],
    }


def test_withheld_labels_leave_a_split_out(tmp_path: Path) -> None:
    hub_like(tmp_path)
    files = [png(picture(i)) for i in range(2000, 2030)]
    test = tmp_path / "test-00000-of-00001.parquet"
    write_parquet(
        test,
        files,
        {"fine_label": [-1] * 30, "coarse_label": [0] * 30},
        class_names={"fine_label": ["cat", "dog", "emu"]},
    )
    task = load_task(str(tmp_path))
    assert task.report["official"] == {"train": 120}
    assert task.report["remarks"] == ["split test has no labels and was left out (30 images)"]
    # With the other label column the test split is back, and the remembered pass must not mix them up.
    assert load_task(str(tmp_path), label="coarse_label").report["official"] == {"test": 30, "train": 120}


def test_subsets_share_images(tmp_path: Path) -> None:
    task = load_task(str(hub_like(tmp_path)))
    part = task.train.subset([5, 1, 3])
    assert part.ids.tolist() == task.train.ids[[5, 1, 3]].tolist()
    assert len(part) == 3
    assert np.array_equal(part.images([0])[0], task.train.images([5])[0])
    assert part.hash != task.train.hash


# What can be wrong --------------------------------------------------------------------------------


def test_no_such_folder(tmp_path: Path) -> None:
    for name in (str(tmp_path / "no"), "./no", "a/b/c"):
        with pytest.raises(
            UnknownNameError, match=r"no folder .*; check the path, or see: layerprobe ls tasks"
        ):
            load_task(name)
    with pytest.raises(UnknownNameError, match="no folder"):
        load_task("cifar100", data_dir=tmp_path / "no")


def test_a_folder_without_images_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(
        UsageError, match=r"no images in .*: looked for parquet files, IDX files .* class folders"
    ):
        load_task(str(tmp_path))


def test_one_class_is_no_task(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 5})
    with pytest.raises(UsageError, match=r"all 5 images of .* are of one class \('cat'\)"):
        load_task(str(tmp_path))


def test_splits_without_a_common_class(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", {"cat": 20, "dog": 20})
    write_class_folders(tmp_path / "val", {"images": 9}, first=100)
    with pytest.raises(UsageError, match=r"none of the classes in the test images of .* occurs in train"):
        load_task(str(tmp_path))


def test_too_few_images_to_cut(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(UsageError, match=r"too few images \(2\) to make a validation split"):
        load_task(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no image", png(picture(0, side=40))[:-200]])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes) -> None:
    write_class_folders(tmp_path / "folders", {"cat": 5, "dog": 5})
    (tmp_path / "folders" / "dog" / "8.png").write_bytes(content)
    with pytest.raises(BrokenFileError, match=r"cannot read the image .*/dog/8\.png: [^\n]+$"):
        load_task(str(tmp_path / "folders"))
    files = [png(picture(i)) for i in range(80)]
    files[70] = content
    write_parquet(tmp_path / "rows" / "a.parquet", files[:40], {"label": [0, 1] * 20})
    write_parquet(tmp_path / "rows" / "b.parquet", files[40:], {"label": [0, 1] * 20})
    with pytest.raises(BrokenFileError, match=r"cannot read the image b\.parquet, row 30: [^\n]+$"):
        load_task(str(tmp_path / "rows"))


def test_rows_without_bytes_do_not_choose_local_files(tmp_path: Path) -> None:
    secret = tmp_path / "private.png"
    secret.write_bytes(png(picture(1)))
    files = [*[png(picture(i)) for i in range(9)], None]
    names = [*["x.png"] * 9, str(secret)]
    write_parquet(tmp_path / "x" / "x.parquet", files, {"label": [0, 1] * 5}, names=names)
    with pytest.raises(BrokenFileError, match=r"no image bytes in x\.parquet, row 9"):
        load_task(str(tmp_path / "x"))


def test_broken_parquet_files_are_named(tmp_path: Path) -> None:
    hub_like(tmp_path)
    path = tmp_path / "train-00001-of-00002.parquet"
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(BrokenFileError, match=r"cannot read .*train-00001-of-00002\.parquet: [^\n]+$"):
            load_task(str(tmp_path))
    path.unlink()
    with pytest.raises(
        BrokenFileError, match=r"train-00000-of-00002\.parquet is here, but .*train-00001-of-00002"
    ):
        load_task(str(tmp_path))


def test_columns_that_do_not_exist(tmp_path: Path) -> None:
    files = [png(picture(i)) for i in range(4)]
    write_parquet(tmp_path / "a" / "x.parquet", files, {"score": [0.5] * 4})
    with pytest.raises(UsageError, match=r"no label column .*; its columns are img, score"):
        load_task(str(tmp_path / "a"))
    write_parquet(tmp_path / "b" / "x.parquet", files, {"boxes": [[1]] * 4})
    with pytest.raises(UsageError, match="no label column"):
        load_task(str(tmp_path / "b"))
    write_parquet(tmp_path / "c" / "x.parquet", files, {"colour": [0, 1, 0, 1], "shape": [0, 1, 0, 1]})
    with pytest.raises(
        UsageError, match=r"several label columns \(colour, shape\); choose one with TASK:COLUMN"
    ):
        load_task(str(tmp_path / "c"))
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "d" / "x.parquet")
    with pytest.raises(UsageError, match=r"no image column; its columns are text, label"):
        load_task(str(tmp_path / "d"))


def test_labels_outside_their_names(tmp_path: Path) -> None:
    files = [png(picture(i)) for i in range(4)]
    write_parquet(tmp_path / "x.parquet", files, {"label": [0, 1, 2, 3]}, class_names={"label": ["a", "b"]})
    with pytest.raises(BrokenFileError, match="a label lies outside its 2 class names"):
        load_task(str(tmp_path))
    write_parquet(tmp_path / "x.parquet", files, {"label": [0, 1, None, 0]})
    with pytest.raises(BrokenFileError, match=r"1 of 4 images have no label; the first is x\.parquet, row 2"):
        load_task(str(tmp_path))


def test_files_that_disagree(tmp_path: Path) -> None:
    files = [png(picture(i)) for i in range(4)]
    write_parquet(tmp_path / "test.parquet", files, {"label": [0, 1] * 2}, class_names={"label": ["a", "b"]})
    write_parquet(tmp_path / "train.parquet", files, {"label": [0, 1] * 2}, class_names={"label": ["b", "a"]})
    with pytest.raises(BrokenFileError, match=r"train\.parquet names the classes of 'label' otherwise"):
        load_task(str(tmp_path))
    write_parquet(tmp_path / "train.parquet", files, {"target": [0, 1] * 2})
    with pytest.raises(
        BrokenFileError, match=r"train\.parquet has no column label, unlike the files beside it"
    ):
        load_task(str(tmp_path))
    write_parquet(tmp_path / "train-1.parquet", files, {"label": ["x", "y"] * 2})
    write_parquet(tmp_path / "train.parquet", files, {"label": [0, 1] * 2})
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(BrokenFileError, match=r"the files of split train in .* differ in schema"):
        load_task(str(tmp_path))


def test_two_data_sets_in_one_folder(tmp_path: Path) -> None:
    hub_like(tmp_path / "red")
    hub_like(tmp_path / "blue")
    with pytest.raises(UsageError, match=r"several data sets \(blue, red\); name one of these folders"):
        load_task(str(tmp_path))


def test_options_that_mean_nothing_for_a_folder(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cat": 5, "dog": 5})
    with pytest.raises(UsageError, match="no label columns, so 'fine' cannot be chosen"):
        load_task(f"{tmp_path}:fine")
    with pytest.raises(UsageError, match="revision 'v1' means nothing here"):
        load_task(str(tmp_path), revision="v1")

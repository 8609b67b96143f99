"""Class folders as people keep them: what is a split, what is a class, and what is told of the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from task_files import picture, png, write_class_folders, write_parquet

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.tasks import load_task
from layerprobe.tasks.task import Task

CLASSES = {"cats": 12, "dogs": 12}


def read(root: Path) -> Task:
    return load_task(str(root))


def total(task: Task) -> int:
    return sum(task.report["official"].values())


@pytest.mark.parametrize(
    ("train", "held_out", "official"),
    [
        ("train", "test", "test"),
        ("training_set", "test_set", "test"),
        ("train_images", "val_images", "validation"),
        ("seg_train/seg_train", "seg_test/seg_test", "test"),
        ("asl_alphabet_train/asl_alphabet_train", "asl_alphabet_test/asl_alphabet_test", "test"),
        ("Training", "Testing", "test"),
        ("train2017", "val2017", "validation"),
        ("TrainImages", "TestImages", "test"),
        ("trainset", "evalset", "test"),
        ("data/train", "data/valid", "validation"),
        ("download/v1/train", "download/v1/dev", "validation"),
        ("train/images", "test/images", "test"),
    ],
)
def test_splits_by_their_words(tmp_path: Path, train: str, held_out: str, official: str) -> None:
    write_class_folders(tmp_path / train, CLASSES)
    write_class_folders(tmp_path / held_out, CLASSES, first=100)
    task = read(tmp_path)
    assert task.classes == ["cats", "dogs"]
    assert task.report["official"] == {"train": 24, official: 24}
    assert len(task.test) == 24


@pytest.mark.parametrize(
    "classes",
    [
        ["airplane", "bus", "car", "train"],
        ["invalid", "valid"],
        ["beaker", "dev_board", "test_tube"],
        ["bus/day", "bus/night", "train/day", "train/night"],
        ["beaker/a", "beaker/b", "dev_board/a", "dev_board/b", "test_tube/a", "test_tube/b"],
    ],
    ids=lambda names: ",".join(names),
)
def test_a_class_may_be_called_as_a_split(tmp_path: Path, classes: list[str]) -> None:
    write_class_folders(tmp_path, dict.fromkeys(classes, 12))
    task = read(tmp_path)
    assert task.classes == sorted({name.split("/")[0] for name in classes})
    assert total(task) == 12 * len(classes)
    (remark,) = task.report["remarks"]
    assert "not for a split" in remark


def test_one_folder_around_all_is_passed_and_said(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "PetImages", CLASSES)
    (tmp_path / "readme.txt").write_text("pets")
    task = read(tmp_path)
    assert task.classes == ["cats", "dogs"]
    assert task.report["remarks"] == ["PetImages/ holds all images; its folders were read"]


def test_images_without_labels_are_counted(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", CLASSES)
    write_class_folders(tmp_path, {"test": 5, "seg_pred/seg_pred": 3}, first=100)
    write_class_folders(tmp_path / "train", {".": 2}, first=200)
    task = read(tmp_path)
    assert task.report["official"] == {"train": 24}
    assert task.report["remarks"] == [
        "seg_pred/ is no split and was left out (3 images)",
        "5 images of test/ lie in no class folder, so they have no labels and were left out",
        "2 images of train/ lie beside the class folders and were left out",
    ]


def test_a_nested_test_without_labels_makes_no_class(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "asl_train" / "asl_train", CLASSES)
    write_class_folders(tmp_path / "asl_test" / "asl_test", {".": 7}, first=100)
    task = read(tmp_path)
    assert task.classes == ["cats", "dogs"]
    assert "7 images of asl_test/asl_test/ lie in no class folder" in task.report["remarks"][0]


@pytest.mark.parametrize("names", [["train", "test"], ["train_images", "test_images"], ["train"]], ids=str)
def test_splits_without_class_folders_are_refused(tmp_path: Path, names: list[str]) -> None:
    write_class_folders(tmp_path, dict.fromkeys(names, 6))
    with pytest.raises(UsageError, match=r"train.* holds? images but no class folders"):
        read(tmp_path)
    write_class_folders(tmp_path / "flat", {".": 6})
    with pytest.raises(UsageError, match="has no class folders, so the labels of its 6 images are not known"):
        read(tmp_path / "flat")


def test_two_folders_of_one_split(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train_images", CLASSES)
    write_class_folders(tmp_path / "train_masks", CLASSES, first=100)
    write_class_folders(tmp_path / "test", CLASSES, first=200)
    with pytest.raises(
        UsageError, match=r"train_images/ and train_masks/ in .* both name split train; keep one"
    ):
        read(tmp_path)
    write_class_folders(tmp_path / "train", CLASSES, first=300)
    task = read(tmp_path)
    assert task.report["official"] == {"test": 24, "train": 24}
    assert task.report["remarks"] == [
        "train_images/ was left out (24 images): train/ is split train",
        "train_masks/ was left out (24 images): train/ is split train",
    ]


def test_splits_within_classes_are_said(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cats/train": 9, "cats/test": 3, "dogs/train": 9, "dogs/test": 3})
    task = read(tmp_path)
    assert (task.classes, total(task)) == (["cats", "dogs"], 24)
    assert task.report["remarks"] == ["test/, train/ within class folders: not read as splits"]


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".dib", "", ".heic"])
def test_every_suffix_is_read_or_counted(tmp_path: Path, suffix: str) -> None:
    write_class_folders(tmp_path, CLASSES)
    for number in range(8):
        Image.fromarray(picture(100 + number)).save(tmp_path / "cats" / f"{number}x{suffix}", "JPEG")
    task = read(tmp_path)
    if suffix in (".jfif", ".jpe", ".JPG"):
        assert (total(task), task.report["remarks"]) == (32, [])
    else:
        assert total(task) == 24
        named = suffix or "no suffix"
        assert task.report["remarks"] == [
            f"8 files are no images by their names and were left out (8 {named})"
        ]


def test_links_lead_out_of_the_data_set_but_not_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_class_folders(root, CLASSES)
    write_class_folders(tmp_path, {"store/deep": 20}, first=100)
    (root / "cats" / "more").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "circle").symlink_to(tmp_path / "store")
    (root / "cats" / "back").symlink_to(root / "dogs")
    (root / "dogs" / "up").symlink_to(tmp_path)
    (root / "dogs" / "whole_disk").symlink_to("/")
    (root / "dogs" / "ring").symlink_to(root / "dogs" / "ring")
    task = read(root)
    assert total(task) == 44
    assert task.report["remarks"] == [
        "cats/back links back into the data set and was left out",
        "cats/more/circle links back into the data set and was left out",
        "dogs/up links back into the data set and was left out",
        "dogs/whole_disk links back into the data set and was left out",
        "1 files are no images by their names and were left out (1 no suffix)",
    ]
    (root / "dogs" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(BrokenFileError, match=r"gone\.png: its link leads nowhere"):
        read(root)


def test_hidden_folders_are_left_out_and_said(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {**CLASSES, "cats/.ipynb_checkpoints": 5, "cats/.thumbnails/x": 2})
    task = read(tmp_path)
    assert total(task) == 24
    assert task.report["remarks"] == ["7 images lie in hidden folders and were left out"]
    write_parquet(tmp_path / ".cache" / "x.parquet", [png(picture(0))], {"label": [0]})
    shutil.rmtree(tmp_path / "cats" / ".thumbnails")
    assert total(read(tmp_path)) == 24

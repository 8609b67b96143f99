"""Tasks of images in memory: the same task whatever holds the images, and one line for what cannot be taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import layerprobe as lp
from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.tasks import Task

DIGITS = load_digits()
PIXELS = np.rint(DIGITS.images[:120] * (255 / 16)).astype(np.uint8)
LABELS = DIGITS.target[:120].astype(int)
NAMES = [f"digit {k}" for k in range(10)]
FEATURES = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=NAMES)})


class Pairs(Dataset):
    """A map-style data set; counts how often it is read."""

    def __init__(self, *, names: bool = False) -> None:
        self.names, self.reads = names, 0

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, row: int) -> Any:
        self.reads += 1
        image, label = Image.fromarray(PIXELS[row]), int(LABELS[row])
        return {"image": image, "label": label} if self.names else (image, label)


def pictures() -> list[Image.Image]:
    return [Image.fromarray(array) for array in PIXELS]


def hub_set(rows: slice = slice(None)) -> datasets.Dataset:
    chosen = pictures()[rows]
    return datasets.Dataset.from_dict({"picture": chosen, "kind": LABELS[rows]}, features=FEATURES)


def saved(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{row}.png" for row in range(len(PIXELS))]
    for path, picture in zip(paths, pictures(), strict=True):
        picture.save(path)
    return paths


def mapped(tmp_path: Path) -> np.ndarray:
    np.save(tmp_path / "pixels.npy", PIXELS)
    return np.load(tmp_path / "pixels.npy", mmap_mode="r")


HOLDERS = {
    "array": lambda _: (PIXELS, LABELS),
    "array with one channel": lambda _: (PIXELS[..., None], LABELS.tolist()),
    "memory-mapped array": lambda path: (mapped(path), LABELS),
    "list of arrays": lambda _: (list(PIXELS), torch.from_numpy(LABELS)),
    "tensor, channels first": lambda _: (torch.from_numpy(PIXELS)[:, None], LABELS),
    "Pillow images": lambda _: (pictures(), list(LABELS)),
    "paths": lambda path: (saved(path), LABELS),
    "torch data set": lambda _: (Pairs(), None),
    "torch data set with names": lambda _: (Pairs(names=True), None),
    "TensorDataset": lambda _: (TensorDataset(torch.from_numpy(PIXELS), torch.from_numpy(LABELS)), None),
    "datasets": lambda _: (hub_set(), None),
}


def same_images(task: Task, other: Task) -> None:
    for name in ("train", "validation", "test"):
        ours, theirs = task.splits[name], other.splits[name]
        pairs = {bytes(image): label for image, label in zip(ours.images(), ours.labels, strict=True)}
        assert pairs == {bytes(i): label for i, label in zip(theirs.images(), theirs.labels, strict=True)}


@pytest.mark.parametrize("kind", HOLDERS)
def test_images_and_labels_arrive_whatever_holds_them(kind: str, tmp_path: Path) -> None:
    images, labels = HOLDERS[kind](tmp_path)
    task = lp.make_task(images, labels)
    assert sum(len(split) for split in task.splits.values()) == len(PIXELS)
    known = {bytes(image): int(label) for image, label in zip(PIXELS, LABELS, strict=True)}
    for split in task.splits.values():
        for image, label in zip(split.images(), split.labels, strict=True):
            assert image.dtype == np.uint8 and image.shape == (8, 8) and known[bytes(image)] == label
    assert task.image_size == 8 and task.channels == 1 and task.revision.startswith("content-")


def test_the_same_images_in_memory_are_the_same_task_with_the_same_ids() -> None:
    tasks = [
        lp.make_task(images, labels)
        for images, labels in (
            (PIXELS, LABELS),
            (pictures(), LABELS),
            (Pairs(), None),
            (list(PIXELS), LABELS),
        )
    ]
    assert len({task.split_hash for task in tasks}) == 1 and len({task.revision for task in tasks}) == 1
    order = np.random.default_rng(0).permutation(len(PIXELS))
    assert lp.make_task(PIXELS[order], LABELS[order]).split_hash == tasks[0].split_hash


def test_an_array_is_not_changed_or_copied() -> None:
    images = PIXELS.copy()
    lp.make_task(images, LABELS)
    assert images.flags.writeable
    images[0] = 0


def test_a_torch_data_set_larger_than_memory_is_read_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerprobe.tasks.duplicates.DECODE_BYTES", 100)
    monkeypatch.setattr("layerprobe.tasks.task.KEEP_BYTES", 100)
    data = Pairs()
    task = lp.make_task(data)
    assert task.report["equality"] == "files"
    before = data.reads
    task.test.images([0, 1])
    task.test.images([0, 1])
    assert data.reads == before + 4


def test_given_splits_are_kept() -> None:
    task = lp.make_task({"train": (PIXELS[:60], LABELS[:60]), "val": (PIXELS[60:90], LABELS[60:90]),
                         "test": (pictures()[90:], LABELS[90:])})  # fmt: skip
    assert {name: len(split) for name, split in task.splits.items()} == {
        "train": 60,
        "validation": 30,
        "test": 30,
    }
    hub = datasets.DatasetDict(
        train=hub_set(slice(0, 60)), validation=hub_set(slice(60, 90)), test=hub_set(slice(90, 120))
    )
    theirs = lp.make_task(hub, image="picture", label="kind")
    assert theirs.classes == NAMES
    same_images(task, theirs)


def test_selections_of_datasets_are_followed() -> None:
    whole = hub_set()
    cut = whole.shuffle(seed=1).train_test_split(0.25, seed=2)
    assert cut["train"]._indices is not None
    task = lp.make_task(cut)
    known = {bytes(image): int(label) for image, label in zip(PIXELS, LABELS, strict=True)}
    shown = [bytes(image) for image in task.test.images()]
    assert [known[image] for image in shown] == task.test.labels.tolist()
    assert sorted(shown) == sorted(bytes(np.asarray(row["picture"])) for row in cut["test"])


def test_selections_from_files_do_not_recall_one_another(tmp_path: Path) -> None:
    hub_set().to_parquet(tmp_path / "all.parquet")
    whole = datasets.Dataset.from_parquet(str(tmp_path / "all.parquet"), cache_dir=str(tmp_path / "cache"))
    first, second = (lp.make_task(whole.select(rows)) for rows in (range(60), range(60, 120)))
    assert first.revision != second.revision
    assert not set(first.train.ids) & set(second.train.ids)


def test_class_names_ids_and_text_labels() -> None:
    words = np.array(NAMES)[LABELS]
    ids = [f"img-{row}" for row in range(len(PIXELS))]
    task = lp.make_task(PIXELS, words, ids=ids)
    assert task.classes == sorted(set(words)) and set(task.train.ids) <= set(ids)
    place = {one: row for row, one in enumerate(ids)}
    for one, image in zip(task.test.ids, task.test.images(), strict=True):
        assert np.array_equal(PIXELS[place[one]], image)
    backwards = NAMES[::-1]
    assert lp.make_task(PIXELS, words.tolist(), classes=backwards).classes == backwards
    assert lp.make_task(PIXELS, LABELS, classes=NAMES).classes == NAMES


def test_given_ids_do_not_hide_changed_images() -> None:
    ids = list(map(str, range(len(PIXELS))))
    other = PIXELS.copy()
    other[:, 0, 0] = 7
    assert lp.make_task(PIXELS, LABELS, ids=ids).revision != lp.make_task(other, LABELS, ids=ids).revision


def test_images_of_several_sizes_are_resized_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    mixed = [Image.fromarray(array).resize((8 + row % 2, 8)) for row, array in enumerate(PIXELS)]
    task = lp.make_task(mixed, LABELS)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=9, bos_token_id=1, eos_token_id=2
    )
    backbone = lp.load_backbone(transformers.GPT2Model(config))
    backbone.prepare(task)
    assert task.image_size is None and backbone.image_size == 224
    assert "images that are no squares of one size are resized to 224×224" in capsys.readouterr().err


class Noise(Pairs):
    def __getitem__(self, row: int) -> Any:
        return np.random.default_rng().integers(0, 255, (8, 8), dtype=np.uint8), 0


class Floats(Pairs):
    def __getitem__(self, row: int) -> Any:
        return torch.from_numpy(PIXELS[row]).float() / 255, int(LABELS[row])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([])


MISTAKES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "loader": (DataLoader(Pairs()), None, {}, r"a DataLoader shuffles.*make_task\(loader.dataset\)"),
    "stream": (Stream(), None, {}, "Stream cannot be asked for its i-th image"),
    "hub stream": (hub_set().to_iterable_dataset(), None, {}, "IterableDataset cannot be asked"),
    "no labels": (PIXELS, None, {}, r"own has no labels: make_task\(images, labels\)"),
    "no labels in a list": (pictures(), None, {}, "own has no labels"),
    "float labels": (PIXELS, LABELS + 0.5, {}, r"label 0 of own is 0.5 \(float\)"),
    "mixed labels": (PIXELS, ["a", *LABELS[1:]], {}, r"label 1 of own is 1 \(int\)"),
    "one-hot": (PIXELS, np.eye(10)[LABELS], {}, r"lists of 10.*\.argmax\(1\)"),
    "too few labels": (PIXELS, LABELS[:5], {}, "120 images and 5 labels"),
    "float pixels": (PIXELS / 255, LABELS, {}, "pixels of float64, whose range nothing tells"),
    "float data set": (Floats(), None, {}, "pixels of float32"),
    "augmented": (Noise(), None, {}, r"another one at every reading \(random augmentation\?\)"),
    "shape": (np.zeros((9, 3, 8, 8, 2), np.uint8), LABELS[:9], {}, "own is 3×8×8×2"),
    "no file": (["no/such.png"] * 9, LABELS[:9], {}, "there is no file no/such.png"),
    "ids": (PIXELS, LABELS, {"ids": ["a"] * 120}, "120 ids, 1 of them different, for 120 images"),
    "unknown class": (
        PIXELS,
        ["cat"] * 120,
        {"classes": ["dog", "cow"]},
        "name 'cat', which is none of the 2",
    ),
    "label out of range": (PIXELS, LABELS, {"classes": ["a", "b"]}, "outside its 2 class names"),
    "one class": (PIXELS, [1] * 120, {}, "are of one class"),
    "empty": ([], [], {}, "own holds no images"),
    "no splits": ({}, None, {}, "own holds no images"),
    "labels beside a column": (hub_set(), LABELS, {}, "a column of the data set: name it with label="),
    "keys": (Pairs(names=True), None, {"image": "photo"}, "have no 'photo', but image, label"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_cannot_be_taken_is_one_line(kind: str) -> None:
    images, labels, options, message = MISTAKES[kind]
    with pytest.raises(lp.LayerprobeError, match=message) as caught:
        lp.make_task(images, labels, **options)
    assert "\n" not in str(caught.value)


def test_columns_that_do_not_exist() -> None:
    with pytest.raises(UnknownNameError, match=r"no image column 'pictures'\. Did you mean 'picture'"):
        lp.make_task(hub_set(), image="pictures")
    with pytest.raises(UsageError, match=r"no label column 'kinds'\. Did you mean 'kind'"):
        lp.make_task(hub_set(), label="kinds")

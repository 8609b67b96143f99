"""A task of images that the caller already has: arrays, Pillow images, files, data sets of torch and `datasets`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from layerprobe.errors import UsageError
from layerprobe.tasks.images import ArrayImages, ImageStore, decode_image, image_pixels
from layerprobe.tasks.parquet import ColumnChoice, from_datasets
from layerprobe.tasks.split import SPLIT_WORDS
from layerprobe.tasks.task import SourceSplit, Task, cut_task, labelled

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGE_KEYS = ("image", "img", "pixel_values")
_LABEL_KEYS = ("label", "labels", "target")
_CHANNELS = (1, 3, 4)


def make_task(
    images: object,
    labels: Iterable[int] | Iterable[str] | None = None,
    *,
    name: str = "own",
    classes: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    image: str | None = None,
    label: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    decode_workers: int | None = None,
    keep_decoded: bool = True,
) -> Task:
    """A task of your own images, cut into train, validation and test unless you give the splits.

    Nothing is copied that lies on disk: files, memory-mapped arrays, and the images of a data set are read when
    they are used.

    Parameters
    ----------
    images : object
        Array n×H×W or n×H×W×3 of uint8; a list of such images, of Pillow images or of paths; a data set of torch
        (items: image and label, as a pair or under names) or of `datasets`. Or a mapping from split names (`train`,
        `validation`, `test`) to any of these, where images and labels of arrays and lists come as pairs: then the
        splits are kept as by `layerprobe.tasks.split.assign`.
    labels : Iterable[int] | Iterable[str] | None
        One whole number or text an image, where the images do not bring them.
    classes : Sequence[str] | None
        Class names: label i is called classes[i].
    ids : Sequence[str] | None
        One an image, each once; by default hashes of the images.
    image, label : str | None
        Columns (or keys of the items) of a data set that has several.
    limit, seed, decode_workers, keep_decoded
        As for `load_task`.

    Returns
    -------
    Task
        As from `load_task`; its revision is a hash of the images and labels.

    Raises
    ------
    UsageError
        No labels, or labels that are neither whole numbers nor text; pixels that are not uint8; a DataLoader, a stream,
        or a data set that changes its images from one reading to the next.
    """
    seed = operator.index(seed)
    _refuse_streams(images)
    parts = dict(images) if isinstance(images, Mapping) else {"all": images}
    if not parts:
        raise UsageError(f"{name} holds no images")
    if all(_is_arrow(part) for part in parts.values()):
        if labels is not None:
            raise UsageError(f"the labels of {name} are a column of the data set: name it with label=")
        choice = ColumnChoice(
            wanted_label=label, wanted_image=image, class_names=list(classes) if classes else None
        )
        source = from_datasets(parts, choice, name, follow_paths=True)
    else:
        splits, values, remarks = [], [], []
        known = [word for word in parts if str(word).lower() in SPLIT_WORDS]
        remarks = [f"split {word} was left out" for word in parts if known and word not in known]
        for word in known or parts:
            found, given = parts[word], labels
            if isinstance(images, Mapping) and isinstance(found, tuple) and len(found) == 2:
                found, given = found
            place = name if word == "all" else f"{name} {word}"
            store, numbers = _read(found, given, place, keys=(image, label))
            splits.append(SourceSplit(SPLIT_WORDS.get(str(word).lower(), "all"), store))
            values.append(_numbered(numbers, classes, place))
        source = labelled(splits, values, list(classes) if classes else None, name)
        source.remarks += remarks
    if ids is not None:
        source.ids = _checked_ids(ids, sum(len(split.labels) for split in source.splits))
    decoding: dict[str, Any] = {"decode_workers": decode_workers, "keep_decoded": keep_decoded}
    return cut_task(name, source, task_id=name, commit=None, limit=limit, seed=seed, **decoding)


class OwnImages(ImageStore):
    """Images that `get` hands out by row as arrays, Pillow images, tensors or paths, one at a time."""

    def __init__(self, get: Callable[[int], object], n_images: int, origin: str) -> None:
        self._get = get
        self._n_images = n_images
        self._origin = origin
        self._last: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return self._n_images

    def stored(self, row: int) -> bytes:
        array = self.pixels(row)
        return repr(array.shape).encode() + array.tobytes()

    def pixels(self, row: int, stored: bytes | pa.Buffer | None = None) -> np.ndarray:
        # A pass over all images asks for the bytes of a row and then for its pixels.
        if self._last[0] != row:
            self._last = (row, as_pixels(self._get(row), self.place(row)))
        return self._last[1]

    def place(self, row: int) -> str:
        return f"{self._origin}, image {row}"

    def stored_size(self) -> int:
        return self._n_images * self.pixels(0).nbytes


def as_pixels(image: object, place: str) -> np.ndarray:
    """uint8 pixels H×W or H×W×3 of an image in memory, or of a file; UsageError for anything else."""
    if isinstance(image, (str, Path)):
        path = Path(image)
        if not path.is_file():
            raise UsageError(f"{place}: there is no file {path}")
        return decode_image(path.read_bytes(), str(path))
    if isinstance(image, Image.Image):
        return image_pixels(image, place)
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise UsageError(
            f"{place} has pixels of {array.dtype}, whose range nothing tells; pass uint8 from 0 to 255, before any "
            "ToTensor or Normalize"
        )
    if array.ndim == 3 and array.shape[2] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = array.transpose(1, 2, 0)  # torch puts channels first
    if array.ndim == 3 and array.shape[2] in _CHANNELS:
        array = array[:, :, 0] if array.shape[2] == 1 else array[:, :, :3]
    elif array.ndim != 2:
        shape = "×".join(map(str, array.shape)) or "a single number"
        raise UsageError(f"{place} is {shape}; an image is height×width or height×width×3")
    return np.ascontiguousarray(array)


def _is_arrow(part: object) -> bool:
    return type(part).__module__.startswith("datasets.") and hasattr(part, "features")


def _refuse_streams(images: object) -> None:
    """UsageError for what gives its images once, in an order of its own, or as batches."""
    from torch.utils.data import DataLoader

    if isinstance(images, DataLoader):
        raise UsageError(
            "a DataLoader shuffles, augments and has no ids, so its rows cannot be told apart or met again; pass its "
            "data set: make_task(loader.dataset), without augmentation"
        )
    parts = images.values() if isinstance(images, Mapping) else (images,)
    for part in parts:
        if isinstance(part, (DataLoader, str)) or not (
            hasattr(part, "__len__") and hasattr(part, "__getitem__")
        ):
            raise UsageError(
                f"{type(part).__name__} cannot be asked for its i-th image; pass a list, an array or a data set "
                "that knows its length"
            )


def _read(
    found: object, labels: Iterable[object] | None, place: str, *, keys: tuple[str | None, str | None]
) -> tuple[ImageStore, list[object]]:
    """The images of one split, and one label each."""
    if isinstance(found, np.ndarray) and found.dtype == np.uint8 and _is_stack(found):
        if labels is None:
            raise UsageError(f"{place} has no labels: make_task(images, labels)")
        plain = found.view() if found.shape[-1] == 3 or found.ndim == 3 else found[..., 0]
        return ArrayImages(plain, place), _listed(labels, len(found), place)
    items: Sequence[object] = found  # type: ignore[assignment]
    if not len(items):
        raise UsageError(f"{place} holds no images")
    first = items[0]
    label_key: str | int = 1
    if isinstance(first, Mapping):
        image_key = _key(keys[0], _IMAGE_KEYS, first, place)
        label_key = _key(keys[1], _LABEL_KEYS, first, place) if labels is None else ""
        store = OwnImages(lambda row: items[row][image_key], len(items), place)  # type: ignore[index]
    elif isinstance(first, (tuple, list)) and len(first) >= 2 and labels is None:
        store = OwnImages(lambda row: items[row][0], len(items), place)  # type: ignore[index]
    elif labels is None:
        raise UsageError(f"{place} has no labels: make_task(images, labels), or items of image and label")
    else:
        store = OwnImages(lambda row: items[row], len(items), place)
    for row in {0, len(items) // 2}:
        if not np.array_equal(as_pixels(store._get(row), place), as_pixels(store._get(row), place)):
            raise UsageError(
                f"{store.place(row)} is another one at every reading (random augmentation?); pass the data set "
                "without its transform"
            )
    if labels is None:
        labels = [items[row][label_key] for row in range(len(items))]  # type: ignore[index]
    return store, _listed(labels, len(items), place)


def _is_stack(array: np.ndarray) -> bool:
    """Whether it is n×H×W or n×H×W×C with 1 or 3 channels at the end."""
    return array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))


def _key(wanted: str | None, usual: tuple[str, ...], item: Mapping[str, object], place: str) -> str:
    found = next((key for key in ((wanted,) if wanted else usual) if key in item), None)
    if found is None:
        raise UsageError(
            f"the items of {place} have no '{wanted or usual[0]}', but {', '.join(item)}; name the keys with image= "
            "and label="
        )
    return found


def _listed(labels: Iterable[object], n_images: int, place: str) -> list[object]:
    """Labels as a list of Python's own values, one an image."""
    if not isinstance(labels, (list, tuple)):
        labels = np.asarray(labels).tolist()
    listed = [value.tolist() if hasattr(value, "tolist") else value for value in labels]
    if listed and isinstance(listed[0], (list, tuple)):
        raise UsageError(
            f"the labels of {place} are lists of {len(listed[0])}, not one entry an image; one-hot rows become "
            "numbers by .argmax(1)"
        )
    if len(listed) != n_images:
        raise UsageError(f"{place} has {n_images:,} images and {len(listed):,} labels")
    return listed


def _numbered(labels: list[object], classes: Sequence[str] | None, place: str) -> np.ndarray:
    """int64, or an object array of text; text becomes numbers where the classes are given."""
    if all(isinstance(value, int) for value in labels):
        return np.array(labels, dtype=np.int64)
    if wrong := [(row, v) for row, v in enumerate(labels) if not isinstance(v, str)]:
        row, value = wrong[0]
        raise UsageError(
            f"labels are whole numbers or text, one kind for all: label {row} of {place} is {value!r} "
            f"({type(value).__name__})"
        )
    if classes is None:
        return np.array(labels, dtype=object)
    number = {name: index for index, name in enumerate(classes)}
    if unknown := sorted({str(value) for value in labels} - number.keys()):
        raise UsageError(
            f"the labels of {place} name '{unknown[0]}', which is none of the {len(number)} classes"
        )
    return np.array([number[str(value)] for value in labels], dtype=np.int64)


def _checked_ids(ids: Sequence[str], n_images: int) -> np.ndarray:
    found = np.array([str(one) for one in ids])
    if len(found) != n_images or len(set(found.tolist())) != n_images:
        raise UsageError(
            f"ids name every image once: there are {len(found):,} ids, {len(set(found.tolist())):,} of them "
            f"different, for {n_images:,} images"
        )
    return found

"""Images whose folders name their classes: what is a split, what is a class, and what is left out, told aloud.

Names alone do not tell: `train` is a split beside `test` and a class beside `bus`. So the shape of the tree is looked
at, and every image is either read or counted in a remark.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.reading import check_plain, is_folder
from layerprobe.tasks.images import FileImages, image_suffixes
from layerprobe.tasks.split import SPLIT_WORDS, split_word
from layerprobe.tasks.task import Source, SourceSplit, fingerprint, labelled


@dataclass(kw_only=True)
class _Folder:
    """A folder with its images; hidden files and folders are not in it."""

    path: Path
    images: list[Path] = field(default_factory=list)
    folders: list[_Folder] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    """Files that are no images by their names."""
    hidden: int = 0
    """Images in hidden folders."""
    links: list[Path] = field(default_factory=list)
    """Links back into the data set, which are not followed."""

    @property
    def name(self) -> str:
        return self.path.name

    @functools.cached_property
    def n_images(self) -> int:
        """Images here and below."""
        return len(self.images) + sum(folder.n_images for folder in self.folders)

    @functools.cached_property
    def filled(self) -> list[_Folder]:
        """The folders in it that hold images."""
        return [folder for folder in self.folders if folder.n_images]

    def walk(self) -> Iterator[_Folder]:
        """It and all below."""
        yield self
        for folder in self.folders:
            yield from folder.walk()


def read_class_folders(root: Path) -> Source:
    """Images in train/CLASS/…, test/CLASS/… or simply CLASS/…; classes are numbered by name."""
    whole = _survey(root, (root.resolve(),))
    top, remarks = _descend(whole, root)
    parts, said = _find_splits(top)
    remarks += said
    splits, values = [], []
    files: dict[str, list[Path]] = {}
    for word, part in parts:
        remarks += _left_out(part, root, top_is_part=part is top)
        paths, classes = [], []
        for folder in part.filled:
            inside = sorted(path for below in folder.walk() for path in below.images)
            paths += inside
            classes += [folder.name] * len(inside)
        if paths:
            names = [path.relative_to(part.path).as_posix() for path in paths]
            splits.append(SourceSplit(word, FileImages(paths, names)))
            files[word] = paths
            values.append(np.array(classes, dtype=object))
    if not splits and whole.n_images:
        raise UsageError(
            f"{root} has no class folders, so the labels of its {whole.n_images:,} images are not known"
        )
    if not splits:
        raise UsageError(
            f"no images in {root}: looked for parquet files, IDX files (…-images-idx3-ubyte, also .gz) "
            "and class folders (train/CLASS/x.png or CLASS/x.png)"
        )
    source = labelled(splits, values, None, str(root))
    source.fingerprint = fingerprint(files)
    source.remarks += remarks
    return source


def _survey(path: Path, within: tuple[Path, ...]) -> _Folder:
    """Look through a folder, which lies in the folders `within`; links back into those are not followed."""
    found = _Folder(path=path)
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise BrokenFileError(f"cannot look into {path}: {error.strerror}") from error
    for entry in entries:
        inside = path / entry.name
        if not _is_text(entry.name):
            raise BrokenFileError(
                f"{path} holds a name that is no UTF-8 ({ascii(entry.name)[:80]}); rename it"
            )
        if is_folder(inside):
            if entry.name.startswith("."):
                found.hidden += sum(
                    Path(name).suffix.lower() in image_suffixes()
                    for _, _, names in os.walk(inside)
                    for name in names
                )
                continue
            target = inside.resolve()
            if not entry.is_symlink():
                found.folders.append(_survey(inside, within))
            elif any(target.is_relative_to(place) or place.is_relative_to(target) for place in within):
                found.links.append(inside)
            else:
                found.folders.append(_survey(inside, (*within, target)))
        elif not entry.name.startswith("."):
            is_image = inside.suffix.lower() in image_suffixes()
            if is_image:
                check_plain(inside, what="the image")
            (found.images if is_image else found.others).append(inside)
    return found


def _is_text(name: str) -> bool:
    """Whether a name can be printed and hashed: the system's names are bytes, of which some are no letters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _descend(whole: _Folder, root: Path) -> tuple[_Folder, list[str]]:
    """The folder that holds splits or classes, where one folder holds all."""
    top = whole
    while (only := _lone(top)) and not split_word(only.name):
        top = only
    if top is whole:
        return top, []
    return top, [f"{top.path.relative_to(root).as_posix()}/ holds all images; its folders were read"]


def _lone(folder: _Folder) -> _Folder | None:
    """The only folder of images in `folder`, where that holds nothing but folders of images."""
    if folder.images or len(folder.filled) != 1:
        return None
    only = folder.filled[0]
    return only if only.filled and not only.images else None


def _find_splits(top: _Folder) -> tuple[list[tuple[str, _Folder]], list[str]]:
    """The splits and the folders that hold their classes; without splits, "all" and the folder itself."""
    named = [folder for folder in top.filled if split_word(folder.name)]
    inner = {folder.name: _inside_split(folder) for folder in named}
    with_classes = [folder for folder in named if inner[folder.name].filled]
    others = [folder for folder in top.filled if folder not in named]
    if not named:
        return [("all", top)], []
    if not with_classes and not others:
        raise UsageError(
            f"{_listed(named)} in {top.path} hold{'s' * (len(named) == 1)} images but no class folders, so their "
            "labels are not known"
        )
    words = {split_word(folder.name) for folder in named}
    # A lone split beside folders of the same shape is a class like them: bus/, car/, train/.
    alike = any(folder.filled and not folder.images for folder in others)
    if not with_classes or (alike and (len(words) == 1 or "train" not in words)):
        return [("all", top)], [
            f"{_listed(named)} beside {_listed(others)}: taken for {'a class' if len(named) == 1 else 'classes'}, "
            "not for a split"
        ]
    chosen, remarks = _one_of_each(named, top)
    remarks = [
        f"{folder.name}/ is no split and was left out{_counted(folder)}"
        for folder in top.folders
        if folder not in named and not split_word(folder.name)
    ] + remarks
    remarks += [
        f"{folder.name}/ holds no images and was left out"
        for folder in top.folders
        if not folder.n_images and split_word(folder.name)
    ]
    parts = [(word, inner[folder.name]) for word, folder in chosen]
    if all(_lone(part) for _, part in parts):
        parts = [(word, part.filled[0]) for word, part in parts]
    return parts, remarks


def _inside_split(folder: _Folder) -> _Folder:
    """Past folders that repeat the split's name: seg_train/seg_train/CLASS."""
    word, first = split_word(folder.name), folder.name
    while not folder.images and len(folder.filled) == 1:
        only = folder.filled[0]
        if only.name != first and split_word(only.name) != word:
            break
        folder = only
    return folder


def _one_of_each(named: Sequence[_Folder], top: _Folder) -> tuple[list[tuple[str, _Folder]], list[str]]:
    """One folder a split; a plain name, such as train, goes before one that holds the word, such as train_masks."""
    chosen: dict[str, _Folder] = {}
    remarks = []
    for folder in sorted(named, key=lambda folder: folder.name.lower() not in SPLIT_WORDS):
        word = split_word(folder.name) or ""
        if word not in chosen:
            chosen[word] = folder
        elif (folder.name.lower() in SPLIT_WORDS) == (chosen[word].name.lower() in SPLIT_WORDS):
            raise UsageError(
                f"{chosen[word].name}/ and {folder.name}/ in {top.path} both name split {word}; keep one of them"
            )
        else:
            remarks.append(
                f"{folder.name}/ was left out ({folder.n_images:,} images): {chosen[word].name}/ is split {word}"
            )
    return sorted(chosen.items(), key=lambda pair: pair[1].name), remarks


def _left_out(part: _Folder, root: Path, *, top_is_part: bool) -> list[str]:
    """Remarks on what a split, or the whole, holds beside images in class folders."""
    where = "" if part.path == root else f" of {part.path.relative_to(root).as_posix()}/"
    if not part.filled and part.images:
        return [
            f"{len(part.images):,} images{where} lie in no class folder, so they have no labels and were left out"
        ]
    remarks = [
        f"{folder.path.relative_to(root).as_posix()}/ holds no images and was left out"
        for folder in part.folders
        if not folder.n_images
    ]
    if part.images:
        remarks.append(f"{len(part.images):,} images{where} lie beside the class folders and were left out")
    below = [folder for inside in part.folders for folder in inside.walk()]
    if n_hidden := sum(folder.hidden for folder in [part, *below]):
        remarks.append(f"{n_hidden:,} images{where} lie in hidden folders and were left out")
    for link in (link for folder in [part, *below] for link in folder.links):
        remarks.append(f"{link.relative_to(root).as_posix()} links back into the data set and was left out")
    kinds = Counter(path.suffix or "no suffix" for folder in below for path in folder.others)
    if kinds:
        listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
        remarks.append(
            f"{kinds.total():,} files{where} are no images by their names and were left out ({listed})"
        )
    splits = sorted(
        {folder.name for folder in below if folder.n_images and folder.name.lower() in SPLIT_WORDS}
    )
    if top_is_part and (splits := [name for name in splits if name not in {f.name for f in part.folders}]):
        listed = ", ".join(f"{name}/" for name in splits)
        remarks.append(f"{listed} within class folders: not read as splits")
    return remarks


def _counted(folder: _Folder) -> str:
    return f" ({folder.n_images:,} images)" if folder.n_images else ""


def _listed(folders: Sequence[_Folder]) -> str:
    shown = [f"{folder.name}/" for folder in folders[:3]] + ["…"] * (len(folders) > 3)
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)

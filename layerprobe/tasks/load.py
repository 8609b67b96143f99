"""From a name to a task: a local folder, a data set of the Hugging Face hub, or one that comes with a package."""

from __future__ import annotations

import contextlib
import operator
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.errors import (
    LayerprobeError,
    NotAvailableError,
    UnknownNameError,
    UsageError,
    did_you_mean,
    first_line,
)
from layerprobe.network import hub_is_out_of_reach, offline_reason
from layerprobe.reading import is_folder, is_there
from layerprobe.tasks.catalog import TASKS, TaskEntry
from layerprobe.tasks.folder import peek_folder, read_folder, refuse_column
from layerprobe.tasks.images import ArrayImages
from layerprobe.tasks.parquet import ColumnChoice, from_datasets
from layerprobe.tasks.task import Source, SourceSplit, Task, cut_task

if TYPE_CHECKING:
    from datasets import DatasetBuilder

BUILDERS = ("parquet", "arrow", "imagefolder", "cache")
"""Readers of the `datasets` library that may run. None of them executes code from the repository."""


class _Unreachable(Exception):
    """The hub does not answer; what is cached may still serve."""


def load_task(
    name: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    offline: bool = False,
    revision: str | None = None,
    label: str | None = None,
    decode_workers: int | None = None,
    keep_decoded: bool = True,
) -> Task:
    """Load an image-classification task, cut into train, validation and test.

    Parameters
    ----------
    name : str
        Alias (see `layerprobe ls tasks`), hub data set id, or local folder: parquet files in the hub's schema, IDX
        files, or class folders. An alias wins over a folder (./NAME). "NAME:COLUMN" chooses the label column.
    data_dir : str | Path | None
        Folder that holds the task's files, instead of the hub.
    limit : int | None
        At most this many training images, stratified; smaller limits give subsets of larger ones. The others
        shrink in proportion, see `layerprobe.tasks.split.limited_sizes`.
    seed : int
        Of the cut and of the subset.
    offline : bool
        Never ask the network (as with HF_HUB_OFFLINE=1); use the Hugging Face cache.
    revision, label : str | None
        Branch, tag or commit of the hub repository; label column, where there are several.
    decode_workers, keep_decoded
        Processes that decode ahead, and whether resized images stay on disk: `layerprobe.tasks.decoding.Decoding`.

    Returns
    -------
    Task
        Its `report` states the rule by which it was cut (see `layerprobe.tasks.split.assign`), the counts,
        and the duplicates that were found.

    Notes
    -----
    All images are read, and decoded where that is affordable (`layerprobe.tasks.duplicates`), whatever the
    limit: only then are ids and cuts the same under every limit. Few images stay decoded in memory.

    Raises
    ------
    UnknownNameError
        No such task, folder or label column.
    NotAvailableError
        Not cached while offline.
    UsageError
        One class only, no image or label column, a limit below the number of classes.
    BrokenFileError : a file or an image that cannot be read.
    """
    seed = operator.index(seed)
    if limit is not None and operator.index(limit) < 1:
        raise UsageError(f"limit must be at least 1, got {limit}")
    base, entry, choice = _parse_name(name, label)
    task_id, commit = entry.task_id if entry else base, None
    if (folder := _local_folder(base, data_dir)) is not None:
        source, task_id = read_folder(folder, choice), base if data_dir is None else str(data_dir)
    elif entry is not None and entry.origin == "package":
        source = _read_digits(choice)
    else:
        config = entry.config if entry else None
        source, commit = _read_hub(base, task_id, choice, config, revision, offline=offline)
    if commit is None and revision is not None:
        raise UsageError(f"revision '{revision}' means nothing here: {task_id} is not read from the hub")
    task = cut_task(
        name,
        source,
        task_id=task_id,
        commit=commit,
        limit=limit,
        seed=seed,
        decode_workers=decode_workers,
        keep_decoded=keep_decoded,
    )
    asked = {"limit": limit, "seed": seed, "revision": commit, "label": label}
    return replace(task, loaded_with=asked | _where(name, data_dir, folder is not None))


def _where(name: str, data_dir: str | Path | None, in_folder: bool) -> dict[str, Any]:
    """Where a process that starts in another folder finds the task."""
    if data_dir is not None:
        return {"name": name, "data_dir": str(Path(data_dir).expanduser().absolute())}
    return {"name": str(Path(name).expanduser().absolute()) if in_folder else name, "data_dir": None}


def peek_image_size(name: str, *, data_dir: str | Path | None = None) -> tuple[int | None, bool]:
    """For a dry run: refuse what `load_task` would refuse at once, and tell the size of the images.

    A data set of the hub is neither downloaded nor looked up: an alias is known from the catalog, and of
    another `owner/name` nothing is.

    Returns
    -------
    tuple[int | None, bool]
        Pixels per side, 0 where the images are not squares of one size, None where that is unknown; and False
        where only the first image was looked at, which the others may not resemble.

    Raises
    ------
    UnknownNameError
        No such task, folder or label column.
    UsageError
        A folder without images, or with images of one class.
    BrokenFileError
        A file whose head cannot be read.
    """
    base, entry, choice = _parse_name(name, None)
    if (folder := _local_folder(base, data_dir)) is not None:
        return peek_folder(name, folder, choice)
    if entry is None:
        return None, True
    if entry.origin == "package":
        refuse_column(base, choice)
    return entry.image_size or 0, True


def _parse_name(name: str, label: str | None) -> tuple[str, TaskEntry | None, ColumnChoice]:
    """Take "cifar100:coarse_label" apart; a folder of that very name comes first."""
    match = re.fullmatch(r"(.+):(\w+)", name)
    base = name
    if match is not None and not is_there(Path(name)):
        base, label = match[1], label or match[2]
    entry = TASKS.get(base)
    return base, entry, ColumnChoice(entry.image if entry else (), entry.label if entry else (), label)


def _local_folder(base: str, data_dir: str | Path | None) -> Path | None:
    """The folder that a task's name means, there or not; None for an alias and a data set of the hub."""
    if data_dir is not None:
        return Path(data_dir).expanduser()
    if base in TASKS:
        return None
    path = Path(base).expanduser()
    if is_there(path) or base.startswith((".", "/", "~")) or base.count("/") > 1:
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise UnknownNameError(f"unknown task '{base}'.{did_you_mean(base, TASKS)} See: layerprobe ls tasks")
    return None


def _read_digits(choice: ColumnChoice) -> Source:
    """The 1,797 handwritten digits that come with scikit-learn, 8×8, their 0 to 16 scaled to 0 to 255."""
    refuse_column("digits", choice)
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    split = SourceSplit("all", ArrayImages(pixels, "digits"), data.target.astype(np.int64))
    return Source(splits=[split], classes=[str(name) for name in data.target_names])


def _read_hub(
    name: str, hub_id: str, choice: ColumnChoice, config: str | None, revision: str | None, *, offline: bool
) -> tuple[Source, str | None]:
    """Read a data set of the hub and tell the commit it was read at (None if the cache does not tell).

    Offline, the files in the hub cache come first (`hf download --repo-type dataset`), then what
    `datasets.load_dataset` prepared earlier.
    """
    why = _why_not_asked(offline)
    if why is None:
        try:
            return _download(hub_id, choice, config, revision)
        except _Unreachable:
            why = "the hub cannot be reached"
    for read in (_from_snapshot, _from_prepared):
        if (cached := read(hub_id, choice, config, revision)) is not None:
            return cached
    raise _not_cached(name, hub_id, why, revision)


def check_reachable(name: str, *, data_dir: str | Path | None = None, offline: bool = False) -> None:
    """NotAvailableError for a data set of the hub that is not in the cache and cannot be asked for.

    Looks at the folders of the cache alone, without the `datasets` library.
    """
    base, entry, _ = _parse_name(name, None)
    hub_id = entry.task_id if entry else base
    if _local_folder(base, data_dir) is not None or (entry and entry.origin == "package"):
        return
    if (why := _why_not_asked(offline)) and not (_has_snapshot(hub_id) or _is_prepared(hub_id)):
        raise _not_cached(base, hub_id, why)


def _not_cached(name: str, hub_id: str, why: str, revision: str | None = None) -> NotAvailableError:
    where = f"'{name}'" if name == hub_id else f"'{name}' ({hub_id})"
    at = f" at revision '{revision}'" if revision else ""
    return NotAvailableError(
        f"{where}{at} is not cached and {why}; download it first or pass a local folder with --data-dir"
    )


def _why_not_asked(offline: bool) -> str | None:
    if why := offline_reason(offline):
        return why
    return "the hub cannot be reached" if hub_is_out_of_reach() else None


def _has_snapshot(hub_id: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="dataset")
    return is_folder(folder / "snapshots")


def _is_prepared(hub_id: str) -> bool:
    """Whether `datasets` may have prepared it: a folder of its name, which that library spells in its own way."""
    from huggingface_hub import constants

    def plain(name: str) -> str:
        return name.replace("_", "").lower()

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    return is_folder(cache) and any(
        plain(folder.name) == plain(hub_id.replace("/", "")) for folder in cache.iterdir()
    )


def _download(
    hub_id: str, choice: ColumnChoice, config: str | None, revision: str | None
) -> tuple[Source, str | None]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    # Of the package that the hub's client talks through; which one that is differs between its versions.
    from huggingface_hub.errors import HTTPError

    try:
        builder = datasets.load_dataset_builder(hub_id, config, revision=revision)
        reader = _reader(builder)
        if reader not in BUILDERS:
            raise UsageError(f"'{hub_id}' is stored as {reader}; layerprobe reads {', '.join(BUILDERS[:-1])}")
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except LayerprobeError:
        raise
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise NotAvailableError(
                f"'{hub_id}' is gated: accept its terms on the hub and log in with `hf auth login`"
            ) from error
        if "Revision" in str(error):
            raise UnknownNameError(f"'{hub_id}' has no revision '{revision}'") from error
        raise UnknownNameError(f"the hub has no data set '{hub_id}' (or it is private)") from error
    except ConnectionError as error:
        raise _Unreachable from error
    except (DatasetsError, ValueError, OSError) as error:
        raise UsageError(f"cannot load '{hub_id}' from the hub: {first_line(error)}") from error
    except HTTPError as error:
        raise _Unreachable from error
    source = from_datasets(splits, choice, hub_id, follow_paths=reader == "imagefolder")
    return source, _commit(builder) or revision


def _from_snapshot(
    hub_id: str, choice: ColumnChoice, config: str | None, revision: str | None
) -> tuple[Source, str | None] | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                hub_id,
                repo_type="dataset",
                revision=revision,
                local_files_only=True,
                allow_patterns=[f"{config}/*" if config else "*.parquet"],
            )
        )
    except LocalEntryNotFoundError:
        return None
    inside = folder / config if config and (folder / config).is_dir() else folder
    if next(inside.rglob("*.parquet"), None) is None:
        return None
    return read_folder(inside, choice), folder.name


def _from_prepared(
    hub_id: str, choice: ColumnChoice, config: str | None, revision: str | None
) -> tuple[Source, str | None] | None:
    if not _is_prepared(hub_id):
        return None
    import datasets

    with _datasets_offline():
        try:
            builder = datasets.load_dataset_builder(hub_id, config)
            splits = builder.as_dataset()
        except (ConnectionError, OSError, ValueError):
            return None
    commit = _commit(builder)
    if revision is not None and revision != commit:
        return None
    return from_datasets(splits, choice, hub_id), commit


@contextlib.contextmanager
def _datasets_offline() -> Iterator[None]:
    """The `datasets` library reads its offline switch from here, once, at import."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _reader(builder: DatasetBuilder) -> str:
    """The name of the packaged reader: datasets.packaged_modules.parquet.parquet → parquet."""
    return type(builder).__module__.rpartition(".")[2]


def _commit(builder: DatasetBuilder) -> str | None:
    digest = getattr(builder, "hash", None)
    return digest if isinstance(digest, str) and len(digest) == 40 else None

"""Data sets of the Hugging Face hub: loaded through `datasets`, or found in the cache when offline."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from layerprobe.errors import LayerprobeError, NotAvailableError, UnknownNameError, UsageError
from layerprobe.tasks.columns import ColumnChoice, choose_columns, column_values
from layerprobe.tasks.images import ArrowImages
from layerprobe.tasks.sources import SPLIT_WORDS, Source, SourceSplit, fingerprint, labelled, read_folder

BUILDERS = ("parquet", "arrow", "imagefolder", "cache")
"""Readers of the `datasets` library that may run. None of them executes code from the repository."""


class _Unreachable(Exception):
    """The hub does not answer; what is cached may still serve."""


def read_hub(
    name: str,
    hub_id: str,
    choice: ColumnChoice,
    *,
    config: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> tuple[Source, str | None]:
    """Read a data set of the hub, from the cache alone when offline.

    Offline, the files in the hub cache come first (`hf download --repo-type dataset`), then what
    `datasets.load_dataset` prepared earlier.

    Returns
    -------
    Source, and the commit it was read at (None if the cache does not tell).

    Raises
    ------
    NotAvailableError : not cached while offline or unreachable; or gated.
    UnknownNameError : the hub has no such data set, revision or configuration.
    """
    why = offline_reason(offline)
    if why is None:
        try:
            return _load(hub_id, choice, config, revision)
        except _Unreachable:
            why = "the hub cannot be reached"
    for read in (_from_snapshot, _from_prepared):
        if (found := read(hub_id, choice, config, revision)) is not None:
            return found
    where = f"'{name}'" if name == hub_id else f"'{name}' ({hub_id})"
    at = f" at revision '{revision}'" if revision else ""
    raise NotAvailableError(
        f"{where}{at} is not cached and {why}; download it first or pass a local folder with --data-dir"
    )


def offline_reason(offline: bool) -> str | None:
    """Why the network must not be asked, in words; None when it may be."""
    if offline:
        return "offline mode is on (--offline)"
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"offline mode is on ({variable}={os.environ[variable]})"
    return None


def _load(
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
        raise UsageError(f"cannot load '{hub_id}' from the hub: {_first_line(error)}") from error
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


def from_datasets(
    splits: Mapping[str, Any], choice: ColumnChoice, place: str, *, follow_paths: bool = False
) -> Source:
    """Take over what `datasets` loaded; its Arrow tables are memory-mapped and stay where they are.

    Parameters
    ----------
    splits : name → `datasets.Dataset`, without selections or transforms.
    follow_paths : see `ArrowImages`.
    """
    first = next(iter(splits.values()))
    columns = choose_columns(first.features.arrow_schema, choice, place)
    known = [name for name in splits if name.lower() in SPLIT_WORDS]
    remarks = [f"split {name} was left out" for name in splits if known and name not in known]
    parts, values = [], []
    for name in known or splits:
        table = splits[name].data.table
        store = ArrowImages(
            table.column(columns.image), [(f"{place} {name}", table.num_rows)], follow_paths=follow_paths
        )
        parts.append(SourceSplit(SPLIT_WORDS.get(name.lower(), "all"), store))
        values.append(column_values(table.column(columns.label)))
    source = labelled(parts, values, columns.class_names, place)
    source.remarks += remarks
    source.label_column = columns.label
    files = {name: [Path(file["filename"]) for file in splits[name].cache_files] for name in known or splits}
    if all(files.values()):
        source.fingerprint = fingerprint(files, columns.image)
    return source


def _reader(builder: Any) -> str:
    """The name of the packaged reader: datasets.packaged_modules.parquet.parquet → parquet."""
    return type(builder).__module__.rpartition(".")[2]


def _commit(builder: Any) -> str | None:
    digest = getattr(builder, "hash", None)
    return digest if isinstance(digest, str) and len(digest) == 40 else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

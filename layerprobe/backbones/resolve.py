"""From a name to a folder of files: alias, hub id, local folder, or a bridge run. Loads no torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from layerprobe.backbones.catalog import MODELS, PACKAGES
from layerprobe.errors import (
    BrokenFileError,
    LayerprobeError,
    NotAvailableError,
    UnknownNameError,
    did_you_mean,
)
from layerprobe.files import cache_root, read_json, weight_files, write_json
from layerprobe.model_config import read_model_config
from layerprobe.network import hub_errors, offline_reason
from layerprobe.reading import Schema, check_fields, check_plain, is_folder, is_there, open_file, read_file

RUN_FILE = "layerprobe_run.json"
"""A folder with this file is a bridge run: it names the folder of the backbone and the file of the stem."""

RUN_SCHEMA = "layerprobe.bridge-run/v1"
_TEXT, _PIXELS = (str, type(None)), (int, type(None))
RUN_FIELDS: dict[str, Schema] = {
    "backbone?": str, "model_id?": str, "stem_file?": _TEXT, "stem?": _TEXT, "attention?": _TEXT, "pooling?": _TEXT,
    "patch_size?": _PIXELS, "image_size?": _PIXELS, "config?": dict, "plan?": _TEXT,
}  # fmt: skip
"""What is read of a bridge run, beside its schema."""

TRAINED = "trained"
"""Origin of a backbone that `bridge_train` trained in place: its weights are not those of its files."""

_REMEMBERED_FROM = 256 << 20
_PIECE = 1 << 20
_SETTLED_SECONDS = 3


class ModelIdentity(Protocol):
    """Which model it is; `ModelSource` is one of files, `own_model.MemorySource` one in memory."""

    @property
    def name(self) -> str: ...
    @property
    def model_id(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def run(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model's files are on this machine."""

    name: str
    """What the user typed."""
    model_id: str
    """Hub id, or the folder's name for local weights."""
    revision: str
    """Commit of the hub repository, or `local-` and a hash of the weights."""
    folder: Path
    origin: str
    """hub, local, package or bridge; `TRAINED` once its weights were trained in place."""
    run: dict[str, Any] | None = None
    """The contents of the run file, for a bridge run."""


def resolve_model(name: str, *, revision: str | None = None, offline: bool = False) -> ModelSource:
    """Find the files of a model, downloading them into the Hugging Face cache when that is allowed.

    Order: an existing folder, an alias of `catalog.MODELS`, a hub id `owner/name`.

    Raises
    ------
    UnknownNameError
        Neither a folder nor an alias nor a hub id.
    NotAvailableError
        Not in the cache while offline, gated, or the hub cannot be reached.
    BrokenFileError
        A folder without configuration or weights, or an index that points outside it.
    """
    as_path = Path(name).expanduser()
    if is_folder(as_path):
        return _local(name, as_path, offline=offline)
    if name in MODELS:
        hub_id = MODELS[name].hub_id
        if name in PACKAGES and revision is None and (packaged := _package_folder(*PACKAGES[name])):
            return _on_disk(name, hub_id, packaged, "package")
        return _from_hub(name, hub_id, revision, offline)
    if is_there(as_path):
        raise UnknownNameError(f"{name} is a file; name the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UnknownNameError(f"there is no folder {name}")
    if "/" not in name:
        raise UnknownNameError(
            f"unknown model '{name}'.{did_you_mean(name, MODELS)} See: layerprobe ls models "
            "(a hub id is written owner/name)"
        )
    return _from_hub(name, name, revision, offline)


def _local(name: str, folder: Path, *, offline: bool) -> ModelSource:
    run_file = folder / RUN_FILE
    if is_there(run_file):
        run = read_json(run_file, what="bridge run", inside=folder)
        if not isinstance(run, dict) or run.get("schema") != RUN_SCHEMA:
            found = run.get("schema") if isinstance(run, dict) else type(run).__name__
            raise BrokenFileError(f"{run_file} is no bridge run that this version reads: schema {found!r}")
        check_fields(run, RUN_FIELDS, run_file)
        if run.get("base"):
            return _on_base(name, run, folder, offline=offline)
        backbone = inside(folder, run.get("backbone", "backbone"), run_file)
        return _on_disk(name, run.get("model_id", folder.name), backbone, "bridge", run)
    return _on_disk(name, folder.resolve().name, folder, "local")


def _on_base(name: str, run: dict[str, Any], folder: Path, *, offline: bool) -> ModelSource:
    """A bridge run that keeps only what was trained: the files of its base model, which must be those it had."""
    wanted = run["base"]
    try:
        revision = str(wanted["revision"]) if wanted["origin"] == "hub" else None
        base = resolve_model(str(wanted["name"]), revision=revision, offline=offline)
    except LayerprobeError as error:
        raise NotAvailableError(
            f"{folder} keeps only what was trained of {wanted['name']}: {error}"
        ) from error
    if base.revision != wanted["revision"]:
        raise BrokenFileError(
            f"{folder} was trained on {wanted['name']} at {wanted['revision']}, and that is {base.revision} now; only "
            "the model it was trained on goes with what it keeps"
        )
    digest = hashlib.sha256(base.revision.encode())
    for key in ("trained_file", "adapters_file"):
        if run.get(key):
            digest.update(inside(folder, str(run[key]), folder / RUN_FILE).read_bytes())
    revision = f"local-{digest.hexdigest()[:12]}"
    return ModelSource(
        name=name, model_id=base.model_id, revision=revision, folder=base.folder, origin="bridge", run=run
    )


def _on_disk(
    name: str, model_id: str, folder: Path, origin: str, run: dict[str, Any] | None = None
) -> ModelSource:
    """A folder that is no snapshot of the hub, named by a hash of its weights."""
    _check_weights(folder)
    revision = weights_hash(folder)
    if run is not None and run.get("adapters_file"):
        path = inside(Path(name).expanduser(), str(run["adapters_file"]), Path(name) / RUN_FILE)
        revision = f"local-{hashlib.sha256(revision.encode() + path.read_bytes()).hexdigest()[:12]}"
    return ModelSource(name=name, model_id=model_id, revision=revision, folder=folder, origin=origin, run=run)


def _package_folder(package: str, inner: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / inner
    return folder if (folder / "config.json").is_file() else None


def _from_hub(name: str, hub_id: str, revision: str | None, offline: bool) -> ModelSource:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    cached_only = offline or constants.HF_HUB_OFFLINE
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    near = f".{did_you_mean(name, MODELS)} See: layerprobe ls models"
    with hub_errors(hub_id, f"download '{hub_id}'", revision=revision, near=near):
        try:
            folder = Path(
                snapshot_download(
                    hub_id, revision=revision, local_files_only=cached_only, allow_patterns=wanted
                )
            )
            # Beside a model in .bin files, an adapter or a part of a pipeline may be a *.safetensors.
            if not cached_only and not any(folder.glob("model.safetensors*")):
                wanted.append("pytorch_model*.bin")
                folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
        except LocalEntryNotFoundError as error:
            why = (offline_reason(offline) if cached_only else None) or "the hub cannot be reached"
            at = f" at revision '{revision}'" if revision else ""
            raise NotAvailableError(
                f"'{name}' ({hub_id}{at}) is not cached and {why}; download it first or pass a local folder"
            ) from error
    _check_weights(folder)
    return ModelSource(name=name, model_id=hub_id, revision=folder.name, folder=folder, origin="hub")


def _check_weights(folder: Path) -> None:
    """Refuse a folder that cannot be a model: no configuration, no weights, an index that leaves it."""
    if not is_there(folder / "config.json"):
        raise BrokenFileError(
            f"{folder} holds no config.json, so it is no model folder (nor a bridge run: no {RUN_FILE})"
        )
    read_model_config(folder)
    if not weight_files(folder)[0]:
        raise BrokenFileError(f"{folder} holds no weights: looked for *.safetensors, *.bin, *.pth, *.pt")


def inside(folder: Path, relative: str, named_by: Path) -> Path:
    """`folder / relative`, refusing a name that would leave the folder. Links within a cache are fine."""
    if Path(relative).is_absolute() or ".." in Path(relative).parts or not relative:
        raise BrokenFileError(f"{named_by} names a path outside its folder: {relative!r}")
    return folder / relative


def weights_hash(folder: Path) -> str:
    """A name for local weights: `local-` and 12 hex digits over configuration and all weight bytes.

    The digest of a file above 256 MiB is remembered in the cache until the file changes, the whole name in this
    process.
    """
    files = [folder / "config.json", *weight_files(folder)[0]]
    facts = tuple((str(path), *_state(path)) for path in files)
    if facts not in _NAMES:
        name = _hash_files(folder)
        if all(map(_is_settled, files)):
            _NAMES[facts] = name
        return name
    return _NAMES[facts]


_NAMES: dict[tuple[object, ...], str] = {}


def _hash_files(folder: Path) -> str:
    digest = hashlib.sha256(read_file(folder / "config.json", what="model configuration", inside=folder))
    for path in weight_files(folder)[0]:
        size = check_plain(path, what="weights", inside=folder).st_size
        digest.update(os.fsencode(f"{path.name}:{size}"))
        if size > _REMEMBERED_FROM:
            digest.update(_remembered_digest(path).encode())
            continue
        with open_file(path, what="weights") as stream:
            for piece in iter(lambda: stream.read(_PIECE), b""):
                digest.update(piece)
    return f"local-{digest.hexdigest()[:12]}"


def _remembered_digest(path: Path) -> str:
    """sha256 of a large file, read once."""
    memory = cache_root() / "weight_digests.json"
    key = str(path.resolve())
    facts = _state(path)
    known: dict[str, list[Any]] = {}
    with contextlib.suppress(LayerprobeError):
        known = read_json(memory, what="digests") if memory.is_file() else {}
    if known.get(key, [None])[0] == facts:
        return str(known[key][1])
    with open_file(path, what="weights") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if _is_settled(path):
        with contextlib.suppress(LayerprobeError):
            write_json(memory, {**known, key: [facts, digest]})
    return digest


def _state(path: Path) -> list[int]:
    """What changes when a file does: the kernel's time of last change cannot be set back by a copy."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _is_settled(path: Path) -> bool:
    """Whether a write of now would change its times: within the clock's grain it would keep them."""
    state = path.stat()
    return time.time() - max(state.st_mtime, state.st_ctime) > _SETTLED_SECONDS

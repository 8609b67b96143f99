"""From a folder or file to the list of its tensors: which files count, shards, indices, tied weights."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from layerprobe.checkpoints.safetensors_files import read_safetensors
from layerprobe.checkpoints.tensors import StoredTensor
from layerprobe.errors import BrokenFileError, NotAvailableError, UsageError
from layerprobe.files import read_json

_TORCH_ENDINGS = (".bin", ".pth", ".pt")


@dataclass(frozen=True)
class Checkpoint:
    """The stored tensors of one model, and its `config.json` where there is one (else an empty dict)."""

    folder: Path
    files: tuple[Path, ...]
    tensors: tuple[StoredTensor, ...]
    config: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, aliases counted once."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.alias_of is None)

    def select(self, include: list[str] | None = None, exclude: list[str] | None = None) -> Checkpoint:
        """Keep tensors whose name fits any `include` pattern (shell style) and no `exclude` pattern.

        Raises
        ------
        UsageError : nothing is left.
        """
        kept = tuple(
            tensor
            for tensor in self.tensors
            if (not include or any(fnmatchcase(tensor.name, pattern) for pattern in include))
            and not any(fnmatchcase(tensor.name, pattern) for pattern in exclude or ())
        )
        if not kept:
            some = ", ".join(tensor.name for tensor in self.tensors[:3])
            raise UsageError(
                f"no tensor of {self.folder} is left after --include/--exclude; names look like: {some}"
            )
        return Checkpoint(self.folder, self.files, kept, self.config)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """List the tensors of a model folder (or of one weight file) without reading any weight.

    In a folder the order of preference is the one of `from_pretrained`: `model.safetensors`, its sharded
    form with an index, `pytorch_model.bin`, its sharded form; then whatever other weight files lie there.

    Raises
    ------
    NotAvailableError : no such path, or no weight files in it.
    BrokenFileError : a file, index or shard that cannot be what it says it is.
    """
    place = Path(path)
    if place.is_file():
        files, listed, folder = [place], None, place.parent
    elif place.is_dir():
        folder = place
        files, listed = _weight_files(place)
    else:
        raise NotAvailableError(f"there is no file or folder {place}")
    tensors: list[StoredTensor] = []
    owner: dict[str, Path] = {}
    for file in files:
        for tensor in _read(file):
            if tensor.name in owner:
                raise BrokenFileError(
                    f"tensor '{tensor.name}' is stored twice: in {owner[tensor.name]} and in {file}"
                )
            owner[tensor.name] = file
            tensors.append(tensor)
    for name, file in (listed or {}).items():
        if owner.get(name) != file:
            raise BrokenFileError(f"the index of {folder} places tensor '{name}' in {file}; it is not there")
    config = folder / "config.json"
    settings = read_json(config, what="model configuration") if config.is_file() else {}
    if not isinstance(settings, dict):
        raise BrokenFileError(f"cannot read model configuration {config}: it is no JSON object")
    return Checkpoint(folder, tuple(files), tuple(tensors), settings)


def _read(file: Path) -> list[StoredTensor]:
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if file.suffix in _TORCH_ENDINGS:
        from layerprobe.checkpoints.torch_files import read_torch

        return read_torch(file)
    raise UsageError(f"cannot tell the format of {file}; known endings: .safetensors .bin .pth .pt")


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, Path] | None]:
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single], None
        if (folder / index).is_file():
            return _shards(folder / index)
    others = sorted(folder.glob("*.safetensors.index.json"))
    if others:
        return _shards(others[0])
    for ending in (".safetensors", *_TORCH_ENDINGS):
        found = sorted(file for file in folder.glob(f"*{ending}") if not _is_no_weight(file.name))
        if found:
            return found, None
    raise NotAvailableError(
        f"{folder} holds no weights: neither *.safetensors nor "
        + ", ".join(f"*{ending}" for ending in _TORCH_ENDINGS)
    )


def _is_no_weight(name: str) -> bool:
    return name.startswith(("training_args", "optimizer", "scheduler", "rng_state", "scaler"))


def _shards(index: Path) -> tuple[list[Path], dict[str, Path]]:
    content = read_json(index, what="shard index")
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise BrokenFileError(f"cannot read shard index {index}: it has no weight_map")
    listed: dict[str, Path] = {}
    for name, shard in table.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise BrokenFileError(
                f"shard index {index} places tensor '{name}' in '{shard}', which is not a file of its folder"
            )
        file = index.parent / shard
        if not file.is_file():
            raise BrokenFileError(
                f"shard index {index} names {shard} for tensor '{name}', and that file is missing; "
                "finish the download"
            )
        listed[name] = file
    return sorted(set(listed.values())), listed

"""From a folder or file to the list of its tensors. Which files belong is `layerprobe.files.weight_files`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from layerprobe.checkpoints.safetensors import StoredTensor, read_safetensors
from layerprobe.errors import BrokenFileError, NotAvailableError, UsageError
from layerprobe.files import TORCH_ENDINGS, read_json, unread_weights, weight_files
from layerprobe.progress import note


@dataclass(frozen=True, kw_only=True)
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
        UsageError
            Nothing is left.
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
        return replace(self, tensors=kept)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """List the tensors of a model folder (or of one weight file) without reading any weight.

    Raises
    ------
    NotAvailableError
        No such path, or no weight files in it.
    BrokenFileError
        a file, index or shard that cannot be what it says it is.
    """
    given = Path(path)
    folder = given if given.is_dir() else given.parent
    placed: dict[str, Path] = {}
    if given.is_file():
        files = [given]
    elif given.is_dir():
        files, placed = weight_files(given)
        if not files:
            endings = ", ".join(f"*{ending}" for ending in TORCH_ENDINGS)
            raise NotAvailableError(f"{given} holds no weights: neither *.safetensors nor {endings}")
    else:
        raise NotAvailableError(f"there is no file or folder {given}")
    tensors: list[StoredTensor] = []
    owner: dict[str, Path] = {}
    left_out = 0
    for file in files:
        for tensor in _read(file):
            if placed and placed.get(tensor.name) != file:
                left_out += 1
                continue
            if tensor.name in owner:
                raise BrokenFileError(
                    f"tensor '{tensor.name}' is stored twice: in {owner[tensor.name]} and in {file}"
                )
            owner[tensor.name] = file
            tensors.append(tensor)
    for name, file in placed.items():
        if owner.get(name) != file:
            raise BrokenFileError(f"the index of {folder} places tensor '{name}' in {file}; it is not there")
    if left_out:
        note(
            f"{given}: {left_out} tensors in the shards are not placed there by the index; they are left out"
        )
    if given.is_dir() and (unread := unread_weights(given, files)):
        note(unread)
    config = folder / "config.json"
    settings = read_json(config, what="model configuration") if config.is_file() else {}
    if not isinstance(settings, dict):
        raise BrokenFileError(f"cannot read model configuration {config}: it is no JSON object")
    return Checkpoint(folder=folder, files=tuple(files), tensors=tuple(tensors), config=settings)


def _read(file: Path) -> list[StoredTensor]:
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if file.suffix in TORCH_ENDINGS:
        from layerprobe.checkpoints.torch_files import read_torch

        return read_torch(file)
    raise UsageError(f"cannot tell the format of {file}; known endings: .safetensors .bin .pth .pt")

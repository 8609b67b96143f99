"""From a folder or file to the list of its tensors. Which files belong is `layerprobe.files.weight_files`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from layerprobe.checkpoints.quantised import dequantised
from layerprobe.checkpoints.safetensors import StoredTensor, read_safetensors
from layerprobe.errors import BrokenFileError, NotAvailableError, UnknownNameError, UsageError
from layerprobe.files import TORCH_ENDINGS, unread_weights, weight_files
from layerprobe.model_config import read_model_config
from layerprobe.progress import note
from layerprobe.reading import is_folder, is_plain, is_there


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The stored tensors of one model, and its `config.json` where there is one (else an empty dict)."""

    folder: Path
    files: tuple[Path, ...]
    tensors: tuple[StoredTensor, ...]
    config: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    """What else a training checkpoint holds: name → what it is."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, aliases counted once."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.alias_of is None)

    def select(self, include: list[str] | None = None, exclude: list[str] | None = None) -> Checkpoint:
        """Keep tensors whose name fits any `include` pattern (shell style) and no `exclude` pattern; UsageError where
        none does."""
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


def open_checkpoint(path: str | Path, *, state: str | None = None) -> Checkpoint:
    """List the tensors of a model folder (or of one weight file) without reading any weight.

    Quantised matrices appear as what their codes and scales define. Of a training checkpoint the model's state is
    listed, or the one named `state`.

    Raises
    ------
    NotAvailableError
        No such path, or no weight files in it.
    UnknownNameError
        There is no such state.
    BrokenFileError
        A file, index or shard that cannot be what it says it is.
    """
    given = Path(path)
    folder = given if is_folder(given) else given.parent
    placed: dict[str, Path] = {}
    if is_plain(given):
        files = [given]
    elif is_folder(given):
        files, placed = weight_files(given)
        if not files:
            endings = ", ".join(f"*{ending}" for ending in TORCH_ENDINGS)
            raise NotAvailableError(f"{given} holds no weights: neither *.safetensors nor {endings}")
    else:
        raise NotAvailableError(f"there is no file or folder {given}")
    tensors: list[StoredTensor] = []
    owner: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    misplaced = 0
    for file in files:
        found, left = _read(file, state)
        left_out |= left
        for tensor in found:
            if placed and placed.get(tensor.name) != file:
                misplaced += 1
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
    if misplaced:
        note(
            f"{given}: {misplaced} tensors in the shards are not placed there by the index; they are left out"
        )
    if is_folder(given) and (unread := unread_weights(given, files)):
        note(unread)
    settings = read_model_config(folder) if is_there(folder / "config.json") else {}
    tensors = dequantised(tensors, settings)
    return Checkpoint(
        folder=folder, files=tuple(files), tensors=tuple(tensors), config=settings, left_out=left_out
    )


def _read(file: Path, state: str | None) -> tuple[list[StoredTensor], dict[str, str]]:
    if file.suffix == ".safetensors":
        if state is not None:
            raise UnknownNameError(f"{file} has no named states, so --state {state} names none")
        return read_safetensors(file), {}
    if file.suffix in TORCH_ENDINGS:
        from layerprobe.checkpoints.torch_files import read_torch

        return read_torch(file, state)
    raise UsageError(f"cannot tell the format of {file}; known endings: .safetensors .bin .pth .pt")

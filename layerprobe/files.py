"""Files that are whole or not there: written aside, flushed, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.errors import (
    BrokenFileError,
    LayerprobeError,
    NotAvailableError,
    UsageError,
    first_line,
    shortened,
)
from layerprobe.reading import check_plain, is_folder, is_shallow, is_there, read_file

if TYPE_CHECKING:
    from torch import Tensor

_HASHED_AT_ONCE = 32 << 20


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, flushed to disk and renamed into place when the body succeeds.

    Nothing is left behind when the body raises, and an existing file stays as it was. LayerprobeError where the
    disk is full or the folder cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = _part_beside(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        yield aside
        os.umask(umask := os.umask(0))  # it can only be read by setting it
        aside.chmod(0o666 & ~umask)
        sync(aside)
        aside.replace(target)
        sync(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # of a disk that has become unwritable
            aside.unlink(missing_ok=True)
        os.close(handle)


def _part_beside(target: Path) -> tuple[int, Path]:
    """A new file beside `target`, open and locked; those that dead processes left behind are deleted.

    A living process keeps its own locked, so nobody else takes it for one of them.
    """
    prefix, suffix = f".{target.name}.", ".part"
    for left in target.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(handle)
    while True:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=target.parent)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink:  # else it was taken for a dead one's before it was locked
            return handle, Path(name)
        os.close(handle)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # folders of some network file systems
            raise
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` (UTF-8) so that a reader sees the old file or the new one, never half of it."""
    with atomic_write(path) as aside:
        # Names of files may hold bytes that are no UTF-8, which Python keeps as halves of letters.
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 1) -> Path:
    """Write strict JSON; ValueError for NaN and Infinity."""
    return write_text(path, json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(
    path: str | os.PathLike[str],
    *,
    what: str = "file",
    max_bytes: int = 256 << 20,
    inside: Path | None = None,
) -> Any:
    """Read JSON; BrokenFileError for what is no plain file (`open_file`), larger than `max_bytes`, or not JSON."""
    source = Path(path)
    try:
        text = read_file(source, what=what, max_bytes=max_bytes, inside=inside)
        value = json.loads(text.decode())
        if not is_shallow(value):
            raise ValueError("nested too deep")
        if (
            b"\\ud" in text or b"\\uD" in text
        ):  # halves of letters cannot be printed, hashed or written to a file
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(
            f"cannot read {what} {source}: not valid JSON ({shortened(str(error), 120)})"
        ) from error
    return value


def read_yaml(path: Path, *, what: str, max_bytes: int) -> Any:
    """Read YAML; BrokenFileError as `read_json`."""
    import yaml

    text = read_file(path, what=what, max_bytes=max_bytes)
    try:
        return yaml.safe_load(text.decode())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BrokenFileError(f"cannot read {path}: {first_line(error)}") from error


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Create `path` if need be; UsageError where it is a file, or cannot be created or written."""
    folder = Path(path)
    if is_there(folder) and not is_folder(folder):
        raise UsageError(f"output folder {folder} is a file; name a folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"output folder {folder} is not writable: {error.strerror}") from error
    return folder


def cannot_write(path: Path, error: OSError) -> LayerprobeError:
    """The one-line form of an operating-system error met while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LayerprobeError(
            f"the disk is full: {path} was not written; what was there before is untouched"
        )
    return LayerprobeError(f"cannot write {path}: {error.strerror or error}")


def cache_root() -> Path:
    """Where layerprobe keeps its own files: $LAYERPROBE_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("LAYERPROBE_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "layerprobe"


TORCH_ENDINGS = (".bin", ".pth", ".pt")
_NO_WEIGHTS = re.compile(
    r"\.|training_args|optimizer|scheduler|rng_state|scaler|.*optim_states|adapter_(model|config)\b"
)
_PARTS = re.compile(r"(consolidated\.|mp_rank_|model-?mp-?|tp_rank_)0*\d+")
"""Names of files that hold the same tensors cut apart, one file a process."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.")
_ELSEWHERE = {
    "*.distcp": "a torch.distributed checkpoint: python -m torch.distributed.checkpoint.format_utils "
    "dcp_to_torch FOLDER weights.pt",
    "zero_pp_rank_*": "a DeepSpeed ZeRO checkpoint: run its zero_to_fp32.py one folder up, and name what it writes",
    "global_step*": "a DeepSpeed checkpoint: run its zero_to_fp32.py, and name what it writes",
    "adapter_model.*": "an adapter alone, not a model: merge it into its base model first (peft's "
    "merge_and_unload), or name the file itself",
    "*.gguf": "GGUF weights: convert them to safetensors first",
    "*.h5": "TensorFlow weights: convert them to safetensors first",
    "*.msgpack": "Flax weights: convert them to safetensors first",
    "*.onnx": "an ONNX graph: name the model that it was exported from",
}
"""What else a folder may hold, by the names of files, and what can be done about it."""


def weight_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files of a model folder that hold its weights, sorted, and where an index places each tensor.

    What is hashed, shown and loaded is what this says. The order of preference is the one of `from_pretrained`:
    `model.safetensors`, its sharded form with an index, `pytorch_model.bin`, its sharded form; then whatever other
    weight files lie there, of several variants (`X.fp16.safetensors`) the plain one. Adapters and the state of
    optimizers are no weights. No placements where no index was used; a tensor that the index does not place in
    the shard where it lies is none of the model's.

    Raises
    ------
    NotAvailableError : no weights that can be read, but something else that is known; the message says what to do.
    BrokenFileError : an index that is none, leaves its folder, or names a missing shard; weights that are no plain
    file of this folder.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if is_there(folder / single):
            check_plain(folder / single, what="weights", inside=folder)
            return [folder / single], {}
        if is_there(index := folder / f"{single}.index.json"):
            return _shards(index)
    if indices := sorted(folder.glob("*.safetensors.index.json"), key=lambda index: len(index.name)):
        return _shards(indices[0])
    for ending in (".safetensors", *TORCH_ENDINGS):
        found = _plain_variants(weights_in(folder, ending))
        parts = [file for file in found if _PARTS.match(file.name)]
        if len(parts) > 1:
            raise NotAvailableError(
                f"{folder} holds the tensors of one model cut into {len(parts)} parts ({parts[0].name} … "
                f"{parts[-1].name}, tensor-parallel), of which none is a tensor; convert them first (transformers' "
                "convert_…_weights_to_hf.py), or take the repository that has model.safetensors"
            )
        if found:
            for file in found:
                check_plain(file, what="weights", inside=folder)
            _check_complete(folder, found)
            return found, {}
    for pattern, answer in _ELSEWHERE.items():
        if any(folder.glob(pattern)):
            raise NotAvailableError(f"{folder} holds {answer}")
    return [], {}


def weights_in(folder: Path, ending: str) -> list[Path]:
    """Every file of `folder` with `ending` that may hold a model's weights."""
    return sorted(file for file in folder.glob(f"*{ending}") if not _NO_WEIGHTS.match(file.name))


def unread_weights(folder: Path, read: Sequence[Path]) -> str | None:
    """What lies beside the weights that are read, looks like weights too, and is not read; None where nothing does.

    The same weights in the other format are not spoken of.
    """
    ending = read[0].suffix if read else ".safetensors"
    others = [file.name for file in weights_in(folder, ending) if file not in read]
    others += sorted(file.name for file in folder.glob("adapter_model.*"))
    if not others:
        return None
    names = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
    shown = read[0].name + (f" and {len(read) - 1} more" if len(read) > 1 else "")
    return f"{folder}: {shown} read; not read: {names}"


def _check_complete(folder: Path, files: list[Path]) -> None:
    """Without an index, names such as `model-00001-of-00003` say how many shards there are."""
    numbered = [found for file in files if (found := _SHARD.search(file.name))]
    for total in {int(found[2]) for found in numbered}:
        there = {int(found[1]) for found in numbered if int(found[2]) == total}
        if len(there) < total:
            raise BrokenFileError(
                f"{folder} holds {len(there)} of {total} shards and no index; finish the download"
            )


def _plain_variants(files: list[Path]) -> list[Path]:
    """Without `X.fp16.safetensors` where `X.safetensors` lies there as well."""
    names = {file.name for file in files}
    return [f for f in files if f"{f.name.split('.')[0]}{f.suffix}" not in names - {f.name}]


def _shards(index: Path) -> tuple[list[Path], dict[str, Path]]:
    content = read_json(index, what="shard index", inside=index.parent)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise BrokenFileError(f"cannot read shard index {index}: it has no weight_map")
    placed: dict[str, Path] = {}
    for name, shard in table.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise BrokenFileError(
                f"shard index {index} places tensor '{name}' in '{shard}', which is not a file of its folder"
            )
        file = index.parent / shard
        if not is_there(file):
            raise BrokenFileError(
                f"shard index {index} names {shard} for tensor '{name}', and that file is missing; "
                "finish the download"
            )
        placed[name] = file
    for file in set(placed.values()):
        check_plain(file, what="weights", inside=index.parent)
    return sorted(set(placed.values())), placed


def dtype_name(dtype: object) -> str:
    """`float32` for torch.float32, "torch.float32" and "float32"."""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces, so that a large one on an accelerator needs no second copy here.

    Of a tensor that is sharded over processes, the part that lies here.
    """
    import torch

    local = tensor.detach()
    if hasattr(local, "to_local"):
        local = local.to_local()
    flat = local.contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _HASHED_AT_ONCE):
        yield flat[start : start + _HASHED_AT_ONCE].cpu().numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes, so that -0.0 differs from 0.0 and a NaN equals itself.

    Of a tensor that is sharded over processes, the part that lies here.
    """
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    digest = hashlib.sha256(f"{local.dtype}{tuple(local.shape)}".encode())
    for piece in tensor_bytes(local):
        digest.update(piece)
    return digest.hexdigest()

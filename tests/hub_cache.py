"""Fill a Hugging Face hub cache by hand, so that tests run the offline road without any download.

The layout is the hub client's own: blobs named by their hash, snapshots of links to them, a ref.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def put_model(cache: Path, repo_id: str, files: Mapping[str, bytes | Path], *, ref: str = "main") -> str:
    """Store a model repository in `cache` (the value of HF_HUB_CACHE). Returns its commit.

    Parameters
    ----------
    files : path in the repository → content, or a file to copy.
    """
    return _put(Path(cache), f"models--{repo_id.replace('/', '--')}", files, ref)


def put_dataset(cache: Path, repo_id: str, files: Mapping[str, bytes | Path], *, ref: str = "main") -> str:
    """Store a data set repository in `cache` (the value of HF_HUB_CACHE). Returns its commit."""
    return _put(Path(cache), f"datasets--{repo_id.replace('/', '--')}", files, ref)


def folder_files(folder: Path) -> dict[str, bytes | Path]:
    """All files below `folder`, ready for `put_model` and `put_dataset`."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _put(cache: Path, name: str, files: Mapping[str, bytes | Path], ref: str) -> str:
    storage = cache / name
    contents = {
        path: source.read_bytes() if isinstance(source, Path) else source for path, source in files.items()
    }
    blobs = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
    commit = hashlib.sha1(repr(sorted(blobs.items())).encode()).hexdigest()
    for path, content in contents.items():
        blob = storage / "blobs" / blobs[path]
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = storage / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
    (storage / "refs").mkdir(parents=True, exist_ok=True)
    (storage / "refs" / ref).write_text(commit)
    return commit

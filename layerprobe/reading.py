"""Files that somebody else made: opened only where they are plain files of a known size, and held against a schema."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import TypeAlias, TypeVar

from layerprobe.errors import BrokenFileError, UsageError, printable

T = TypeVar("T")

SIZE_LIMIT = 768 << 20
"""Bytes that one file may unpack to in memory, unless $LAYERPROBE_SIZE_LIMIT says otherwise."""
Schema: TypeAlias = "type | tuple[Schema, ...] | list[Schema] | Mapping[str, Schema]"

MAX_DEPTH = 100
"""Levels of nested lists and objects; deeper ones are no file of ours, and overflow the stack elsewhere."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextlib.contextmanager
def open_file(
    path: str | os.PathLike[str],
    *,
    what: str = "file",
    inside: Path | None = None,
    max_bytes: int | None = None,
) -> Iterator[BufferedReader]:
    """A file that came from elsewhere, opened for reading; neither a pipe nor a device is ever waited for.

    Parameters
    ----------
    what : str
        What messages call it.
    inside : Path | None
        Folder that it must lie in, links followed, where the user did not name the file. Of a snapshot in the Hugging
        Face cache: the repository's folder, whose blobs the snapshot links to.
    max_bytes : int | None
        Larger files are refused.

    Raises
    ------
    BrokenFileError
        Not there, no plain file, elsewhere, too large, or not readable; also where reading fails later.
    """
    source = Path(path)
    try:
        check_plain(source, what=what, inside=inside)
        # Between the look and the opening, the file may be changed for a pipe.
        handle = os.open(source, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as stream:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise BrokenFileError(f"cannot read {what} {source}: it is no plain file")
            if max_bytes is not None and facts.st_size > max_bytes:
                raise BrokenFileError(
                    f"{what} {source} has {facts.st_size:,} bytes; more than {max_bytes:,} are not read"
                )
            yield stream
    except OSError as error:
        raise BrokenFileError(f"cannot read {what} {source}: {error.strerror or error}") from error


def check_plain(path: Path, *, what: str = "file", inside: Path | None = None) -> os.stat_result:
    """The facts of a plain file; BrokenFileError for anything else, see `open_file`."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            kind = _KINDS.get(stat.S_IFMT(facts.st_mode), "no plain file")
            raise BrokenFileError(f"cannot read {what} {path}: it is {kind}")
        if inside is not None and not path.resolve().is_relative_to(_home(inside)):
            raise BrokenFileError(
                f"cannot read {what} {path}: it is a link out of its folder, to {path.resolve()}; put a copy there"
            )
    except OSError as error:
        why = "its links lead in a circle" if error.errno == errno.ELOOP else error.strerror
        if error.errno == errno.ENOENT and path.is_symlink():
            why = "its link leads nowhere"
        raise BrokenFileError(f"cannot read {what} {path}: {why}") from error
    except ValueError as error:  # a name with a null byte
        raise BrokenFileError(f"cannot read {what} {printable(str(path))}: {error}") from error
    return facts


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has this name; a name that nothing can have (too long, in a circle of links) has none."""
    return _mode(path, stat.S_ISDIR)


def is_plain(path: str | os.PathLike[str]) -> bool:
    """Whether a plain file has this name."""
    return _mode(path, stat.S_ISREG)


def _mode(path: str | os.PathLike[str], test: Callable[[int], bool]) -> bool:
    try:
        return test(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False


def is_there(path: Path) -> bool:
    """Whether something has this name, be it a link to nothing; a name that no file can have is not there."""
    try:
        path.lstat()
    except (OSError, ValueError):
        return False
    return True


def read_file(
    path: str | os.PathLike[str],
    *,
    what: str = "file",
    inside: Path | None = None,
    max_bytes: int = 256 << 20,
) -> bytes:
    """The bytes of a file that came from elsewhere; errors as of `open_file`."""
    with open_file(path, what=what, inside=inside, max_bytes=max_bytes) as stream:
        return stream.read(max_bytes)


def check_fields(value: T, schema: Schema, place: object) -> T:
    """`value`, where it is what `schema` says; BrokenFileError names the first field that is not.

    A schema is a type, a tuple of schemas one of which it must fit, a list with the schema of its items,
    or an object's: field → schema, where the name of a field that may be missing ends with "?". `float` takes
    whole numbers too, `int` those of 64 bits.

    >>> check_fields({"n": 3, "names": ["a"]}, {"n": int, "names": [str], "more?": dict}, "x.json")["n"]
    3
    """
    if mistake := _mistake(value, schema, ""):
        raise BrokenFileError(f"cannot read {place}: {mistake}")
    return value


def _mistake(value: object, schema: Schema, name: str) -> str | None:
    if isinstance(schema, Mapping):
        if not isinstance(value, dict):
            return _other(name, "an object", value)
        for field, inner in schema.items():
            key = field.removesuffix("?")
            if key not in value:
                if key == field:
                    return f"it has no '{name}{key}'"
            elif found := _mistake(value[key], inner, f"{name}{key}."):
                return found
        return None
    if isinstance(schema, list):
        if not isinstance(value, list):
            return _other(name, "a list", value)
        return next(
            (m for i, one in enumerate(value) if (m := _mistake(one, schema[0], f"{name}{i}."))), None
        )
    if isinstance(schema, tuple):
        mistakes = [_mistake(value, kind, name) for kind in schema]
        if None in mistakes:
            return None
        fitting = [m for m, kind in zip(mistakes, schema, strict=True) if isinstance(value, _outer(kind))]
        return (
            fitting[0]
            if fitting
            else _other(name, " or ".join(_WORDS[_outer(kind)] for kind in schema), value)
        )
    return None if _is_a(value, _outer(schema)) else _other(name, _WORDS[_outer(schema)], value)


def _outer(schema: Schema) -> type:
    """The type that a value of this schema has."""
    return schema if isinstance(schema, type) else dict if isinstance(schema, Mapping) else type(schema)


_WORDS = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object", list: "a list",
    type(None): "null",
}  # fmt: skip


def _is_a(value: object, kind: type) -> bool:
    if kind is float:
        return type(value) is float or _is_a(value, int)
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    return isinstance(value, kind)


def _other(name: str, words: str, value: object) -> str:
    shown = _WORDS.get(type(value), type(value).__name__)
    if type(value) in (int, float, str, bool):
        text = hex(value) if type(value) is int and abs(value) >= 2**63 else repr(value)
        shown = printable(text if len(text) <= 40 else text[:37] + "…")
    return f"'{name.rstrip('.')}' must be {words}, not {shown}" if name else f"it holds {shown}, not {words}"


def check_unpacked(n_bytes: int, path: Path) -> None:
    """BrokenFileError for a file that unpacks to more than the limit, by what it announces or what has come so far."""
    text = os.environ.get("LAYERPROBE_SIZE_LIMIT", str(SIZE_LIMIT))
    if not text.isdecimal():
        raise UsageError(f"LAYERPROBE_SIZE_LIMIT is a number of bytes, not {text!r}")
    if n_bytes > int(text):
        raise BrokenFileError(
            f"{path} unpacks to {n_bytes:,} bytes or more; over {int(text):,} are not read into memory; where that is "
            "meant, raise $LAYERPROBE_SIZE_LIMIT"
        )


def is_shallow(value: object) -> bool:
    """Whether lists and objects are nested at most `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for item in level:
            inner += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
        if not inner:
            return True
        level = inner
    return False


def _home(folder: Path) -> Path:
    """Where the files of a folder may lie: in it, or in its repository's part of the Hugging Face cache."""
    whole = folder.resolve()
    return whole.parent.parent if whole.parent.name == "snapshots" else whole

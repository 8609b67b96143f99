"""One small change to one file of an example: bytes, JSON values, cells of tables, rows of databases, or its kind."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3.5, -1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30, 10**1000, "", "x",
    "x" * 5000, "\x1b[31mred\x1b[0m", "[bold]", "$\\frac{", "../../etc/passwd", "/etc/passwd", "\u202ereversed",
    "\ud800", "owner/kernel", "a\nb", "nan", [], {}, [1], ["x"], [None], [[]], {"x": 1}, [10**1000],
)  # fmt: skip


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one file, or two; what was done, for the report."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    done = []
    for _ in range(1 if draw.random() < 0.85 else 2):
        path = draw.choice(files)
        done.append(f"{path.relative_to(folder)}: {_change(path, draw)}")
    return "; ".join(done)


def _change(path: Path, draw: random.Random) -> str:
    if not path.is_file():  # the change before made something else of it
        return "gone"
    if draw.random() < 0.08:
        return _other_kind(path, draw)
    if path.suffix == ".json" and draw.random() < 0.8:
        return _change_json(path, draw)
    if path.suffix == ".csv" and draw.random() < 0.6:
        return _change_csv(path, draw)
    if path.suffix == ".safetensors" and draw.random() < 0.5:
        return _change_header(path, draw)
    if path.suffix == ".db" and draw.random() < 0.8:
        return _change_database(path, draw)
    return _change_bytes(path, draw)


def _other_kind(path: Path, draw: random.Random) -> str:
    """A pipe, a folder, a link: whatever is no plain file."""
    kinds = ["pipe", "folder", "nowhere", "circle", "device", "outside", "empty", "gone", "unreadable name"]
    kind = draw.choice(kinds)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "unreadable name":
        Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff\xfe" + os.fsencode(path.suffix))).write_bytes(
            b"x"
        )
    elif kind != "gone":
        target = {
            "nowhere": "/nowhere/at/all",
            "circle": path,
            "device": "/dev/zero",
            "outside": "/etc/passwd",
        }[kind]
        path.symlink_to(target)
    return kind


def _change_bytes(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    way = draw.choice(["flip", "flip", "flip many", "cut", "repeat", "insert", "zero", "grow", "number"])
    at = draw.randrange(len(data)) if data else 0
    if not data:
        data += draw.randbytes(16)
    elif way == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif way == "flip many":
        for _ in range(20):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif way == "cut":
        del data[at:]
    elif way == "repeat":
        data[at:at] = data[at : at + draw.randrange(1, 200)]
    elif way == "insert":
        data[at:at] = draw.randbytes(draw.randrange(1, 50))
    elif way == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif way == "number":
        data[at : at + 4] = draw.choice(
            [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\x7f\xff\xff\xff"]
        )
    else:
        data += draw.randbytes(draw.randrange(1, 3000))
    path.write_bytes(data)
    return f"{way} at {at}"


def _change_json(path: Path, draw: random.Random) -> str:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return _change_bytes(path, draw)
    value, done = change_value(value, draw)
    text = json.dumps(value)
    if draw.random() < 0.03:
        text, done = text[:-1] + ',"deep":' + "[" * 50_000 + "]" * 50_000 + "}", "nested deep"
    path.write_text(text)
    return done


def _change_database(path: Path, draw: random.Random) -> str:
    """One cell of one row, or the row as a whole, of a table that has rows."""
    try:
        with closing(sqlite3.connect(path)) as database, database:
            return _change_row(database, draw)
    except (sqlite3.Error, IndexError, ValueError):  # what the change before left, or what the table forbids
        return _change_bytes(path, draw)


def _change_row(database: sqlite3.Connection, draw: random.Random) -> str:
    names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    counts = {name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names}
    table = draw.choice([name for name in names if counts[name]])
    row = draw.randrange(counts[table])
    cursor = database.execute(f"SELECT rowid, * FROM {table} LIMIT 1 OFFSET {row}")
    number, *cells = cursor.fetchone()
    if draw.random() < 0.1:
        database.execute(f"DELETE FROM {table} WHERE rowid = ?", (number,))
        return f"{table} {row}: gone"
    at = draw.randrange(len(cells))
    new, done = cells[at], ""
    if isinstance(new, str) and new[:1] in ("{", "[") and draw.random() < 0.8:
        changed, done = change_value(json.loads(new), draw)
        new = json.dumps(changed)
    else:
        new = draw.choice([json.dumps(draw.choice(HOSTILE)), None, -1, 0, 3, 2**40, 1e308, b"x"])
    column = cursor.description[at + 1][0]
    database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, number))
    return f"{table} {row} {column}: {done or str(new)[:40]}"


def change_value(value: Any, draw: random.Random) -> tuple[Any, str]:
    """A JSON value with one place in it changed."""
    places = _places(value)
    if not places:
        return draw.choice(HOSTILE), "whole"
    holder, key = draw.choice(places)
    way = draw.random()
    if way < 0.12:
        del holder[key]
        return value, f"without {key}"
    if way < 0.2 and isinstance(holder, dict):
        holder[draw.choice(["x", "__class__", "", "a.b", "\ud800", "x" * 400])] = holder.pop(key)
        return value, f"{key} renamed"
    if way < 0.25:
        return draw.choice(HOSTILE), "whole"
    if way < 0.45 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = draw.choice(
            [holder[key] * 2, holder[key] + 1, -holder[key], str(holder[key]), 0, 10**6, 10**9]
        )
        return value, f"{key} = {str(holder[key])[:40]}"
    holder[key] = draw.choice(HOSTILE)
    return value, f"{key} = {str(holder[key])[:40]!r}"


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack and len(found) < 3000:
        holder = stack.pop()
        keys = (
            list(holder)
            if isinstance(holder, dict)
            else range(len(holder))
            if isinstance(holder, list)
            else []
        )
        for key in keys:
            found.append((holder, key))
            stack.append(holder[key])
    return found


def _change_csv(path: Path, draw: random.Random) -> str:
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:  # changed once already
        return _change_bytes(path, draw)
    if not lines:
        return _change_bytes(path, draw)
    row = draw.randrange(len(lines))
    cells = lines[row].split(",")
    column = draw.randrange(len(cells))
    way = draw.choice(["value", "value", "value", "column gone", "column twice", "line gone", "quote"])
    if way == "value":
        cells[column] = draw.choice(
            ["", "x", "1e400", "-1", "True", "\x1b[2J", "9" * 1000, '"a', "nan", "[]", "0"]
        )
    elif way == "column gone":
        del cells[column]
    elif way == "column twice":
        cells.insert(column, cells[column])
    elif way == "quote":
        cells[column] = '"' + cells[column]
    lines[row] = ",".join(cells)
    if way == "line gone":
        del lines[row]
    path.write_text("\n".join(lines) + "\n")
    return f"{way} in line {row}"


def _change_header(path: Path, draw: random.Random) -> str:
    """The JSON header of a safetensors file, with a length that fits again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header, done = change_value(json.loads(data[8 : 8 + length]), draw)
        text = json.dumps(header).encode()
    except (ValueError, RecursionError):
        return _change_bytes(path, draw)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return f"header: {done}"


def seed_of(*parts: object) -> int:
    """A number that is the same in every process."""
    return zlib.crc32(repr(parts).encode())

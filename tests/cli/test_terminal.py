"""What a person sees: tables that fit 80 columns, colours on a terminal alone, one format of numbers."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from layerprobe.progress import Stages, progress_bar
from layerprobe.tables import MARK, render_table

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_a_terminal(*arguments: str, columns: int = 80, **environment: str) -> str:
    """What a command writes to a terminal of so many columns."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    left_out = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    child = subprocess.Popen(
        [sys.executable, "-m", "layerprobe", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=inner,
        stderr=inner,
        env={**kept, "TERM": "xterm-256color", **environment},
    )
    os.close(inner)
    written = b""
    try:
        while piece := os.read(outer, 4096):
            written += piece
    except OSError:  # how Linux says that nobody writes any more
        pass
    child.wait(60)
    os.close(outer)
    return written.decode().replace("\r\n", "\n")


def test_tables_and_messages_fit_and_colours_obey() -> None:
    shown = in_a_terminal("ls", "models")
    assert ESCAPE.search(shown)
    lines = ESCAPE.sub("", shown).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("in the extra [demo]" in line for line in lines)  # which is no markup
    assert not ESCAPE.search(in_a_terminal("ls", "models", NO_COLOR="1"))
    piped = subprocess.run(
        [sys.executable, "-m", "layerprobe", "ls", "models"], capture_output=True, text=True, check=True
    )
    assert not ESCAPE.search(piped.stdout) and max(map(len, piped.stdout.splitlines())) > 80
    mistake = in_a_terminal("probe", "minilm", "--task", "digits", "--pooling", "clss")
    assert max(map(len, mistake.splitlines())) <= 80 and "Did you mean 'cls'?" in mistake
    helped = in_a_terminal("freeze-search", "--help", columns=80)
    assert max(map(len, ESCAPE.sub("", helped).splitlines())) <= 80


def test_a_wide_table_stands_in_parts_behind_its_first_column() -> None:
    rows = [
        {"layer": f"block {i}", **{f"score {j}": i * j for j in range(12)}, "reason": None} for i in range(3)
    ]
    parts = render_table(rows, width=40).split("\n\n")
    assert len(parts) > 2 and all(part.startswith("layer") for part in parts)
    assert max(len(line) for part in parts for line in part.splitlines()) <= 40
    assert "reason" not in "".join(parts)  # nothing in it
    joined = " ".join(parts)
    assert all(f"score {j}" in joined for j in range(12))


def test_written_numbers_stand_to_the_right() -> None:
    text = render_table([{"a": f"{MARK}90.7", "b": "x"}, {"a": "8.1", "b": "10.6 M"}])
    assert text.splitlines() == ["     a  b", "▸ 90.7  x", "   8.1  10.6 M"]


def test_a_log_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerprobe.progress._quiet", False)  # commands with --quiet ran in this process
    with progress_bar(range(3), unit="layer", desc="probes") as bar:
        list(bar)
    assert capsys.readouterr().err == ""  # quick things say nothing
    monkeypatch.setattr("layerprobe.progress.LINE_SECONDS", 0.0)
    stages = Stages(quiet=False)
    stages.show("search", 0, 4, unit="trainings")
    stages.show("search", 2, 4, unit="trainings", about="best 90 %")
    stages.show("report", 0, 2, unit="trainings")
    stages.close()
    lines = capsys.readouterr().err.splitlines()
    assert any(re.fullmatch(r"search: 2 of 4 trainings, about 0 s left", line) for line in lines), lines
    Stages(quiet=True).show("search", 1, 2, unit="trainings")
    assert capsys.readouterr().err == ""


def test_a_bar_that_was_interrupted_while_it_was_made_is_closed_without_a_word() -> None:
    kind = type(progress_bar(range(0), unit="layer", desc="probes"))
    kind.__new__(kind).close()

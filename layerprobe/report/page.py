"""Small pieces of HTML. Everything that comes from a file is escaped: a run folder may be somebody else's."""

from __future__ import annotations

import base64
import html
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprobe.errors import BrokenFileError
from layerprobe.metrics.intervals import interval_in_words
from layerprobe.provenance import without_secrets
from layerprobe.reading import Schema, read_file
from layerprobe.report.sort import POLICY, SCRIPT
from layerprobe.report.style import STYLE
from layerprobe.tables import cell_text, render_table

MAX_FIGURE_BYTES = 20 << 20
PROVENANCE_FIELDS: dict[str, Schema] = {
    "command?": (str, type(None)),
    "command_line?": (str, type(None)),
    "arguments?": (dict, type(None)),
}
MOST_LISTED = 60
"""Rows of a table that a narrow screen shows as lists."""
NOT_ESTIMABLE = "not estimable"
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""Characters that neither HTML nor XML may hold."""


def page(title: str, sections: Sequence[str]) -> str:
    """A whole document; nothing in it is loaded from elsewhere."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; {POLICY}\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def text(value: object) -> str:
    """Escaped text, without the characters that HTML may not hold."""
    return html.escape(NOT_TEXT.sub("\ufffd", str(value)))


def heading(question: str, answer: str) -> str:
    """The question of a page, and its answer: the first sentence large, the others below."""
    first, rest = first_sentence(answer)
    more = "".join(f"<p>{text(line)}</p>" for line in rest.splitlines() if line.strip())
    return f'<h1>{text(question)}</h1>\n<p class="answer">{text(first)}</p>{more}'


def first_sentence(answer: str) -> tuple[str, str]:
    """
    >>> first_sentence("Train block 0. Test accuracy 95.1 %. Sure.")
    ('Train block 0.', 'Test accuracy 95.1 %. Sure.')
    """
    found = re.match(r"(.+?[.?!])(?:\s+(?=[A-Z+-])|\s*\n|$)(.*)", answer.strip(), re.DOTALL)
    return (found.group(1), found.group(2)) if found else (answer, "")


def percent(value: float | None, *, sign: bool = False) -> str:
    """A share as per cent with one decimal."""
    if value is None or value != value:
        return "–"
    shown = f"{100 * value:{'+' if sign else ''}z.1f}"
    return "0.0" if shown == "+0.0" else shown


def interval(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """`low to high` in per cent, a dash, or "not estimable" where it is wider than the whole scale."""
    if low is None or high is None or low != low or high != high:
        return "–"
    return NOT_ESTIMABLE if high - low > 1 else interval_in_words(low, high, sign=sign)


def estimate(value: float | None, low: float | None, high: float | None, *, sign: bool = False) -> str:
    """A share and its interval, or "not estimable"."""
    if value is None or value != value:
        return "–"
    ends = interval(low, high, sign=sign)
    if ends == NOT_ESTIMABLE:
        return NOT_ESTIMABLE
    return percent(value, sign=sign) if ends == "–" else f"{percent(value, sign=sign)} ({ends})"


def figure(path: Path, folder: Path, caption: str) -> str:
    """A PNG file of a run folder, embedded; BrokenFileError where it is none, elsewhere, or larger than 20 MiB."""
    data = read_file(path, what="figure", inside=folder, max_bytes=MAX_FIGURE_BYTES)
    if not data.startswith(b"\x89PNG"):
        raise BrokenFileError(f"{path} is no PNG file")
    code = base64.b64encode(data).decode("ascii")
    image = f'<img alt="{text(caption)}" src="data:image/png;base64,{code}">'
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"


def strip(states: Sequence[str], *, legend: bool = True) -> str:
    """The blocks of a plan from input to output: `trained` ones filled, `frozen` ones pale, others half filled."""
    looks, half = {"trained": 'class="on" ', "frozen": ""}, 'class="half" '
    cells = "".join(
        f'<span {looks.get(state, half)}title="block {i}: {text(state)}">{i}</span>'
        for i, state in enumerate(states)
    )
    halves = "".join(f"; half: {text(state)} alone" for state in dict.fromkeys(states) if state not in looks)
    words = f'<p class="soft">Blocks from input to output; filled: trained, pale: frozen{halves}.</p>'
    return f'<div class="strip{"" if legend else " small"}">{cells}</div>{words if legend else ""}'


def bar(value: float | None, reach: float) -> str:
    """A small bar around zero in a cell; `reach` is the value that fills one half."""
    if value is None or value != value or reach <= 0:
        return ""
    width = min(50.0, 50 * abs(value) / reach)
    left = 50.0 if value >= 0 else 50 - width
    kind = "up" if value >= 0 else "down"
    return f'<span class="bar"><i class="{kind}" style="left:{left:.1f}%;width:{width:.1f}%"></i></span>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, mark: int | None = None) -> str:
    """Cells of ready HTML, the first of each row its heading; on a narrow screen every row is a small list."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    lines = []
    for index, row in enumerate(rows):
        cells = [f'<th scope="row">{row[0]}</th>']
        cells += [
            f'<td data-label="{text(name)}">{cell}</td>'
            for name, cell in zip(columns[1:], row[1:], strict=True)
        ]
        opening = '<tr class="mark">' if index == mark else "<tr>"
        lines.append(f"{opening}{''.join(cells)}</tr>")
    return f'<table class="stack"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def folded(title: str, inner: str) -> str:
    """Something for those who want to look closer."""
    return f"<details><summary>{text(title)}</summary>{inner}</details>"


def commands(*lines: str) -> str:
    """Lines to copy into a shell."""
    return f"<pre>{text(chr(10).join(lines))}</pre>"


def quoted(word: object) -> str:
    """A word from a file as a shell takes it: whatever it holds, it stays one word."""
    return shlex.quote(NOT_TEXT.sub("", str(word)).replace("\n", " ").replace("\r", " "))


def repeat_section(provenance: Mapping[str, Any]) -> str:
    """The command that repeats a result, and, folded, the versions and machine it was made with."""
    # Records of earlier versions may hold a password.
    provenance = without_secrets(provenance)
    given = (provenance.get("arguments") or {}).items()
    arguments = "\n".join(f"#   {key} = {value}" for key, value in given)
    line = provenance.get("command_line") or f"# from Python: {provenance.get('command')} with\n{arguments}"
    entries = []
    for section, values in provenance.items():
        if isinstance(values, Mapping):
            entries += [(f"{section}.{key}", value) for key, value in values.items()]
        elif section != "command_line":
            entries.append((section, values))
    known = [[text(entry), text(value)] for entry, value in entries if value is not None]
    details = folded(
        "arguments, versions, machine", f'<div class="long">{table(["entry", "value"], known)}</div>'
    )
    return f"<h2>How to repeat this</h2>{commands(line)}{details}"


def records_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows of a record as they are; wide ones move sideways within their frame, few ones are lists on a phone."""
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    if 0 < len(rows) <= MOST_LISTED and names:
        cells = [[text(cell_text(row.get(name))) for name in names] for row in rows]
        return f'<div class="wide">{table([text_key(name) for name in names], cells)}</div>'
    shown = [{text_key(key): value for key, value in row.items()} for row in rows]
    return render_table(shown, "html", columns=[text_key(name) for name in names])


def text_key(key: object) -> str:
    """A column's name without characters that HTML may not hold."""
    return NOT_TEXT.sub("\ufffd", str(key))

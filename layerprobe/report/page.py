"""Small pieces of HTML. Everything that comes from a file is escaped: a run folder may be somebody else's."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprobe.errors import BrokenFileError
from layerprobe.metrics.intervals import interval_in_words
from layerprobe.provenance import without_secrets
from layerprobe.reading import Schema, read_file
from layerprobe.tables import render_table

MAX_FIGURE_BYTES = 20 << 20
PROVENANCE_FIELDS: dict[str, Schema] = {
    "command?": (str, type(None)),
    "command_line?": (str, type(None)),
    "arguments?": (dict, type(None)),
}

STYLE = """
:root { --ink: #1b1f24; --soft: #5b6570; --line: #d9dee3; --train: #d55e00; --frozen: #e8ecef; }
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); }
body { max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; }
h2 { font-size: 1.15rem; margin-top: 2.4rem; }
.answer { font-size: 1.15rem; border-left: 4px solid var(--train); padding: .4rem 0 .4rem 1rem; }
.soft { color: var(--soft); font-size: .9rem; }
.strip { display: flex; gap: 3px; margin: 1rem 0 .2rem; }
.strip span { flex: 1; max-width: 3.5rem; text-align: center; padding: .35rem 0; border-radius: 4px; }
.strip span { background: var(--frozen); }
.strip span.on { background: var(--train); color: #fff; font-weight: 600; }
.strip span.half { background: linear-gradient(to right, var(--train) 50%, var(--frozen) 50%); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
td.t, th.t { text-align: left; }
tr.mark td { background: #fdf0e6; font-weight: 600; }
figure { margin: 1.2rem 0; }
figure img { max-width: min(100%, 44rem); }
figcaption { color: var(--soft); font-size: .88rem; }
pre { background: #f6f8fa; padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--soft); }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """A whole document; nothing in it is loaded from elsewhere."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def text(value: Any) -> str:
    """Escaped text."""
    return html.escape(str(value))


def percent(value: float | None, *, sign: bool = False) -> str:
    """A share as per cent with one decimal."""
    return "–" if value is None or value != value else f"{100 * value:{'+' if sign else ''}.1f}"


def interval(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """`low to high` in per cent, or a dash."""
    return "–" if low is None or high is None else interval_in_words(low, high, sign=sign)


def figure(path: Path, folder: Path, caption: str) -> str:
    """A PNG file of a run folder, embedded.

    Raises
    ------
    BrokenFileError
        No plain file, outside the folder, larger than 20 MiB, or no PNG.
    """
    data = read_file(path, what="figure", inside=folder, max_bytes=MAX_FIGURE_BYTES)
    if not data.startswith(b"\x89PNG"):
        raise BrokenFileError(f"{path} is no PNG file")
    code = base64.b64encode(data).decode("ascii")
    image = f'<img alt="{text(caption)}" src="data:image/png;base64,{code}">'
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"


def strip(states: Sequence[str]) -> str:
    """The blocks of a plan from input to output: `trained` ones filled, `frozen` ones pale, others half filled."""
    looks, half = {"trained": 'class="on" ', "frozen": ""}, 'class="half" '
    cells = "".join(
        f'<span {looks.get(state, half)}title="block {i}: {text(state)}">{i}</span>'
        for i, state in enumerate(states)
    )
    legend = "blocks from input to output; filled = trained, pale = frozen"
    legend += "".join(f", half = {state} alone" for state in dict.fromkeys(states) if state not in looks)
    legend = text(legend)
    return f'<div class="strip">{cells}</div><p class="soft">{legend}</p>'


def folded(title: str, inner: str) -> str:
    """Something for those who want to look closer."""
    return f"<details><summary>{text(title)}</summary>{inner}</details>"


def repeat_section(provenance: Mapping[str, Any]) -> str:
    """The command that repeats a result, and the versions and machine it was made with."""
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
    known = [{"entry": entry, "value": str(value)} for entry, value in entries if value is not None]
    details = folded("arguments, versions, machine", render_table(known, "html"))
    return f"<h2>How to repeat this</h2><pre>{text(line)}</pre>{details}"

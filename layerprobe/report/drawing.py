"""Figures of a page as SVG with text as text, in the page's colours, once for broad and once for narrow screens."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable

from matplotlib.axes import Axes

from layerprobe.plotting import style as look
from layerprobe.report.page import NOT_TEXT, text

Draw = Callable[[Axes], object]

WIDTHS = {"broad": 7.1, "narrow": 3.7}
"""Inches. Text of size 10 is then about as large as the page's."""
COLOURS = {
    look.INK: "currentColor",
    look.LINE_GREY: "var(--soft)",
    look.CELL_GREY: "var(--pale)",
    look.BLUE: "var(--blue)",
    look.ORANGE: "var(--orange)",
    look.GREEN: "var(--green)",
    look.PINK: "var(--pink)",
    look.YELLOW: "var(--yellow)",
    look.SKY: "var(--sky)",
    look.GREY: "var(--grey)",
    look.BLACK: "currentColor",
    look.OTHER_COLOUR: "var(--grey)",
    look.TRAINING_COLOURS["pixels"]: "var(--wine)",
}
"""Colours of the figures → those of the page, which change with the theme."""
LINK = "{http://www.w3.org/1999/xlink}href"


def drawn(draw: Draw, caption: str, *, name: str, height: float = 3.4) -> str:
    """A figure with its caption; `name` keeps the identifiers of the figures of a page apart."""
    pictures = [
        f"<div>{svg(draw, caption, name=f'{name}-{kind}', width=width, height=height, kind=kind)}</div>"
        for kind, width in WIDTHS.items()
    ]
    return f"<figure>{''.join(pictures)}<figcaption>{text(caption)}</figcaption></figure>"


def svg(draw: Draw, caption: str, *, name: str, width: float, height: float, kind: str) -> str:
    """One SVG element. Names of models and tasks are text in it: dollars are no formulas."""
    options = {"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}
    with look.settings(options), warnings.catch_warnings():
        # The reader's fonts draw the text, whatever glyphs ours lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        ax = look.loose_axes(width, height)
        draw(ax)
        stream = io.StringIO()
        look.figure_of(ax).savefig(stream, format="svg", transparent=True)
    # Our own matplotlib wrote this, with whatever text came from the run escaped.
    root = ET.fromstring(NOT_TEXT.sub("\ufffd", stream.getvalue()).encode())
    _clean(root, name)
    keep = {"viewBox": root.get("viewBox", "")}
    root.attrib.clear()
    root.attrib.update({**keep, "class": kind, "role": "img", "aria-label": NOT_TEXT.sub("", caption)})
    return _in_page_colours(ET.tostring(root, encoding="unicode"))


def _clean(root: ET.Element, name: str) -> None:
    """Plain tags, no metadata, and identifiers that no other figure has."""
    source = ET.tostring(root, encoding="unicode")
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', source))
    names = {found for pair in used for found in pair if found}
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rsplit("}", 1)[-1]
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "id":
                if value in names:
                    element.set("id", f"{name}-{value}")
            elif key == LINK:
                element.set("href", value.replace("#", f"#{name}-"))
            else:
                element.set(key, value.replace("url(#", f"url(#{name}-"))


def _in_page_colours(source: str) -> str:
    """Colours in style attributes become the page's; the page's font takes the place of matplotlib's."""

    def styled(found: re.Match[str]) -> str:
        style = re.sub(r"font: ([\d.]+)px [^;]*", r"font-size: \1px", found.group(1))
        for colour, name in COLOURS.items():
            style = re.sub(re.escape(colour), name, style, flags=re.IGNORECASE)
        return f'style="{style}"'

    return re.sub(r'style="([^"]*)"', styled, source)

"""Reports of any run folder: complete, self-contained, and unmoved by hostile content."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
from PIL import Image

from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.report import write_report
from layerprobe.report.page import figure, interval, page, percent, strip
from layerprobe.tables import cell_text, render_table, tidy


@dataclass
class Answer(Record):
    command: ClassVar[str] = "probe"
    name: str = "gpt2"
    provenance: dict[str, Any] = field(default_factory=lambda: provenance("probe", {"limit": 7}))

    def to_frame(self) -> pd.DataFrame:
        return tidy([{"metric": "probe_accuracy", "value": 0.25, "block": 3}], model=self.name)

    def summary(self) -> str:
        return "an answer"


def test_a_folder_of_records_becomes_a_page(tmp_path: Path) -> None:
    Answer().save(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "curve.png")
    text = write_report(tmp_path).read_text()
    assert "probe_accuracy" in text
    assert "0.25" in text
    assert "data:image/png;base64," in text
    assert "limit = 7" in text  # how to repeat it


class Tags(HTMLParser):
    """Tags and the addresses they point to, as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.addresses: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script><img src=https://example.org/x>"
    Answer(name=hostile).save(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "curve.png")
    text = write_report(tmp_path).read_text()
    tags = Tags()
    tags.feed(text)
    assert "script" not in tags.names
    assert tags.addresses
    assert all(str(address).startswith("data:") for address in tags.addresses)
    assert "default-src 'none'" in text
    assert html.escape(hostile) in text


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(BrokenFileError, match="holds no finished layerprobe run"):
        write_report(tmp_path)
    (tmp_path / "search.json").write_text(json.dumps({"schema": "layerprobe.search/v9"}))
    with pytest.raises(BrokenFileError, match=r"search\.json is not of the schema layerprobe\.search/v1"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_figures_that_are_no_pictures(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"GIF89a")
    with pytest.raises(BrokenFileError, match="is no PNG file"):
        figure(path, path.parent, "x")


def test_pieces() -> None:
    assert percent(0.12345) == "12.3"
    assert percent(0.01, sign=True) == "+1.0"
    assert percent(None) == "–"
    assert interval(0.1, 0.2) == "10.0 to 20.0"
    assert interval(None, 0.2) == "–"
    assert [cell_text(v) for v in (None, float("nan"), 12345, 1e-5, "a", True)] == [
        "–",
        "–",
        "12,345",
        "1e-05",
        "a",
        "yes",
    ]
    marks = strip(["trained", "frozen", "mlp"])
    assert marks.count('class="on"') == marks.count('class="half"') == 1 and "half = mlp alone" in marks
    marked = render_table([{"arm": "plan", "n": 1}, {"arm": "all", "n": 2}], "html", mark="plan")
    assert marked.count('class="mark"') == 1
    assert page("t", ["<p>x</p>"]).startswith("<!doctype html>")

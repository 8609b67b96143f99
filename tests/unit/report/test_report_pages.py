"""Reports of any run folder: complete, self-contained, and unmoved by hostile content."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import html5lib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from records_of_commands import ROWS, example

import layerprobe as lp
from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.plans.table import PlanTable
from layerprobe.provenance import provenance
from layerprobe.records import Record
from layerprobe.report import write_report
from layerprobe.report.page import estimate, figure, interval, page, percent, strip
from layerprobe.report.style import DARK, LIGHT
from layerprobe.search.space import Space
from layerprobe.search.verdict import recommendation
from layerprobe.tables import cell_text, tidy

QUICKSTART = Path(__file__).parents[3] / "results/quickstart"


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


def strict(path: Path) -> None:
    """A page that html5lib's strict parser takes without a mistake, and that is small."""
    html5lib.HTMLParser(strict=True).parse(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 1 << 20


def first_words(path: Path) -> tuple[str, str]:
    """The title of a page, and its answer."""
    tree = html5lib.parse(path.read_text(encoding="utf-8"), namespaceHTMLElements=False)
    answer = next(p for p in tree.iter("p") if p.get("class") == "answer")
    title = "".join(tree.find(".//h1").itertext())
    assert tree.find(".//title").text == f"layerprobe: {title}"
    return title, "".join(answer.itertext())


@pytest.mark.parametrize("command", sorted(set(ROWS) - {"freeze-search"}))
def test_every_command_has_a_page_whose_title_asks_and_first_sentence_answers(
    command: str, tmp_path: Path
) -> None:
    example(command).save(tmp_path)
    path = write_report(tmp_path)
    strict(path)
    title, answer = first_words(path)
    assert title.endswith("?") and "gpt2" in title
    assert answer == f"The answer of {command}."
    text = path.read_text()
    assert text.count("<svg") == 2 and "No figure" not in text  # for broad and for narrow screens
    assert "<text" in text  # text as text


def test_a_search_answers_first_then_says_how_sure_and_what_next() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_report(QUICKSTART, output=Path(folder) / "page.html")
        strict(path)
        title, answer = first_words(path)
        text = path.read_text()
    assert title == "Which blocks of minilm should train for digits?"
    found = json.loads((QUICKSTART / "search.json").read_text())
    assert found["plan"]["words"] in answer and answer == found["answer"].split(". ")[0] + "."
    order = [
        "How sure",
        "Every way of training",
        "Block by block",
        "What the search tried",
        "What to do next",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    for fact in (
        "Grey: the excluded difference, ±2.7 points",
        "detectable difference",
        "stopping margin",
        "the head starts from a logistic regression",
        "pilot, all blocks",
        "in 8 of 10 cases",
    ):
        assert fact in text
    assert "better 0." not in text and "P(plan better)" not in text
    assert text.count('class="bar"') == 6  # one a block


def test_three_sizes_have_one_name_each_on_the_page_and_in_the_documentation(tmp_path: Path) -> None:
    page = write_report(QUICKSTART, output=tmp_path / "page.html").read_text()
    guide = (QUICKSTART.parents[1] / "docs" / "verdict.md").read_text()
    for term in ("excluded difference", "detectable difference", "stopping margin"):
        assert term in page and f"**{term[0].upper()}{term[1:]}**" in guide
    assert "δ" not in page + guide


def test_one_share_of_parameters_stands_wherever_a_plan_is_told(tmp_path: Path) -> None:
    """README, stored answer, the answer's own words, `plan show` and the page of one plan."""
    plan = lp.load(QUICKSTART / "plan.json")
    sizes = tuple(
        sum(p.size for p in plan.parameters.values() if p.block == index) for index in range(plan.n_blocks)
    )
    told = [
        (QUICKSTART.parents[1] / "README.md").read_text(),
        json.loads((QUICKSTART / "search.json").read_text())["answer"],
        recommendation(plan.chosen_blocks, Space(sizes)),
        PlanTable(plan).summary().splitlines()[0],
        write_report(QUICKSTART, output=tmp_path / "page.html").read_text(),
    ]
    expected = sum(np.array(sizes)[list(plan.trainable_blocks)]) / sum(sizes)
    shares = [re.findall(r"([\d.]+ %) of the blocks' parameters train", html.unescape(text)) for text in told]
    assert all(shares) and {share for found in shares for share in found} == {f"{100 * expected:.0f} %"}


def test_intervals_wider_than_the_scale_are_not_printed(tmp_path: Path) -> None:
    shutil.copytree(QUICKSTART, tmp_path / "run")
    layers = pd.read_csv(tmp_path / "run/layers.csv").assign(train_gain_low=-1.1, train_gain_high=1.05)
    layers.to_csv(tmp_path / "run/layers.csv", index=False)
    arms = pd.read_csv(tmp_path / "run/baselines.csv")
    arms.loc[arms["arm"] == "all", ["low", "high"]] = [-0.3, 1.2]
    arms.to_csv(tmp_path / "run/baselines.csv", index=False)
    text = write_report(tmp_path / "run").read_text()
    assert "not estimable" in text and "110.0" not in text and "120.0" not in text
    assert "too few trainings to tell the gain" in text
    assert estimate(0.5, -0.2, 1.0) == "not estimable" and estimate(0.5, 0.4, 0.6) == "50.0 (40.0 to 60.0)"


def test_a_plan_equal_to_a_baseline_and_the_probes_are_called_so(tmp_path: Path) -> None:
    shutil.copytree(QUICKSTART, tmp_path / "run")
    arms = pd.read_csv(tmp_path / "run/baselines.csv")
    arms.loc[arms["arm"] == "plan", "plan"] = "......"
    found = json.loads((tmp_path / "run/search.json").read_text())
    found["plan"]["strip"] = "......"
    (tmp_path / "run/search.json").write_text(json.dumps(found))
    probe = {
        "arm": "pixels",
        "plan": "......",
        "test_accuracy": 0.97,
        "low": 0.95,
        "high": 0.98,
        "n_seeds": 1,
    }
    ends = zip(("", "_low", "_high"), (0.03, 0.01, 0.05), strict=True)
    probe |= {f"minus_plan{end}": value for end, value in ends} | {"trainable_parameters": 0}
    pd.concat([arms[arms["n_seeds"] > 1], pd.DataFrame([probe])]).to_csv(
        tmp_path / "run/baselines.csv", index=False
    )
    text = write_report(tmp_path / "run").read_text()
    assert text.count("same plan") == 1
    assert "probe of raw pixels" in text and "+3.0 (+1.0 to +5.0)" in text


def test_two_runs_beside_each_other(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(QUICKSTART, other)
    found = json.loads((other / "search.json").read_text())
    found["answer"] = "Train all blocks. Test accuracy 95.1 %."
    found["provenance"]["arguments"]["budget"] = 40.0
    (other / "search.json").write_text(json.dumps(found))
    path = write_report(QUICKSTART, other, output=tmp_path / "page.html")
    strict(path)
    title, answer = first_words(path)
    assert title == "Which blocks of minilm should train for digits?"
    assert answer == "2 runs give 2 different answers."
    text = path.read_text()
    assert (
        '<th scope="row">budget</th><td data-label="quickstart">20.0</td><td data-label="other">40.0</td>'
        in text
    )
    example("probe").save(tmp_path / "probe")
    strict(write_report(tmp_path / "probe", other))


HOSTILE = "<script>alert(1)</script>\x00\x1b[31m'; rm -rf ~ #$x^2$"


def test_text_from_outside_is_text_everywhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(QUICKSTART, run)
    found = json.loads((run / "search.json").read_text())
    found |= {"model": HOSTILE, "task": HOSTILE, "answer": HOSTILE}
    (run / "search.json").write_text(json.dumps(found))
    path = write_report(run)
    strict(path)
    text = path.read_text()
    assert text.count("<script") == 1 and "\x00" not in text  # our own and "\x1b" not in text
    assert "--model &#x27;&lt;script" in text  # one word for a shell
    example("cka", model=HOSTILE).save(tmp_path / "cka")
    page = write_report(tmp_path / "cka")
    strict(page)
    assert "No figure" not in page.read_text()


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_stands_out_from_what_is_behind_it(theme: dict[str, str]) -> None:
    for ground in ("paper", "pale", "mark"):
        assert contrast(theme["ink"], theme[ground]) >= 4.5
    assert contrast(theme["soft"], theme["paper"]) >= 4.5
    assert contrast(theme["soft"], theme["mark"]) >= 4.5
    assert contrast(theme["on-ink"], theme["on"]) >= 4.5
    for mark in ("blue", "orange", "green", "pink", "yellow", "sky", "grey", "wine"):
        assert contrast(theme[mark], theme["paper"]) >= 3.0


def contrast(first: str, second: str) -> float:
    """Of two colours as #rrggbb, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return sum(weight * s for weight, s in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


class Tags(HTMLParser):
    """Tags and the addresses they point to, as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.addresses: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_nothing_is_loaded_from_elsewhere_and_only_our_own_script_runs(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script><img src=https://example.org/x>"
    Answer(name=hostile).save(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "curve.png")
    text = write_report(tmp_path).read_text()
    tags = Tags()
    tags.feed(text)
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and text.count("<script") == 1
    assert tags.addresses
    assert all(str(address).startswith(("data:", "#")) for address in tags.addresses)
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
    assert marks.count('class="on"') == marks.count('class="half"') == 1 and "half: mlp alone" in marks
    assert page("t", ["<p>x</p>"]).startswith("<!doctype html>")

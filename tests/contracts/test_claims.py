"""No figure stands alone: every claim in README.md and results/ names its command, its n or seeds, and its interval.

A claim is a row of a table with a measured figure (a decimal number, a percentage, or a number with a unit), or an
item of a list with a difference in points. It needs

- an **interval** beside it (`0.81 to 4.39`, `[0.81, 4.39]`, `± 0.2`), or, there or in the text of its section, a word
  why there is none (`NO_INTERVAL`): it is exact or a count, or a best, a median or a single measurement;
- a **basis**, n or seeds (`3 seeds`, `451 test images`, `9 rounds`), beside it or in the text of its page;
- a **command** in code (`make …`, `python …`, `layerprobe …`), beside it or in the text of its page.

README.md is no page of one study: there the text of the section counts, not that of the page. And in the two tables of
studies, in README.md and results/README.md, a row stands alone; its command may be on the page that it links to.
Tables of claims (`answers.csv`) have n, interval and command as columns, and no empty ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
OVERVIEWS = ("README.md", "results/README.md")
PAGES = sorted(
    {
        *OVERVIEWS,
        *(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "results").rglob("*.md")),
    }
)

NUMBER = r"[+−-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
UNIT = r"(?:\s?(?:%|ppm|points?|σ|MiB|GiB|GB|KiB|ms|s|min|h|x|×|times|steps/s)(?!\w))"
FIGURE = re.compile(rf"(?<![\w./-])(?:[+−-]?\d[\d,]*\.\d+(?:e-?\d+)?(?![.\d])|{NUMBER}{UNIT})")
DIFFERENCE = re.compile(r"[+−]\d[\d.]*\s+points")
INTERVAL = re.compile(
    rf"{NUMBER}(?:\s?%)?\s+to\s+{NUMBER}|\[\s*{NUMBER}(?:\s?%)?\s*,\s*{NUMBER}|±\s*{NUMBER}"
)
NO_INTERVAL = re.compile(
    r"\bexact(?:ly)?\b|\bcount(?:s|ed)?\b|\bbest of \d+|\bmedians? of \d+|\bsingle measurement|\bone run\b",
    re.IGNORECASE,
)
THINGS = (
    r"(?:seeds|images|models|rounds|runs|repeats|blocks|entries|tensors|weights|trainings|permutations|pairs)"
)
BASIS = re.compile(
    rf"\b\d[\d,]*(?: and \d+| of \d+)? (?:[\w-]+ ){{0,3}}?{THINGS}\b|\bn = \d|\bseeds? \d|\bbest of \d+|\bmedian of \d+"
    r"|\b(?:two|three|four|five|six|seven|eight|nine|ten) (?:[\w-]+ ){0,2}?(?:seeds|models|rounds|runs)\b"
    r"|\bsingle measurement|\bone run\b"
)
COMMAND = re.compile(r"(?:^|[`\n$ ])(?:\w+=\S+ )*(?:make \w|python \w|layerprobe \w)", re.MULTILINE)
VERSION = re.compile(r"\b\d+\.\d+\.\d+\S*|\barXiv \d+\.\d+|\babs/\d+\.\d+")


class Section(NamedTuple):
    """What stands under one heading: its title, its text without tables, and its tables as lists of rows."""

    title: str
    text: str
    tables: list[list[str]]


def sections(page: str) -> list[Section]:
    """The page cut at its headings; headings and pipes inside code blocks are code."""
    found = [Section("", "", [])]
    code = in_table = False
    for line in page.splitlines():
        code ^= line.startswith("```")
        if line.startswith("#") and not code:
            found.append(Section(line.lstrip("# "), "", []))
        is_row = line.startswith("|") and not code
        if is_row and not in_table:
            found[-1].tables.append([])
        if is_row:
            found[-1].tables[-1].append(line)
        else:
            found[-1] = found[-1]._replace(text=found[-1].text + line + "\n")
        in_table = is_row
    return found


def plain(row: str) -> str:
    """A row without code, addresses and version numbers, in which digits are no figures."""
    return VERSION.sub("", re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "", row)))


def complaints(page: str, name: str, *, root: Path = REPOSITORY) -> list[str]:
    """The claims of a page that lack something, each with what it lacks."""
    parts = sections(page)
    everything = "".join(part.text for part in parts)
    found = []
    for part in parts:
        for row, overview in claims_of(part, name):
            section = "" if overview else part.text
            around = "" if overview else part.text if name == "README.md" else everything
            lacking = []
            if not (INTERVAL.search(plain(row)) or NO_INTERVAL.search(plain(row) + section)):
                lacking.append("an interval, or the word why there is none")
            if not BASIS.search(plain(row) + "\n" + around):
                lacking.append("n or seeds")
            if not (COMMAND.search(row + "\n" + around) or COMMAND.search(pages_behind(row, root))):
                lacking.append("a command")
            if lacking:
                found.append(f"{name}, '{part.title}': {row}\n    lacks {' and '.join(lacking)}")
    return found


def claims_of(part: Section, name: str) -> list[tuple[str, bool]]:
    """The claims of a section, and whether each is a row of a table of studies."""
    rows = [
        (row, name in OVERVIEWS and "answer" in table[0])
        for table in part.tables
        for row in table[2:]
        if FIGURE.search(plain(row))
    ]
    items = re.findall(r"^[-*] .*(?:\n {2,}.*)*", part.text, re.MULTILINE)
    return rows + [(item, False) for item in items if DIFFERENCE.search(item)]


def pages_behind(row: str, root: Path) -> str:
    """The text of the pages and files that a row links to; folders of results are relative to either root."""
    text = ""
    for target in re.findall(r"\]\(([^)#:]+)\)", row):
        for base in (root, root / "results"):
            if (base / target).is_file():
                text += (base / target).read_text(encoding="utf-8")
    return text


@pytest.mark.parametrize("name", PAGES)
def test_every_claim_has_its_interval_its_basis_and_its_command(name: str) -> None:
    page = (REPOSITORY / name).read_text(encoding="utf-8")
    assert complaints(page, name) == []


@pytest.mark.parametrize("name", PAGES)
def test_every_script_that_a_page_names_exists(name: str) -> None:
    scripts = re.findall(
        r"python ((?:analyses|benchmarks|docs)/\w+\.py)", (REPOSITORY / name).read_text(encoding="utf-8")
    )
    assert [script for script in scripts if not (REPOSITORY / script).is_file()] == []


def test_there_are_claims_to_check() -> None:
    claims = [
        claim
        for name in PAGES
        for part in sections((REPOSITORY / name).read_text(encoding="utf-8"))
        for claim in claims_of(part, name)
    ]
    assert len(claims) > 40


def bare_rows(table: pd.DataFrame) -> list[str]:
    """Rows of a table of claims that lack one of the columns."""
    needed = ["n", "interval", "low", "high", "command"]
    if missing := [column for column in needed if column not in table]:
        return [f"no column {', '.join(missing)}"]
    # An undefined end of an interval is said to be undefined: then the claim is not shown.
    judged = table if "verdict" not in table else table[table["verdict"] != "not shown"]
    empty = table[["n", "interval", "command"]].isna().any(axis=1)
    open_ended = judged[["low", "high"]].isna().any(axis=1)
    return [str(row) for row in [*table[empty].index, *judged[open_ended].index]]


def test_every_row_of_a_table_of_claims_is_complete() -> None:
    tables = sorted((REPOSITORY / "results").rglob("answers.csv"))
    assert {
        path.as_posix(): bare_rows(pd.read_csv(path)) for path in tables if bare_rows(pd.read_csv(path))
    } == {}


def test_an_incomplete_row_of_a_table_of_claims_is_noticed() -> None:
    row = {
        "n": 451,
        "interval": "95 %",
        "low": -1.0,
        "high": 10.2,
        "command": "make quickstart",
        "verdict": "above",
    }
    assert bare_rows(pd.DataFrame([row])) == []
    for column in ("n", "interval", "low", "high", "command"):
        assert bare_rows(pd.DataFrame([row | {column: None}])) == ["0"]
        assert bare_rows(pd.DataFrame([row]).drop(columns=column)) == [f"no column {column}"]
    assert bare_rows(pd.DataFrame([row | {"low": None, "verdict": "not shown"}])) == []


GOOD = """# A study

`python analyses/a_study.py`: 2,000 test images, 3 seeds.

| arm | accuracy | 95 % interval |
| --- | ---: | --- |
| plan | 73.0 % | 62.8 to 83.2 |
"""
OVERVIEW = """| question | command | answer |
| --- | --- | --- |
| Which? | `make quickstart` | +4.6 points (95 % interval −1.0 to +10.2, 3 seeds) |
"""


@pytest.mark.parametrize(
    ("page", "name", "taken", "left", "lack"),
    [
        (GOOD, "results/a/README.md", "| 62.8 to 83.2 ", "| ", "an interval"),
        (GOOD, "results/a/README.md", "2,000 test images, 3 seeds", "digits", "n or seeds"),
        (GOOD, "results/a/README.md", "`python analyses/a_study.py`", "A script", "a command"),
        (OVERVIEW, "README.md", "95 % interval −1.0 to +10.2, ", "", "an interval"),
        (OVERVIEW, "README.md", ", 3 seeds", "", "n or seeds"),
        (OVERVIEW, "results/README.md", "`make quickstart`", "see above", "a command"),
        (
            GOOD + "\n- plan − all: +4.6 points, −1.0 to +10.2\n",
            "results/a/README.md",
            ", −1.0 to +10.2",
            "",
            "an interval",
        ),
        # In a table of studies a row stands alone: text around it does not help.
        ("3 seeds, exact, `make it`\n\n" + OVERVIEW, "README.md", ", 3 seeds)", ")", "n or seeds"),
    ],
)
def test_a_claim_without_one_of_them_is_noticed(
    page: str, name: str, taken: str, left: str, lack: str
) -> None:
    assert complaints(page, name) == []
    assert taken in page
    (complaint,) = complaints(page.replace(taken, left), name)
    assert f"lacks {lack}" in complaint


@pytest.mark.parametrize(
    ("row", "is_claim"),
    [
        ("| plan | 73.0 % |", True),
        ("| speed | 12 times |", True),
        ("| p | 0.3 |", True),
        ("| memory | 271 MiB |", True),
        ("| captum 0.9.0 | reads `0.5` |", False),
        ("| blocks | 0, 1, 4 and 5 of 6 |", False),
        ("| [paper](https://arxiv.org/abs/2604.01833) | arXiv 2604.01833 |", False),
    ],
)
def test_what_counts_as_a_claim(row: str, is_claim: bool) -> None:
    assert bool(FIGURE.search(plain(row))) == is_claim

"""Pages in a real browser, where Chromium is installed: no error, nothing cut at 400 pixels, text that can be read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from records_of_commands import example

from layerprobe.report import write_report

QUICKSTART = Path(__file__).parents[2] / "results/quickstart"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

CONTRASTS = """() => {
  const channel = s => { s /= 255; return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; };
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const c = rgb(getComputedStyle(node).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    if (parseFloat(style.fontSize) === 0) continue;
    const ink = rgb(node instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(node))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra [dev] is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = [write_report(QUICKSTART, output=folder / "search.html")]
    for command in ("probe", "cka", "outliers", "bridge", "evaluate"):
        example(command).save(folder / command)
        made.append(write_report(folder / command))
    made.append(write_report(folder / "probe", QUICKSTART, output=folder / "two.html"))
    return made


def test_a_press_on_a_heading_sorts_the_table(browser: Any, pages: list[Path]) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(pages[0].as_uri())
    table = page.locator("table.stack", has=page.locator("thead button", has_text="test")).first
    head = table.locator("thead th", has=page.locator("button", has_text="test")).first
    column = head.evaluate("node => node.cellIndex")

    def values() -> list[float]:
        texts = table.locator(f"tbody tr > :nth-child({column + 1})").all_text_contents()
        return [float(text.split()[0]) for text in texts]

    before = values()
    head.locator("button").press("Enter")  # as a keyboard does
    assert head.get_attribute("aria-sort") == "descending"
    assert values() == sorted(before, reverse=True) != before
    head.locator("button").click()
    assert values() == sorted(before)
    page.close()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pages_in_a_browser(browser: Any, pages: list[Path], width: int, theme: str) -> None:
    for path in pages:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
        errors: list[str] = []
        page.on("console", lambda message, seen=errors: seen.append(message.text))
        page.on("pageerror", lambda error, seen=errors: seen.append(str(error)))
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert errors == [], path.name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
        found = page.evaluate(CONTRASTS)
        assert len(found) > 20
        assert [pair for pair in found if pair[0] < 4.5] == [], path.name
        page.close()

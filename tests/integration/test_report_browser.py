"""Pages in a real browser, where Chromium is installed: no error, nothing cut at 400 pixels, text that can be read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from records_of_commands import example

from layerprobe.report import write_report

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "results/quickstart"
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


def test_the_documentation_is_searched_from_the_disk(browser: Any, tmp_path: Path) -> None:
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="the extra [docs] is not installed")
    from mkdocs.config import load_config

    docs = REPOSITORY / "docs"
    (tmp_path / "docs/assets").mkdir(parents=True)
    shutil.copy(docs / "assets/iframe-worker.js", tmp_path / "docs/assets")
    (tmp_path / "docs/index.md").write_text("# Home\n\nhello\n")
    (tmp_path / "docs/plans.md").write_text("# Plans\n\nA freeze plan of zebras.\n")
    whole = yaml.load((REPOSITORY / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    kept = {name: whole[name] for name in ("site_name", "use_directory_urls", "extra")}
    (tmp_path / "mkdocs.yml").write_text(
        yaml.safe_dump(
            kept | {"theme": {"name": "material", "font": False}, "plugins": whole["plugins"][:2]}
        ).replace("'false'", "false")
    )
    mkdocs.build(load_config(str(tmp_path / "mkdocs.yml")))
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "site/index.html").as_uri())
    page.wait_for_load_state("networkidle")
    page.keyboard.press("/")
    page.keyboard.type("zebras", delay=30)
    page.locator(".md-search-result__item", has_text="A freeze plan of zebras").first.wait_for(timeout=20_000)
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
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

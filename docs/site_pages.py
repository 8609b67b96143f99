"""What the site shows from outside docs/: results, notebooks as they were executed, changelog, contributing.

A hook of MkDocs (see mkdocs.yml). Notebooks are shown, not run; a test runs them.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from layerprobe import __version__

REPOSITORY = Path(__file__).resolve().parents[1]
LINKED = ("analyses", "benchmarks")
"""Folders of scripts that pages link to; shown as the files they are."""

PICTURES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}


def on_config(config: Any) -> None:
    """Name the version below every page; fill the sections of the navigation whose pages come from outside docs/."""
    config.copyright = f"layerprobe {__version__}"
    section(config.nav, "Tutorials").extend(f"notebooks/{path.stem}.md" for path in notebooks())
    section(config.nav, "Results").append("results/README.md")
    section(config.nav, "Project").extend(["CONTRIBUTING.md", "CHANGELOG.md"])


def on_files(files: Any, config: Any) -> Any:
    """Add the files themselves."""
    from mkdocs.structure.files import File

    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        files.append(from_disk(name, config))
    for path in sorted((REPOSITORY / "results").rglob("*")):
        if path.is_file():
            files.append(from_disk(path.relative_to(REPOSITORY).as_posix(), config))
    for folder in LINKED:
        for path in sorted((REPOSITORY / folder).glob("*.py")):
            files.append(from_disk(path.relative_to(REPOSITORY).as_posix(), config))
    for path in notebooks():
        text, pictures = notebook_page(json.loads(path.read_text(encoding="utf-8")), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of docs/ lead to what `on_files` added: on the site those files lie beside the pages of docs/."""
    path = page.file.src_path
    if not (REPOSITORY / "docs" / path).exists():
        return markdown
    up = "../" * (path.count("/") + 1)
    return markdown.replace(f"]({up}", f"]({up.removeprefix('../')}")


def section(nav: list[dict[str, Any]], title: str) -> list[Any]:
    """The list of pages under a title of the navigation."""
    pages = next(entry[title] for entry in nav if title in entry)
    assert isinstance(pages, list)
    return pages


def notebooks() -> list[Path]:
    """The notebooks, in order; none is fine."""
    return sorted((REPOSITORY / "notebooks").glob("[0-9]*.ipynb"))


def result_pages() -> list[str]:
    """Pages of results, as paths from the repository."""
    pages = sorted((REPOSITORY / "results").rglob("*.md"))
    return [path.relative_to(REPOSITORY).as_posix() for path in pages]


def from_disk(path: str, config: Any) -> Any:
    """A file of the repository, at the same path in the site."""
    from mkdocs.structure.files import File

    return File(path, str(REPOSITORY), config.site_dir, config.use_directory_urls)


def notebook_page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook with its stored outputs as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(f"```python\n{source}\n```")
            for index, output in enumerate(cell.get("outputs", ())):
                parts.append(shown_output(output, f"{stem}-{number}-{index}", pictures))
    return "\n\n".join(part for part in parts if part) + "\n", pictures


def shown_output(output: dict[str, Any], name: str, pictures: dict[str, bytes]) -> str:
    """One output of a cell: the richest form there is."""
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```" if output["name"] == "stdout" else ""
    if output["output_type"] == "error":
        raise ValueError(f"notebook output {name} is an error: {output['ename']}: {output['evalue']}")
    data = output["data"]
    for kind, suffix in PICTURES.items():
        if kind in data:
            content = "".join(data[kind])
            pictures[f"{name}.{suffix}"] = content.encode() if suffix == "svg" else base64.b64decode(content)
            return f"![Output of the cell above]({name}.{suffix})"
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    if "text/html" in data:
        return f'<div class="output">\n{without_blank_lines("".join(data["text/html"]))}\n</div>'
    return f"```text\n{''.join(data.get('text/plain', ''))}\n```"


def without_blank_lines(html: str) -> str:
    """HTML that Markdown takes as one piece: a blank line would end it."""
    return "\n".join(line for line in html.splitlines() if line.strip())

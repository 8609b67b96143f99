"""The page of any other run: its question and answer, the figure of its record, its table, what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerprobe.errors import BrokenFileError, LayerprobeError
from layerprobe.files import read_json
from layerprobe.reading import check_fields
from layerprobe.records import FIGURES, SavedRecord, figure_of, saved_record
from layerprobe.report import page as html
from layerprobe.report.drawing import drawn
from layerprobe.report.page import PROVENANCE_FIELDS

SHOWN_ROWS = 200
MOST_PNG_BYTES = 600 << 10
"""Figures of the folder are embedded up to this size in all, so that a page stays below 1 MiB."""

QUESTIONS = {
    "outliers": "How heavy are the tails of the weights of {model}?",
    "compare": "Do {model} and {other} differ in their outlier parameters?",
    "features": "What does each layer of {model} hold for {task}?",
    "cka": "Which layers of {model} and {other} are alike on {task}?",
    "probe": "How much of {task} can be read off each layer of {model}?",
    "transfer": "Which layers of {model} does {task} call for, by transfer scores?",
    "attribute": "Which blocks of {model} do predictions on {task} rest on?",
    "bridge": "What did training {model} on random labels of {task} change?",
    "evaluate": "Which way of training {model} does best on {task}?",
    "plan-show": "What does this plan train of {model}?",
}
CAPTIONS = {
    "outliers": "Share of weights far from the mean of their tensor, by block and module kind.",
    "compare": "Ratio of the outlier ratios of the two sides, with 95 % intervals.",
    "features": "Largest offset of a feature from zero, layer by layer.",
    "cka": "Debiased linear CKA of every layer with every layer.",
    "probe": "Test accuracy of a linear probe of each layer, and the controls.",
    "transfer": "One transfer score layer by layer, with its 95 % interval.",
    "attribute": "What is lost without each block, with one standard error over images.",
    "bridge": "Relative change of the weights of each block.",
    "evaluate": "Test accuracy of each arm against its training cost.",
}
NEXT_STEPS = {
    "outliers": "layerprobe compare {model} OTHER-MODEL",
    "compare": "layerprobe outliers --model {model}",
    "features": "layerprobe probe --model {model} --task {task}",
    "cka": "layerprobe probe --model {model} --task {task}",
    "probe": "layerprobe freeze-search --model {model} --task {task} -o search",
    "transfer": "layerprobe freeze-search --model {model} --task {task} -o search",
    "attribute": "layerprobe freeze-search --model {model} --task {task} -o search",
    "bridge": "layerprobe evaluate --model {folder} --task {task} --seeds 3",
    "evaluate": "layerprobe freeze-search --model {model} --task {task} -o search",
}


def read_records(folder: Path) -> dict[str, SavedRecord]:
    """The saved records (`<command>.json`) of a folder by name; BrokenFileError where there is none."""
    records = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path, what="record", inside=folder)
        if _is_record(content):
            check_fields(content, {"provenance?": (PROVENANCE_FIELDS, type(None))}, path)
            records[path.stem] = saved_record(content, path)
    if not records:
        raise BrokenFileError(
            f"{folder} holds no finished layerprobe run (no search.json, no <command>.json with rows); "
            "name the folder that a command was given with -o"
        )
    return records


def record_sections(folder: Path) -> tuple[str, list[str]]:
    """Title and sections for a folder that holds saved records; BrokenFileError where there is none."""
    records = read_records(folder)
    sections: list[str] = []
    first = next(iter(records.values()))
    for name, record in records.items():
        title = html.heading(question_of(record), record.answer)
        sections.append(title if record is first else title.replace("<h1>", "<h2>").replace("</h1>", "</h2>"))
        sections += [record_figure(record, name=name), _tables(record, name)]
    sections += _pictures(folder, {"probe", "drift", *records})
    if record_step := NEXT_STEPS.get(first.command):
        words = {**_words(first), "folder": folder.name}
        line = record_step.format(**{key: html.quoted(value) for key, value in words.items()})
        sections += ["<h2>What to do next</h2>", html.commands(line)]
    sections.append(html.repeat_section(first.provenance))
    return question_of(first), sections


def _is_record(content: object) -> bool:
    return (
        isinstance(content, dict)
        and str(content.get("schema", "")).startswith("layerprobe.")
        and isinstance(content.get("rows"), list)
    )


def _words(record: SavedRecord) -> dict[str, str]:
    words = {"other": "itself"}
    for key, column in (("model", "model"), ("task", "task"), ("other", "model_y")):
        known = record.frame[column].dropna().tolist() if column in record.frame else []
        words[key] = str(known[0]) if known else words.get(key, f"the {key}")
    return words


def question_of(record: SavedRecord) -> str:
    """What a record answers."""
    if record.command not in QUESTIONS:  # the name comes from the file: it is no template
        return f"What does {record.command} say?"
    return QUESTIONS[record.command].format_map(_words(record))


def record_figure(record: SavedRecord, *, name: str) -> str:
    """The figure of a record, or a line that says why there is none."""
    if record.command not in FIGURES:
        return ""
    draw, frame = figure_of(record.command), record.frame
    height = 5.2 if record.command in ("cka", "compare") else 3.8
    try:
        return drawn(
            lambda ax: draw(frame, ax=ax), CAPTIONS.get(record.command, ""), name=name, height=height
        )
    except (LayerprobeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        # The rows may be those of another version, or of somebody who meant harm: the page goes without a figure.
        return f'<p class="soft">No figure: {html.text(type(error).__name__)}: {html.text(error)}</p>'


def _tables(record: SavedRecord, name: str) -> str:
    rows = record.table()
    shown = rows[:SHOWN_ROWS]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    known = [column for column in columns if any(row.get(column) is not None for row in shown)]
    more = f'<p class="soft">{len(rows) - SHOWN_ROWS:,} more rows in {html.text(name)}.csv</p>'
    inner = html.records_table(shown, known) + (more if len(rows) > SHOWN_ROWS else "")
    return inner if record.rows else html.folded(f"the first rows of {name}.csv", inner)


def _pictures(folder: Path, known: set[str]) -> list[str]:
    """The folder's other figures, folded; those that would make the page too large are named."""
    shown, left, total = [], [], 0
    for path in sorted(folder.glob("*.png")):
        if path.stem in known:
            continue
        picture = html.figure(path, folder, path.stem.replace("_", " "))
        total += len(picture)
        if total > MOST_PNG_BYTES:
            left.append(path.name)
        else:
            shown.append(picture)
    note = [f'<p class="soft">Too large for this page: {html.text(", ".join(left))}</p>'] if left else []
    return [html.folded("more figures", "".join([*shown, *note]))] if shown or note else []


def flat(values: Mapping[str, Any], within: str = "") -> dict[str, str]:
    """Nested settings as `outer.inner` → text."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{within}{key}.")
        else:
            found[f"{within}{key}"] = str(value)
    return found

"""The page of several runs beside each other: their answers, where their settings differ, and their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprobe.reading import is_there
from layerprobe.report import page as html
from layerprobe.report.freeze_search import main_figure
from layerprobe.report.runs import flat, question_of, read_records, record_figure
from layerprobe.report.search_run import SearchRun


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a comparison shows of one run."""

    name: str
    question: str
    answer: str
    accuracy: str
    blocks: str
    figure: str
    provenance: Mapping[str, Any]


def comparison_sections(folders: Sequence[Path]) -> tuple[str, list[str]]:
    """Title and sections of a page about several run folders; BrokenFileError as for each of them."""
    runs = [_summary(folder, index) for index, folder in enumerate(folders)]
    names = " and ".join(run.name for run in runs)
    questions = list(dict.fromkeys(run.question for run in runs))
    title = questions[0] if len(questions) == 1 else f"What do {names} say?"
    answers = list(dict.fromkeys(html.first_sentence(run.answer)[0] for run in runs))
    verdict = (
        f"{len(runs)} runs give the same answer: {answers[0]}"
        if len(answers) == 1
        else f"{len(runs)} runs give {len(answers)} different answers."
    )
    columns = ["run", "answer", "blocks", "test accuracy, %"]
    rows = [
        [html.text(run.name), html.text(run.answer), run.blocks or "–", run.accuracy or "–"] for run in runs
    ]
    if not any(run.blocks for run in runs):
        columns, rows = columns[:2], [row[:2] for row in rows]
    sections = [f'<h1>{html.text(title)}</h1>\n<p class="answer">{html.text(verdict)}</p>']
    sections += [f'<div class="words">{html.table(columns, rows)}</div>']
    sections += ["<h2>Where their settings differ</h2>", _differences(runs)]
    for run in runs:
        sections += [f"<h2>{html.text(run.name)}: {html.text(run.question)}</h2>", run.figure]
    for run in runs:
        sections += [f"<h3>{html.text(run.name)}</h3>", html.repeat_section(run.provenance)]
    return title, sections


def _summary(folder: Path, index: int) -> Summary:
    name = folder.resolve().name
    if is_there(folder / "search.json"):
        run = SearchRun.read(folder)
        mine = run.recommended
        return Summary(
            name=name,
            question=run.question,
            answer=run.found["answer"],
            accuracy=html.estimate(mine["test_accuracy"], mine["low"], mine["high"]),
            blocks=html.strip(run.states(mine["plan"]), legend=False),
            figure=main_figure(run, name=f"run{index}"),
            provenance=run.found["provenance"],
        )
    record = next(iter(read_records(folder).values()))
    return Summary(
        name=name,
        question=question_of(record),
        answer=record.answer,
        accuracy="",
        blocks="",
        figure=record_figure(record, name=f"run{index}"),
        provenance=record.provenance,
    )


def _differences(runs: Sequence[Summary]) -> str:
    settings = [flat(run.provenance.get("arguments") or {}) for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    rows = [
        [html.text(key), *(html.text(one.get(key, "–")) for one in settings)]
        for key in keys
        if len({one.get(key, "–") for one in settings}) > 1
    ]
    if not rows:
        return "<p>In nothing that was recorded.</p>"
    return f'<div class="words">{html.table(["setting", *(run.name for run in runs)], rows)}</div>'

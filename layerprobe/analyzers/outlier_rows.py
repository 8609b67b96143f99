"""The long table of an outlier report, row by row: as many rows as there are are written without being held."""

from __future__ import annotations

import csv as csv_module
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple, TextIO

import numpy as np

from layerprobe.analyzers.outlier_scan import ScannedTensor
from layerprobe.metrics.outliers import OutlierRules, TensorOutliers
from layerprobe.tables import COLUMNS

EXTRA = ("level", "group", "kind", "stack", "tensor", "entry")
"""The columns behind the common ones."""


class Owner(NamedTuple):
    """What a row is about: everything that the rows of one tensor (or roll-up) have in common."""

    level: str
    block: int | None = None
    group: str | None = None
    kind: str | None = None
    stack: str | None = None
    tensor: str | None = None


class Cell(NamedTuple):
    """What one row says of its owner."""

    metric: str
    value: float | None
    n: int | None = None
    reason: str | None = None
    entry: str | None = None


Rows = Iterable[tuple[Owner, list[Cell]]]


def tensor_rows(tensors: Iterable[ScannedTensor], rules: OutlierRules) -> Iterator[tuple[Owner, list[Cell]]]:
    """The rows of every tensor and part."""
    for row in tensors:
        place = row.place
        level = "tensor" if row.part_of is None else "part"
        owner = Owner(
            level, block=place.block, group=place.group, kind=place.kind, stack=place.stack, tensor=row.name
        )
        if row.found is None:
            yield owner, [Cell("count", None, reason=f"skipped: {row.skip}")]
            continue
        cells = metric_cells(row.found, rules, rules.sigmas)
        n = row.found.n
        for rank, (value, index) in enumerate(row.found.top, start=1):
            cells.append(Cell(f"top_entry_{rank}", value, n, entry=str(coordinates(row.shape, index))))
        for axis, found in row.found.axes.items():
            # What is a column of a linear layer is a row of a transposed Conv1D: named by what it carries.
            line = {"row": "column", "column": "row"}[axis] if place.transposed else axis
            if isinstance(found, str):
                cells.append(Cell(f"{line}_outlier_count_4z", None, reason=found))
                continue
            entry = str(list(found.lines)) if found.lines else None
            cells.append(Cell(f"{line}_outlier_count_4z", found.count, found.n, entry=entry))
            cells.append(Cell(f"{line}_max_z", found.max_z, found.n))
        yield owner, cells


def metric_cells(found: TensorOutliers, rules: OutlierRules, sigmas: Sequence[float]) -> list[Cell]:
    """Sizes, values, counts and what is undefined; of the counts beyond kσ those of `sigmas`."""
    size, n = found.size, found.n
    cells = [
        Cell("count", n, size),
        Cell("nonfinite", found.nan + found.inf, size),
        Cell("nan_count", found.nan, size),
        Cell("inf_count", found.inf, size),
    ]
    cells += [Cell(metric, value, n) for metric, value in found.values.items()]
    hidden = {f"{k:g}sigma" for k in rules.all_sigmas} - {f"{k:g}sigma" for k in sigmas}
    for rule, count in found.counts.items():
        if rule in hidden:
            continue
        of = found.counted[rule]
        cells.append(Cell(f"outlier_count_{rule}", count, of))
        if of:
            cells.append(Cell(f"outlier_ratio_{rule}", count / of, of))
            cells.append(Cell(f"outlier_ppm_{rule}", count / of * 1e6, of))
        else:
            cells.append(Cell(f"outlier_ratio_{rule}", None, n=0, reason="no finite entries"))
    if found.reasons:
        rule_names = _rule_names(rules)
        for name, reason in found.reasons.items():
            cells.append(
                Cell(f"outlier_ratio_{name}" if name in rule_names else name, None, n=n, reason=reason)
            )
    return cells


@cache
def _rule_names(rules: OutlierRules) -> frozenset[str]:
    return frozenset(rules.definitions())


def coordinates(shape: tuple[int, ...], index: int) -> list[int]:
    """The place of a flat index."""
    return [int(i) for i in np.unravel_index(index, shape)] if shape else []


def dict_rows(rows: Rows) -> Iterator[dict[str, object]]:
    """Plain dictionaries, for a data frame."""
    for owner, cells in rows:
        about = owner._asdict()
        for cell in cells:
            yield about | cell._asdict()


def write_tables(
    rows: Rows,
    csv: TextIO | None,
    body: TextIO | None,
    *,
    named: Mapping[str, str],
    facts: Mapping[str, object],
) -> None:
    """Write the rows, in one pass, as the CSV that a data frame would write and as a record's JSON object.

    `named` holds model, revision and schema, `facts` what else stands in the object; either stream may be None.
    """
    model, revision = named["model"], named["revision"]
    if csv is not None:
        csv.write(",".join((*COLUMNS, *EXTRA)) + "\n")
    if body is not None:
        body.write('{\n "schema": ' + json.dumps(named["schema"]))
        for key, value in facts.items():
            text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
            body.write(f",\n {json.dumps(key)}: " + text.replace("\n", "\n "))
        body.write(',\n "rows": [')
    between = "\n  "
    constants = f'{{"model": {_json(model)}, "revision": {_json(revision)}, "task": null, "split": null, '
    for owner, cells in rows:
        values = [_text(cell.value) for cell in cells]
        if csv is not None and cells:
            # model, revision, task, split, block, site | metric, value, stderr, n, seed, reason | the rest
            head = _csv(model, revision, None, None, owner.block, None)
            tail = _csv(owner.level, owner.group, owner.kind, owner.stack, owner.tensor)
            csv.writelines(
                f"{head},{c.metric},{value},,{'' if c.n is None else c.n},,{_csv(c.reason)},{tail},{_csv(c.entry)}\n"
                for c, value in zip(cells, values, strict=True)
            )
        if body is not None and cells:
            head = f'{constants}"block": {_json(owner.block)}, "site": null, "metric": "'
            tail = "".join(f', "{name}": {_json(getattr(owner, name))}' for name in EXTRA[:-1])
            lines = [
                f'{head}{c.metric}", "value": {value or "null"}, "stderr": null, "n": {_json(c.n)}, "seed": null, '
                f'"reason": {_json(c.reason)}{tail}, "entry": {_json(c.entry)}}}'
                for c, value in zip(cells, values, strict=True)
            ]
            body.write(between + ",\n  ".join(lines))
            between = ",\n  "
    if body is not None:
        body.write("\n ]\n}\n")


def _text(value: float | None) -> str:
    """A finite number; empty for what is undefined."""
    if value is None:
        return ""
    number = repr(float(value))
    return "" if number in ("nan", "inf", "-inf") else number


def _json(value: str | int | None) -> str:
    if value is None:
        return "null"
    return str(value) if isinstance(value, int) else json.dumps(value, ensure_ascii=False)


def _csv(*values: str | int | None) -> str:
    if values == (None,):
        return ""
    texts = ["" if value is None else str(value) for value in values]
    if not any(character in text for text in texts for character in ',"\n\r'):
        return ",".join(texts)
    line = io.StringIO()
    csv_module.writer(line, lineterminator="").writerow(texts)
    return line.getvalue()

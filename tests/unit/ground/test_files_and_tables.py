from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

from layerprobe.errors import BrokenFileError, LayerprobeError, UsageError, did_you_mean
from layerprobe.files import atomic_write, output_folder, read_json, write_json
from layerprobe.provenance import command_line, provenance
from layerprobe.records import Record
from layerprobe.tables import COLUMNS, read_frame, render_table, strict_rows, strict_value, tidy, write_frame


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as aside:
        aside.write_text("half of the n")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(LayerprobeError, match=r"the disk is full: .*x\.json was not written"),
        atomic_write(tmp_path / "x.json"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"value": float("nan")})
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "cut.json").write_text('{"a": [1, 2')
    with pytest.raises(BrokenFileError, match=r"cannot read plan .*cut\.json: not valid JSON"):
        read_json(tmp_path / "cut.json", what="plan")
    with pytest.raises(BrokenFileError, match="No such file"):
        read_json(tmp_path / "absent.json")


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match=r"output folder .*taken is a file"):
        output_folder(tmp_path / "taken")
    with pytest.raises(UsageError, match="is not writable"):
        output_folder("/proc/no-such-place/run")


def test_undefined_values_become_null_never_nan() -> None:
    frame = tidy(
        [{"metric": "a", "value": np.float64("nan"), "reason": "constant"}, {"metric": "b", "value": np.inf}]
    )
    rows = strict_rows(frame)
    assert [row["value"] for row in rows] == [None, None]
    json.dumps([*rows, strict_value({"n": np.int64(3), "nan": float("nan")})], allow_nan=False)


def test_tidy_puts_the_shared_columns_first_and_keeps_integers(tmp_path: Path) -> None:
    frame = tidy(
        [{"block": 3, "metric": "m", "value": 1.5, "tensor": "w"}, {"block": None, "metric": "m"}], model="x"
    )
    assert list(frame.columns) == [*COLUMNS, "tensor"]
    assert strict_rows(frame)[0]["block"] == 3
    assert isinstance(strict_rows(frame)[0]["block"], int)
    for ending in ("csv", "parquet"):
        back = read_frame(write_frame(frame, tmp_path / f"t.{ending}"))
        assert back["value"].tolist()[0] == 1.5
    with pytest.raises(UsageError, match=r"end it with \.csv or \.parquet"):
        write_frame(frame, tmp_path / "t.xls")


def test_a_table_reads_the_same_in_text_markdown_and_html() -> None:
    rows = [{"arm": "a<b", "n": 12345, "value": 0.123456}, {"arm": "all", "n": 2, "value": float("nan")}]
    assert render_table(rows) == "arm       n   value\na<b  12,345  0.1235\nall       2       –"
    assert render_table(rows, "markdown").splitlines()[1:] == [
        "| --- | ---: | ---: |", "| a<b | 12,345 | 0.1235 |", "| all | 2 | – |"
    ]  # fmt: skip
    page = render_table(rows, "html", columns=["arm", "value"])
    assert '<tr><td class="t">a&lt;b</td><td>0.1235</td></tr>' in page
    assert '<tr><td class="t">all</td><td>–</td></tr>' in page
    assert "12,345" not in page
    assert render_table([], "html") == '<p class="soft">none</p>'


@dataclass(repr=False)
class Tiny(Record):
    command: ClassVar[str] = "tiny"
    provenance: dict[str, Any] = field(default_factory=lambda: provenance("tiny", {"n": 1}))

    def to_frame(self) -> pd.DataFrame:
        return tidy([{"metric": "answer", "value": 42.0}])

    def summary(self) -> str:
        return "a < b"


def test_records_save_show_and_say_where_they_come_from(tmp_path: Path) -> None:
    Tiny().save(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "tiny.json").read_text())
    assert saved["schema"] == "layerprobe.tiny/v1"
    assert saved["rows"][0]["value"] == 42.0
    assert saved["provenance"]["versions"]["layerprobe"]
    assert "a &lt; b" in Tiny()._repr_html_()
    assert repr(Tiny()) == "<Tiny: a < b>"


def test_suggestions() -> None:
    assert did_you_mean("lama-7b", ["llama-7b", "gpt2"]) == " Did you mean 'llama-7b'?"
    assert did_you_mean("zzz", ["llama-7b"]) == ""


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/bin/layerprobe", "probe", "--task", "my set"], "layerprobe probe --task 'my set'"),
        (["/x/layerprobe/__main__.py", "env"], "layerprobe env"),
        (["/x/pytest/__main__.py", "env"], None),
        (["notebook"], None),
    ],
)
def test_the_command_line_is_ours_or_none(
    argv: list[str], line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", argv)
    assert command_line() == line

"""Every record draws itself, is read back from its file, and shows itself in a notebook."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import transformers
from matplotlib.axes import Axes
from records_of_commands import ROWS, example
from safetensors import safe_open

import layerprobe as lp
from layerprobe.analyzers.features import FeatureTable
from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.records import FIGURES, SavedRecord

QUICKSTART = Path(__file__).parents[3] / "results/quickstart"


def test_every_command_has_a_figure_and_an_example() -> None:
    assert set(FIGURES) == set(ROWS)
    for name in FIGURES.values():
        module, function = name.split(".")
        assert callable(getattr(getattr(lp.plotting, module), function))


@pytest.mark.parametrize("command", sorted(ROWS))
@pytest.mark.parametrize("ending", ["", "saved.json"])
def test_a_record_comes_back_from_its_file_and_draws_itself(
    command: str, ending: str, tmp_path: Path
) -> None:
    made = example(command)
    target = tmp_path / ending if ending else tmp_path
    made.save(target)
    back = lp.load(target)
    assert isinstance(back, SavedRecord) and back.command == command
    assert back.summary() == made.answer and back.table() == made.rows
    pd.testing.assert_frame_equal(
        back.to_frame()[["metric", "value"]], made.to_frame()[["metric", "value"]], check_dtype=False
    )
    ax = back.plot()
    assert isinstance(ax, Axes)
    ax.get_figure().canvas.draw()
    plt.close(ax.get_figure())
    shown = back._repr_html_()
    assert "The answer of" in shown and "block 0" in shown and "NaN" not in shown


def test_a_file_of_rows_alone_and_what_is_no_record(tmp_path: Path) -> None:
    example("probe").save(tmp_path / "probe.csv")
    assert lp.load(tmp_path / "probe.csv").plot() is not None
    with pytest.raises(UsageError, match="there is no file"):
        lp.load(tmp_path / "nothing.json")
    with pytest.raises(UsageError, match="holds none"):
        lp.load(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({"schema": "other/v1", "rows": []}))
    with pytest.raises(BrokenFileError, match="its schema is 'other/v1'"):
        lp.load(tmp_path / "x.json")
    (tmp_path / "y.json").write_text("[1]")
    with pytest.raises(BrokenFileError, match="cannot read"):
        lp.load(tmp_path / "y.json")
    for command in ("probe", "cka"):
        example(command).save(tmp_path)
    with pytest.raises(UsageError, match=r"cka\.json, probe\.json; name its file"):
        lp.load(tmp_path)


def test_a_search_and_a_plan_come_back_as_themselves() -> None:
    result = lp.load(QUICKSTART)
    kept = pd.read_csv(QUICKSTART / "trials.csv")
    assert result.facts["model"] == "minilm" and list(result.trials["plan"]) == list(kept["plan"])
    assert result.plan == lp.load(QUICKSTART / "plan.json")
    assert isinstance(result.plot(), Axes)
    assert "arm" in result._repr_html_()
    assert len(repr(result.plan)) < 200
    assert result.plan._repr_html_().count('title="block') == 6
    plt.close("all")


def test_public_names() -> None:
    assert {"plot_cka", "plot_differences", "search", "style"} <= set(dir(lp.plotting))
    assert lp.plotting.plot_cka.__name__ == "plot_cka"
    with pytest.raises(AttributeError, match="no attribute 'plot_nothing'"):
        _ = lp.plotting.plot_nothing
    assert {"Backbone", "Task", "load"} <= set(dir(lp))
    assert isinstance(lp.load_task("digits", limit=30), lp.Task)
    assert (Path(lp.__file__).parent / "py.typed").exists()


def tiny() -> tuple[lp.Backbone, lp.Task]:
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=32)
    backbone = lp.load_backbone(transformers.GPT2Model(config), patch_size=4)
    return backbone, lp.load_task("digits", limit=60)


def test_backbone_and_task_show_themselves_in_short() -> None:
    backbone, task = tiny()
    assert isinstance(backbone, lp.Backbone)
    assert repr(backbone).count("\n") == 0 and "3 blocks" in repr(backbone)
    assert "<table" in backbone._repr_html_() and "patch_size" in backbone._repr_html_()
    assert "10 classes" in task._repr_html_() and "validation" in task._repr_html_()


def test_features_become_files_of_other_programs(tmp_path: Path) -> None:
    backbone, task = tiny()
    parts = [
        lp.extract_features(backbone, task, name, cache_dir=tmp_path, quiet=True) for name in task.splits
    ]
    path = parts[0].export(tmp_path / "f.safetensors")
    with safe_open(path, framework="np") as stored:
        assert set(stored.keys()) == {*map(str, parts[0].layers), "labels"}
        assert np.array_equal(stored.get_tensor("block.1.resid_post"), parts[0][1])
        assert json.loads(stored.metadata()["ids"]) == parts[0].ids.tolist()
    stacked = np.load(parts[0].export(tmp_path / "f.npy"))
    assert stacked.shape == (len(parts[0]), *parts[0][0].shape)
    names = [path.name for path in FeatureTable(parts).export(tmp_path / "all.npy")]
    assert names == ["all.train.npy", "all.validation.npy", "all.test.npy"]
    with pytest.raises(UsageError, match=r"end it with \.safetensors or \.npy"):
        parts[0].export(tmp_path / "f.pt")

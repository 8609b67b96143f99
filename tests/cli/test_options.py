"""Option groups: what a command is handed, and in which order its help shows the options."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerprobe.choices import SPLITS
from layerprobe.cli import options
from layerprobe.cli.options import option
from layerprobe.cli.output import Output
from layerprobe.errors import UnknownNameError, UsageError


@options.backbone_options(model="gpt2")
@options.task_options()
@options.layer_options()
def command(
    backbone: options.BackboneOptions,
    task: options.TaskOptions,
    layers: options.LayerOptions,
    own: int = option(3, "Of this command alone."),
    pooling: str | None = option("cls", "Its own idea of an option of a group."),
) -> None:
    """A command of three groups."""
    seen.update(backbone=backbone, task=task, layers=layers, own=own, pooling=pooling)


seen: dict[str, object] = {}


def test_a_command_gets_one_object_a_group_and_shared_options_once() -> None:
    parameters = inspect.signature(command).parameters
    assert list(parameters)[:6] == ["named_model", "model", "task", "own", "pooling", "revision"]
    assert list(parameters).count("seed") == 1
    given = {name: item.default for name, item in parameters.items()}
    assert given["model"] == "gpt2" and given["task"] is inspect.Parameter.empty
    command(**{**given, "task": "digits", "seed": 7})
    assert seen["backbone"] == options.BackboneOptions(model="gpt2", seed=7, pooling="cls")
    assert seen["task"] == options.TaskOptions(task="digits", seed=7)
    assert seen["layers"] == options.LayerOptions()
    assert (seen["own"], seen["pooling"]) == (3, "cls")


def test_lists_of_names_and_numbers() -> None:
    assert options.name_list(" knn, ridge,") == ["knn", "ridge"]
    assert options.learning_rates("3e-4, 1e-3") == (3e-4, 1e-3)
    with pytest.raises(UsageError, match="'fast' is no list of learning rates"):
        options.learning_rates("fast")
    with pytest.raises(
        UnknownNameError, match=r"unknown split 'tset'.* Choose from: train, validation, test"
    ):
        options.check_name("split", "tset", SPLITS)


@pytest.mark.parametrize("quiet", [False, True])
def test_what_reading_a_task_left_out_is_said_unless_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    rng = np.random.default_rng(0)
    for name in ["train/ant"] * 12 + ["train/bee"] * 12 + ["test"] * 5:
        path = tmp_path / name / f"{rng.integers(10**9)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)).save(path)
    options.TaskOptions(task=str(tmp_path)).load(Output("features", quiet=quiet))
    said = capsys.readouterr()
    remark = (
        f"{tmp_path}: 5 images of test/ lie in no class folder, so they have no labels and were left out\n"
    )
    assert (said.out, said.err) == ("", "" if quiet else remark)


def test_small_models_get_one_thread_and_the_option_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from layerprobe.cli.processes import SMALL, choose_threads

    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for threads, parameters in ((None, SMALL - 1), (None, SMALL), (3, SMALL - 1)):
        choose_threads(threads, parameters)
    assert asked == [1, 3]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # whoever set it wants it so
    choose_threads(None, SMALL - 1)
    assert asked == [1, 3]


def test_options_are_spelt_alike_everywhere() -> None:
    """No second name of a thing, a model by its place wherever one is named, and no flag without effect."""
    from test_start import all_commands

    other_names = {
        "--finetune-steps",
        "--lr",
        "--n-sigma",
        "--num-seeds",
        "--n-seeds",
        "--num-threads",
        "--resume",
    }
    for name, command in all_commands().items():
        flags = {flag for one in command.params for flag in one.opts}
        assert not flags & other_names, name
        if "--model" in flags and name not in ("worker", "plan check", "plan lint"):
            assert any(one.param_type_name == "argument" for one in command.params), name
        told = " ".join([command.help or "", *(getattr(one, "help", None) or "" for one in command.params)])
        assert "no effect" not in told.lower(), name

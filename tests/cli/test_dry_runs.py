"""`--dry-run` refuses what the run would refuse, and counts the tokens that it would meet."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from families import save
from PIL import Image

COMMANDS = ["features", "cka", "probe", "transfer", "attribute", "freeze-search", "bridge", "evaluate"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of 3 blocks and 128 positions."""
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision model for images of 32×32 in patches of 8."""
    return save("vit", tmp_path_factory.mktemp("vit"))


def mistakes() -> list[tuple[str, ...]]:
    """Commands with one wrong value each, which stands last."""
    wrong = [(command, "--task", "digit") for command in COMMANDS]
    wrong += [(command, "--task", "./nofolder") for command in COMMANDS]
    wrong += [(command, "--model", "./nomodel") for command in COMMANDS]
    wrong += [
        ("evaluate", "--arms", "langage"),
        ("evaluate", "--mode", "finetun"),
        ("evaluate", "--finetune", "pln"),
        ("evaluate", "--seeds", "1,1"),
        ("evaluate", "--augment", "strong"),
        ("bridge", "--augment", "strong"),
        ("bridge", "--lrs", "-1"),
        ("bridge", "--steps", "0"),
        ("bridge", "--random-classes", "1"),
        ("bridge", "--plan", "nope.json"),
        ("probe", "--sites", "resid"),
        ("probe", "--blocks", "9"),
        ("probe", "--init", "randm"),
        ("probe", "--stem", "pcaa"),
        ("probe", "--attention", "causl"),
        ("probe", "--pooling", "clss"),
        ("probe", "--patch-size", "5"),
        ("probe", "--refit", "tain"),
        ("probe", "--C", "-2"),
        ("features", "--split", "trian"),
        ("features", "--store-dtype", "float8"),
        ("features", "--blocks", "9"),
        ("features", "--sites", "resid"),
        ("cka", "--split", "all"),
        ("cka", "--blocks", "9"),
        ("cka", "--init-b", "randm"),
        ("cka", "--model-b", "./nomodel"),
        ("probe", "--pooling", "cls"),
        ("attribute", "--methods", "skp"),
        ("attribute", "--head", "prob"),
        ("attribute", "--split", "tset"),
        ("attribute", "--tolerance", "2"),
        ("transfer", "--head", "prob"),
        ("freeze-search", "--objective", "frugl"),
        ("freeze-search", "--must-freeze", "9"),
        ("freeze-search", "--must-train", "9"),
        ("freeze-search", "--budget", "1"),
        ("freeze-search", "--seeds", "1"),
        ("freeze-search", "--precision", "float8"),
        ("freeze-search", "--lrs", "-2"),
        ("freeze-search", "--baselines", "all,firts-5"),
        ("freeze-search", "--min-frozen", "9"),
    ]
    return wrong


@pytest.mark.parametrize("wrong", mistakes(), ids=" ".join)
def test_a_wrong_value_is_refused_and_named(run_cli: Callable, llama: Path, wrong: tuple[str, ...]) -> None:
    command, flag, value = wrong
    usual = {"--model": str(llama), "--task": "digits", flag: value}
    result = run_cli(command, *(word for pair in usual.items() for word in pair), "--dry-run")
    assert (result.code, result.out) == (2, ""), result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert value.split(",")[-1].removeprefix("./") in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_images_is_refused(
    run_cli: Callable, llama: Path, tmp_path: Path, command: str
) -> None:
    result = run_cli(command, "--model", llama, "--task", tmp_path, "--dry-run")
    assert result.code == 2
    assert f"no images in {tmp_path}" in result.err


@pytest.mark.parametrize("flags", [["--dry-run"], []])
@pytest.mark.parametrize("flag", ["--model", "--task", "--data-dir"])
def test_a_folder_that_is_not_there_is_bad_usage_whichever_option_names_it(
    run_cli: Callable, llama: Path, flag: str, flags: list[str]
) -> None:
    usual = {"--model": str(llama), "--task": "digits", flag: "./nofolder"}
    result = run_cli("features", *(word for pair in usual.items() for word in pair), *flags)
    assert result.code == 2
    assert "nofolder" in result.err


def test_models_are_compared_in_groups_of_some(run_cli: Callable, llama: Path) -> None:
    assert "at least two different models, got 1" in run_cli("compare", llama, "--dry-run").err
    assert "at least two names" in run_cli("compare", "--group", f"a={llama}", "--dry-run").err
    assert "'many'" in run_cli("outliers", "--model", llama, "--sigmas", "many", "--dry-run").err


def test_keeping_a_bridge_without_one_is_refused(run_cli: Callable, llama: Path) -> None:
    arguments = ["--model", llama, "--task", "digits", "--preset", "quickstart", "--keep-bridge", "--dry-run"]
    assert "there is none; give --bridge-steps" in run_cli("freeze-search", *arguments).err


# Tokens -------------------------------------------------------------------------------------------


def tokens(run_cli: Callable, command: str, *arguments: object) -> str:
    result = run_cli(command, *arguments, "--dry-run", "--json")
    assert result.code == 0, result.err
    return str(json.loads(result.out)["tokens an image"])


@pytest.mark.parametrize("command", ["probe", "freeze-search", "bridge", "evaluate"])
@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["--task", "digits"], 64),
        (["--task", "digits", "--patch-size", "4"], 4),
        (["--task", "digits", "--patch-size", "4", "--image-size", "32"], 64),
        (["--task", "cifar100"], 64),
        (["--task", "cifar100", "--patch-size", "8"], 16),
        (["--task", "mnist"], 49),
        (["--task", "imagenet-1k", "--patch-size", "56"], 16),
    ],
)
def test_tokens_follow_patch_image_and_task(
    run_cli: Callable, llama: Path, command: str, arguments: list[str], count: int
) -> None:
    assert tokens(run_cli, command, "--model", llama, *arguments) == str(count)


def test_what_cannot_be_known_is_assumed_aloud(run_cli: Callable, llama: Path) -> None:
    assert tokens(run_cli, "probe", "--model", llama, "--task", "someone/pictures").startswith("64, assumed")


def test_a_vision_model_counts_by_its_own_size(run_cli: Callable, vit: Path) -> None:
    assert tokens(run_cli, "probe", "--model", vit, "--task", "digits") == "17"  # 4 × 4 and the class token
    assert tokens(run_cli, "probe", "--model", vit, "--task", "digits", "--image-size", "64") == "65"
    result = run_cli("probe", "--model", vit, "--task", "digits", "--attention", "causal", "--dry-run")
    assert result.code == 2 and "is a vision model" in result.err


def test_too_many_patches_for_the_model_are_told_before_the_run(run_cli: Callable, llama: Path) -> None:
    arguments = ["--model", llama, "--task", "cifar100", "--patch-size", "2", "--dry-run"]
    result = run_cli("bridge", *arguments)
    assert result.code == 2
    assert "256 patches do not fit" in result.err and "has 128 positions" in result.err


def picture(path: Path, side: int, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, dtype=np.uint8)).save(path)


def test_class_folders_are_counted_by_their_first_image(
    run_cli: Callable, llama: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(("cats", "dogs")):
        for index in range(3):
            picture(tmp_path / name / f"{index}.png", 16, 10 * number + index)
    arguments = ["--model", llama, "--task", tmp_path]
    assert tokens(run_cli, "probe", *arguments, "--patch-size", "4") == "16"
    # The other images may be larger: nothing is refused by the first one alone.
    assert tokens(run_cli, "probe", *arguments, "--patch-size", "7").startswith("64, assumed")


def test_a_folder_of_one_class_is_refused(run_cli: Callable, llama: Path, tmp_path: Path) -> None:
    picture(tmp_path / "cats" / "0.png", 8, 1)
    result = run_cli("probe", "--model", llama, "--task", tmp_path, "--dry-run")
    assert result.code == 2 and "of one class" in result.err


def test_idx_files_and_parquet_are_counted_by_their_heads(
    run_cli: Callable, llama: Path, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    idx, parquet = tmp_path / "idx", tmp_path / "parquet"
    idx.mkdir()
    # The pixels are missing: a dry run that read them would refuse the file.
    (idx / "train-images-idx3-ubyte").write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 60, 28, 28))
    (idx / "train-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 60))
    assert tokens(run_cli, "probe", "--model", llama, "--task", idx, "--patch-size", "7") == "16"
    result = run_cli("probe", "--model", llama, "--task", idx, "--patch-size", "5", "--dry-run")
    assert result.code == 2 and "patch size 5 does not divide images of 28×28" in result.err

    picture(parquet / "image.png", 24, 7)
    data = (parquet / "image.png").read_bytes()
    table = pa.table({"image": [{"bytes": data, "path": None}] * 4, "label": [0, 1, 0, 1]})
    pq.write_table(table, parquet / "train.parquet")
    arguments = ["--model", llama, "--task", "cifar100", "--data-dir", parquet]
    assert tokens(run_cli, "probe", *arguments, "--patch-size", "8") == "9"
    result = run_cli("probe", "--model", llama, "--task", f"{parquet}:colour", "--dry-run")
    assert result.code == 2 and "colour" in result.err

"""Which files are a model's weights: the order of preference, what lies beside them, and answers for the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from layerprobe.errors import BrokenFileError, NotAvailableError
from layerprobe.files import unread_weights, weight_files


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")
    return path


@pytest.mark.parametrize(
    ("there", "read", "also"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"], None),
        (
            ["pytorch_model.bin", "adapter_model.safetensors", "vae.safetensors"],
            ["pytorch_model.bin"],
            "adapter_model",
        ),
        (["pytorch_model.bin", "optimizer.bin", "training_args.bin"], ["pytorch_model.bin"], None),
        (
            ["model.safetensors", "model_1.safetensors"],
            ["model.safetensors"],
            r"not read: model_1\.safetensors",
        ),
        (["unet.safetensors", "unet.fp16.safetensors"], ["unet.safetensors"], r"not read: unet\.fp16"),
        (
            ["a.safetensors", "b.safetensors", "optimizer.safetensors"],
            ["a.safetensors", "b.safetensors"],
            None,
        ),
        (["consolidated.00.pth"], ["consolidated.00.pth"], None),
        (
            ["w-00001-of-00002.bin", "w-00002-of-00002.bin"],
            ["w-00001-of-00002.bin", "w-00002-of-00002.bin"],
            None,
        ),
    ],
)
def test_what_is_read_and_what_is_said_not_to_be(
    tmp_path: Path, there: list[str], read: list[str], also: str | None
) -> None:
    files, placed = weight_files(folder(tmp_path, *there))
    assert [file.name for file in files] == read and not placed
    said = unread_weights(tmp_path, files)
    assert (said is None) if also is None else (said is not None and re.search(also, said))


def test_the_index_says_what_belongs(tmp_path: Path) -> None:
    folder(tmp_path, "model-1.safetensors", "model-overlay.safetensors", "model-old.safetensors")
    index = {"a": "model-1.safetensors", "b": "model-overlay.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    files, placed = weight_files(tmp_path)
    assert [file.name for file in files] == ["model-1.safetensors", "model-overlay.safetensors"]
    assert {name: file.name for name, file in placed.items()} == index
    assert "not read: model-old.safetensors" in str(unread_weights(tmp_path, files))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (
            ["consolidated.00.pth", "consolidated.01.pth"],
            r"cut into 2 parts \(consolidated\.00\.pth .* convert them",
        ),
        (["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"], "cut into 2 parts"),
        (["adapter_model.safetensors"], "an adapter alone, not a model: merge it"),
        (
            ["global_step10/mp_rank_00_model_states.pt", "latest"],
            r"DeepSpeed checkpoint: run its zero_to_fp32\.py",
        ),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], r"ZeRO checkpoint: run its zero_to_fp32\.py"),
        (["__0_0.distcp"], "torch.distributed.checkpoint.format_utils dcp_to_torch"),
        (["model.gguf"], "GGUF weights: convert"),
    ],
)
def test_what_is_no_whole_model_is_answered(tmp_path: Path, there: list[str], message: str) -> None:
    with pytest.raises(NotAvailableError, match=message):
        weight_files(folder(tmp_path, *there))


def test_shards_without_an_index_are_counted(tmp_path: Path) -> None:
    folder(tmp_path, "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    with pytest.raises(BrokenFileError, match="2 of 3 shards and no index; finish the download"):
        weight_files(tmp_path)

"""Names to files, and each mistake a person makes on the way: one clear line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import save

from layerprobe.backbones import load_backbone, resolve_model
from layerprobe.backbones.catalog import MODELS
from layerprobe.backbones.resolve import weights_hash
from layerprobe.errors import BrokenFileError, NotAvailableError, UnknownNameError, UsageError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_unknown_names_get_suggestions() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown model 'lama-7b'\. Did you mean 'llama-7b'.*layerprobe ls models"
    ):
        resolve_model("lama-7b")
    with pytest.raises(UnknownNameError, match=r"there is no folder \./nowhere"):
        resolve_model("./nowhere")


def test_not_cached_while_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        NotAvailableError,
        match=r"'llama-7b' \(huggyllama/llama-7b\) is not cached and offline mode is on \(HF_HUB_OFFLINE=1\)",
    ):
        resolve_model("llama-7b", offline=True)
    with pytest.raises(NotAvailableError, match=r"not cached .*; download it first or pass a local folder"):
        resolve_model("somebody/something", offline=True)


def test_a_folder_without_configuration_or_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenFileError, match=r"holds no weights: looked for \*\.safetensors"):
        resolve_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(BrokenFileError, match=r"holds no config\.json"):
        resolve_model(str(folder))


@pytest.mark.parametrize("keep", [4, 200, 0.5, 0.99])
def test_truncated_weights(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(BrokenFileError, match=r"cannot load the weights of '.*model'"):
        load_backbone(str(folder), device="cpu")


def test_missing_tensors_are_not_replaced_by_random_numbers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(BrokenFileError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj\.weight"):
        load_backbone(str(folder), device="cpu")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/outside.safetensors"])
def test_an_index_that_leaves_its_folder(folder: Path, shard: str) -> None:
    index = {"weight_map": {"a": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenFileError, match="names a path outside its folder"):
        resolve_model(str(folder))


def test_an_index_that_names_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(BrokenFileError, match=r"names a missing shard: model-2\.safetensors"):
        resolve_model(str(folder))


def test_broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llam')
    with pytest.raises(BrokenFileError, match="cannot read the configuration"):
        load_backbone(str(folder), device="cpu")
    (folder / "config.json").write_text('{"model_type": "nonexistent-kind"}')
    with pytest.raises(BrokenFileError, match="nonexistent-kind"):
        load_backbone(str(folder), device="cpu")


def test_remote_code_runs_only_when_asked_for(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(UsageError, match="pass --trust-remote-code"):
        load_backbone(str(folder), device="cpu")
    assert not (folder / "ran").exists()


def test_missing_device_and_unknown_names(folder: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(NotAvailableError, match=r"device 'cuda' was asked for, .*use --device cpu"):
            load_backbone(str(folder), device="cuda")
    with pytest.raises(UnknownNameError, match="unknown device 'gpu7'"):
        load_backbone(str(folder), device="gpu7")
    with pytest.raises(UnknownNameError, match="unknown dtype 'int3'"):
        load_backbone(str(folder), device="cpu", dtype="int3")


def test_too_little_memory_is_told_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERPROBE_MEMORY_LIMIT", "1000")
    with pytest.raises(NotAvailableError, match=r"needs 0\.0 GiB for its weights in float32, but cpu has"):
        load_backbone(str(folder), device="cpu")


def test_local_weights_have_a_revision_that_follows_their_bytes(folder: Path) -> None:
    before = weights_hash(folder)
    assert weights_hash(folder) == before
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert weights_hash(folder) != before
    assert resolve_model(str(folder)).revision == weights_hash(folder)


def test_the_alias_table_is_well_formed() -> None:
    for alias, entry in MODELS.items():
        assert alias == alias.lower()
        assert entry.hub_id.count("/") == 1
        assert entry.pretrained_on in ("language", "vision")


def test_finding_files_loads_no_torch(folder: Path) -> None:
    code = (
        f"from layerprobe.backbones import resolve_model; resolve_model({str(folder)!r}); import sys; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

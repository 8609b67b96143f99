"""Names to files, and each mistake a person makes on the way: one clear line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from families import save

from layerprobe.backbones import resolve_model
from layerprobe.backbones.catalog import MODELS
from layerprobe.backbones.resolve import weights_hash
from layerprobe.errors import BrokenFileError, NotAvailableError, UnknownNameError


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


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/outside.safetensors"])
def test_an_index_that_leaves_its_folder(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenFileError, match="which is not a file of its folder"):
        resolve_model(str(folder))


def test_an_index_that_names_a_missing_shard(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-2.bin"}}')
    assert resolve_model(str(folder)).folder == folder, "an index that nobody follows"
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(
        BrokenFileError, match=r"names model-2\.safetensors for tensor 'a', and that file is missing"
    ):
        resolve_model(str(folder))


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

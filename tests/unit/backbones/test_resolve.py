"""Names to files, and each mistake a person makes on the way: one clear line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from families import save

from layerprobe.backbones import resolve, resolve_model
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
        resolve_model("llama-7b")
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


def test_the_name_follows_the_file_that_is_loaded_not_what_lies_beside_it(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"one")
    first = weights_hash(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"another adapter")
    assert weights_hash(folder) == first
    (folder / "pytorch_model.bin").write_bytes(b"two")
    assert weights_hash(folder) != first


@pytest.mark.parametrize("keep_times", [True, False])
def test_any_byte_of_a_large_file_changes_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_times: bool
) -> None:
    monkeypatch.setenv("LAYERPROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resolve, "_REMEMBERED_FROM", 10)
    monkeypatch.setattr(resolve, "_SETTLED_SECONDS", -1)
    path = folder / "model.safetensors"
    before = weights_hash(folder)
    assert (tmp_path / "cache" / "weight_digests.json").is_file()
    with monkeypatch.context() as patch:  # the second time no byte is read
        patch.setattr(resolve.hashlib, "file_digest", None)
        assert weights_hash(folder) == before
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if keep_times:  # as rsync and cp -p do
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights_hash(folder) != before


def test_weights_in_bin_are_fetched_though_an_adapter_is_a_safetensors(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, snapshot = folder, tmp_path / "0123abc"
    (repository / "model.safetensors").rename(repository / "adapter_model.safetensors")
    (repository / "pytorch_model.bin").write_bytes(b"weights")
    snapshot.mkdir()

    def download(_id: str, *, allow_patterns: list[str], **_options: object) -> str:
        for file in repository.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert resolve_model("owner/name").folder == snapshot
    assert (snapshot / "pytorch_model.bin").is_file()


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

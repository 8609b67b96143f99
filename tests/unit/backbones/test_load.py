"""From files to a model: damaged weights, missing tensors, remote code, memory, and the meta device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from families import FAMILIES, save

from layerprobe.backbones import load_backbone
from layerprobe.backbones.load import load_for_dry_run
from layerprobe.errors import BrokenFileError, NotAvailableError, UnknownNameError, UsageError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


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


def test_broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llam')
    with pytest.raises(BrokenFileError, match="cannot read model configuration"):
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


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_meta_device_has_the_same_model_without_values(family: str, tmp_path: Path) -> None:
    folder = str(save(family, tmp_path))
    real, meta = load_backbone(folder, device="cpu"), load_backbone(folder, device="meta")
    assert meta.layout == real.layout
    assert (meta.n_parameters, meta.weights_bytes) == (real.n_parameters, real.weights_bytes)
    shapes = [{name: p.shape for name, p in backbone.model.named_parameters()} for backbone in (real, meta)]
    assert shapes[0] == shapes[1]
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    differing = {key for key, value in real.describe().items() if meta.describe()[key] != value}
    assert differing <= {"attention"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_dry_runs_count_the_tokens_that_a_run_meets(family: str, tmp_path: Path) -> None:
    folder = str(save(family, tmp_path))
    backbone = load_for_dry_run(folder, task_size=32, device="cpu", patch_size=8)
    n_tokens = backbone.count_tokens()
    assert backbone.run_device.type == "cpu"
    assert n_tokens == 16 + backbone.n_prefix(n_tokens)
    assert backbone.tokens_in_words == str(n_tokens)


def test_an_uncertain_image_size_refuses_nothing(folder: Path) -> None:
    guess = load_for_dry_run(str(folder), task_size=16, task_size_certain=False, patch_size=5, device="cpu")
    assert (guess.count_tokens(), guess.tokens) == (None, 64)
    with pytest.raises(UsageError, match="patch size 5 does not divide images of 16×16"):
        load_for_dry_run(str(folder), task_size=16, patch_size=5, device="cpu")


def test_a_configuration_of_far_more_parameters_than_the_files_hold(tmp_path: Path) -> None:
    """Refused before hours are spent on random values for them."""
    folder = save("vit", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"num_channels": 1_000_000}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BrokenFileError, match=r"its configuration announces .* parameters"):
        load_backbone(str(folder), device="cpu")

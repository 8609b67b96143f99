"""A checkpoint's model has exactly the checkpoint's weights, or the reason why not stands in one line."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import save
from safetensors.torch import load_file, save_file

from layerprobe.backbones import load_backbone
from layerprobe.errors import BrokenFileError, NotAvailableError, UsageError

Q = "layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def change(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    state.update({name.replace("__", "."): value for name, value in tensors.items()})
    save_file(state, path, metadata={"format": "pt"})


def configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    "name",
    ["model__layers__0__mlp__extra__weight", "model__layers__7__mlp__up_proj__weight", "model__norm__bias"],
)
def test_a_tensor_left_over_inside_the_backbone_is_an_error(folder: Path, name: str) -> None:
    change(folder, **{name: torch.zeros(4)})
    with pytest.raises(BrokenFileError, match=r"has no place .*nothing was loaded"):
        load_backbone(str(folder), device="cpu")


def test_a_tensor_left_over_around_it_is_a_remark(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, value_head__weight=torch.zeros(4))
    load_backbone(str(folder), device="cpu")
    assert "1 tensors around the backbone are not used (first: value_head.weight)" in capsys.readouterr().err


def test_what_the_class_declares_or_makes_itself_is_no_error(folder: Path) -> None:
    change(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    load_backbone(str(folder), device="cpu")


def test_a_head_that_was_not_in_the_file_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save("vit", tmp_path, num_labels=4)
    path = folder / "model.safetensors"
    save_file(
        {n: t for n, t in load_file(path).items() if "classifier" not in n}, path, metadata={"format": "pt"}
    )
    backbone = load_backbone(str(folder), device="cpu")
    assert "around the backbone are not in the checkpoint (first: classifier.bias)" in capsys.readouterr().err
    with pytest.raises(UsageError, match="brings no image classifier"):
        backbone.own_logits(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("overlay", ["model-z.safetensors", "a-overlay.safetensors"])
def test_the_tensor_that_is_loaded_is_the_one_of_the_index(folder: Path, overlay: str) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-base.safetensors")
    wanted = torch.full_like(state[f"model.{Q}"], 0.25)
    save_file({f"model.{Q}": wanted}, folder / overlay)
    table = {name: overlay if name == f"model.{Q}" else "model-base.safetensors" for name in state}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    model = load_backbone(str(folder), device="cpu").model
    assert torch.equal(model.get_parameter(Q), wanted)
    others = {n: p for n, p in model.named_parameters() if n != Q}
    assert all(torch.equal(p, state[f"model.{n}"]) for n, p in others.items())


def test_an_adapter_beside_the_weights_is_not_applied(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    found = load_backbone(str(folder), device="cpu").model
    state = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, state[f"model.{n}"]) for n, p in found.named_parameters())
    assert "not read: adapter_model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["config", "beside"])
def test_a_quantisation_that_transformers_passes_over_is_refused(folder: Path, where: str) -> None:
    if where == "config":
        configure(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    else:
        (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(
        NotAvailableError, match=r"are quantised \((modelopt|FP8).*would be taken for weights"
    ):
        load_backbone(str(folder), device="cpu")


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_never_become_weights(folder: Path, dtype: torch.dtype, scale: bool) -> None:
    if dtype == torch.float8_e4m3fn and not scale:
        pytest.skip("float8 without scales is a cast, not a code")
    codes = (100 * torch.rand(32, 32)).to(dtype)
    change(folder, **{f"model.{Q}": codes}, **({f"model.{Q}_scale": torch.ones(1)} if scale else {}))
    with pytest.raises((NotAvailableError, BrokenFileError), match=r"integer codes|has no place"):
        load_backbone(str(folder), device="cpu")


def test_a_package_that_is_missing_is_one_line(folder: Path) -> None:
    if transformers.utils.is_optimum_available():
        pytest.skip("optimum is here")
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(NotAvailableError, match=r"needs a package that is not here: .*optimum"):
        load_backbone(str(folder), device="cpu")


def test_what_transformers_warns_of_is_said_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transformers.LlamaForCausalLM.from_pretrained.__func__

    def warning(cls: Any, *args: Any, **kwargs: Any) -> Any:
        logging.getLogger("transformers.somewhere").warning("mind the gap\nand much more")
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", classmethod(warning))
    load_backbone(str(folder), device="cpu")
    assert "transformers: mind the gap\n" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_that_was_saved_by_itself_loads_as_what_it_is(family: str, tmp_path: Path) -> None:
    if family == "t5":
        whole = load_backbone(str(save("t5", tmp_path / "whole")), device="cpu").model
    else:
        config = transformers.BartConfig(
            d_model=32, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99,
        )  # fmt: skip
        transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
        whole = load_backbone(str(tmp_path / "whole"), device="cpu").model
    whole.save_pretrained(tmp_path / "tower")
    again = load_backbone(str(tmp_path / "tower"), device="cpu").model
    assert type(again) is type(whole)
    before, after = whole.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)

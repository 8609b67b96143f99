"""A model object in place of a name: found inside its wrappers, read as it is, left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import transformers
from families import NAMED_FAMILIES
from torch import nn

import layerprobe as lp
from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.tasks import Task

peft = pytest.importorskip("peft", reason="the extra [peft] is not installed")

LORA = peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)


def gpt2(kind: str = "GPT2Model") -> transformers.PreTrainedModel:
    _, config, arguments = NAMED_FAMILIES["gpt2"]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**arguments))


def compiled_blocks() -> nn.Module:
    model = gpt2()
    for index, block in enumerate(model.h):
        model.h[index] = torch.compile(block)
    return model


def compiled_in_place() -> nn.Module:
    model = gpt2()
    model.compile()
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "bare": gpt2,
    "with a head": lambda: gpt2("GPT2LMHeadModel"),
    "compiled": lambda: torch.compile(gpt2("GPT2LMHeadModel")),
    "compiled in place": compiled_in_place,
    "compiled blocks": compiled_blocks,
    "peft": lambda: peft.get_peft_model(gpt2("GPT2LMHeadModel"), LORA),
    "compiled peft": lambda: torch.compile(peft.get_peft_model(gpt2("GPT2LMHeadModel"), LORA)),
}


@pytest.fixture(scope="module")
def digits() -> Task:
    return lp.load_task("digits", limit=60)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, nothing about the model may be changed for good."""

    def state() -> tuple[object, ...]:
        modules = list(model.modules())
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules]
        flags = {name: (p.requires_grad, p.dtype, p.data_ptr()) for name, p in model.named_parameters()}
        return hooks, flags, [m.training for m in modules]

    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    yield
    assert state() == before
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_model_in_a_wrapper_is_read_and_left_as_it_was(kind: str, digits: Task) -> None:
    model = WRAPPED[kind]().train()
    with untouched(model):
        backbone = lp.load_backbone(model, patch_size=4)
        features = lp.extract_features(backbone, digits, quiet=True)
        lp.attribute_layers(backbone, digits, methods=["skip"], n_images=4, quiet=True)
        lp.transfer_scores(backbone, digits, quiet=True, batch_size=16)
    assert backbone.n_blocks == 3 and backbone.checked is not None and backbone.checked.withheld is None
    inner = backbone.model
    hidden = []
    handles = [block.register_forward_hook(lambda *a: hidden.append(a[2])) for block in inner.h]
    pixels = backbone.preprocess(digits.train.images(range(8)))
    inner.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        inner(inputs_embeds=backbone.stem(pixels))
    for handle in handles:
        handle.remove()
    for index, output in enumerate(hidden):
        own = (output[0] if isinstance(output, tuple) else output).mean(1).numpy()
        np.testing.assert_allclose(features[index][:8], own, rtol=1e-4, atol=1e-5)


def test_adapters_are_part_of_what_is_measured(digits: Task) -> None:
    plain = lp.load_backbone(gpt2(), patch_size=4)
    tuned = lp.load_backbone(peft.get_peft_model(gpt2(), LORA), patch_size=4)
    first, second = (lp.extract_features(b, digits, quiet=True) for b in (plain, tuned))
    assert first["block.2.resid_post"].shape == second["block.2.resid_post"].shape
    assert not np.allclose(first["block.2.resid_post"], second["block.2.resid_post"])
    assert plain.source.revision != tuned.source.revision
    assert tuned.layout.mlp_outputs[0] == "h.0.mlp.c_proj"


@pytest.mark.parametrize("change", ["in place", "through .data"])
def test_changed_weights_are_another_revision_with_features_of_their_own(change: str, digits: Task) -> None:
    model = gpt2()
    backbone = lp.load_backbone(model, patch_size=4)
    revision, before = backbone.source.revision, lp.extract_features(backbone, digits, quiet=True)
    assert revision.startswith("memory-") and backbone.source.revision == revision
    with torch.no_grad():
        if change == "in place":
            model.h[0].mlp.c_fc.weight.mul_(2)
        else:
            model.h[0].mlp.c_fc.weight.data[0, 0] += 1
    after = lp.extract_features(backbone, digits, quiet=True)
    assert after.revision == backbone.source.revision != revision == before.revision
    assert not np.array_equal(before["block.0.resid_post"], after["block.0.resid_post"])


def test_the_same_weights_have_the_same_revision_compiled_or_not() -> None:
    revisions = {lp.load_backbone(made(), patch_size=4).source.revision for made in (gpt2, compiled_in_place)}
    revisions.add(lp.load_backbone(torch.compile(gpt2()), patch_size=4).source.revision)
    revisions.add(lp.load_backbone(compiled_blocks(), patch_size=4).source.revision)
    assert len(revisions) == 1


def vit() -> transformers.PreTrainedModel:
    kind, config, arguments = NAMED_FAMILIES["vit"]
    return getattr(transformers, kind)(getattr(transformers, config)(**arguments))


def test_a_vision_model_takes_its_image_processor(digits: Task, capsys: pytest.CaptureFixture[str]) -> None:
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.2] * 3)
    with_it = lp.load_backbone(vit(), processor=processor)
    assert with_it.preprocessing.mean == (0.2,) * 3 and with_it.preprocessing.output_size == (32, 32)
    assert "recipe" not in capsys.readouterr().err
    without = lp.load_backbone(vit())
    assert "ViTForImageClassification holds no preprocessing recipe" in capsys.readouterr().err
    assert without.preprocessing.size == (32, 32)
    assert lp.extract_features(with_it, digits, quiet=True)["block.0"].shape == (60, 32)


def llava() -> transformers.PreTrainedModel:
    _, _, text = NAMED_FAMILIES["llama"]
    _, _, image = NAMED_FAMILIES["clip-vision"]
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**image), text_config=transformers.LlamaConfig(**text)
    )
    return transformers.LlavaForConditionalGeneration(config)


def test_a_tower_of_a_multimodal_model(digits: Task) -> None:
    model = llava()
    assert lp.load_backbone(model).modality == "vision"
    text = lp.load_backbone(model, tower="model.language_model", patch_size=4)
    assert text.modality == "language" and text.n_blocks == 3
    assert text.model is model.model.language_model
    with pytest.raises(
        UnknownNameError, match=r"has no model 'model.language'. Did you mean .*language_model'"
    ):
        lp.load_backbone(model, tower="model.language")


def test_what_cannot_be_taken_is_one_line() -> None:
    with pytest.raises(UsageError, match="Sequential is no model of transformers"):
        lp.load_backbone(nn.Sequential(nn.Linear(2, 2)))
    with torch.device("meta"):
        empty = gpt2()
    with pytest.raises(UsageError, match="has no values"):
        lp.load_backbone(empty)
    soft = peft.get_peft_model(
        gpt2("GPT2LMHeadModel"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(UsageError, match=r"learns a prompt \(PROMPT_TUNING\)"):
        lp.load_backbone(soft)
    with pytest.raises(UsageError, match="dtype says how a model is loaded"):
        lp.load_backbone(gpt2(), dtype="bfloat16")
    with pytest.raises(UsageError, match="init says how a model is loaded"):
        lp.load_backbone(gpt2(), init="random")
    with pytest.raises(UsageError, match="tower and processor are for a model in memory"):
        lp.load_backbone("minilm", tower="encoder")


def test_a_model_without_blocks_is_one_line() -> None:
    model = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    )
    with pytest.raises(UsageError) as caught:
        lp.load_backbone(model)
    assert "\n" not in str(caught.value) and "ResNet" in str(caught.value)


def test_a_processor_and_an_image_size_contradict_one_another() -> None:
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    with pytest.raises(UsageError, match="two sizes"):
        lp.load_backbone(vit(), processor=processor, image_size=16)

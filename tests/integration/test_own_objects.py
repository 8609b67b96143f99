"""The README's script on one's own model and images, and the same script with other objects in their place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import layerprobe as lp
from layerprobe.errors import UsageError

README = Path(__file__).resolve().parents[2] / "README.md"
DIGITS = load_digits()
IMAGES = [Image.fromarray((16 * d.clip(0, 15)).astype("uint8")) for d in DIGITS.images[:120]]
LABELS = DIGITS.target[:120].tolist()


def the_script() -> list[str]:
    """The lines of the README's block that begins with a model of one's own."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    (block,) = [text for text in blocks if "own = transformers.GPT2Model" in text]
    return [line for line in block.splitlines() if line.strip()]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2Model(
        transformers.GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2)
    )


def in_peft() -> nn.Module:
    peft = pytest.importorskip("peft", reason="the extra [peft] is not installed")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return peft.get_peft_model(gpt2(), config)


def data_set() -> datasets.DatasetDict:
    features = datasets.Features(
        {"img": datasets.Image(), "digit": datasets.ClassLabel(names=[str(k) for k in range(10)])}
    )
    whole = datasets.Dataset.from_dict({"img": IMAGES, "digit": LABELS}, features=features)
    return whole.train_test_split(0.3, seed=0)


OBJECTS: dict[str, tuple[Any, Any]] = {
    "as in the README": (None, None),
    "DatasetDict": (gpt2, data_set),
    "PEFT wrapper": (in_peft, None),
    "compiled": (lambda: torch.compile(gpt2(), backend="eager"), None),
}


def test_the_script_is_short() -> None:
    assert len(the_script()) <= 15


@pytest.mark.parametrize("kind", OBJECTS)
def test_from_a_model_and_images_in_memory_to_a_verified_plan(kind: str) -> None:
    make_model, make_data = OBJECTS[kind]
    space: dict[str, Any] = {"lp": lp, "images": IMAGES, "labels": LABELS}
    lines = the_script()
    if make_model is not None:
        space["own"] = make_model()
        lines = [line for line in lines if not line.startswith("own = ")]
    if make_data is not None:
        space["task"] = lp.make_task(make_data(), image="img", label="digit")
        lines = [line for line in lines if not line.startswith("task = ")]
    begins = next(i for i, line in enumerate(lines) if line.startswith("backbone = "))
    trains = next(i for i, line in enumerate(lines) if line.startswith("plan.apply"))
    exec("\n".join(lines[:begins]), space)
    own = space["own"]
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    flags = [p.requires_grad for p in own.parameters()]
    exec("\n".join(lines[begins:trains]), space)
    assert {"block", "value"} <= set(space["curve"].to_frame().columns) and len(space["plan"].blocks) == 4
    after = own.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert flags == [p.requires_grad for p in own.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in own.modules())
    exec("\n".join(lines[trains:]), space)
    moved = {n for n, tensor in own.state_dict().items() if not torch.equal(before[n], tensor)}
    from layerprobe.plans.names import clean_name

    names = {clean_name(n.removeprefix("base_model.model.")) for n in moved}
    unread = {n for n in space["plan"].trainable if n.startswith("wte")}
    assert names <= set(space["plan"].trainable) and names >= set(space["plan"].trainable) - unread


def test_a_model_of_timm_in_the_wrapper_of_transformers() -> None:
    pytest.importorskip("timm", reason="the extra [timm] is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    size = {"depth": 3, "img_size": 16, "patch_size": 8}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=size)
    with pytest.raises(UsageError, match="returns scores alone; give TimmWrapperModel"):
        lp.load_backbone(transformers.TimmWrapperForImageClassification(config))
    model = transformers.TimmWrapperModel(config).eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    backbone = lp.load_backbone(model)
    task = lp.make_task(IMAGES, LABELS)
    features = lp.extract_features(backbone, task, split="train")
    assert backbone.modality == "vision" and backbone.image_size is None and backbone.hidden_size == 192
    seen: list[torch.Tensor] = []
    hook = model.timm_model.blocks[1].register_forward_hook(lambda *given: seen.append(given[-1]))
    with torch.no_grad():
        pixels = backbone.preprocess(task.train.images(range(2)))
        model(pixel_values=pixels)
    hook.remove()
    assert pixels.shape[-2:] == (16, 16)
    at = torch.tensor(features["block.1.resid_post"][:2])
    torch.testing.assert_close(at, backbone.pool(seen[0]), atol=1e-5, rtol=1e-4)
    tiny = {
        "budget": 5,
        "finetune_steps": 2,
        "batch_size": 16,
        "seeds": 2,
        "use_scores": False,
        "lrs": [1e-3],
    }
    plan = lp.freeze_search(backbone, task, units="attention,mlp", quiet=True, **tiny).plan
    assert plan.n_blocks == 3
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())

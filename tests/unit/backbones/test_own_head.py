"""A checkpoint's own classifier: its outputs are a task's classes by name, or they are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from layerprobe.backbones import load_backbone
from layerprobe.backbones.own_head import match_classes, own_head
from layerprobe.errors import UsageError

CLASSES = ["cat", "dog", "sea lion"]
TASK = SimpleNamespace(name="pets", classes=CLASSES)


def order(outputs: list[str], classes: list[str]) -> list[int]:
    return match_classes(outputs, classes, "the classifier", "the task")


@pytest.mark.parametrize(
    "outputs", [["dog", "sea lion", "cat"], ["DOG", "Sea Lion", "Cat"], ["dog", "sea_lion", "cat"]]
)
def test_outputs_are_found_by_name(outputs: list[str]) -> None:
    assert order(outputs, CLASSES) == [2, 0, 1]


def test_names_that_differ_in_case_or_signs_alone_stay_apart() -> None:
    assert order(["C++", "C", "c"], ["c", "C", "C++"]) == [2, 1, 0]
    with pytest.raises(UsageError, match="not the same by name"):
        order(["c", "cpp"], ["C", "C++"])


def test_numbers_are_names() -> None:
    numbers = sorted(str(i) for i in range(12))  # 0, 1, 10, 11, 2, …
    assert order([f"LABEL_{i}" for i in range(12)], numbers) == [int(name) for name in numbers]
    with pytest.raises(UsageError, match="outputs without names"):
        order(["LABEL_0", "LABEL_1"], ["1", "2"])
    assert order([str(i) for i in range(10)], [str(9 - i) for i in range(10)]) == list(range(9, -1, -1))
    with pytest.raises(UsageError, match="not the same by name"):
        order(["0", "1", "2"], CLASSES)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["LABEL_0", "LABEL_1", "LABEL_2"], "outputs without names cannot be matched"),
        ([], "outputs without names cannot be matched"),
        (["cat", "dog"], "knows 2 classes .*, the task has 3 classes .*not the same by name"),
        (["cat", "dog", "dog"], "not the same by name"),
        (["cat", "dog", "sea lion", "crane"], "not the same by name"),
    ],
)
def test_what_cannot_be_matched_is_refused(outputs: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        order(outputs, CLASSES)


def test_the_names_are_those_of_the_whole_checkpoint_not_of_its_tower(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.CLIPConfig(
        text_config=small, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=32
    )
    config.id2label = {0: "sea lion", 1: "cat", 2: "dog"}
    transformers.CLIPForImageClassification(config).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), device="cpu")
    assert len(backbone.config.id2label) == 2  # the tower's default, which says nothing
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = transformers.CLIPForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(own_head(backbone, TASK)(pixels), model(pixels).logits[:, [1, 2, 0]])


def test_outputs_are_numbered_also_where_the_numbers_are_text() -> None:
    """A dictionary set on a configuration in memory keeps its keys, and "10" sorts before "2"."""
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
            patch_size=4, num_labels=12,
        )
    ).eval()  # fmt: skip
    names = [f"c{i}" for i in range(12)]
    model.config.id2label = {str(i): name for i, name in enumerate(names)}
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = own_head(load_backbone(model), SimpleNamespace(name="twelve", classes=names))(pixels)
    with torch.no_grad():
        assert torch.equal(found, model(pixels).logits)


def test_a_text_classifier_is_no_image_classifier(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99,
        id2label=dict(enumerate(CLASSES)),
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="brings no image classifier"):
        own_head(load_backbone(str(tmp_path), device="cpu"), TASK)

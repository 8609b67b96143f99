"""Small tasks and small transformers of four families, made from configurations; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@dataclass
class Split:
    """Images in memory, with the reading side of `layerprobe.tasks.ImageSplit`."""

    ids: np.ndarray
    labels: np.ndarray
    arrays: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, indices: Any = None) -> list[np.ndarray]:
        return list(self.arrays if indices is None else self.arrays[indices])

    def resized(self, resizer: Any, indices: Any) -> torch.Tensor:
        return resizer.stacked([resizer.resized(image) for image in self.images(indices)])

    def resized_batches(self, resizer: Any, batch_size: int) -> Iterator[torch.Tensor]:
        for start in range(0, len(self), batch_size):
            yield self.resized(resizer, slice(start, start + batch_size))

    def subset(self, indices: Any) -> Split:
        return Split(self.ids[indices], self.labels[indices], self.arrays[indices])


@dataclass
class Task:
    """Bright squares in one of four corners, in noise: learnable within a few steps."""

    seed: int = 0
    sizes: tuple[int, int, int] = (64, 32, 32)
    name: str = "corners"
    task_id: str = "corners"
    revision: str = "1"
    n_classes: int = 4
    channels: int = 3
    image_size: int = 8
    splits: dict[str, Split] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        for split, size in zip(("train", "validation", "test"), self.sizes, strict=True):
            labels = np.arange(size) % self.n_classes
            arrays = draw.integers(0, 120, (size, 8, 8, 3), dtype=np.uint8)
            for array, label in zip(arrays, labels, strict=True):
                row, column = divmod(int(label), 2)
                array[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 100
            ids = np.array([f"{split}/{self.seed}/{i}" for i in range(size)])
            self.splits[split] = Split(ids, labels.astype(np.int64), arrays)

    @property
    def train(self) -> Split:
        return self.splits["train"]

    @property
    def split_hash(self) -> str:
        return f"corners-{self.seed}-{self.sizes}"


def tiny_config(family: str) -> Any:
    """A configuration of four narrow blocks, with dropout where the family has it."""
    import transformers

    if family == "gpt2":
        return transformers.GPT2Config(
            n_embd=16, n_layer=4, n_head=2, n_positions=32, vocab_size=40, bos_token_id=0, eos_token_id=0
        )
    if family == "llama":
        return transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=40,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    if family == "bert":
        return transformers.BertConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=40,
            max_position_embeddings=32,
        )
    return transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.1,
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model of a family, saved as any checkpoint is."""
    import transformers

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            torch.manual_seed(7)
            with torch.random.fork_rng():
                model = transformers.AutoModel.from_config(tiny_config(family))
            made[family] = tmp_path_factory.mktemp("models") / family
            model.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def task() -> Task:
    return Task()


@pytest.fixture
def make_backbone(model_folder: Callable[[str], Path], task: Task) -> Callable[..., Any]:
    """A fresh backbone of a family, prepared for the small task."""
    from layerprobe.backbones import load_backbone

    def make(family: str = "gpt2", **options: Any) -> Any:
        options.setdefault("device", "cpu")
        if family != "vit":
            options.setdefault("patch_size", 4)
        return load_backbone(str(model_folder(family)), **options).prepare(task)

    return make


@pytest.fixture
def mixture_of_experts(task: Task) -> Any:
    """A backbone of width 32 whose blocks send each token to two of four experts, stacked in one tensor."""
    import transformers
    from families import _GQA

    from layerprobe.backbones import load_backbone

    config = transformers.GptOssConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.GptOssModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some of its tensors start uninitialised or at zero
            torch.nn.init.normal_(parameter, std=0.02)
    return load_backbone(model, patch_size=4).prepare(task)

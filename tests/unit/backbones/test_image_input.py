"""Stem, attention, pooling and preprocessing: how images enter a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import save

from layerprobe.backbones import load_backbone
from layerprobe.backbones.image_input import PatchStem, default_patch_size, for_vision, patchify
from layerprobe.errors import UnknownNameError, UsageError

RNG = np.random.default_rng(1)


class Images:
    def __init__(self, images: list[np.ndarray], size: int) -> None:
        self._images = images
        self.image_size = size
        self.channels = 3
        self.train = self

    def __len__(self) -> int:
        return len(self._images)

    def resized(self, resizer: Any, indices: np.ndarray) -> torch.Tensor:
        return resizer.stacked([resizer.resized(self._images[i]) for i in indices])


SMOOTH = Images(
    [np.clip(RNG.normal(128, 40, (1, 1, 3)) + RNG.normal(0, 25, (16, 16, 3)).cumsum(0), 0, 255).astype("uint8")
     for _ in range(60)],
    16,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save("bert", tmp_path_factory.mktemp("bert")))


def test_patchify_reads_rows_then_columns_and_inverts() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    patches = patchify(pixels, 2)
    assert patches.shape == (2, 4, 12)
    by_hand = pixels[0, :, 0:2, 2:4].permute(1, 2, 0).flatten()  # second patch of the first row
    assert torch.equal(patches[0, 1], by_hand)


def test_patch_size_must_divide_the_image() -> None:
    with pytest.raises(UsageError, match="patch size 5 does not divide images of 16×16"):
        patchify(torch.zeros(1, 3, 16, 16), 5)


@pytest.mark.parametrize(("size", "patch"), [(8, 1), (28, 4), (32, 4), (64, 8), (224, 28)])
def test_default_patch_size_gives_about_eight_by_eight(size: int, patch: int) -> None:
    assert default_patch_size(size) == patch


@pytest.mark.parametrize("kind", ["random", "pca"])
def test_tokens_have_the_scale_of_token_embeddings(llama: str, kind: str) -> None:
    backbone = load_backbone(llama, stem=kind, patch_size=4, device="cpu").prepare(SMOOTH)
    tokens = backbone.stem(backbone.preprocess_rows(SMOOTH, np.arange(60)))
    ratio = float(tokens.detach().square().mean().sqrt() / backbone.token_std())
    # Random weights meet real, correlated pixels, so their scale is right only in order of magnitude.
    assert ratio == pytest.approx(1, abs=0.02) if kind == "pca" else 0.2 < ratio < 5


def test_pca_tokens_are_uncorrelated_deterministic_and_whole() -> None:
    pixels = torch.randn(50, 3, 8, 8, dtype=torch.float64).cumsum(2).float()
    stem, again = PatchStem(3, 4, 64), PatchStem(3, 4, 64)
    stem.init_pca(pixels, token_std=0.5)
    again.init_pca(pixels.clone(), token_std=0.5)
    assert torch.equal(stem.projection.weight, again.projection.weight)
    tokens = stem(pixels).flatten(0, 1)
    used = tokens[:, :48]
    covariance = torch.cov(used.T)
    assert torch.allclose(covariance, covariance[0, 0] * torch.eye(48), atol=1e-3)
    assert float(tokens[:, 48:].abs().max()) == 0
    # Nothing is lost: with as many components as pixel values the map has full rank.
    assert int(torch.linalg.matrix_rank(stem.projection.weight)) == 48


def test_random_stem_follows_its_seed(llama: str) -> None:
    one, same, other = (
        load_backbone(llama, patch_size=4, seed=s, device="cpu").prepare(SMOOTH).describe()["stem_hash"]
        for s in (0, 0, 1)
    )
    assert one == same != other


def test_attention_is_found_and_overridden(llama: str, bert: str) -> None:
    assert load_backbone(llama, device="cpu").attention == "causal"
    assert load_backbone(bert, device="cpu").attention == "bidirectional"
    for folder, attention in ((llama, "bidirectional"), (bert, "causal")):
        backbone = load_backbone(folder, attention=attention, patch_size=4, device="cpu").prepare(SMOOTH)
        pixels = backbone.preprocess_rows(SMOOTH, np.arange(1))
        changed = pixels.clone()
        changed[:, :, -4:, -4:] += 1  # the last patch alone
        with torch.no_grad():
            first = backbone(pixels)[0, 0], backbone(changed)[0, 0]
        assert torch.equal(*first) == (attention == "causal")


def test_attention_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    folder = save("gpt-neo", tmp_path)
    with pytest.raises(UsageError, match="attention 'bidirectional' cannot be had from GPTNeoModel"):
        load_backbone(str(folder), attention="bidirectional", device="cpu")


def test_cls_pooling_under_causal_attention_is_refused(llama: str) -> None:
    with pytest.raises(UsageError, match="sees one patch alone"):
        load_backbone(llama, pooling="cls", device="cpu")


@pytest.mark.parametrize(
    "option", [{"stem": "fourier"}, {"pooling": "max"}, {"attention": "local"}, {"init": "zero"}]
)
def test_unknown_choices_list_the_known_ones(llama: str, option: dict[str, str]) -> None:
    with pytest.raises(UnknownNameError, match="choose one of"):
        load_backbone(llama, device="cpu", **option)


def test_poolings(bert: str) -> None:
    backbone = load_backbone(bert, patch_size=4, device="cpu").prepare(SMOOTH)
    hidden = torch.randn(2, 16, 32)
    assert torch.allclose(backbone.pool(hidden), hidden.mean(1))
    backbone.pooling = "last"
    assert torch.equal(backbone.pool(hidden), hidden[:, -1])
    backbone.pooling = "cls"
    assert torch.equal(backbone.pool(hidden), hidden[:, 0])


def test_mean_pooling_of_vision_models_leaves_out_the_class_token(tmp_path: Path) -> None:
    backbone = load_backbone(str(save("deit", tmp_path)), device="cpu")
    hidden = torch.randn(2, 18, 32)  # class token, distillation token, 4 × 4 patches
    assert torch.allclose(backbone.pool(hidden), hidden[:, 2:].mean(1))


def test_too_many_patches_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = save("gpt2", tmp_path, n_positions=10)
    with pytest.raises(
        UsageError, match=r"16 patches do not fit: .* has 10 positions; use a larger --patch-size"
    ):
        load_backbone(str(folder), patch_size=4, device="cpu").prepare(SMOOTH)


def test_random_init_is_another_model_of_the_same_shape(llama: str) -> None:
    trained = load_backbone(llama, device="cpu")
    control = load_backbone(llama, init="random", seed=3, device="cpu")
    again = load_backbone(llama, init="random", seed=3, device="cpu")
    shapes = {n: p.shape for n, p in trained.model.named_parameters()}
    assert shapes == {n: p.shape for n, p in control.model.named_parameters()}
    name = "layers.0.mlp.up_proj.weight"
    assert not torch.equal(trained.model.get_parameter(name), control.model.get_parameter(name))
    assert torch.equal(again.model.get_parameter(name), control.model.get_parameter(name))


RECIPES = [
    {"do_resize": True, "size": {"height": 24, "width": 24}, "resample": 2, "do_rescale": True,
     "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.2],
     "image_processor_type": "ViTImageProcessor"},
    {"do_resize": True, "size": {"shortest_edge": 26}, "resample": 3, "do_center_crop": True,
     "crop_size": {"height": 24, "width": 24}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
     "image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.28], "image_processor_type": "CLIPImageProcessor"},
    {"do_resize": True, "size": {"shortest_edge": 30}, "resample": 3, "do_center_crop": True,
     "crop_size": {"height": 24, "width": 24}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
     "image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.28], "image_processor_type": "BitImageProcessor"},
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r["image_processor_type"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (40, 29, 3), (21, 47, 3)], ids=str)
def test_numbers_equal_the_models_own_preprocessor(
    tmp_path: Path, recipe: dict[str, object], shape: tuple[int, ...]
) -> None:
    import json

    import transformers

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recipe))
    config = transformers.ViTConfig(image_size=24, num_channels=3)
    image = RNG.integers(0, 256, shape, dtype=np.uint8)
    ours = for_vision(tmp_path, config, None)([image])
    own_class = getattr(transformers, f"{recipe['image_processor_type']}Pil")
    theirs = own_class.from_pretrained(tmp_path)(
        images=[image], return_tensors="pt", input_data_format="channels_last"
    )
    assert torch.allclose(ours, theirs["pixel_values"], atol=1e-6)

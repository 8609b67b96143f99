"""A vision checkpoint's pixels are those of its own image processor, whatever its recipe says or leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import save
from PIL import Image

from layerprobe.backbones import load_backbone
from layerprobe.backbones.catalog import MODELS
from layerprobe.backbones.image_input import for_vision
from layerprobe.errors import BrokenFileError, UsageError


def _hw(height: int, width: int) -> dict[str, int]:
    return {"height": height, "width": width}


RNG = np.random.default_rng(3)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
DONE = {"do_normalize": True, "do_resize": True}
CROP = {"do_center_crop": True, "crop_size": 224}
DINOV2 = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224}, "resample": 3, "do_resize": True, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True, **IMAGENET,
}  # fmt: skip

# As published, in the notation of their day.
PUBLISHED: dict[str, tuple[str, str | None, dict[str, object]]] = {
    "vit-base": ("vit", None, {**DONE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}),
    "deit-tiny": ("deit", None, {**CROP, **DONE, **IMAGENET, "resample": 3, "size": 256}),
    "deit-base": ("deit", "DeiTFeatureExtractor", {**CROP, **DONE, **IMAGENET, "resample": 3, "size": 256}),
    "dinov2-small": ("dinov2", None, DINOV2),
    "dinov2-base": ("dinov2", None, DINOV2),
    "clip-vit-base": ("clip", "CLIPFeatureExtractor", {**CROP, **DONE, **CLIP, "resample": 3, "size": 224}),
}

EDGE = "shortest_edge"
VARIANTS: dict[str, tuple[str, str | None, dict[str, object]]] = {
    "distilled DeiT, edge of the crop": (
        "deit",
        "DeiTFeatureExtractor",
        {**CROP, "size": 224, "resample": 3},
    ),
    "DeiT, class alone": ("deit", "DeiTImageProcessor", {}),
    "BeiT, bare size and crop": ("beit", "BeitFeatureExtractor", {**CROP, "size": 256, "resample": 2}),
    "BeiT, no crop": ("beit", "BeitFeatureExtractor", {"do_center_crop": False, "size": 224}),
    "data2vec": ("data2vec-vision", "BeitFeatureExtractor", {"size": 224, "crop_size": 224}),
    "CLIP, no crop": ("clip", "CLIPFeatureExtractor", {"do_center_crop": False, "size": 224, **CLIP}),
    "CLIP, class alone": ("clip", "CLIPImageProcessor", {}),
    "CLIP, legacy fast class": ("clip", "CLIPImageProcessorFast", {"size": {EDGE: 336}, "crop_size": 336}),
    "CLIP, exact size": ("clip", "CLIPImageProcessor", {"size": _hw(160, 192), "do_center_crop": False}),
    "CLIP, crop beyond the image": ("clip", "CLIPImageProcessor", {"size": 180, "crop_size": 225}),
    "CLIP, crop without size": ("clip", "CLIPImageProcessor", {"do_resize": False}),
    "CLIP, no rescale": ("clip", "CLIPImageProcessor", {"do_rescale": False}),
    "CLIP, no normalise": ("clip", "CLIPImageProcessor", {"do_normalize": False}),
    "CLIP, neither": ("clip", "CLIPImageProcessor", {"do_normalize": False, "do_rescale": False}),
    "Bit, statistics left out": ("dinov2", "BitImageProcessor", {"size": {EDGE: 256}, **CROP}),
    "Bit, class alone": ("dinov2", "BitImageProcessor", {}),
    "no class: the model's": ("dinov2", None, {"size": {EDGE: 240}}),
    "nothing but braces": ("vit", None, {}),
    "ViT, scalar statistics": ("vit", "ViTImageProcessor", {"image_mean": 0.5, "image_std": 0.25}),
    "ViT, class alone": ("vit", "ViTImageProcessor", {}),
    "ViT, Lanczos": ("vit", "ViTImageProcessor", {"resample": 1}),
    "ViT, nearest": ("vit", "ViTImageProcessor", {"resample": 0, "size": 100}),
    "ViT, box": ("vit", "ViTImageProcessor", {"resample": 4, "size": _hw(64, 96)}),
    "ViT, Hamming": ("vit", "ViTImageProcessor", {"resample": 5, "size": 96}),
    "ViT, another factor": ("vit", "ViTImageProcessor", {"rescale_factor": 1 / 127.5}),
    "ViT, list for a size": ("vit", "ViTImageProcessor", {"size": [192, 160]}),
    "ViT, shortest edge": ("vit", "ViTImageProcessor", {"size": {EDGE: 144}}),
    "ViT, two edges": ("vit", "ViTImageProcessor", {"size": {EDGE: 144, "longest_edge": 200}}),
    "Swin": ("swin", "ViTImageProcessor", {"size": 256, **IMAGENET}),
    "SigLIP, class alone": ("siglip_vision_model", "SiglipImageProcessor", {}),
    "SigLIP, its size": ("siglip_vision_model", "SiglipImageProcessor", {"size": _hw(256, 256)}),
    "ConvNeXT, small": ("vit", "ConvNextImageProcessor", {"size": {EDGE: 224}, "crop_pct": 0.9}),
    "ConvNeXT, large": ("vit", "ConvNextImageProcessor", {"size": 384}),
    "LeViT": ("levit", "LevitImageProcessor", {"size": {EDGE: 224}, "crop_size": 224}),
    "PVT": ("pvt", "PvtImageProcessor", {}),
    "BLIP": ("blip", "BlipImageProcessor", {"size": _hw(384, 384)}),
    "MobileViT, channels flipped": ("mobilevit", "MobileViTImageProcessor", {}),
    "Perceiver, crop first": ("perceiver", "PerceiverImageProcessor", {}),
    "EfficientNet": ("efficientnet", "EfficientNetImageProcessor", {}),
}


def _write(folder: Path, model_type: str, name: str | None, recipe: dict[str, object]) -> None:
    if name is not None:
        recipe = {f"{'feature_extractor' if 'Extractor' in name else 'image_processor'}_type": name, **recipe}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))


def _config(model_type: str) -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model(model_type)


def _waves(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    colours = [128 + 100 * np.sin(x / 7 + i) * np.cos(y / 11 - i) for i in range(3)]
    return np.stack(colours, -1).astype(np.uint8)


def _theirs(folder: Path, image: np.ndarray) -> torch.Tensor:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return torch.as_tensor(np.asarray(processor(images=Image.fromarray(image))["pixel_values"]))


def test_every_vision_alias_is_among_the_published_recipes() -> None:
    assert set(PUBLISHED) == {name for name, entry in MODELS.items() if entry.pretrained_on == "vision"}


@pytest.mark.parametrize("shape", [(200, 333), (64, 48)], ids=str)
@pytest.mark.parametrize("name", [*PUBLISHED, *VARIANTS])
def test_pixels_are_the_processors_own(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    model_type, class_name, recipe = {**PUBLISHED, **VARIANTS}[name]
    _write(tmp_path, model_type, class_name, recipe)
    for image in (_waves(*shape), RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)):
        ours, theirs = for_vision(tmp_path, _config(model_type), None)([image]), _theirs(tmp_path, image)
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) < 1e-5


def _by_hand(
    image: np.ndarray,
    size: tuple[int, int],
    crop: int | None,
    mean: list[float],
    std: list[float],
    resample: int,
) -> np.ndarray:
    picture = np.asarray(Image.fromarray(image).resize(size[::-1], resample), dtype=np.float64)
    if crop is not None:
        top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
        picture = picture[top : top + crop, left : left + crop]
    return ((picture / 255 - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("name", "size", "crop", "statistics", "resample"),
    [
        ("vit-base", (224, 224), None, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 2),
        ("deit-tiny", (256, 256), 224, IMAGENET, 3),
        ("dinov2-small", (256, 426), 224, IMAGENET, 3),  # 256 · 333 / 200 = 426.24
        ("clip-vit-base", (224, 372), 224, CLIP, 3),
        ("distilled DeiT, edge of the crop", (224, 224), 224, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 3),
        ("Bit, statistics left out", (256, 426), 224, CLIP, 3),
    ],
)  # fmt: skip
def test_pixels_worked_out_by_hand(
    tmp_path: Path,
    name: str,
    size: tuple[int, int],
    crop: int | None,
    statistics: dict[str, list[float]],
    resample: int,
) -> None:
    model_type, class_name, recipe = {**PUBLISHED, **VARIANTS}[name]
    _write(tmp_path, model_type, class_name, recipe)
    image = _waves(200, 333)
    expected = _by_hand(image, size, crop, statistics["image_mean"], statistics["image_std"], resample)
    ours = for_vision(tmp_path, _config(model_type), None)([image])[0].double().numpy()
    assert np.abs(ours - expected).max() < 1e-5


def test_a_recipe_within_the_processor_of_text_and_images_wins(tmp_path: Path) -> None:
    _write(tmp_path, "clip", "ViTImageProcessor", {"size": 32})
    inside = transformers.CLIPImageProcessorPil(size={"shortest_edge": 200}, crop_size=160).to_dict()
    nested = {"image_processor": inside, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested, default=str))
    recipe = for_vision(tmp_path, _config("clip_vision_model"), None)
    assert (recipe.shortest_edge, recipe.crop, recipe.output_size) == (200, (160, 160), (160, 160))
    image = _waves(90, 70)
    assert float((recipe([image]) - _theirs(tmp_path, image)).abs().max()) < 1e-5
    # Files of before transformers 5 name the class of the whole alone.
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert for_vision(tmp_path, _config("clip_vision_model"), None).size == (32, 32)


def test_dinov3_scales_before_it_resizes(tmp_path: Path) -> None:
    """Its class needs torchvision; bilinear with antialiasing is a matrix on either side, here in float64."""
    recipe = {"size": _hw(16, 16), **IMAGENET}
    _write(tmp_path, "dinov3_vit", "DINOv3ViTImageProcessorFast", recipe)
    image = RNG.integers(0, 256, (40, 64, 3), dtype=np.uint8)
    rows, columns = _triangle(40, 16), _triangle(64, 16)
    small = np.einsum("ih,hwc,jw->cij", rows, image / 255, columns)
    mean, std = (np.array(IMAGENET[key])[:, None, None] for key in ("image_mean", "image_std"))
    ours = for_vision(tmp_path, _config("dinov3_vit"), None)([image])[0].double().numpy()
    assert np.abs(ours - (small - mean) / std).max() < 1e-5


def _triangle(long: int, short: int) -> np.ndarray:
    """Weights short × long of a triangle filter as wide as two pixels of the smaller image."""
    scale = long / short
    centres = (np.arange(short) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(long) + 0.5 - centres[:, None]) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["vit-base", "dinov2-small", "clip-vit-base", "ConvNeXT, small"])
def test_a_size_of_the_users_replaces_size_and_crop(tmp_path: Path, name: str) -> None:
    model_type, class_name, recipe = {**PUBLISHED, **VARIANTS}[name]
    _write(tmp_path, model_type, class_name, recipe)
    made = for_vision(tmp_path, _config(model_type), 96)
    assert made.output_size == (96, 96)
    assert made([_waves(200, 333)]).shape == (1, 3, 96, 96)
    if name != "ConvNeXT, small":
        expected = _by_hand(_waves(200, 333), (96, 96), None, list(made.mean), list(made.std), made.resample)
        assert np.abs(made([_waves(200, 333)])[0].double().numpy() - expected).max() < 1e-5


def test_the_size_is_told_only_where_every_image_gets_it(tmp_path: Path) -> None:
    _write(tmp_path, "vit", "ViTImageProcessor", {"size": {"shortest_edge": 40}})
    recipe = for_vision(tmp_path, _config("vit"), None)
    assert recipe.output_size is None
    with pytest.raises(BrokenFileError, match=r"images of different sizes \(40×50, 50×40\W"):
        recipe([_waves(80, 100), _waves(100, 80)])


def test_features_do_not_depend_on_the_company_an_image_is_in(tmp_path: Path) -> None:
    """DETR's processor pads a batch to its largest image."""
    _write(tmp_path, "detr", "DetrImageProcessor", {"size": {EDGE: 40, "longest_edge": 60}})
    made = for_vision(tmp_path, _config("vit"), None)
    alone = made([_waves(80, 80)])
    assert torch.equal(made([_waves(80, 80), _waves(120, 120)])[:1], alone)
    with pytest.raises(BrokenFileError, match="make no batch"):
        made([_waves(80, 80), _waves(120, 80)])


@pytest.mark.parametrize(
    ("model_type", "class_name", "recipe", "message"),
    [
        ("vit", "ViTImageProcessor", {"size": {"edge": 3}}, "cannot follow the preprocessing recipe"),
        ("clip_vision_model", "MyOwnProcessor", {}, "cannot follow the preprocessing recipe"),
        ("vit", "MyOwnProcessor", {}, "cannot follow the preprocessing recipe"),
        ("vit", "Llama4ImageProcessor", {}, "Llama4ImageProcessor needs torchvision, which is not installed"),
        ("vit", "Qwen2VLImageProcessor", {}, "makes an array of .* of one image, not a picture"),
        ("vit", "ViTImageProcessor", {"image_mean": [0.5, 0.5]}, "cannot prepare an image of 224×224"),
        ("vit", "ViTImageProcessor", {"image_mean": None}, "cannot prepare an image of 224×224"),
        ("vit", "SamImageProcessor", {"size": "large"}, "cannot follow the preprocessing recipe"),
    ],
)
def test_what_cannot_be_followed_is_said_in_one_line(
    tmp_path: Path, model_type: str, class_name: str, recipe: dict[str, object], message: str
) -> None:
    _write(tmp_path, model_type, class_name, recipe)
    with pytest.raises(BrokenFileError, match=message) as caught:
        for_vision(tmp_path, _config(model_type), None)
    assert "\n" not in str(caught.value)


def test_a_file_that_holds_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(BrokenFileError, match="holds no preprocessing recipe"):
        for_vision(tmp_path, _config("vit"), None)


def test_channels_must_agree(tmp_path: Path) -> None:
    _write(tmp_path, "vit", "ViTImageProcessor", {})
    gray = transformers.ViTConfig(num_channels=1)
    with pytest.raises(BrokenFileError, match="cannot prepare an image"):
        for_vision(tmp_path, gray, None)
    _write(tmp_path, "vit", "ViTImageProcessor", {"image_mean": 0.5, "image_std": 0.5})
    assert for_vision(tmp_path, gray, None)([_waves(50, 50)]).shape == (1, 1, 224, 224)


@pytest.mark.parametrize("size", [96, 224])
def test_dinov2_runs_at_its_own_recipe_under_a_larger_configuration(tmp_path: Path, size: int) -> None:
    folder = save("dinov2", tmp_path, image_size=518, patch_size=14)
    (folder / "preprocessor_config.json").write_text(json.dumps(DINOV2))
    image = _waves(200, 333)
    backbone = load_backbone(str(folder), device="cpu", image_size=None if size == 224 else 98)
    pixels = backbone.preprocess([image])
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(backbone(pixels), model(pixels).last_hidden_state, atol=1e-6)
        n_tokens = backbone(pixels).shape[1]
    assert n_tokens == 1 + (16**2 if size == 224 else 7**2)
    assert backbone.count_tokens() == n_tokens
    assert backbone.n_prefix(n_tokens) == 1


def test_a_size_that_a_model_does_not_take_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.Aimv2VisionConfig(**sizes, image_size=32, patch_size=8)
    transformers.Aimv2VisionModel(config).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), device="cpu", image_size=64)
    with pytest.raises(UsageError, match="takes images of 32×32 only, not of 64×64"):
        backbone(backbone.preprocess([_waves(40, 40)]))


def test_a_model_without_a_recipe_says_what_is_done_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = for_vision(tmp_path, transformers.ViTConfig(image_size=32), None, name="my/vit")
    assert "my/vit holds no preprocessing recipe; its images are resized to 32×32" in capsys.readouterr().err
    expected = _by_hand(_waves(50, 60), (32, 32), None, [0.5] * 3, [0.5] * 3, 3)
    assert np.abs(recipe([_waves(50, 60)])[0].double().numpy() - expected).max() < 1e-5


@pytest.mark.slow
def test_every_processor_that_runs_on_pillow_is_followed_or_refused(tmp_path: Path) -> None:
    """All classes of transformers at their own defaults; those for patches, pairs or text are refused."""
    image = RNG.integers(0, 256, (180, 260, 3), dtype=np.uint8)
    same = 0
    for name in sorted(name for name in dir(transformers) if name.endswith("ImageProcessorPil")):
        _write(tmp_path, "vit", name.removesuffix("Pil"), {})
        try:
            ours = for_vision(tmp_path, _config("vit"), None)
        except BrokenFileError:
            continue
        assert torch.equal(ours([image]), _theirs(tmp_path, image)), name
        json.dumps(ours.describe())
        same += 1
    assert same >= 50

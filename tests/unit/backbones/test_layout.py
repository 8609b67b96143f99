"""One parametrised test for every promised family: blocks found, sites right, nothing left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import ADDITIVE, FAMILIES, NAMED_FAMILIES, build, save

from layerprobe.backbones import Backbone, load_backbone
from layerprobe.backbones.layout import find_layout
from layerprobe.errors import LayerprobeError, UnknownNameError, UsageError
from layerprobe.hooks import all_layers, capture
from layerprobe.layers import SITES, LayerRef

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(5)]


class _Split:
    def __len__(self) -> int:
        return len(IMAGES)

    def images(self, indices: np.ndarray) -> list[np.ndarray]:
        return [IMAGES[i] for i in indices]


class ImagesOf32:
    """The little that a backbone needs to know of a task."""

    image_size = 32
    channels = 3
    train = _Split()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = save(request.param, tmp_path_factory.mktemp(request.param))
    loaded = load_backbone(str(folder), patch_size=8, device="cpu").prepare(ImagesOf32())
    loaded.family = request.param
    return loaded


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_blocks_sites_and_shapes(backbone: Backbone) -> None:
    expected_blocks = 4 if backbone.family == "gpt-neo" else 3
    assert backbone.n_blocks == expected_blocks
    pixels = backbone.preprocess(IMAGES)
    layers = all_layers(backbone.n_blocks)
    before = hooks_of(backbone.model)
    with torch.no_grad(), capture(backbone, layers) as seen:
        final = backbone(pixels)
    assert hooks_of(backbone.model) == before
    assert set(seen) == set(layers)
    for layer in layers:
        assert seen[layer].shape == final.shape == (5, final.shape[1], 32), str(layer)
    assert final.shape[1] - backbone.n_prefix(final.shape[1]) == 16  # 4 × 4 patches


def test_resid_post_is_what_the_next_block_receives(backbone: Backbone) -> None:
    pixels = backbone.preprocess(IMAGES)
    with torch.no_grad(), capture(backbone, all_layers(backbone.n_blocks)) as seen:
        backbone(pixels)
    for block in range(backbone.n_blocks - 1):
        assert torch.equal(seen[LayerRef(block)], seen[LayerRef(block + 1, "resid_pre")])
    assert torch.equal(seen[LayerRef(None, "embed")], seen[LayerRef(0, "resid_pre")])


def test_resid_post_equals_the_models_own_hidden_states(backbone: Backbone) -> None:
    """Independent of our hooks: transformers' `output_hidden_states`, bit for bit.

    Its tuple has the embedding first; its last entry may be after the final norm, so it is left out.
    """
    pixels = backbone.preprocess(IMAGES)
    with torch.no_grad(), capture(backbone, all_layers(backbone.n_blocks)) as seen:
        backbone(pixels)
        if backbone.modality == "vision":
            own = backbone.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        else:
            own = backbone.model(inputs_embeds=backbone.stem(pixels), output_hidden_states=True).hidden_states
    if own is None:
        pytest.fail(f"{backbone.family} gives no hidden states to compare with")
    for block in range(backbone.n_blocks - 1):
        assert torch.equal(seen[LayerRef(block)], own[block + 1])


def test_every_image_of_the_batch_is_its_own(backbone: Backbone) -> None:
    """Old `out[0]` code silently took the first image of a batch; here each image's features are its own."""
    pixels = backbone.preprocess(IMAGES)
    layer = LayerRef(1)
    with torch.no_grad():
        with capture(backbone, [layer], pool=backbone.pool) as together:
            backbone(pixels)
        for index in range(len(IMAGES)):
            with capture(backbone, [layer], pool=backbone.pool) as alone:
                backbone(pixels[index : index + 1])
            assert torch.allclose(alone[layer][0], together[layer][index], atol=1e-5)


def test_sites_add_up_in_pre_norm_blocks(backbone: Backbone) -> None:
    if backbone.family not in ADDITIVE:
        pytest.skip("this family scales or normalises what a block adds; its sites are taken before that")
    pixels = backbone.preprocess(IMAGES)
    with torch.no_grad(), capture(backbone, all_layers(backbone.n_blocks)) as seen:
        backbone(pixels)
    for block in range(backbone.n_blocks):
        site = {name: seen[LayerRef(block, name)] for name in SITES}
        total = site["resid_pre"] + site["attn_out"] + site["mlp_out"]
        assert torch.allclose(site["resid_post"], total, atol=1e-5), block


def test_no_hook_survives_an_exception_or_an_early_stop(backbone: Backbone) -> None:
    pixels = backbone.preprocess(IMAGES)
    before = hooks_of(backbone.model)
    with pytest.raises(ZeroDivisionError), capture(backbone, all_layers(backbone.n_blocks)):
        1 / 0  # noqa: B018
    assert hooks_of(backbone.model) == before
    with torch.no_grad(), capture(backbone, [LayerRef(0)], stop_early=True) as seen:
        backbone(pixels)
        pytest.fail("the pass should have ended at block 0")
    assert hooks_of(backbone.model) == before
    assert list(seen) == [LayerRef(0)]


def test_parameter_groups_cover_every_parameter(backbone: Backbone) -> None:
    groups = backbone.layout.parameter_groups
    assert set(groups) == {name for name, _ in backbone.model.named_parameters()}
    for index, block in enumerate(backbone.blocks):
        own = {id(p) for p in block.parameters()}
        grouped = {id(backbone.model.get_parameter(n)) for n, g in groups.items() if g == f"block.{index}"}
        assert grouped == own
    assert set(groups.values()) <= {f"block.{i}" for i in range(backbone.n_blocks)} | {
        "embeddings", "positions", "norm", "other"
    }  # fmt: skip


def test_thirteen_families_are_promised() -> None:
    assert len(NAMED_FAMILIES) == 13


def test_a_model_without_blocks_says_what_was_looked_for() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = build("gpt2").config
    with pytest.raises(UsageError, match=r"looked for a ModuleList of 3 modules .*num_hidden_layers = 3"):
        find_layout(model, config)


def test_unknown_block_and_layer_that_never_ran(backbone: Backbone) -> None:
    with pytest.raises(UnknownNameError, match=r"block 40 does not exist: .* has [34] blocks"):
        capture(backbone, [LayerRef(40)])
    with (
        pytest.raises(LayerprobeError, match=r"block\.1\.resid_post was requested but never ran"),
        capture(backbone, [LayerRef(1)]),
    ):
        pass

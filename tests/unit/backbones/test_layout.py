"""One parametrised test for every promised family: blocks found, sites right, nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import ADDITIVE, FAMILIES, NAMED_FAMILIES, build, save

from layerprobe.backbones import Backbone, load_backbone
from layerprobe.backbones.layout import find_layout, longest_sequence
from layerprobe.errors import LayerprobeError, UnknownNameError, UsageError
from layerprobe.hooks import all_layers, capture
from layerprobe.layers import SITES, LayerRef
from layerprobe.training.classifier import Classifier

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(5)]


class _Split:
    def __len__(self) -> int:
        return len(IMAGES)

    def resized(self, resizer: Any, indices: np.ndarray) -> torch.Tensor:
        return resizer.stacked([resizer.resized(IMAGES[i]) for i in indices])


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


def test_a_module_that_is_two_blocks_is_one_line() -> None:
    model = build("llama").model
    model.layers[1] = model.layers[0]
    with pytest.raises(UsageError, match="LlamaModel runs 2 modules as its 3 blocks"):
        find_layout(model, model.config)


def test_unknown_block_and_layer_that_never_ran(backbone: Backbone) -> None:
    with pytest.raises(UnknownNameError, match=r"block 40 does not exist: .* has [34] blocks"):
        capture(backbone, [LayerRef(40)])
    with (
        pytest.raises(LayerprobeError, match=r"block\.1\.resid_post was requested but never ran"),
        capture(backbone, [LayerRef(1)]),
    ):
        pass


LM = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def loaded(name: str, config: transformers.PretrainedConfig, folder: Path, **options: object) -> Backbone:
    getattr(transformers, name)(config).eval().save_pretrained(folder)
    return load_backbone(str(folder), device="cpu", **options)


@pytest.mark.parametrize("name", ["XLM", "Flaubert"])
def test_lists_of_parts_side_by_side_are_no_blocks(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(emb_dim=32, n_layers=3, n_heads=4, n_words=99)
    with pytest.raises(UsageError, match=r"lists side by side .*attentions"):
        loaded(f"{name}Model", config, tmp_path)


def test_the_model_without_its_head_is_found_where_base_model_is_the_head(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        **LM,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=8,
    )
    backbone = loaded("Llama4ForCausalLM", config, tmp_path, patch_size=8).prepare(ImagesOf32())
    assert type(backbone.model).__name__ == "Llama4TextModel"
    with torch.no_grad():
        tokens = backbone.stem(backbone.preprocess(IMAGES))
        own = backbone.model(inputs_embeds=tokens).last_hidden_state
    assert own.shape == (5, 16, 32)
    torch.testing.assert_close(backbone(backbone.preprocess(IMAGES)), own)


def test_of_a_vision_language_model_the_image_tower_runs(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **LM},
        image_token_index=98,
    )
    backbone = loaded("LlavaForConditionalGeneration", config, tmp_path).prepare(ImagesOf32())
    assert (backbone.modality, backbone.hidden_size, backbone.n_prefix(17)) == ("vision", 16, 1)


@pytest.mark.parametrize(
    ("name", "arguments", "usable"),
    [
        ("Roberta", {**LM, "pad_token_id": 1, "max_position_embeddings": 66}, 64),
        ("Bert", {**LM, "max_position_embeddings": 64}, 64),
        ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 99, "max_seq_len": 32}, 32),
        ("XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 99}, None),
    ],
)
def test_usable_positions(name: str, arguments: dict[str, int], usable: int | None, tmp_path: Path) -> None:
    """As many tokens run and one more does not (RoBERTa sets padding's rows aside, XLNet has no limit)."""
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**arguments)).eval()
    assert longest_sequence(model, model.config) == usable
    with torch.no_grad():
        model(inputs_embeds=torch.zeros(1, usable or 100, 32))
        if usable is not None:
            with pytest.raises((RuntimeError, IndexError)):
                model(inputs_embeds=torch.zeros(1, usable + 1, 32))


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_a_mask_that_the_model_does_not_take_is_one_line(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path)
    with pytest.raises(UsageError, match="'bidirectional' cannot be had from"):
        load_backbone(str(folder), device="cpu", attention="bidirectional")


def test_a_model_that_needs_token_ids_is_one_line(tmp_path: Path) -> None:
    config = transformers.Gemma4TextConfig(
        **LM, num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=99, hidden_size_per_layer_input=8,
        global_head_dim=8,
    )  # fmt: skip
    with pytest.raises(UsageError, match="cannot take embeddings of images in place of token ids"):
        loaded("Gemma4ForCausalLM", config, tmp_path)


def test_a_projected_output_has_a_width_of_its_own(tmp_path: Path) -> None:
    folder = save("opt", tmp_path, word_embed_proj_dim=16, do_layer_norm_before=False)
    backbone = load_backbone(str(folder), device="cpu", patch_size=8).prepare(ImagesOf32())
    assert (backbone.hidden_size, backbone.output_width) == (32, 16)
    assert backbone.features(backbone.preprocess(IMAGES)).shape == (5, 16)
    assert Classifier(backbone, 10, seed=0)(backbone.preprocess(IMAGES)).shape == (5, 10)

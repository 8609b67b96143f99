"""The self-check: each property broken on purpose, and real families that break one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import build
from torch import Tensor, nn

from layerprobe.backbones import Backbone, load_backbone
from layerprobe.backbones.self_check import TOLERANCE
from layerprobe.errors import UsageError
from layerprobe.hooks import capture
from layerprobe.hooks.capture import check_layers
from layerprobe.layers import LayerRef

IMAGES = [np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(4)]
LM = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


class _Split:
    def __len__(self) -> int:
        return len(IMAGES)

    def resized(self, resizer: Any, indices: np.ndarray) -> torch.Tensor:
        return resizer.stacked([resizer.resized(IMAGES[i]) for i in indices])


class Images:
    """The little that a backbone needs to know of a task."""

    image_size = 32
    train = _Split()


def loaded(model: nn.Module, folder: Path, **options: Any) -> Backbone:
    model.eval().save_pretrained(folder)  # type: ignore[operator]
    return load_backbone(str(folder), device="cpu", patch_size=8, **options)


def toy(folder: Path, family: str = "llama") -> Backbone:
    """A small model whose weights are large enough that each of its parts matters."""
    model = build(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return loaded(model, folder)


def around(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let a module return something else than it does."""

    def hook(_module: nn.Module, _args: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    module.register_forward_hook(hook)


def test_a_sound_model_passes_and_says_what_was_found(tmp_path: Path) -> None:
    backbone = toy(tmp_path).prepare(Images())
    found = backbone.provenance()["self_check"]
    assert found == {
        "n_tokens": 16, "n_prefix": 0, "output_width": 32, "causal": True, "withheld": None, "n_images": 2,
        "tolerance": TOLERANCE,
    }  # fmt: skip
    assert "self_check" not in backbone.describe()  # what was measured decides no feature


def test_without_the_check_nothing_is_refused(tmp_path: Path) -> None:
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION))
    backbone = loaded(model, tmp_path, self_check=False).prepare(Images())
    assert backbone.provenance()["self_check"] is None


def test_the_check_runs_once_and_leaves_the_random_state_and_hooks_alone(tmp_path: Path) -> None:
    backbone = toy(tmp_path)
    states = []
    for checks in (False, True):
        torch.manual_seed(0)
        backbone.stem, backbone.checks_itself = None, checks
        backbone.prepare(Images())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())
    first = backbone.checked
    assert backbone.prepare(Images()).checked is first


def test_chance_in_a_block_is_refused(tmp_path: Path) -> None:
    backbone = toy(tmp_path)
    around(backbone.blocks[1], lambda hidden: hidden + torch.randn_like(hidden) * 0.1)
    with pytest.raises(UsageError, match=r"two forward passes .* differ"):
        backbone.prepare(Images())


def test_tokens_that_are_padded_are_refused(tmp_path: Path) -> None:
    backbone = toy(tmp_path)
    around(backbone.model.embed_tokens, lambda hidden: hidden)
    forward = backbone.model.forward

    def padded(inputs_embeds: Tensor, **rest: Any) -> Any:
        output = forward(inputs_embeds=nn.functional.pad(inputs_embeds, (0, 0, 0, 4)), **rest)
        output.last_hidden_state = output.last_hidden_state[:, :-4]
        return output

    backbone.model.forward = padded
    with pytest.raises(UsageError, match=r"extends 16 tokens to 20 .*--patch-size"):
        backbone.prepare(Images())


def test_tokens_that_are_dropped_are_refused(tmp_path: Path) -> None:
    backbone = toy(tmp_path, "vit")
    around(backbone.model.embeddings, lambda hidden: hidden[:, :9])
    with pytest.raises(UsageError, match=r"9 tokens enter .* 16 patches; it masks"):
        backbone.prepare(Images())


def test_a_future_that_leaks_is_refused(tmp_path: Path) -> None:
    backbone = toy(tmp_path)
    around(backbone.blocks[0], lambda hidden: hidden + hidden[:, -1:] * 0.1)
    with pytest.raises(UsageError, match=r"'causal' was chosen, but .* is not causal"):
        backbone.prepare(Images())


def test_an_output_that_does_not_come_from_the_last_block_is_refused(tmp_path: Path) -> None:
    backbone = toy(tmp_path)
    seen: list[Tensor] = []
    around(backbone.blocks[0], lambda hidden: seen.append(hidden) or hidden)  # type: ignore[func-returns-value]
    around(backbone.model.norm, lambda hidden: hidden + seen[-1])
    with pytest.raises(UsageError, match=r"layers\.2 is not all that LlamaModel makes its own output of"):
        backbone.prepare(Images())


def test_a_gate_after_both_outputs_withdraws_two_sites_and_keeps_the_stream(tmp_path: Path) -> None:
    backbone = toy(tmp_path)
    around(backbone.blocks[1], lambda hidden: hidden * hidden.mean(-1, keepdim=True).sigmoid())
    backbone.prepare(Images())
    assert backbone.checked is not None and "layers.1" in str(backbone.checked.withheld)
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(UsageError, match=rf"{site} is not offered for .*does not add up"):
            check_layers([LayerRef(0, site)], backbone)
    check_layers([LayerRef(0, "resid_pre"), LayerRef(0)], backbone)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ViTMAE", VISION, "masks, hashes or samples at random"),
        ("Yolos", {**VISION, "num_detection_tokens": 7}, "appends 7 tokens of its own"),
        ("Longformer", {**LM, "attention_window": 64}, "extends 16 tokens to 64"),
    ],
)
def test_families_that_do_not_keep_tokens(
    name: str, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments = {**arguments}
    if name == "Yolos":
        arguments["image_size"] = [32, 32]
    config = getattr(transformers, f"{name}Config")(**arguments)
    with pytest.raises(UsageError, match=message):
        loaded(getattr(transformers, f"{name}Model")(config), tmp_path).prepare(Images())


def test_reformer_hashes_at_random(tmp_path: Path) -> None:
    config = transformers.ReformerConfig(
        hidden_size=32, attention_head_size=8, num_attention_heads=4, feed_forward_size=64, vocab_size=99,
        attn_layers=["lsh", "lsh"], axial_pos_embds=False, lsh_attn_chunk_length=4, num_buckets=4,
        max_position_embeddings=64, is_decoder=False, num_hashes=1,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"hash|blocks"):
        loaded(transformers.ReformerModel(config), tmp_path).prepare(Images())


def test_tokens_that_are_appended_are_refused(tmp_path: Path) -> None:
    backbone = toy(tmp_path, "vit")
    around(backbone.model.embeddings, lambda hidden: torch.cat([hidden, hidden[:, :3] * 0 + 1], dim=1))
    with pytest.raises(UsageError, match="appends 3 tokens of its own after the image's 16"):
        backbone.prepare(Images())


def test_tokens_that_are_hashed_at_random_are_refused(tmp_path: Path) -> None:
    """Each token is mixed with its bucket's mean, and buckets are drawn anew in every pass."""
    backbone = toy(tmp_path)

    def hashed(hidden: Tensor) -> Tensor:
        bucket = (hidden @ torch.randn(hidden.shape[-1], 4)).argmax(-1)
        same = (bucket[:, :, None] == bucket[:, None]).to(hidden.dtype).tril()
        return hidden + same @ hidden / same.sum(-1, keepdim=True)

    around(backbone.blocks[1], hashed)
    with pytest.raises(UsageError, match="hashes or samples at random"):
        backbone.prepare(Images())


def test_a_projection_of_its_own_in_a_layer_withdraws_two_sites(tmp_path: Path) -> None:
    """As of MobileBERT's bottlenecks or Gemma 4's embeddings by layer: the block adds more than its two writers."""
    backbone = toy(tmp_path)
    projection = torch.randn(32, 32) * 0.1
    around(backbone.blocks[1], lambda hidden: hidden @ projection)
    backbone.prepare(Images())
    assert backbone.checked is not None and "layers.1" in str(backbone.checked.withheld)


def test_bigbird_keeps_its_sparse_attention(tmp_path: Path) -> None:
    """The trial on three tokens must not leave full attention behind; against the model's own hidden states."""
    config = transformers.BigBirdConfig(
        **LM, block_size=4, num_random_blocks=1, max_position_embeddings=128, attention_type="block_sparse"
    )
    model = transformers.BigBirdModel(config)
    backbone = loaded(model, tmp_path, image_size=64).prepare(Images())
    pixels = backbone.preprocess(IMAGES)
    with torch.no_grad(), capture(backbone, [LayerRef(0), LayerRef(1)]) as seen:
        backbone(pixels)
        own = model(inputs_embeds=backbone.stem(pixels), output_hidden_states=True).hidden_states
    assert model.attention_type == backbone.model.attention_type == "block_sparse"
    for layer, expected in zip(seen, own[1:], strict=False):
        torch.testing.assert_close(seen[layer], expected.view(seen[layer].shape))


MOE = {
    "qwen2-moe": (
        "Qwen2Moe",
        {**LM, **EXPERTS, "num_key_value_heads": 2, "shared_expert_intermediate_size": 16},
    ),
    "glm4-moe": (
        "Glm4Moe",
        {
            **LM, **GROUPED, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 1,
        },
    ),
    "afmoe": ("Afmoe", {**LM, **GROUPED, **EXPERTS, "num_dense_layers": 1}),
    "mixtral": ("Mixtral", {**LM, "num_key_value_heads": 2, "num_local_experts": 4}),
}  # fmt: skip


@pytest.mark.parametrize("family", MOE)
def test_experts_give_what_the_mlp_adds_not_what_one_expert_does(family: str, tmp_path: Path) -> None:
    """Against the modules' own outputs, read by a plain hook."""
    name, arguments = MOE[family]
    config = getattr(transformers, f"{name}Config")(**arguments)
    backbone = loaded(getattr(transformers, f"{name}ForCausalLM")(config), tmp_path).prepare(Images())
    block = backbone.blocks[-1]
    own: dict[str, Tensor] = {}
    for site, part in (("attn_out", block.self_attn), ("mlp_out", block.mlp)):
        around(part, lambda output, site=site: own.setdefault(site, output.clone()))
    with torch.no_grad(), capture(backbone, [LayerRef(2, "attn_out"), LayerRef(2, "mlp_out")]) as seen:
        backbone(backbone.preprocess(IMAGES))
    for site, value in own.items():
        torch.testing.assert_close(seen[LayerRef(2, site)], value.view(4, 16, 32))


@pytest.mark.parametrize(("family", "prefix"), [("vit", 1), ("deit", 2), ("dinov2", 1), ("clip-vision", 1)])
def test_prefix_tokens_are_counted_where_the_image_begins(family: str, prefix: int, tmp_path: Path) -> None:
    backbone = toy(tmp_path, family).prepare(Images())
    assert backbone.checked is not None
    assert (backbone.checked.n_prefix, backbone.n_prefix(16 + prefix)) == (prefix, prefix)


def test_dinov3_counts_its_registers(tmp_path: Path) -> None:
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION, num_register_tokens=4))
    backbone = loaded(model, tmp_path).prepare(Images())
    assert backbone.n_prefix(21) == 5
    pixels = backbone.preprocess(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(backbone(pixels), model(pixel_values=pixels).last_hidden_state)


def test_xlnet_keeps_tokens_first_inside_and_features_are_per_image(tmp_path: Path) -> None:
    model = transformers.XLNetModel(
        transformers.XLNetConfig(d_model=32, n_layer=3, n_head=4, d_inner=64, vocab_size=99)
    )
    backbone = loaded(model, tmp_path).prepare(Images())
    pixels = backbone.preprocess(IMAGES)
    with torch.no_grad(), capture(backbone, [LayerRef(None, "embed"), LayerRef(0), LayerRef(1)]) as seen:
        backbone(pixels)
        own = model(inputs_embeds=backbone.stem(pixels), output_hidden_states=True).hidden_states
    for layer, expected in zip(seen, own, strict=False):
        torch.testing.assert_close(seen[layer], expected.view(seen[layer].shape))

"""Names of many families find block, kind and group; fused matrices are cut into their parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from layerprobe.checkpoints import StoredTensor, fused_parts, open_checkpoint, tensor_roles

NAMES = {
    "model.layers.7.self_attn.q_proj.weight": (7, "q", "blocks"),
    "model.layers.7.self_attn.o_proj.weight": (7, "o", "blocks"),
    "model.layers.7.mlp.gate_proj.weight": (7, "gate", "blocks"),
    "model.layers.7.mlp.down_proj.weight": (7, "down", "blocks"),
    "model.layers.7.input_layernorm.weight": (7, "norm", "norms_biases"),
    "model.layers.7.self_attn.q_norm.weight": (7, "norm", "norms_biases"),
    "model.layers.7.mlp.experts.3.w2.weight": (7, "down", "blocks"),
    "model.layers.7.mlp.gate.weight": (7, "router", "blocks"),
    "model.layers.7.mlp.gate_up_proj.weight": (7, "gate_up", "blocks"),
    "model.norm.weight": (None, "norm", "norms_biases"),
    "lm_head.weight": (None, "head", "head"),
    "model.embed_tokens.weight": (None, "embedding", "embeddings"),
    "h.11.attn.c_attn.weight": (11, "qkv", "blocks"),
    "h.11.attn.c_proj.weight": (11, "o", "blocks"),
    "h.11.mlp.c_proj.weight": (11, "down", "blocks"),
    "h.11.mlp.c_proj.bias": (11, "bias", "norms_biases"),
    "h.11.ln_1.bias": (11, "norm", "norms_biases"),
    "transformer.ln_f.weight": (None, "norm", "norms_biases"),
    "wte.weight": (None, "embedding", "embeddings"),
    "wpe.weight": (None, "embedding", "embeddings"),
    "encoder.layer.2.attention.self.query.weight": (2, "q", "blocks"),
    "encoder.layer.2.attention.output.dense.weight": (2, "o", "blocks"),
    "encoder.layer.2.attention.output.LayerNorm.weight": (2, "norm", "norms_biases"),
    "encoder.layer.2.intermediate.dense.weight": (2, "fc", "blocks"),
    "encoder.layer.2.output.dense.weight": (2, "down", "blocks"),
    "pooler.dense.weight": (None, "other", "other"),
    "vit.encoder.layer.0.attention.attention.value.weight": (0, "v", "blocks"),
    "vit.embeddings.cls_token": (None, "embedding", "embeddings"),
    "vit.embeddings.patch_embeddings.projection.weight": (None, "embedding", "embeddings"),
    "vit.embeddings.patch_embeddings.projection.bias": (None, "bias", "norms_biases"),
    "classifier.weight": (None, "head", "head"),
    "blocks.4.attn.qkv.weight": (4, "qkv", "blocks"),
    "blocks.4.attn.proj.weight": (4, "o", "blocks"),
    "blocks.4.mlp.fc1.weight": (4, "fc", "blocks"),
    "blocks.4.mlp.fc2.weight": (4, "down", "blocks"),
    "encoder.block.3.layer.0.SelfAttention.q.weight": (3, "q", "blocks"),
    "encoder.block.3.layer.1.DenseReluDense.wi_0.weight": (3, "gate", "blocks"),
    "encoder.block.3.layer.1.DenseReluDense.wo.weight": (3, "down", "blocks"),
    "gpt_neox.layers.5.attention.query_key_value.weight": (5, "qkv", "blocks"),
    "gpt_neox.layers.5.attention.dense.weight": (5, "o", "blocks"),
    "gpt_neox.layers.5.mlp.dense_h_to_4h.weight": (5, "fc", "blocks"),
    "vision_model.encoder.layers.1.self_attn.out_proj.weight": (1, "o", "blocks"),
    "vision_model.pre_layrnorm.weight": (None, "norm", "norms_biases"),
    "something.entirely.else": (None, "other", "other"),
}


def test_names_of_many_families_find_block_kind_and_group() -> None:
    shapes = {name: (4,) if "norm" in name.lower() or name.endswith("bias") else (4, 4) for name in NAMES}
    found = tensor_roles(shapes)
    assert {name: (found[name].block, found[name].kind, found[name].group) for name in NAMES} == NAMES


def test_every_matrix_in_the_blocks_of_the_promised_families_has_a_kind() -> None:
    import families

    for family in families.FAMILIES:
        shapes = {name: tuple(value.shape) for name, value in families.build(family).state_dict().items()}
        found = tensor_roles(shapes)
        unknown = [name for name, place in found.items() if place.group == "blocks" and place.kind == "other"]
        assert unknown == [], family
        blocks = {(place.stack, place.block) for place in found.values() if place.block is not None}
        assert len(blocks) == {"gpt-neo": 4, "t5": 6}.get(family, 3), family
        assert {"o", "down"} <= {place.kind for place in found.values()}, family


def test_causal_masks_and_rotary_tables_are_buffers_but_attention_biases_are_not() -> None:
    found = tensor_roles(
        {
            "h.0.attn.bias": (1, 1, 8, 8),
            "h.0.attn.masked_bias": (),
            "layers.0.self_attn.rotary_emb.inv_freq": (8,),
            "h.0.attn.c_proj.bias": (8,),
        }
    )
    assert [place.kind for place in found.values()] == ["buffer", "buffer", "buffer", "bias"]


def test_nested_stages_are_counted_through_and_stacks_are_kept_apart() -> None:
    found = tensor_roles(
        {
            **{f"encoder.layers.0.blocks.{i}.mlp.fc1.weight": (4, 4) for i in range(2)},
            **{f"encoder.layers.1.blocks.{i}.mlp.fc1.weight": (4, 4) for i in range(3)},
            "encoder.layers.0.downsample.reduction.weight": (4, 4),
            "decoder.block.0.layer.0.SelfAttention.q.weight": (4, 4),
        }
    )
    assert [place.block for place in found.values()] == [0, 1, 2, 3, 4, None, 0]
    assert {place.stack for place in found.values()} == {"encoder", "decoder", None}


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("layout", ["conv1d", "linear", "grouped", "gate_up"])
def test_fused_matrices_are_cut_into_their_parts(layout: str, container: str, tmp_path: Path) -> None:
    d = 6
    q, k, v = torch.randn(d, d), torch.randn(d, d), torch.randn(d, d)
    name = {"conv1d": "h.0.attn.c_attn.weight", "gate_up": "layers.0.mlp.gate_up_proj.weight"}.get(
        layout, "layers.0.self_attn.qkv_proj.weight"
    )
    if layout == "grouped":
        k, v = k[:2], v[:2]
    expected = {"gate": q, "up": k} if layout == "gate_up" else {"q": q, "k": k, "v": v}
    fused = torch.cat(list(expected.values()))
    if layout == "conv1d":
        fused, expected = fused.T.contiguous(), {kind: part.T for kind, part in expected.items()}
    weights = {name: fused}
    save_file(weights, tmp_path / container) if "safe" in container else torch.save(
        weights, tmp_path / container
    )
    tensor = open_checkpoint(tmp_path).tensors[0]
    parts = dict(fused_parts(tensor, tensor_roles({name: tensor.shape})[name]))
    assert list(parts) == list(expected)
    for kind, part in parts.items():
        assert part.name == f"{name}[{kind}]"
        for buffer in (40, 200, 4096):
            entries = np.concatenate([chunk.copy() for chunk in part.chunks(bytearray(buffer))])
            assert np.array_equal(entries, expected[kind].contiguous().numpy().ravel())


def test_interleaved_heads_are_left_whole() -> None:
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    tensor = StoredTensor(name=name, dtype="float32", shape=(18, 6), file=Path("x"), offset=0, nbytes=432)
    assert fused_parts(tensor, tensor_roles({name: (18, 6)})[name]) == []

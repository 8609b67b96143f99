"""Names of many families find block, kind and group, by their place in the module tree."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from layerprobe.checkpoints import tensor_roles

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


_C = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GQA = {**_C, "num_key_value_heads": 2}
# Model → end of a tensor's name in some block → its kind.
PLACES = {
    "modernbert": (
        tf.ModernBertConfig(**_C, cls_token_id=1, sep_token_id=2),
        {"attn.Wqkv": "qkv", "attn.Wo": "o", "mlp.Wi": "gate_up", "mlp.Wo": "down"},
    ),
    "rwkv": (
        tf.RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99),
        {
            "attention.key": "mixer", "attention.value": "mixer", "attention.output": "mixer",
            "feed_forward.key": "fc", "feed_forward.value": "down", "feed_forward.receptance": "gate",
        },
    ),
    "mamba": (
        tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99),
        {"mixer.in_proj": "mixer", "mixer.x_proj": "mixer", "mixer.conv1d": "mixer", "mixer.out_proj": "mixer"},
    ),
    "mamba2": (
        tf.Mamba2Config(hidden_size=32, num_hidden_layers=2, vocab_size=99, num_heads=4, head_dim=16, n_groups=1),
        {"mixer.in_proj": "mixer", "mixer.out_proj": "mixer"},
    ),
    "lfm2": (
        tf.Lfm2Config(**_GQA, layer_types=["conv", "full_attention"]),
        {
            "conv.in_proj": "mixer", "conv.out_proj": "mixer", "conv.conv": "mixer",
            "self_attn.q_proj": "q", "self_attn.out_proj": "o",
            "feed_forward.w1": "gate", "feed_forward.w3": "up", "feed_forward.w2": "down",
        },
    ),
    "recurrent_gemma": (
        tf.RecurrentGemmaConfig(**_GQA, lru_width=32, attention_window_size=8),
        {
            "temporal_block.linear_x": "mixer", "temporal_block.linear_out": "mixer",
            "mlp_block.gate_proj": "gate", "mlp_block.down_proj": "down",
        },
    ),
    "falcon_h1": (
        tf.FalconH1Config(**_GQA, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
        {"mamba.in_proj": "mixer", "mamba.out_proj": "mixer", "self_attn.o_proj": "o", "feed_forward.up_proj": "up"},
    ),
    "blip": (
        tf.BlipVisionConfig(**{k: v for k, v in _C.items() if k[-3:] != "_id" and k != "vocab_size"}, image_size=32),
        {"self_attn.qkv": "qkv", "self_attn.projection": "o", "mlp.fc1": "fc", "mlp.fc2": "down"},
    ),
    "granitemoeshared": (
        tf.GraniteMoeSharedConfig(**_GQA, num_local_experts=4, shared_intermediate_size=48),
        {"shared_mlp.input_linear": "gate_up", "shared_mlp.output_linear": "down", "self_attn.o_proj": "o"},
    ),
    "xlnet": (
        tf.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=99),
        {"rel_attn.q": "q", "rel_attn.o": "o", "ff.layer_1": "fc", "ff.layer_2": "down"},
    ),
    "squeezebert": (
        tf.SqueezeBertConfig(**_C, embedding_size=32),
        {"attention.query": "q", "attention.value": "v"},
    ),
    "deepseek_v3": (
        tf.DeepseekV3Config(
            **{**_GQA, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8,
            qk_nope_head_dim=8, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1,
        ),
        {"self_attn.q_b_proj": "q", "self_attn.kv_b_proj": "kv", "self_attn.o_proj": "o", "mlp.gate": "router"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", PLACES)
def test_the_kind_is_that_of_the_place_in_the_module_tree(model: str) -> None:
    config, kinds = PLACES[model]
    with torch.device("meta"):
        built = tf.BlipVisionModel(config) if model == "blip" else tf.AutoModel.from_config(config)
    found = tensor_roles({name: tuple(value.shape) for name, value in built.state_dict().items()})
    for ending, kind in kinds.items():
        roles = {role for name, role in found.items() if name.removesuffix(".weight").endswith("." + ending)}
        assert {role.kind for role in roles} == {kind}, ending
        assert {role.group for role in roles} == {"blocks"}, ending


def test_a_module_called_mixer_is_what_it_holds() -> None:
    found = tensor_roles(
        {
            "backbone.layers.0.mixer.in_proj.weight": (80, 32),
            "backbone.layers.0.mixer.A_log": (4,),
            "backbone.layers.1.mixer.q_proj.weight": (32, 32),
            "backbone.layers.1.mixer.o_proj.weight": (32, 32),
            "backbone.layers.2.mixer.up_proj.weight": (64, 32),
            "backbone.layers.2.mixer.down_proj.weight": (32, 64),
            "backbone.layers.3.linear_attn.in_proj_qkvz.weight": (96, 32),
            "backbone.layers.3.linear_attn.out_proj.weight": (32, 32),
            "backbone.layers.3.linear_attn.dt_bias": (4,),
            "layers.0.self_attn.relative_position_bias.proj.weight": (32, 32),
            "semantic.layers.0.attn.att_proj.weight": (96, 32),
            "semantic.layers.0.mlp.in_proj.weight": (128, 32),
            "semantic.layers.0.mlp.out_proj.weight": (32, 128),
        }
    )
    kinds = [role.kind for role in found.values()]
    assert kinds[:2] == ["mixer", "mixer"]
    assert kinds[2:6] == ["q", "o", "up", "down"]
    assert kinds[6:8] == ["mixer", "mixer"]
    assert kinds[9:] == ["other", "qkv", "fc", "down"]

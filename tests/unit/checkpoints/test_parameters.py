"""What is stored and no parameter: the model's class decides where there is one, else the names that tables have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerprobe.analyzers.outliers import outlier_report
from layerprobe.checkpoints import tensor_roles
from layerprobe.checkpoints.parameters import no_parameters

TABLES = {
    "layers.0.attention.rotary_emb.cos_cached": (1, 1, 9, 8),
    "layers.0.self_attn.rotary_emb.sin_cached": (1, 1, 9, 8),
    "layers.0.attn.rotary_emb.scale": (4,),
    "h.0.attn.rotary.inv_freq": (4,),
    "rope.freqs": (4,),
    "layers.0.attn.rope.freqs": (4,),
    "layers.0.self_attn.freqs": (64, 4),
    "freqs_cis": (64, 4),
    "layers.0.attn.tril": (64, 64),
    "blocks.0.sa.heads.0.tril": (64, 64),
    "layers.0.attn.causal_mask": (64, 64),
    "layers.0.attn.mask": (1, 1, 64, 64),
    "attn_mask": (7, 7),
    "h.0.attn.bias": (1, 1, 64, 64),
    "layers.0.attention.self.relative_coords_table": (1, 15, 15, 2),
    "layers.0.self_attn.slopes": (8, 1, 1),
    "layers.0.attn.alibi": (1, 8, 1, 64),
    "h.0.attn.embed_positions": (64, 16),
    "pos_encoding.pe": (1, 64, 32),
    "layers.0.input_layernorm.weight_ema": (32,),
    "encoder.embed_positions._float_tensor": (1,),
    "final_logits_bias": (1, 20),
}
PARAMETERS = {
    "layers.0.attention.self.distance_embedding.weight": (63, 8),
    "decoder.embed_positions.weight": (64, 16),
    "layers.0.self_attn.q_proj.bias": (8,),
    "layers.0.attn.bias": (8,),
    "embeddings.mask_token": (1, 1, 8),
    "layers.0.mega.ema_gate.damping_factor": (8, 2, 1),
    "layers.0.attn.relative_position_bias_table": (169, 4),
    "layers.0.attention.relative_attention_bias.weight": (32, 4),
}


@pytest.mark.parametrize("name", TABLES)
def test_names_of_tables_are_no_parameters(name: str) -> None:
    assert tensor_roles({name: TABLES[name]})[name].kind == "buffer"
    assert name in no_parameters({name: TABLES[name]}, {name: True}, None)


@pytest.mark.parametrize("name", PARAMETERS)
def test_names_that_look_alike_are_parameters(name: str) -> None:
    assert tensor_roles({name: PARAMETERS[name]})[name].kind != "buffer"
    assert no_parameters({name: PARAMETERS[name]}, {name: True}, None) == {}


def test_averages_beside_the_model_count_once(tmp_path: Path) -> None:
    own = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(8, 8) for i in range(2)}
    copies = {f"model_ema.{name.removeprefix('model.')}": tensor.clone() for name, tensor in own.items()}
    flat = {"model_ema." + name.removeprefix("model.").replace(".", ""): t.clone() for name, t in own.items()}
    save_file(own | copies | flat, tmp_path / "model.safetensors")
    assert outlier_report(tmp_path, quiet=True).pool().n == 2 * 64


@pytest.mark.parametrize(
    ("own", "follower"),
    [
        ("module.encoder_q", "module.encoder_k"),  # MoCo
        ("online_network", "target_network"),  # BYOL
        ("student.backbone", "teacher.backbone"),  # DINO
        ("text_encoder", "text_encoder_m"),  # ALBEF
    ],
)
def test_a_network_that_follows_another_counts_once(own: str, follower: str, tmp_path: Path) -> None:
    names = [f"layers.{i}.mlp.up_proj.weight" for i in range(2)]
    state = {f"{module}.{name}": torch.randn(8, 8) for module in (own, follower) for name in names}
    state[f"{follower}.layers.0.mlp.down_proj.weight"] = torch.randn(8, 8)  # follows nothing
    torch.save({"state_dict": state}, tmp_path / "checkpoint.pt")
    report = outlier_report(tmp_path / "checkpoint.pt", quiet=True)
    assert report.pool().n == 3 * 64
    assert sum(row.skip == "an average (EMA) of other tensors" for row in report.tensors) == 2


def llama(folder: Path) -> int:
    import transformers as tf

    config = tf.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=30
    )
    model = tf.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def add(folder: Path, extra: dict[str, torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file)


def test_where_there_is_a_configuration_the_class_decides(tmp_path: Path) -> None:
    n = llama(tmp_path)
    tables = {
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.rand(1, 1, 64, 8),
        "model.layers.1.self_attn.my_own_table": torch.rand(16, 16),
        "model.lookup": torch.rand(100),
    }
    add(tmp_path, tables)
    report = outlier_report(tmp_path, quiet=True)
    assert report.pool().n == n
    reasons = {row.name: row.skip for row in report.tensors if row.found is None}
    assert reasons["model.layers.1.self_attn.my_own_table"] == "no parameter of LlamaForCausalLM"
    assert set(reasons) == set(tables)


def test_a_class_that_the_file_does_not_fill_decides_nothing_of_what_it_does_not_know(tmp_path: Path) -> None:
    llama(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "up_proj" not in name}
    save_file(kept | {"model.layers.0.mlp.fused_experts": torch.rand(16, 16)}, file)
    report = outlier_report(tmp_path, quiet=True)
    assert "model.layers.0.mlp.fused_experts" in {row.name for row in report.counted()}


def test_what_the_class_declares_as_parameter_or_buffer_is_that(tmp_path: Path) -> None:
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Swinv2Config(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=3
    )
    model = tf.Swinv2ForImageClassification(config)
    state = model.state_dict() | dict(model.named_buffers())
    model.save_pretrained(tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    report = outlier_report(tmp_path, quiet=True)
    assert report.pool().n == sum(parameter.numel() for parameter in model.parameters())
    assert len(state) > len(dict(model.named_parameters()))

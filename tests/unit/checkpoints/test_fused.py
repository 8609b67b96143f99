"""Fused matrices are cut as the model's own code cuts them: the rows that its attention products receive."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from layerprobe.backbones.fused_layout import measure_fused_rows
from layerprobe.checkpoints import FusedMatrices, StoredTensor, open_checkpoint, tensor_roles
from layerprobe.checkpoints.fused import Part
from layerprobe.checkpoints.view import View

D, H = 64, 4
SIZE = D // H
_C = {
    "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": H, "intermediate_size": 96, "vocab_size": 50,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT = {"n_embd": D, "n_layer": 2, "n_head": H, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}

MODELS = {
    "gpt2": tf.GPT2Config(**_GPT),
    "openai-gpt": tf.OpenAIGPTConfig(n_embd=D, n_layer=2, n_head=H, vocab_size=50),
    "gpt_bigcode": tf.GPTBigCodeConfig(**_GPT, multi_query=False),
    "gpt_bigcode shared": tf.GPTBigCodeConfig(**_GPT),
    "bloom": tf.BloomConfig(hidden_size=D, n_layer=2, n_head=H, vocab_size=50),
    "gpt_neox": tf.GPTNeoXConfig(**_C),
    "gpt_neox_japanese": tf.GPTNeoXJapaneseConfig(**_C),
    "falcon shared": tf.FalconConfig(**_C),
    "falcon": tf.FalconConfig(**_C, multi_query=False),
    "falcon groups": tf.FalconConfig(**_C, new_decoder_architecture=True, num_kv_heads=2),
    "phi3": tf.Phi3Config(**_C, num_key_value_heads=2),
    "mpt": tf.MptConfig(d_model=D, n_heads=H, n_layers=2, vocab_size=50, max_seq_len=32),
    "modernbert": tf.ModernBertConfig(**_C, cls_token_id=1, sep_token_id=2),
    "persimmon": tf.PersimmonConfig(**_C),
    "deberta": tf.DebertaConfig(**_C, relative_attention=False),
}


def outputs_of(part: Part, whole: tuple[int, ...]) -> list[int]:
    """The output rows of the whole that this part holds."""
    numbers = np.arange(np.prod(whole)).reshape(whole)
    assert part.tensor.view is not None
    kept = part.tensor.view.take(numbers.reshape(-1)).reshape(part.tensor.shape)
    return (kept[0] % whole[1] if part.transposed else kept[:, 0] // whole[1]).tolist()


def parts_of(shapes: dict[str, tuple[int, ...]], name: str, config: dict[str, object]) -> list[Part]:
    tensor = StoredTensor(
        name=name, dtype="float32", shape=shapes[name], file=Path("x"), offset=0, nbytes=0, source=np.zeros(1)
    )
    return FusedMatrices(shapes, config).parts(tensor, tensor_roles(shapes)[name])


@pytest.mark.parametrize("name", MODELS)
def test_known_architectures_are_cut_where_the_model_sends_its_rows(name: str, tmp_path: Path) -> None:
    config = MODELS[name]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        weights = tf.AutoModel.from_config(config).state_dict()
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    roles = tensor_roles(shapes)
    fused = {key for key, role in roles.items() if role.kind == "qkv"}
    assert len(fused) == 2
    flipped = {key: shapes[key][::-1] if roles[key].transposed else shapes[key] for key in fused}
    truth = measure_fused_rows(tmp_path, flipped)
    settings = json.loads((tmp_path / "config.json").read_text())
    for key in fused:
        found = {part.kind: outputs_of(part, shapes[key]) for part in parts_of(shapes, key, settings)}
        assert found == {kind: list(rows) for kind, rows in truth[key].items()}


def rows(*axes: int) -> np.ndarray:
    return np.arange(np.prod(axes)).reshape(axes)


CODEGEN = rows(4, 3, D // 4)
BY_HEAD = rows(H, 3, SIZE)
LATENT = rows(H, 8 + 12)
# What the forward passes read off: split and view calls of the modelling files, transcribed.
TRANSCRIBED = {
    "codegen": (
        "transformer.h.0.attn.qkv_proj.weight",
        (3 * D, D),
        {"model_type": "codegen", "n_head": H, "n_embd": D},
        {"q": CODEGEN[:, 0], "k": CODEGEN[:, 2], "v": CODEGEN[:, 1]},
    ),
    "minimax": (
        "model.layers.0.self_attn.qkv_proj.weight",
        (3 * D, D),
        {"model_type": "minimax", "num_attention_heads": H, "num_key_value_heads": 2},
        {"q": BY_HEAD[:, 0], "k": BY_HEAD[:, 1], "v": BY_HEAD[:, 2]},
    ),
    "internlm2": (
        "model.layers.0.attention.wqkv.weight",
        (8 * SIZE, D),
        {"model_type": "internlm2", "num_attention_heads": H, "num_key_value_heads": 2},
        {"q": rows(2, 4, SIZE)[:, :2], "k": rows(2, 4, SIZE)[:, 2], "v": rows(2, 4, SIZE)[:, 3]},
    ),
    "dbrx": (
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight",
        (2 * D, D),
        {"model_type": "dbrx", "n_heads": H, "attn_config": {"kv_n_heads": 2}},
        {"q": rows(D), "k": D + rows(D // 2), "v": 3 * D // 2 + rows(D // 2)},
    ),
    "a wide head": (
        "model.layers.0.self_attn.qkv_proj.weight",
        (32 * (H + 2), D),
        {"model_type": "phi3", "num_attention_heads": H, "num_key_value_heads": 1, "head_dim": 32},
        {"q": rows(32 * H), "k": 32 * H + rows(32), "v": 32 * (H + 1) + rows(32)},
    ),
    "a vision tower": (
        "model.visual.blocks.0.attn.qkv.weight",
        (3 * 32, 32),
        {
            "model_type": "qwen2_5_vl", "num_attention_heads": 4, "num_key_value_heads": 2,
            "vision_config": {"num_heads": 2},
        },
        {"q": rows(32), "k": 32 + rows(32), "v": 64 + rows(32)},
    ),
    "latent attention": (
        "model.layers.0.self_attn.kv_b_proj.weight",
        (H * 20, 16),
        {"model_type": "deepseek_v3", "num_attention_heads": H, "qk_nope_head_dim": 8, "v_head_dim": 12},
        {"k": LATENT[:, :8], "v": LATENT[:, 8:]},
    ),
    "granite, gate and up": (
        "model.layers.0.shared_mlp.input_linear.weight",
        (2 * 24, D),
        {"model_type": "granitemoeshared"},
        {"gate": rows(24), "up": 24 + rows(24)},
    ),
    "phi4 audio, up and gate": (
        "model.embed_tokens_extend.audio_embed.encoder.encoders.layers.0.feed_forward_in.gate_up_proj.weight",
        (2 * 24, D),
        {"model_type": "phi4_multimodal"},
        {"gate": 24 + rows(24), "up": rows(24)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSCRIBED)
def test_other_cuts_are_those_of_the_forward_passes(case: str) -> None:
    name, shape, config, truth = TRANSCRIBED[case]
    shapes: dict[str, tuple[int, ...]] = {name: shape}
    if "input_linear" in name:
        shapes[name.replace("input", "output")] = (D, 24)
    found = {part.kind: outputs_of(part, shape) for part in parts_of(shapes, name, config)}
    assert found == {kind: index.reshape(-1).tolist() for kind, index in truth.items()}


def test_cross_attention_holds_k_and_v() -> None:
    model = tf.GPT2Model(tf.GPT2Config(**_GPT, add_cross_attention=True))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    name = "h.0.crossattention.c_attn.weight"
    found = parts_of(shapes, name, {"model_type": "gpt2", "n_head": H})
    assert [part.kind for part in found] == ["k", "v"]
    assert [outputs_of(part, shapes[name])[0] for part in found] == [0, D]
    assert tensor_roles(shapes)["h.0.crossattention.q_attn.weight"].kind == "q"


@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "transformer.h.0.attn.qkv_proj.weight",
        "transformer.h.0.attn.c_attn.weight",
    ],
)
def test_a_matrix_of_an_unknown_architecture_stays_whole(name: str) -> None:
    assert parts_of({name: (3 * D, D)}, name, {}) == []


def test_an_architecture_that_is_not_known_is_asked(tmp_path: Path) -> None:
    from layerprobe.analyzers.outliers import outlier_report

    class OwnConfig(tf.BloomConfig):
        model_type = "own-bloom"

    class OwnModel(tf.BloomModel):
        config_class = OwnConfig

    tf.AutoConfig.register("own-bloom", OwnConfig)
    tf.AutoModel.register(OwnConfig, OwnModel)
    torch.manual_seed(0)
    model = OwnModel(OwnConfig(hidden_size=D, n_layer=2, n_head=H, vocab_size=50))
    model.save_pretrained(tmp_path)
    name = "h.1.self_attention.query_key_value.weight"
    found = {
        row.place.kind: row for row in outlier_report(tmp_path, quiet=True).tensors if row.part_of == name
    }
    assert list(found) == ["q", "k", "v"]
    weight = model.state_dict()[name].double().numpy()
    for index, row in enumerate(found.values()):
        assert row.found is not None
        assert row.found.values["std"] == pytest.approx(
            weight[BY_HEAD[:, index].reshape(-1)].std(), rel=1e-12
        )


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "layout", ["conv1d", "linear", "grouped", "gate_up", "by head", "experts", "transposed", "interleaved"]
)
def test_parts_hold_the_entries_of_their_module(layout: str, container: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    d, experts, inner = 6, 3, 5
    config: dict[str, object] = {}
    name = "layers.0.self_attn.qkv_proj.weight"
    q, k, v = torch.randn(d, d), torch.randn(d, d), torch.randn(d, d)
    truth = {"q": q, "k": k, "v": v}
    more: dict[str, torch.Tensor] = {}
    if layout == "grouped":
        truth |= {"k": k[:2], "v": v[:2]}
    if layout == "gate_up":
        name, truth = "layers.0.mlp.gate_up_proj.weight", {"gate": q, "up": k}
    fused = torch.cat(list(truth.values()))
    if layout == "conv1d":
        name, fused = "h.0.attn.c_attn.weight", fused.T.contiguous()
        truth = {kind: part.T for kind, part in truth.items()}
    if layout == "by head":
        name, config = (
            "h.0.self_attention.query_key_value.weight",
            {"model_type": "bloom", "n_head": 2, "hidden_size": d},
        )
        fused = torch.stack([part.reshape(2, 3, d) for part in truth.values()], 1).reshape(3 * d, d)
    if layout in ("experts", "transposed", "interleaved"):
        gate, up = torch.randn(experts, inner, d), torch.randn(experts, inner, d)
        name, down = "layers.0.mlp.experts.gate_up_proj", torch.randn(experts, d, inner)
        fused = torch.cat([gate, up], 1)
        if layout == "interleaved":
            fused, config = (
                torch.stack([gate, up], 2).reshape(experts, 2 * inner, d),
                {"model_type": "gpt_oss"},
            )
        if layout != "experts":
            fused, down, gate, up = fused.mT, down.mT, gate.mT, up.mT
        truth = {
            f"{e}.{kind}": part[e] for e in range(experts) for kind, part in (("gate", gate), ("up", up))
        }
        more = {"layers.0.mlp.experts.down_proj": down.contiguous()}
    weights = {name: fused.contiguous(), **more}
    save = save_file if "safe" in container else torch.save
    save(weights, tmp_path / container)
    tensor = next(one for one in open_checkpoint(tmp_path).tensors if one.name == name)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    parts = FusedMatrices(shapes, config).parts(tensor, tensor_roles(shapes)[name])
    assert [part.tensor.name for part in parts] == [f"{name}[{label}]" for label in truth]
    for part, expected in zip(parts, truth.values(), strict=True):
        assert part.tensor.shape == tuple(expected.shape)
        assert part.tensor.nbytes == 4 * expected.numel()
        for buffer in (4, 40, 200, 4096):
            chunks = [chunk.copy() for chunk in part.tensor.chunks(bytearray(buffer))]
            assert np.array_equal(np.concatenate(chunks), expected.contiguous().numpy().ravel())


def test_experts_without_their_last_layer_are_cut_only_where_the_width_is_known() -> None:
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    shapes: dict[str, tuple[int, ...]] = {name: (2, 16, 48)}
    assert [part.kind for part in parts_of(shapes, name, {})] == ["gate_up"] * 2
    llama4 = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": 16}}
    assert [part.tensor.shape for part in parts_of(shapes, name, llama4)] == [(16, 24)] * 4
    other = {"model_type": "qwen3_5_moe", "hidden_size": 48}
    assert [part.tensor.shape for part in parts_of(shapes, name, other)] == [(8, 48)] * 4


def test_dbrx_keeps_the_rows_of_all_experts_in_one_matrix() -> None:
    config = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 4}}
    stem = "transformer.blocks.0.ffn.experts.mlp"
    shapes: dict[str, tuple[int, ...]] = {f"{stem}.{leaf}": (4 * 24, 16) for leaf in ("w1", "v1", "w2")}
    for leaf, kind in (("w1", "gate"), ("v1", "up"), ("w2", "down")):
        found = parts_of(shapes, f"{stem}.{leaf}", config)
        assert [part.kind for part in found] == [kind] * 4
        assert {part.tensor.shape for part in found} == {(24, 16)}
        assert {part.transposed for part in found} == {kind == "down"}


def test_a_view_reads_no_more_than_it_is_allowed() -> None:
    view = View((5, 3, 7), ((1, 4), (0, 2), (2, 6)))
    numbers = np.arange(105)
    for limit in (1, 3, 7, 20, 50, 1000):
        spans = list(view.spans(limit))
        assert max(count for _, count, _ in spans) <= limit
        found = np.concatenate([kept.take(numbers[first : first + count]) for first, count, kept in spans])
        assert found.tolist() == numbers.reshape(5, 3, 7)[1:4, :2, 2:6].reshape(-1).tolist()

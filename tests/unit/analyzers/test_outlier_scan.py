"""What is counted: copies once, experts one by one however they are stored, fused matrices by the model's own code."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from layerprobe.analyzers.compare import compare_outliers
from layerprobe.analyzers.outliers import OutlierReport, outlier_report
from layerprobe.metrics.outliers.summary import outlier_statistics

_C = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 500,
}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 500,
    "max_position_embeddings": 40,
}  # fmt: skip

TIED = {
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=500)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_BART)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=500)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_C)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_C)),
    "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**_C, embedding_size=16)),
    "distilbert": lambda: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=500)
    ),
    "untied llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_C, tie_word_embeddings=False)),
}


@pytest.mark.parametrize("name", TIED)
def test_copies_of_a_tied_tensor_count_once(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TIED[name]()
    weights = {
        key: value.clone().contiguous() for key, value in model.named_parameters(remove_duplicate=False)
    }
    save_file(weights, tmp_path / "model.safetensors")
    report = outlier_report(tmp_path, quiet=True)
    assert report.pool().n == sum(parameter.numel() for parameter in model.parameters())
    by_id: dict[int, set[str]] = {}
    for key, value in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(value), set()).add(key)
    for row in report.tensors:
        if row.tied_to is not None:
            assert any({row.name, row.tied_to} <= names for names in by_id.values())


def test_layers_and_vectors_that_merely_start_equal_are_no_copies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    same = torch.randn(8, 8)
    weights = {f"layers.{i}.mlp.up_proj.weight": same.clone() for i in range(2)}
    weights |= {"norm.weight": torch.ones(8), "other_norm.weight": torch.ones(8)}
    weights |= {"pos_embed": torch.zeros(4, 8), "type_embed": torch.zeros(4, 8)}
    save_file(weights, tmp_path / "model.safetensors")
    assert outlier_report(tmp_path, quiet=True).provenance["tied"] == {}


def stored_experts(folder: Path, layout: str) -> OutlierReport:
    """The same mixture of experts, with a heavy tail in the gates, stored in one of several ways."""
    g = torch.Generator().manual_seed(0)
    n_experts, inner, width = 8, 48, 64
    weights: dict[str, torch.Tensor] = {}
    for i in range(6):
        scale = torch.linspace(0.5, 3, n_experts)[:, None, None]
        gate, up, down = (
            torch.randn(n_experts, *shape, generator=g) * 0.02 * scale
            for shape in ((inner, width), (inner, width), (width, inner))
        )
        gate.view(-1)[::97] *= 20
        stem = f"model.layers.{i}.mlp.experts"
        if layout == "split":
            for e in range(n_experts):
                for leaf, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                    weights[f"{stem}.{e}.{leaf}.weight"] = matrix[e].clone()
            continue
        both = torch.cat([gate, up], 1)
        if layout == "interleaved":
            both = torch.stack([gate, up], 2).reshape(both.shape)
            weights[f"{stem}.gate_up_proj_bias"] = torch.zeros(n_experts, 2 * inner)
        flip = layout in ("interleaved", "transposed")
        weights[f"{stem}.gate_up_proj"] = (both.mT if flip else both).contiguous()
        weights[f"{stem}.down_proj"] = (down.mT if flip else down).contiguous()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    return outlier_report(folder, quiet=True)


@pytest.mark.parametrize("layout", ["fused", "transposed", "interleaved"])
def test_experts_count_alike_in_every_layout(layout: str, tmp_path: Path) -> None:
    split, other = stored_experts(tmp_path / "split", "split"), stored_experts(tmp_path / layout, layout)
    for where in ({"kind": "gate"}, {"kind": "up"}, {"kind": "down"}, {"block": 3}, {"group": "blocks"}):
        if layout == "interleaved" and "block" in where:
            continue  # it has biases besides
        one, two = split.pool(**where), other.pool(**where)
        assert (one.n, one.counts["3sigma"]) == (two.n, two.counts["3sigma"])
        assert one.values["std"] == pytest.approx(two.values["std"], rel=1e-12)
    assert split.pool(kind="gate").counts["3sigma"] > 2 * split.pool(kind="up").counts["3sigma"]
    assert other.pool(kind="gate_up").n == 0
    rows = [row for row in compare_outliers(split, other).rows if row["level"] == "pair"]
    ratios = [row for row in rows if row["metric"] == "ratio_of_ratios_3sigma"]
    assert {row["part"] for row in ratios} >= {"all", "mlp in", "mlp out", "gate", "up", "down"}
    assert all(row["value"] == pytest.approx(1) for row in ratios if row["part"] != "bias")


def test_a_kind_of_one_expert_is_the_numbers_of_its_matrix(tmp_path: Path) -> None:
    """gpt-oss as its own class saves it: gate and up alternate along the last axis."""
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        **{**_C, "vocab_size": 99}, num_key_value_heads=2, head_dim=8, num_local_experts=4
    )
    model = tf.GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.save_pretrained(tmp_path)
    report = outlier_report(tmp_path, quiet=True)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    found = {row.name: row for row in report.tensors if row.part_of == name}
    matrix = model.state_dict()[name].double().numpy()
    assert len(found) == 8
    for expert in range(4):
        for kind, truth in (("gate", matrix[expert, :, ::2]), ("up", matrix[expert, :, 1::2])):
            row = found[f"{name}[{expert}.{kind}]"]
            assert row.found is not None and row.shape == truth.shape
            assert row.found.values["mean"] == pytest.approx(truth.mean(), rel=1e-9)
            far = np.abs(truth - truth.mean()) > 3 * truth.std()
            assert row.found.counts["3sigma"] == far.sum()
    assert report.pool().n == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("model", ["modernbert", "rwkv", "mamba"])
def test_a_comparison_finds_heavy_tails_where_they_are(model: str, tmp_path: Path) -> None:
    six = {**_C, "num_hidden_layers": 6, "hidden_size": 64, "vocab_size": 99}
    bert = tf.ModernBertConfig(
        **six, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )
    small = {"hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 99}
    config, spot, part = {
        "modernbert": (bert, "attn.Wo", "attention out"),
        "rwkv": (tf.RwkvConfig(**small, intermediate_size=256), "feed_forward.key", "mlp in"),
        "mamba": (tf.MambaConfig(**small), "mixer.in_proj", None),
    }[model]
    torch.manual_seed(0)
    for folder, built in (
        ("x", tf.AutoModel.from_config(config)),
        ("y", tf.LlamaModel(tf.LlamaConfig(**six))),
    ):
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.02)
                if folder == "x" and spot in name:
                    parameter.view(-1)[::97] *= 30
        built.save_pretrained(tmp_path / folder)
    rows = compare_outliers(tmp_path / "x", tmp_path / "y", quiet=True).rows
    families = ("attention in", "attention out", "mlp in", "mlp out")
    ratios = {
        row["part"]: row["value"]
        for row in rows
        if (row["level"], row["depth"], row["metric"]) == ("pair", "all", "ratio_of_ratios_3sigma")
        and row["part"] in families
    }
    if part is None:
        assert ratios == {}
    else:
        assert ratios.pop(part) > 2
    assert all(0.7 < value < 1.4 for value in ratios.values())


def test_a_tensor_more_costs_little_memory(tmp_path: Path) -> None:
    """92,000 tensors in 400 MiB: the report may keep 2,000 bytes of each, beside 200 MiB of libraries."""
    weights = {
        f"layers.{i // 600}.mlp.experts.{i % 600}.up_proj.weight": torch.randn(4, 4) for i in range(3000)
    }
    save_file(weights, tmp_path / "model.safetensors")
    outlier_report(tmp_path, include=["layers.0.mlp.experts.0.*"], quiet=True)  # what is loaded once
    tracemalloc.start()
    try:
        report = outlier_report(tmp_path, quiet=True)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(report.tensors) == 3000
    assert kept / 3000 < 2000


def test_packed_numbers_are_those_that_were_counted(tmp_path: Path) -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    save_file({"layers.0.mlp.up_proj.weight": weight}, tmp_path / "model.safetensors")
    found = outlier_report(tmp_path, axes=True, quiet=True).tensors[0].found
    plain = outlier_statistics(weight)
    assert found is not None
    assert dict(found.values) == dict(plain.values)
    assert dict(found.counts) == dict(plain.counts)
    assert list(found.axes) == ["row", "column"]
    assert found.top == plain.top
    assert found.top[0] == plain.top[0]

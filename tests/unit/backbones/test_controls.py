"""Controls keep exactly what they say they keep of the pretrained weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from layerprobe.backbones import load_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0).add_(0.1)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return str(path)


def weights(folder, init, seed=0):
    return dict(load_backbone(folder, init=init, seed=seed).model.named_parameters())


def test_shuffled_keeps_the_entries_of_every_tensor_and_loses_their_places(folder):
    old, new = weights(folder, "pretrained"), weights(folder, "shuffled")
    for name, value in old.items():
        torch.testing.assert_close(new[name].flatten().sort().values, value.flatten().sort().values)
    assert not torch.equal(new["layers.0.mlp.up_proj.weight"], old["layers.0.mlp.up_proj.weight"])


def test_matched_keeps_moments_of_block_matrices_norms_and_embeddings(folder):
    old, new = ({k: v.detach() for k, v in weights(folder, i).items()} for i in ("pretrained", "matched"))
    for name, value in old.items():
        if "norm" in name or "embed" in name:
            assert torch.equal(new[name], value), name
        else:
            error = value.std() / value.numel() ** 0.5
            assert abs(new[name].mean() - value.mean()) < 5 * error
            assert float(new[name].std() / value.std()) == pytest.approx(1, abs=0.1)
            assert abs(torch.corrcoef(torch.stack([new[name].flatten(), value.flatten()]))[0, 1]) < 0.15


def test_matched_reset_has_the_norms_of_a_new_model(folder):
    matched, reset = weights(folder, "matched"), weights(folder, "matched-reset")
    assert torch.equal(reset["norm.weight"], torch.ones(32))
    for name in matched:
        assert torch.equal(matched[name], reset[name]) == ("norm" not in name)


def test_a_control_depends_on_the_seed_alone(folder):
    one, again, other = (weights(folder, "matched", seed) for seed in (1, 1, 2))
    name = "layers.1.self_attn.q_proj.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])

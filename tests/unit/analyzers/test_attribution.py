"""Attribution: equal to captum, honest about completeness, indifferent to how blocks return their output."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from captum.attr import LayerConductance, LayerFeatureAblation
from captum.attr._utils.approximation_methods import approximation_parameters
from families import save
from torch import nn

from layerprobe.analyzers.attribution import METHODS, SLOW_METHODS, attribute_layers
from layerprobe.analyzers.attribution_path import (
    ablated,
    mean_updates,
    path_conductance,
    refined,
    residual_taps,
)
from layerprobe.analyzers.attribution_rows import completeness_rows, large_errors
from layerprobe.analyzers.heads import only_these_train
from layerprobe.backbones import load_backbone
from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.plotting.layer_scores import attribution_figure, patch_maps_figure, plot_attribution
from layerprobe.tasks import load_task

# gpt-neo and deberta-v2 return tuples from their blocks, the others bare tensors.
FAMILIES = ("gpt2", "llama", "bert", "vit", "gpt-neo", "deberta-v2")
VISION = {"image_size": 8, "patch_size": 2, "num_labels": 10}


@pytest.fixture(scope="module")
def task():
    return load_task("digits", limit=120)


def load(family, folder, task):
    saved = save(family, folder, **(VISION if family == "vit" else {}))
    options = {} if family == "vit" else {"patch_size": 2}
    return load_backbone(str(saved), device="cpu", **options).prepare(task)


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request, tmp_path_factory, task):
    return load(request.param, tmp_path_factory.mktemp(request.param), task)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, task):
    return load("gpt2", tmp_path_factory.mktemp("one"), task)


@pytest.fixture(scope="module")
def record(gpt2, task):
    return attribute_layers(
        gpt2, task, methods=(*METHODS, *SLOW_METHODS), n_images=12, n_maps=2, n_reference=40, max_steps=1024
    )


class Predictor(nn.Module):
    """One class's logit of a random linear head, B."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        torch.manual_seed(1)
        self.head = nn.Linear(backbone.hidden_size, 10)

    def forward(self, pixels, targets):
        logits = self.head(self.backbone.features(pixels))
        return logits.gather(1, targets[:, None])[:, 0]


@pytest.fixture
def problem(backbone, task):
    pixels = backbone.preprocess(task.test.images(range(3)))
    baseline = backbone.preprocess(task.train.images(range(20))).mean(dim=0)
    return Predictor(backbone), pixels, baseline, torch.tensor([0, 3, 7])


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_one_pass_equals_captum_layer_by_layer(backbone, problem):
    predict, pixels, baseline, targets = problem
    n_steps = 5
    alphas = approximation_parameters("gausslegendre")[1](n_steps + 1)
    with residual_taps(backbone) as taps:
        single = [
            LayerConductance(predict, tap).attribute(
                pixels,
                baselines=baseline.expand_as(pixels),
                additional_forward_args=(targets,),
                n_steps=n_steps,
            )
            for tap in taps
        ]
        ours = path_conductance(lambda p: predict(p, targets), taps, pixels, baseline, alphas, rule="left")
    assert len(single) == backbone.n_blocks + 1
    for mine, theirs in zip(ours.conductance, single, strict=True):
        assert theirs.abs().max() > 0
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_every_place_sums_to_the_same_and_the_update_is_part_of_it(backbone, problem):
    predict, pixels, baseline, targets = problem
    alphas = np.linspace(0, 1, 65).tolist()
    with residual_taps(backbone) as taps, only_these_train(backbone, []):
        found = path_conductance(
            lambda p: predict(p, targets), taps, pixels, baseline, alphas, with_step_errors=True
        )
    change = (found.end - found.start).detach()
    for c in found.conductance:
        sums = c.sum(dim=(1, 2))
        assert (sums - change).abs().max() <= 0.15 * change.abs().max()
    assert found.step_errors.shape == (64,) and (found.step_errors >= 0).all()
    assert len(found.update) == backbone.n_blocks and found.update[0].shape == found.conductance[0].shape[:2]


def test_update_attribution_of_a_linear_chain_is_exact():
    """Blocks y = x + W x and a linear head: the path integral has a closed form."""
    torch.manual_seed(0)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    chain = Chain()
    weights = []
    with torch.no_grad():
        for block in chain.blocks:
            weights.append(torch.randn(4, 4) * 0.3)
            block.weight.copy_(torch.eye(4) + weights[-1])
    head = torch.randn(4)
    x, base = torch.randn(2, 5, 4), torch.randn(5, 4)
    with residual_taps(chain) as taps:
        found = path_conductance(lambda p: chain(p).sum(dim=1) @ head, taps, x, base, [0.0, 0.3, 1.0])
    moved, back = x - base, [head]
    for block in reversed(list(chain.blocks)):
        back.insert(0, back[0] @ block.weight)
    for index in range(3):
        expected = (moved @ weights[index].T) @ back[index + 1]  # g · (what the block adds), per token
        assert torch.allclose(found.update[index], expected.detach(), atol=1e-5)
        moved = moved @ chain.blocks[index].weight.T
    assert torch.allclose(found.conductance[3].sum(dim=(1, 2)), found.end - found.start, atol=1e-4)


def test_integrated_gradients_say_how_far_they_miss_the_change_of_the_output(gpt2, record):
    errors = record.metric("integrated_gradients_completeness_error")["value"]
    assert len(errors) == gpt2.n_blocks and 0 < errors.max() < 0.02
    assert "Completeness error of integrated gradients" in record.summary()
    assert not any("completeness" in column for column in record.table()[0])


def test_a_large_completeness_error_is_told_in_a_line(gpt2, task, capsys, monkeypatch):
    missed = np.array([0.5, 3.0, 1.0])
    rows = completeness_rows("attribution_completeness_error", missed, 20.0, 8, first=-1)
    assert [(row["block"], row["site"]) for row in rows] == [
        (None, "embed"),
        (0, "resid_post"),
        (1, "resid_post"),
    ]
    assert list(large_errors(rows)) == [
        "completeness error of the path: 15 % of the change of the output at 8 steps, above 5 %; lower the tolerance "
        "or raise max_steps"
    ]
    assert not list(large_errors(completeness_rows("attribution_completeness_error", missed / 4, 20.0, 8)))
    monkeypatch.setattr("layerprobe.analyzers.attribution_rows.LARGE_ERROR", 1e-7)
    arguments = {"methods": ["integrated_gradients"], "n_images": 4, "n_maps": 0, "n_reference": 20}
    attribute_layers(gpt2, task, **arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("completeness error")]
    assert [line.split(":")[0].rpartition("of ")[2] for line in lines] == ["the path", "integrated gradients"]
    attribute_layers(gpt2, task, **arguments, quiet=True)
    assert "completeness" not in capsys.readouterr().err


def test_ablations_equal_captums_feature_ablation(backbone, problem, task):
    predict, pixels, _, targets = problem
    batch = backbone.preprocess(task.train.images(range(30)))
    with only_these_train(backbone, []):
        updates, mean_image = mean_updates(backbone, [batch[:20], batch[20:]])
        assert torch.allclose(mean_image, batch.mean(dim=0), atol=1e-5)
        with residual_taps(backbone) as taps, torch.no_grad():
            seen = []
            handles = [tap.register_forward_hook(lambda _m, _a, out: seen.append(out)) for tap in taps]
            whole = predict(pixels, targets)
            for handle in handles:
                handle.remove()
            for index, block in enumerate(backbone.blocks):
                for update in (None, updates[index]):
                    replacement = seen[index] if update is None else seen[index] + update
                    theirs = LayerFeatureAblation(predict, taps[index + 1]).attribute(
                        pixels,
                        layer_baselines=replacement,
                        additional_forward_args=(targets,),
                        layer_mask=torch.zeros(1, *replacement.shape[1:], dtype=torch.int64),
                    )
                    with ablated(block, update):
                        lost = whole - predict(pixels, targets)
                    assert torch.allclose(theirs[:, 0, 0], lost, atol=1e-5)
                    assert lost.abs().max() > 0


def test_hooks_leave_with_their_block_also_after_an_error(backbone, problem):
    predict, pixels, baseline, targets = problem
    before = n_hooks(backbone)
    with pytest.raises(RuntimeError, match="stop"), residual_taps(backbone) as taps:

        def broken(p):
            predict(p, targets)
            raise RuntimeError("stop")

        path_conductance(broken, taps, pixels, baseline, [0.0, 1.0])
    with pytest.raises(RuntimeError), ablated(backbone.blocks[0]):
        raise RuntimeError
    assert n_hooks(backbone) == before
    assert not any(tap._forward_hooks for tap in taps)


def test_steps_are_halved_where_the_error_is():
    assert refined([0.0, 0.5, 1.0], [3.0, 0.1], 1.0) == [0.0, 0.25, 0.5, 1.0]
    assert refined([0.0, 0.5, 1.0], [0.2, 0.1], 1.0) == [0.0, 0.25, 0.5, 1.0]
    assert refined([0.0, 1.0], [0.0], 1.0) == [0.0, 0.5, 1.0]


def test_the_record_answers_for_every_block(record, gpt2):
    frame = record.to_frame()
    assert set(frame["metric"]) == {
        "attribution_skip",
        "attribution_skip_accuracy_lost",
        "attribution_mean_ablation",
        "attribution_mean_ablation_accuracy_lost",
        "attribution_conductance",
        "attribution_update",
        "attribution_gradient_x_activation",
        "attribution_integrated_gradients",
        "attribution_integrated_gradients_completeness_error",
        "attribution_completeness_error",
    }
    for name in ("skip", "conductance", "integrated_gradients"):
        assert list(record.metric(name)["block"]) == list(range(gpt2.n_blocks))
        assert record.metric(name)["value"].notna().all()
    errors = record.metric("completeness_error")
    assert len(errors) == gpt2.n_blocks + 1 and errors["value"].max() <= 0.02
    assert "Completeness error of the path" in record.summary() and "head: probe" in record.summary()
    assert record.provenance["prediction"]["n_steps"] >= 8
    with pytest.raises(UnknownNameError, match="no attribution 'deeplift'"):
        record.metric("deeplift")


def test_maps_hold_every_patch_of_the_embedding_and_of_every_block(record, task):
    maps = record.maps
    assert set(maps["image"]) == set(task.test.ids[:2]) and len(maps) == 2 * 4 * 16
    assert sorted(maps["row"].unique()) == [0, 1, 2, 3]
    blocks = maps[maps["block"].notna()].groupby("block")["value"].sum()
    assert len(blocks) == 3 and np.isfinite(blocks).all()


def test_the_record_saves_its_maps_and_draws(record, tmp_path):
    record.save(tmp_path)
    assert json.loads((tmp_path / "attribute.json").read_text())["schema"] == "layerprobe.attribute/v1"
    assert (tmp_path / "attribution_maps.csv").read_text().count("\n") == len(record.maps) + 1
    assert plot_attribution(record.to_frame(), "attribution_update").get_title().startswith("through")
    assert len([ax for ax in attribution_figure(record.to_frame()).get_axes() if ax.axison]) == 8
    assert len(patch_maps_figure(record.maps, record.pictures).get_axes()) == 2 * 5 + 1  # the colour key
    with pytest.raises(UnknownNameError, match="no attribution 'attribution_lrp'"):
        plot_attribution(record.to_frame(), "attribution_lrp")


def test_a_path_that_does_not_converge_leaves_empty_rows(gpt2, task):
    found = attribute_layers(
        gpt2,
        task,
        methods=("conductance", "update"),
        n_images=6,
        n_reference=20,
        tolerance=1e-6,
        max_steps=16,
    )
    rows = found.metric("conductance")
    assert rows["value"].isna().all()
    assert (
        rows["reason"]
        .str.contains(r"completeness error .* at \d+ steps exceeds 0.0001 %; raise max_steps")
        .all()
    )
    assert found.maps.empty and found.metric("completeness_error")["value"].notna().all()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("deeplift", "43 to 300 %"),
        ("LayerDeepLift", "43 to 300 %"),
        ("deep_lift_shap", "43 to 300 %"),
        ("lrp", "no propagation rule for LayerNorm"),
        ("layer_lrp", "no propagation rule for LayerNorm"),
        ("block_sum", "ranks nothing"),
    ],
)
def test_invalid_methods_are_refused_with_the_reason(gpt2, task, method, reason):
    with pytest.raises(UsageError, match=reason):
        attribute_layers(gpt2, task, methods=("skip", method))


def test_requests_that_cannot_be_served_say_why(gpt2, task):
    with pytest.raises(UnknownNameError, match="unknown attribution method 'shapley'"):
        attribute_layers(gpt2, task, methods=("shapley",))
    with pytest.raises(UsageError, match="no attribution method"):
        attribute_layers(gpt2, task, methods=())
    with pytest.raises(UnknownNameError, match="unknown split 'dev'"):
        attribute_layers(gpt2, task, split="dev")
    with pytest.raises(UsageError, match="at least 2 images"):
        attribute_layers(gpt2, task, n_images=1)


def test_a_skipped_block_that_does_nothing_costs_nothing(tmp_path, task):
    backbone = load("gpt2", tmp_path, task)
    with torch.no_grad():
        for name, parameter in backbone.blocks[1].named_parameters():
            if name.startswith(("attn.c_proj", "mlp.c_proj")):
                parameter.zero_()
    found = attribute_layers(
        backbone, task, methods=("skip", "update"), n_images=8, n_reference=20, max_steps=1024
    )
    skip, update = found.metric("skip"), found.metric("update")
    assert skip["value"].iloc[1] == pytest.approx(0.0, abs=1e-5) and abs(skip["value"].iloc[0]) > 1e-3
    assert update["value"].iloc[1] == pytest.approx(0.0, abs=1e-5)
    assert all(p.requires_grad for p in backbone.parameters())

"""Transfer scores of tiny random backbones: gradients against plain autograd, families apart, honest gaps."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from families import save
from torch.nn import functional

from layerprobe.analyzers import transfer
from layerprobe.analyzers.heads import Predictor, fit_probe_head, make_predictor, only_these_train
from layerprobe.analyzers.transfer import gradient_snr, trainable_scores, transfer_scores
from layerprobe.backbones import load_backbone
from layerprobe.backbones.backbone import evaluating
from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.metrics.transferability.scores import HIGHER_IS_BETTER, logme, neural_collapse
from layerprobe.plotting.layer_scores import plot_transfer, transfer_figure
from layerprobe.tasks import load_task


@pytest.fixture(scope="module")
def task():
    return load_task("digits", limit=200)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, task):
    folder = save("gpt2", tmp_path_factory.mktemp("gpt2"))
    return load_backbone(str(folder), patch_size=2, device="cpu").prepare(task)


@pytest.fixture(scope="module")
def classifier(backbone, task):
    return make_predictor(backbone, task, n_train=100)


@pytest.fixture(scope="module")
def batches(backbone, task):
    return [
        (backbone.preprocess(task.train.images(rows)), torch.from_numpy(task.train.labels[rows]))
        for rows in np.arange(100, 180).reshape(5, 16)
    ]


@pytest.fixture(scope="module")
def record(backbone, task, tmp_path_factory):
    return transfer_scores(
        backbone,
        task,
        n_replicates=4,
        n_batches=4,
        batch_size=8,
        n_fisher=6,
        cache_dir=tmp_path_factory.mktemp("c"),
    )


def plain_gradients(classifier, batches, index):
    """One flat float64 gradient per batch for the parameters of a block, by `loss.backward()`."""
    block = classifier.backbone.blocks[index]
    rows = []
    for pixels, labels in batches:
        classifier.backbone.zero_grad()
        functional.cross_entropy(classifier(pixels), labels).backward()
        rows.append(torch.cat([p.grad.flatten() for p in block.parameters()]).double().numpy())
    classifier.backbone.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in block.parameters()]).double().numpy()
    return np.array(rows), weights


def test_trainable_scores_are_their_definitions(classifier, batches):
    found = trainable_scores(classifier, batches, [batches[0][0][:1], batches[0][0][1:2]])
    assert len(found) == 3
    for index, scores in enumerate(found):
        g, theta = plain_gradients(classifier, batches, index)
        ratio = np.linalg.norm(g, axis=1) / np.linalg.norm(theta)
        assert scores["rgn"].value == pytest.approx(ratio.mean(), rel=1e-5)
        assert scores["rgn"].stderr == pytest.approx(ratio.std(ddof=1) / np.sqrt(5), rel=1e-4)
        assert scores["taylor"].value == pytest.approx(np.abs(g * theta).mean(), rel=1e-5)
        noise = ((g - g.mean(axis=0)) ** 2).sum() / 4
        signal = (g.mean(axis=0) ** 2).sum() - noise / 5
        assert scores["gradient_snr"].value == pytest.approx(signal / noise, rel=1e-4)


def test_fisher_is_the_expected_squared_gradient_under_the_models_own_labels(classifier, batches):
    """Averaged over draws it meets the sum over all labels, weighted by their predicted probability."""
    image = batches[0][0][:1]
    block = classifier.backbone.blocks[1]
    parameters = list(block.parameters())
    count = sum(p.numel() for p in parameters)
    expected = 0.0
    log_probabilities = classifier(image).log_softmax(dim=1)[0]
    for log_p in log_probabilities:
        gradients = torch.autograd.grad(log_p, parameters, retain_graph=True)
        expected += (
            float(log_p.detach().exp()) * sum(float(g.double().square().sum()) for g in gradients) / count
        )
    found = trainable_scores(classifier, batches[:3], [image] * 120, seed=1)[1]["fisher"]
    assert abs(found.value - expected) < 4 * found.stderr
    assert found.n == 120


def test_signal_to_noise_is_unbiased_where_there_is_no_signal():
    rng = np.random.default_rng(0)
    values = []
    for _ in range(400):
        g = rng.normal(size=(8, 50))
        values.append(gradient_snr(g @ g.T).value)
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    g = rng.normal(size=(8, 50)) + 1.0  # ‖E g‖² = 50, variance of one gradient 50: ratio 1
    assert gradient_snr(g @ g.T).value == pytest.approx(1.0, abs=0.4)


def test_jackknife_error_of_the_ratio_matches_fresh_draws():
    rng = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(300):
        g = rng.normal(size=(12, 40)) + 0.5
        spread = gradient_snr(g @ g.T)
        values.append(spread.value)
        errors.append(spread.stderr)
    assert 0.8 < np.mean(errors) / np.std(values) < 1.3


def test_equal_gradients_have_no_noise():
    g = np.ones((4, 3))
    assert gradient_snr(g @ g.T).value == np.inf
    assert gradient_snr(np.zeros((4, 4))).value == 0.0


def test_blocks_in_turns_give_the_same_scores(classifier, batches, monkeypatch):
    images = [batches[0][0][:1], batches[1][0][:1]]
    at_once = trainable_scores(classifier, batches, images)
    monkeypatch.setattr(transfer, "GRADIENT_BYTES", 1)
    in_turns = trainable_scores(classifier, batches, images)
    for a, b in zip(at_once, in_turns, strict=True):
        for name in a:
            assert a[name].value == pytest.approx(b[name].value, rel=1e-5), name


def test_the_backbone_is_left_as_it_was(classifier, batches):
    backbone = classifier.backbone
    first = next(backbone.parameters())
    first.requires_grad_(False)
    backbone.blocks[0].train()
    before = [(p.requires_grad, p.detach().clone()) for p in backbone.parameters()]
    with pytest.raises(RuntimeError), only_these_train(backbone, list(backbone.blocks[1].parameters())):
        assert not backbone.blocks[0].training
        assert [p.requires_grad for p in backbone.blocks[1].parameters()] != []
        assert sum(p.requires_grad for p in backbone.parameters()) == len(
            list(backbone.blocks[1].parameters())
        )
        raise RuntimeError
    trainable_scores(classifier, batches, [batches[0][0][:1]] * 2)
    assert backbone.blocks[0].training
    for (wanted, value), p in zip(before, backbone.parameters(), strict=True):
        assert p.requires_grad == wanted and p.grad is None and torch.equal(p, value)
    first.requires_grad_(True)
    backbone.eval()


def test_evaluation_mode_is_undone_module_by_module(backbone):
    backbone.blocks[1].train()
    with evaluating(backbone):
        assert not any(module.training for module in backbone.modules())
    assert backbone.blocks[1].training and not backbone.blocks[0].training
    backbone.eval()


def test_the_probe_head_predicts_what_it_was_fitted_to(backbone, task, classifier):
    rows = np.arange(100)
    with torch.no_grad():
        predicted = classifier(backbone.preprocess(task.train.images(rows))).argmax(dim=1).numpy()
    assert (predicted == task.train.labels[rows]).mean() > 0.3  # chance is 0.1
    assert classifier.facts["head"] == "probe" and classifier.facts["n_train"] == 100
    layer, facts = fit_probe_head(backbone, task, n_train=100)
    assert layer.weight.shape == (10, 32) and not layer.weight.requires_grad
    with torch.no_grad():
        images = backbone.preprocess(task.validation.images(range(len(task.validation))))
        hits = layer(backbone.features(images)).argmax(dim=1).numpy() == task.validation.labels
    assert facts["validation_accuracy"] == pytest.approx(hits.mean())


def test_a_silenced_dimension_gets_no_weight(tmp_path, task):
    """Standardised, a column of 1e-9 of the others' deviation would get a billion times their weight."""
    backbone = load_backbone(str(save("gpt2", tmp_path)), patch_size=2, device="cpu").prepare(task)
    with torch.no_grad():
        backbone.model.ln_f.weight[5] = 1e-9
    layer, _ = fit_probe_head(backbone, task, n_train=100)
    assert (layer.weight[:, 5] == 0).all()
    others = layer.weight.abs().max(dim=0).values
    assert others.max() < 1e3 * others[others > 0].median()


def test_a_class_without_training_images_is_never_predicted(backbone, task):
    kept = np.flatnonzero(task.train.labels != 3)[:80]
    thin = dataclasses.replace(task, splits={**task.splits, "train": task.train.subset(kept)})
    layer, _ = fit_probe_head(backbone, thin)
    with torch.no_grad():
        logits = layer(backbone.features(backbone.preprocess(task.test.images(range(60)))))
    assert layer.weight.shape == (10, 32) and not (logits.argmax(dim=1) == 3).any()


def test_the_record_holds_both_families_apart(record):
    frame = record.to_frame()
    readable, trainable = (frame[frame["family"] == family] for family in ("readable", "trainable"))
    assert len(readable) == 4 * len(HIGHER_IS_BETTER) and len(trainable) == 3 * 4
    assert set(readable["site"]) == {"embed", "resid_post"} and trainable["site"].isna().all()
    assert not set(readable["metric"]) & set(trainable["metric"])
    assert frame["metric"].str.startswith("transfer_").all()
    assert ((frame["low"] <= frame["value"]) | frame["low"].isna()).all()
    assert [row["layer"] for row in record.table()] == ["embed", "block 0", "block 1", "block 2"]
    assert "not combined" in record.summary()
    assert record.summary().startswith("Readable: LogME is highest at ")
    assert re.search(
        r"rgn is highest at block \d( here, not told apart from|, \S+ ahead of) block \d", record.summary()
    )
    for metric, rows in frame.groupby("metric"):
        assert rows["gap_to_best"].min() == 0 and rows["gap_low"].notna().sum() == (
            0 if metric == "transfer_knn" else len(rows) - 1
        )


def test_readable_rows_are_the_metrics_of_the_features(record, backbone, task):
    from layerprobe.analyzers.features import extract_features

    features = extract_features(backbone, task, "train")
    for block in range(3):
        X = np.asarray(features[block])
        for name, function in (("logme", logme), ("neural_collapse", neural_collapse)):
            rows = record.to_frame().query(f"metric == 'transfer_{name}' and block == {block}")
            value = rows["value"].item()
            assert value == pytest.approx(function(X, features.labels), rel=1e-9)


def test_the_record_saves_strict_json_and_draws(record, tmp_path):
    record.save(tmp_path)
    body = json.loads((tmp_path / "transfer.json").read_text())
    assert body["schema"] == "layerprobe.transfer/v1"
    assert body["provenance"]["gradients"]["head"] == "probe"
    axes = plot_transfer(record.to_frame(), "transfer_neural_collapse")
    assert "lower is better" in axes.get_title()
    figure = transfer_figure(record.to_frame())
    assert len([ax for ax in figure.get_axes() if ax.axison]) == len(HIGHER_IS_BETTER) + 4
    with pytest.raises(UnknownNameError, match="no score 'transfer_leep'"):
        plot_transfer(record.to_frame(), "transfer_leep")


def test_equal_seeds_give_equal_tables(record, backbone, task, tmp_path):
    again = transfer_scores(
        backbone, task, n_replicates=4, n_batches=4, batch_size=8, n_fisher=6, cache_dir=tmp_path
    )
    assert again.to_frame().equals(record.to_frame())


def test_constant_features_are_rows_with_a_reason(backbone, task, tmp_path):
    """With position tokens alone every image looks the same to the layer that is silenced."""
    weight = backbone.stem.projection.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        found = transfer_scores(backbone, task, families=("readable",), n_replicates=0, cache_dir=tmp_path)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    frame = found.to_frame()
    assert frame[frame["site"] == "embed"]["value"].isna().all()
    assert frame[frame["value"].isna()]["reason"].str.contains("equal").all()
    json.dumps(found.to_json(), allow_nan=False)
    assert "No score is defined" in found.summary() or found.to_frame()["value"].notna().any()


def test_requests_that_cannot_be_served_say_why(backbone, task):
    with pytest.raises(UnknownNameError, match="unknown families"):
        transfer_scores(backbone, task, families=("readible",))
    with pytest.raises(UsageError, match="at least 3 batches and 2 images"):
        transfer_scores(backbone, task, families=("trainable",), n_batches=2)
    with pytest.raises(UsageError, match="at least 3 batches of 128"):
        transfer_scores(backbone, task, families=("trainable",), batch_size=128)
    with pytest.raises(UnknownNameError, match="unknown head"):
        make_predictor(backbone, task, "probes")
    with pytest.raises(UsageError, match="brings no image classifier"):
        make_predictor(backbone, task, "own")


def test_a_vision_models_own_classifier_serves_where_it_fits(tmp_path, task):
    names = dict(enumerate(reversed(task.classes)))
    folder = save("vit", tmp_path, image_size=8, patch_size=2, num_channels=3, id2label=names)
    vision = load_backbone(str(folder), device="cpu")
    own = make_predictor(vision, task, "own")
    assert isinstance(own, Predictor) and own.facts == {"head": "own"}
    pixels = vision.preprocess(task.train.images(range(8)))
    assert torch.equal(own(pixels), vision.own_logits(pixels).flip(1))  # as the task's classes stand
    found = trainable_scores(
        own, [(pixels, torch.arange(8)), (pixels.flip(0), torch.arange(8))] * 2, [pixels[:1]] * 2
    )
    assert all(scores["rgn"].value > 0 for scores in found)
    wrong = load_backbone(
        str(save("vit", tmp_path / "w", image_size=8, patch_size=2, num_labels=7)), device="cpu"
    )
    with pytest.raises(UsageError, match=r"knows 7 classes .* digits has 10 classes"):
        make_predictor(wrong, task, "own")

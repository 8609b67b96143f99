"""Bridge training: what it promises about frozen tensors, labels, files and continuing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES
from transformers import AutoModel

from layerprobe.backbones import load_backbone
from layerprobe.errors import NotAvailableError, PlanError, UsageError
from layerprobe.files import tensor_digest
from layerprobe.training import BridgeConfig, all_trainable, block_plan, bridge_train
from layerprobe.training.loop import DIVERGED_WINDOW, DivergedError, _divergence


def digests(module):
    return {n: tensor_digest(t) for n, t in [*module.named_parameters(), *module.named_buffers()]}


SMALL = BridgeConfig(steps=6, batch_size=16, lr=3e-3, random_classes=4, weight_decay=0.1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "vit"])
def test_frozen_tensors_are_bit_identical_and_trained_ones_change(family, precision, make_backbone, task):
    backbone = make_backbone(family)
    before = digests(backbone.model)
    stem = digests(backbone.stem) if backbone.stem is not None else {}
    plan = block_plan(backbone, [1, 3])
    run = bridge_train(backbone, task, plan=plan, config=SMALL.replace(precision=precision))
    after = digests(backbone.model)
    moved = {name for name in before if before[name] != after[name]}
    assert moved == set(plan.trainable)
    for name, old in stem.items():
        assert tensor_digest(backbone.stem.state_dict()[name]) != old
    assert run.value("trained_tensors_changed") == len(plan.trainable)
    drift = run.to_frame().query("metric == 'weight_change'").set_index("block")["value"]
    assert drift[0] == 0 and drift[2] == 0 and drift[1] > 0 and drift[3] > 0


def test_bfloat16_weights_keep_the_promise_too(make_backbone, task):
    backbone = make_backbone("llama", dtype="bfloat16")
    before = digests(backbone.model)
    plan = block_plan(backbone, [0])
    bridge_train(backbone, task, plan=plan, config=SMALL.replace(lr=1e-2))
    after = digests(backbone.model)
    assert {n for n in before if before[n] != after[n]} <= set(plan.trainable)


def test_a_broken_promise_is_an_error(make_backbone, task):
    """Someone writes into a frozen tensor during the run; the check at the end must see it."""
    backbone = make_backbone("gpt2")
    plan = block_plan(backbone, [1])
    frozen = dict(backbone.model.named_parameters())[plan.frozen[-1]]

    def meddle(*_args):
        with torch.no_grad():
            frozen.view(-1)[0].add_(1e-3)

    handle = backbone.blocks[1].register_forward_pre_hook(meddle)
    with pytest.raises(PlanError, match=r"frozen tensors are not what they were"):
        bridge_train(backbone, task, plan=plan, config=SMALL)
    handle.remove()


def test_the_run_folder_holds_a_plain_model_and_loads_as_backbone(make_backbone, task, tmp_path):
    backbone = make_backbone("gpt2", pooling="last")
    run = bridge_train(backbone, task, plan=block_plan(backbone, [2]), config=SMALL, output=tmp_path / "run")
    plain = AutoModel.from_pretrained(tmp_path / "run" / "final" / "backbone")
    assert digests(plain) == digests(run.backbone.model)
    again = load_backbone(str(tmp_path / "run"), device="cpu")
    assert again.source.origin == "bridge"
    assert again.pooling == "last"
    pixels = again.preprocess(task.train.images()[:3])
    with torch.no_grad():
        assert torch.equal(again.features(pixels), run.backbone.eval().features(pixels))


def test_a_vision_run_keeps_the_recipe_of_its_pixels(make_backbone, model_folder, task, tmp_path):
    folder = tmp_path / "vit"
    shutil.copytree(model_folder("vit"), folder)
    size = transformers.AutoConfig.from_pretrained(folder).image_size
    recipe = {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": 0.3, "image_std": 0.2}
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))
    backbone = load_backbone(str(folder), device="cpu").prepare(task)
    bridge_train(backbone, task, plan=block_plan(backbone, [2]), config=SMALL, output=tmp_path / "run")
    again = load_backbone(str(tmp_path / "run"), device="cpu")
    images = task.train.images()[:3]
    assert torch.equal(again.preprocess(images), backbone.preprocess(images))
    assert again.describe()["preprocessing"] == backbone.describe()["preprocessing"]


def test_a_vision_run_at_another_size_loads_at_that_size(make_backbone, model_folder, task, tmp_path):
    size = 2 * transformers.AutoConfig.from_pretrained(model_folder("vit")).image_size
    backbone = load_backbone(str(model_folder("vit")), device="cpu", image_size=size).prepare(task)
    bridge_train(backbone, task, plan=block_plan(backbone, [2]), config=SMALL, output=tmp_path / "run")
    again = load_backbone(str(tmp_path / "run"), device="cpu")
    pixels = again.preprocess(task.train.images()[:3])
    assert pixels.shape[-2:] == (size, size)
    assert torch.equal(pixels, backbone.preprocess(task.train.images()[:3]))
    assert again.describe()["image_size"] == size
    smaller = load_backbone(str(tmp_path / "run"), device="cpu", image_size=size // 2)
    assert smaller.preprocess(task.train.images()[:3]).shape[-1] == size // 2


def test_labels_do_not_depend_on_order_and_are_kept(make_backbone, task, tmp_path):
    import pandas as pd

    run = bridge_train(make_backbone(), task, config=SMALL, output=tmp_path / "run")
    kept = pd.read_csv(tmp_path / "run" / "labels.csv").set_index("id")["label"]
    turned = type(task)(seed=task.seed)
    turned.splits["train"] = turned.train.subset(list(range(len(turned.train)))[::-1])
    other = bridge_train(make_backbone(), turned, config=SMALL)
    assert kept.loc[list(turned.train.ids)].tolist() == other.labels.tolist()
    assert kept.loc[list(task.train.ids)].tolist() == run.labels.tolist()


class Stop(Exception):
    """Stands for a kill: nothing is saved on the way out."""


def stop_after(monkeypatch, n_steps):
    from layerprobe.training.bridge_run import History

    add = History.add

    def counted(self, step, *rest):
        add(self, step, *rest)
        if step.index + 1 == n_steps:
            raise Stop

    monkeypatch.setattr(History, "add", counted)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in ("gpt2", "vit") else pytest.mark.slow) for name in FAMILIES],
)
def test_a_killed_run_continues_bit_for_bit(family, make_backbone, task, tmp_path, monkeypatch):
    """Killed in the middle of an epoch, between checkpoints, with accumulation, dropout and augmentation."""
    config = SMALL.replace(steps=11, micro_batch=5, checkpoint_every=3)
    whole = bridge_train(make_backbone(family), task, config=config)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(Stop):
            bridge_train(make_backbone(family), task, config=config, output=tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]
    backbone = make_backbone(family)
    run = bridge_train(backbone, task, config=config, output=tmp_path / "run")
    assert digests(run.backbone) == digests(whole.backbone)
    columns = ["step", "loss", "accuracy", "lr", "grad_norm"]
    assert run.history[columns].equals(whole.history[columns])


def test_two_phases_train_the_stem_first_and_then_leave_it(make_backbone, task, tmp_path, monkeypatch):
    config = SMALL.replace(steps=8, stem_steps=4, augment="none", checkpoint_every=2)
    backbone = make_backbone("gpt2")
    model, stem = digests(backbone.model), digests(backbone.stem)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stop):
            bridge_train(backbone, task, config=config, plan=block_plan(backbone, [3]))
    assert digests(backbone.model) == model
    assert digests(backbone.stem) != stem
    middle = digests(backbone.stem)
    backbone = make_backbone("gpt2")
    bridge_train(backbone, task, config=config, plan=block_plan(backbone, [3]), output=tmp_path / "whole")
    assert digests(backbone.stem) == middle
    assert digests(backbone.model) != model
    whole = digests(backbone)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stop):
            backbone = make_backbone("gpt2")
            plan = block_plan(backbone, [3])
            bridge_train(backbone, task, config=config, plan=plan, output=tmp_path / "r")
    backbone = make_backbone("gpt2")
    bridge_train(backbone, task, config=config, plan=block_plan(backbone, [3]), output=tmp_path / "r")
    assert digests(backbone) == whole


def test_the_learning_rate_is_chosen_by_random_label_loss(make_backbone, task):
    run = bridge_train(make_backbone("gpt2"), task, config=SMALL.replace(lrs=(1e-7, 1e-2), lr_steps=25))
    assert run.value("learning_rate") == 1e-2


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"micro_batch": 4}])
def test_memory_savers_change_nothing_but_memory(option, make_backbone, task):
    plain = bridge_train(make_backbone("llama"), task, config=SMALL)
    saving = bridge_train(make_backbone("llama"), task, config=SMALL.replace(**option))
    assert saving.history["loss"].tolist() == pytest.approx(plain.history["loss"].tolist(), rel=1e-5)


def test_a_model_that_cannot_compute_activations_again_is_one_line(task, tmp_path):
    config = transformers.XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=32, vocab_size=40)
    backbone = load_backbone(transformers.XLNetModel(config), patch_size=4)
    with pytest.raises(UsageError, match="XLNetModel cannot compute activations again"):
        bridge_train(
            backbone, task, config=SMALL.replace(gradient_checkpointing=True), output=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_compiling_changes_no_result(make_backbone, task, tmp_path, monkeypatch):
    """The traced model trains as the plain one, and checkpoints keep the plain model's names."""
    import functools

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain = bridge_train(make_backbone("llama"), task, config=SMALL)
    traced = bridge_train(make_backbone("llama"), task, config=SMALL.replace(compile=True), output=tmp_path)
    assert traced.history["loss"].tolist() == pytest.approx(plain.history["loss"].tolist(), rel=1e-5)
    names = set(dict(AutoModel.from_pretrained(tmp_path / "final" / "backbone").named_parameters()))
    assert names == set(dict(plain.backbone.model.named_parameters()))


def test_more_classes_than_images(make_backbone, task):
    with pytest.raises(UsageError, match="65 random classes are more than the 64 training images"):
        bridge_train(make_backbone(), task, config=BridgeConfig(random_classes=65))


def test_nothing_to_train(make_backbone, task):
    from layerprobe.plans import FreezePlan, parameter_table

    backbone = make_backbone()
    plan = FreezePlan.from_blocks(
        parameter_table(backbone.model),
        backbone.layout.parameter_groups,
        [],
        model_id="tiny",
        stem="frozen",
        head="frozen",
    )
    with pytest.raises(
        UsageError, match="nothing to train: the plan freezes the blocks, the stem and the head"
    ):
        bridge_train(backbone, task, plan=plan)


def test_a_plan_for_another_model(make_backbone, task):
    plan = all_trainable(make_backbone("llama"))
    with pytest.raises(PlanError):
        bridge_train(make_backbone("gpt2"), task, plan=plan, config=SMALL)


def test_a_rate_that_diverges_says_so(make_backbone, task):
    config = SMALL.replace(lr=300.0, steps=100, clip_norm=None, warmup=0.0)
    with pytest.raises(DivergedError, match=r"step \d+ of 100: .*(learning rate|--lr)"):
        bridge_train(make_backbone(), task, config=config)


def test_a_loss_that_starts_high_and_comes_down_has_not_diverged():
    falling = [float(loss) for loss in np.linspace(15, 5, DIVERGED_WINDOW)]
    for losses, diverged in ((falling, False), (falling[::-1], True), ([5.0] * DIVERGED_WINDOW, True)):
        found = _divergence(losses, 1.0, guess=np.log(10), lr=1e-3, peak=1e-3)
        assert bool(found) is diverged


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(make_backbone, task, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="is not writable"):
        bridge_train(make_backbone(), task, config=SMALL, output=tmp_path / "run")


def test_an_output_that_is_a_file(make_backbone, task, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; name a folder with -o"):
        bridge_train(make_backbone(), task, config=SMALL, output=tmp_path / "file")


@pytest.mark.skipif(
    not Path("/proc/self").is_dir(), reason="needs a file system where nobody may create folders"
)
def test_a_place_where_no_folder_can_be_made(make_backbone, task):
    with pytest.raises(UsageError, match=r"output folder /proc/run is not writable"):
        bridge_train(make_backbone(), task, config=SMALL, output="/proc/run")


def test_a_tracker_that_is_not_installed(make_backbone, task, tmp_path):
    with pytest.raises(NotAvailableError, match=r"tracker 'neverheard' is not installed; installed: "):
        bridge_train(make_backbone(), task, config=SMALL.replace(trackers=("neverheard",)), output=tmp_path)

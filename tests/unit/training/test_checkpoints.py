"""Run folders: full disks, interrupts, other data, other settings, broken files. One line each."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch
import transformers

from layerprobe.backbones import load_backbone
from layerprobe.errors import BrokenFileError, LayerprobeError, UsageError
from layerprobe.files import tensor_digest
from layerprobe.plans import FreezePlan
from layerprobe.training import BridgeConfig, block_plan, bridge_train, checkpoints
from layerprobe.training.classifier import Classifier
from layerprobe.training.loop import DivergedError

SMALL = BridgeConfig(steps=6, batch_size=16, lr=3e-3, random_classes=4, checkpoint_every=2)


def digests(module):
    return {name: tensor_digest(p) for name, p in module.named_parameters()}


def steps_kept(folder):
    return sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*"))


@pytest.fixture
def at_step(monkeypatch):
    """Call something when so many steps are done."""
    from layerprobe.training.bridge_run import History

    add = History.add

    def arrange(n_steps, what):
        def counted(self, step, *rest):
            add(self, step, *rest)
            if step.index + 1 == n_steps:
                what()

        monkeypatch.setattr(History, "add", counted)
        return lambda: monkeypatch.setattr(History, "add", add)

    return arrange


def test_a_full_disk_stops_with_one_line_and_keeps_the_last_checkpoint(
    make_backbone, task, tmp_path, monkeypatch
):
    save_file = checkpoints.save_file

    def full(tensors, path):
        if "step-00000004" in str(path) and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)

    whole = bridge_train(make_backbone(), task, config=SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(
            LayerprobeError, match=r"the disk is full: .*; the last good checkpoint is .*step-00000002$"
        ):
            bridge_train(make_backbone(), task, config=SMALL, output=tmp_path)
    assert steps_kept(tmp_path) == [2]
    assert not list(tmp_path.rglob("*.part"))
    run = bridge_train(make_backbone(), task, config=SMALL, output=tmp_path)
    assert digests(run.backbone) == digests(whole.backbone)


def test_a_real_full_file_system_reads_the_same(make_backbone, task, tmp_path):
    """A file-size limit makes the operating system refuse the write, inside safetensors too."""
    resource = pytest.importorskip("resource", reason="this system has no limits on file sizes")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(LayerprobeError, match=r"cannot write .*there is no checkpoint yet"):
            bridge_train(make_backbone(), task, config=SMALL, output=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept_and_one_that_no_run_file_names_is_not(
    make_backbone, task, tmp_path, keep, at_step
):
    stale = tmp_path / "checkpoints" / "step-00000099"
    stale.mkdir(parents=True)
    undo = at_step(5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        bridge_train(
            make_backbone(), task, config=SMALL.replace(checkpoint_every=1, keep=keep), output=tmp_path
        )
    undo()
    assert steps_kept(tmp_path) == [3, 4, 5][3 - keep :]


def test_a_model_of_mixed_dtypes_is_read_back_bit_for_bit(make_backbone, task, tmp_path):
    def mixed():
        backbone = make_backbone("llama", dtype="bfloat16")
        backbone.model.layers[2].float()
        return backbone

    trained = mixed()
    plan = block_plan(trained, [2])
    bridge_train(
        trained, task, plan=plan, config=SMALL.replace(steps=2, precision="bfloat16"), output=tmp_path
    )
    again = mixed()
    checkpoints.load_weights(checkpoints.find_checkpoint(tmp_path), Classifier(again, 4, seed=0), plan)
    assert digests(again) == digests(trained)


def test_ctrl_c_saves_between_two_steps(make_backbone, task, tmp_path, at_step):
    whole = bridge_train(make_backbone(), task, config=SMALL)
    undo = at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        bridge_train(make_backbone(), task, config=SMALL, output=tmp_path)
    undo()
    assert steps_kept(tmp_path) == [2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run = bridge_train(make_backbone(), task, config=SMALL, output=tmp_path)
    assert digests(run.backbone) == digests(whole.backbone)


def test_a_loss_that_is_no_number_names_the_step_and_the_last_good_checkpoint(
    make_backbone, task, tmp_path, at_step
):
    backbone = make_backbone()

    def poison():
        with torch.no_grad():
            next(backbone.model.parameters()).fill_(float("nan"))
            backbone.stem.projection.weight.fill_(float("nan"))

    at_step(3, poison)
    with pytest.raises(
        DivergedError, match=r"step 4 of 6: loss nan.*the last good checkpoint is .*step-00000002$"
    ):
        bridge_train(backbone, task, config=SMALL, output=tmp_path)


@pytest.fixture
def unfinished(make_backbone, task, tmp_path, at_step):
    """The folder of a run that was interrupted after three of six steps."""
    undo = at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        bridge_train(make_backbone(), task, config=SMALL, output=tmp_path)
    undo()
    return tmp_path


def test_the_same_call_continues_and_then_reads(unfinished, make_backbone, task, at_step):
    done = bridge_train(make_backbone(), task, config=SMALL, output=unfinished)
    files = {p: p.read_bytes() for p in (unfinished / "final").rglob("*.safetensors")}
    at_step(1, lambda: pytest.fail("a finished run trained again"))
    again = bridge_train(make_backbone(), task, config=SMALL, output=unfinished)
    assert digests(again.backbone) == digests(done.backbone)
    assert again.summary() == done.summary() and len(again.history) == 6
    assert {p: p.read_bytes() for p in (unfinished / "final").rglob("*.safetensors")} == files
    with pytest.raises(UsageError, match=r"with lr=0\.003, not 0\.1; name another folder with --output"):
        bridge_train(make_backbone(), task, config=SMALL.replace(lr=0.1), output=unfinished)


def test_only_the_same_run_is_continued(unfinished, make_backbone, task, model_folder):

    again = {"output": unfinished}
    with pytest.raises(UsageError, match=r"begun with lr=0\.003, not 0\.1"):
        bridge_train(make_backbone(), task, config=SMALL.replace(lr=0.1), **again)
    with pytest.raises(UsageError, match=r"the training images changed since the checkpoint at step 3: ids"):
        bridge_train(make_backbone(), type(task)(seed=5), config=SMALL, **again)
    with pytest.raises(UsageError, match="trains a backbone with pooling=mean, not last"):
        bridge_train(make_backbone(pooling="last"), task, config=SMALL, **again)
    with pytest.raises(UsageError, match="begun with another freeze plan"):
        backbone = make_backbone()
        bridge_train(backbone, task, plan=block_plan(backbone, [0]), config=SMALL, **again)
    with pytest.raises(UsageError, match="started from other weights"):
        backbone = make_backbone()
        with torch.no_grad():
            next(backbone.model.parameters()).add_(1)
        bridge_train(backbone, task, config=SMALL, **again)


def test_another_number_of_processes_is_said(unfinished, make_backbone, task, capsys):

    state = unfinished / "checkpoints" / "step-00000003" / "state.json"
    kept = json.loads(state.read_text())
    state.write_text(json.dumps({**kept, "processes": 4}))
    bridge_train(make_backbone(), task, config=SMALL, output=unfinished)
    assert "continuing with 1 processes what 4 began: images, labels and effective batch stay the same" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["optimizer.safetensors", "head.safetensors", "state.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(unfinished, make_backbone, task, name, capsys):
    """One changed byte is enough, and the run still ends as an undisturbed one."""
    path = unfinished / "checkpoints" / "step-00000003" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)
    run = bridge_train(make_backbone(), task, config=SMALL, output=unfinished)
    assert "the checkpoint at step 2 is taken instead" in capsys.readouterr().err
    assert digests(run.backbone) == digests(bridge_train(make_backbone(), task, config=SMALL).backbone)


def test_checkpoints_that_are_all_damaged_are_named(unfinished, make_backbone, task):
    for path in unfinished.glob("checkpoints/step-*/backbone/model.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        BrokenFileError, match=r"checkpoint .*step-00000003 is damaged: backbone/model\.safetensors"
    ):
        bridge_train(make_backbone(), task, config=SMALL, output=unfinished)


def test_a_state_of_another_kind_is_one_line(unfinished, make_backbone, task):
    for path in unfinished.glob("checkpoints/step-*/state.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "step": "3", "config": []}))
    with pytest.raises(BrokenFileError, match=r"'step' must be a whole number, not '3'"):
        bridge_train(make_backbone(), task, config=SMALL, output=unfinished)


BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
    "max_position_embeddings": 40,
}  # fmt: skip


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_run_of_an_encoder_decoder_loads_again_as_its_encoder(family, task, tmp_path):
    """In layerprobe, as a run and as a folder, and in transformers by AutoModel alone."""
    from families import build

    whole = build("t5") if family == "t5" else transformers.BartModel(transformers.BartConfig(**BART))
    whole.save_pretrained(tmp_path / family)
    backbone = load_backbone(str(tmp_path / family), device="cpu", patch_size=4).prepare(task)
    bridge_train(backbone, task, config=SMALL, output=tmp_path / "run")
    folder = tmp_path / "run" / "final" / "backbone"
    for again in (
        load_backbone(str(tmp_path / "run"), device="cpu").model,
        load_backbone(str(folder), device="cpu").model,
        transformers.AutoModel.from_pretrained(folder).get_encoder(),
    ):
        assert type(again) is type(backbone.model) and digests(again) == digests(backbone.model)
    fresh = Classifier(
        load_backbone(str(tmp_path / family), device="cpu", patch_size=4).prepare(task), 4, seed=0
    )
    plan = FreezePlan.load(tmp_path / "run")
    checkpoints.load_weights(checkpoints.find_checkpoint(tmp_path / "run"), fresh, plan)
    assert digests(fresh.backbone.model) == digests(backbone.model)


def test_a_run_file_that_points_elsewhere_is_refused(unfinished, make_backbone, task):

    run_file = unfinished / checkpoints.RUN_FILE
    run_file.write_text(json.dumps({**json.loads(run_file.read_text()), "checkpoint": "../elsewhere"}))
    with pytest.raises(BrokenFileError, match="points outside its folder"):
        bridge_train(make_backbone(), task, config=SMALL, output=unfinished)


def test_spreading_needs_processes(make_backbone):
    from layerprobe.training.classifier import shard

    with pytest.raises(UsageError, match="start them with: accelerate launch"):
        shard(Classifier(make_backbone(), 4, seed=0), torch.device("cpu"))

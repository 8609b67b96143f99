"""Bridge, fine-tuning and run folders under plans that place adapters, and folders that keep only what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import NAMED_FAMILIES

import layerprobe as lp
from layerprobe.errors import BrokenFileError, NotAvailableError, UsageError
from layerprobe.plans.adapters import has_adapters, present_ranks, remove_adapters
from layerprobe.plans.names import clean_name
from layerprobe.search.evaluator import block_params
from layerprobe.training import TaskTensors, block_plan, evaluate, evaluate_arms, train_and_score, unit_plan
from layerprobe.training.config import BridgeConfig, FineTuneConfig

peft = pytest.importorskip("peft", reason="the extra [peft] is not installed")

BRIDGE = BridgeConfig(steps=6, batch_size=16, random_classes=4, lr=3e-3)


@pytest.fixture(scope="module")
def digits() -> Any:
    return lp.load_task("digits", limit=60)


@pytest.fixture(params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    import transformers

    kind, config, arguments = NAMED_FAMILIES[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**arguments))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path) -> Any:
    return lp.load_backbone(str(folder), device="cpu", patch_size=4)


def lora(backbone: Any, *, also: tuple[int, ...] = ()) -> lp.FreezePlan:
    """Adapters of rank 2 on all matrices of block 1, and the blocks `also` trained."""
    plan = block_plan(backbone, also)
    inside = [n for n, p in plan.parameters.items() if p.block == 1 and len(p.shape) == 2]
    return plan.with_adapters({n.removesuffix(".weight"): 2 for n in inside}, scale=2.0)


def values(backbone: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in backbone.model.named_parameters()}


def features(backbone: Any, task: Any) -> torch.Tensor:
    backbone.prepare(task)
    with torch.no_grad():
        return backbone.eval().features(backbone.preprocess(task.train.images(range(6))))


def test_a_training_under_adapters_leaves_the_backbone_as_it_was(folder: Path, digits: Any) -> None:
    backbone = load(folder).prepare(digits)
    plan, before = lora(backbone, also=(2,)), values(backbone)
    tensors = TaskTensors.of(backbone, digits)
    fine = FineTuneConfig(steps=6, batch_size=16, lr=3e-3)
    found = train_and_score(backbone, tensors, plan, bridge=BRIDGE, finetune=fine)
    assert found.reason is None and found.trainable_parameters == plan.trained_parameters
    again = train_and_score(backbone, tensors, plan, bridge=BRIDGE, finetune=fine)
    assert (
        again.validation_accuracy == found.validation_accuracy
        and again.bridge_accuracy == found.bridge_accuracy
    )
    # A second stage under another plan goes on from what the adapters have learnt.
    other = train_and_score(
        backbone, tensors, plan, bridge=BRIDGE, finetune=fine, finetune_plan=block_plan(backbone, [0])
    )
    assert other.reason is None
    after = values(backbone)
    assert not has_adapters(backbone) and before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_evaluate_under_adapters(folder: Path, digits: Any, tmp_path: Path) -> None:
    backbone = load(folder).prepare(digits)
    plan = lora(backbone)
    before, config = values(backbone), FineTuneConfig(steps=20, batch_size=16, lr=3e-2)
    record = evaluate(backbone, digits, plan=plan, config=config, seeds=(0, 1), output=tmp_path / "out")
    assert {trial.trainable_parameters for trial in record.trials} == {plan.trained_parameters}
    assert record.provenance["plan"]["adapters"] == plan.adapters
    assert not has_adapters(backbone) and all(
        torch.equal(before[n], p) for n, p in backbone.model.named_parameters()
    )
    other = plan.with_adapters(dict.fromkeys(plan.adapters, 3))
    with pytest.raises(UsageError, match="an evaluation with other settings"):
        evaluate(backbone, digits, plan=other, config=config, seeds=(0, 1), output=tmp_path / "out")
    # A run under adapters is evaluated under its own plan, and so are arms.
    run = lp.bridge_train(backbone, digits, plan=plan, config=BRIDGE)
    assert evaluate(run, digits, config=config).trials[0].trainable_parameters == plan.trained_parameters
    arms = evaluate_arms(
        lambda init, seed: load(folder),
        digits,
        ["partial", "none"],
        plan=plan,
        finetune=config,
        bridge=BRIDGE,
    )
    trained = {(t.arm, t.trainable_parameters) for t in arms.trials}
    assert trained == {("partial", plan.trained_parameters), ("none", 0)}


def test_after_a_bridge_under_adapters_every_other_plan_can_be_trained(
    folder: Path, digits: Any, tmp_path: Path
) -> None:
    backbone = load(folder).prepare(digits)
    early, plan = block_plan(backbone, [0]), lora(backbone)
    run = lp.bridge_train(backbone, digits, plan=plan, config=BRIDGE)
    before, config = values(backbone), FineTuneConfig(steps=2, batch_size=16)
    assert block_plan(backbone, [0]).content_hash() == early.content_hash()
    assert unit_plan(backbone, ["1"], rank=2).adapters == plan.adapters
    assert block_params(backbone) == block_params(load(folder))
    for other in (early, unit_plan(backbone, ["0", "1"], rank=3), unit_plan(backbone, ["2.mlp"]), plan):
        record = evaluate(run, digits, plan=other, config=config)
        assert record.trials[0].trainable_parameters == other.trained_parameters
        after = values(backbone)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert present_ranks({clean_name(n): p for n, p in backbone.model.named_parameters()}) == plan.adapters
    with pytest.raises(UsageError, match=r"carries adapters already .*; load the backbone anew"):
        lp.bridge_train(backbone, digits, config=BRIDGE, output=tmp_path / "run")


@pytest.mark.parametrize("save", ["full", "trained"])
def test_a_run_under_adapters_loads_as_the_model_it_trained(
    folder: Path, digits: Any, tmp_path: Path, save: str
) -> None:
    backbone = load(folder)
    plan, base = lora(backbone, also=(2,)), values(backbone)
    run = lp.bridge_train(
        backbone, digits, plan=plan, config=BRIDGE.replace(save=save), output=tmp_path / "run"
    )
    drift = run.to_frame().query("metric == 'weight_change'").set_index("block")["value"]
    assert drift[0] == 0 and drift[1] > 0 and drift[2] > 0
    expected = features(backbone, digits)
    loaded = load(tmp_path / "run")
    torch.testing.assert_close(features(loaded, digits), expected, atol=1e-6, rtol=1e-5)
    remove_adapters(backbone.model, merge=True)
    merged, found = values(backbone), values(loaded)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-5)
        if name.startswith(("wte", "h.0.", "layers.0.", "embed")):
            assert torch.equal(tensor, base[name])
    assert loaded.source.revision != load(folder).source.revision
    kept = {path.name for path in (tmp_path / "run" / "final").iterdir()}
    assert "adapters.safetensors" in kept and (("backbone" in kept) == (save == "full"))


@pytest.mark.parametrize("save", ["full", "trained"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_continued_run_is_the_run_that_never_stopped(
    folder: Path,
    digits: Any,
    tmp_path: Path,
    save: str,
    adapters: bool,
    interrupt_after: Callable[[int], None],
) -> None:
    config = BRIDGE.replace(save=save, checkpoint_every=2)

    def train(where: str, **options: Any) -> Any:
        backbone = load(folder)
        plan = lora(backbone, also=(2,)) if adapters else block_plan(backbone, [2])
        lp.bridge_train(backbone, digits, plan=plan, config=config, output=tmp_path / where, **options)
        return backbone

    whole = values(train("whole"))
    interrupt_after(4)
    with pytest.raises(KeyboardInterrupt):
        train("cut")
    interrupt_after(0)
    continued = values(train("cut"))
    assert whole.keys() == continued.keys() and all(torch.equal(whole[n], continued[n]) for n in whole)


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Stop a bridge training after so many steps, as Ctrl-C does; 0: never."""
    from layerprobe.training import bridge

    record = bridge._Training._record

    def set_limit(limit: int) -> None:
        def stopping(self: Any, step: Any, bar: Any) -> None:
            record(self, step, bar)
            if limit and step.index + 1 == limit:
                monkeypatch.setattr(self, "_any_process", lambda _: True)

        monkeypatch.setattr(bridge._Training, "_record", stopping)

    return set_limit


def test_what_was_trained_is_small_and_names_its_base(folder: Path, digits: Any, tmp_path: Path) -> None:
    backbone = load(folder)
    plan, base = block_plan(backbone, [2]), backbone.source.revision
    lp.bridge_train(
        backbone, digits, plan=plan, config=BRIDGE.replace(save="trained"), output=tmp_path / "run"
    )
    run = json.loads((tmp_path / "run" / "layerprobe_run.json").read_text())
    assert run["base"] == {
        "name": str(folder), "model_id": "model", "revision": base, "origin": "local",
    }  # fmt: skip
    stored = sum(p.stat().st_size for p in (tmp_path / "run" / "final").glob("*.safetensors"))
    stem_and_head = sum(p.numel() for p in backbone.stem.parameters()) + 33 * 4
    assert stored < 4 * (plan.counts["trainable_parameters"] + stem_and_head) + 4000
    torch.testing.assert_close(
        features(load(tmp_path / "run"), digits), features(backbone, digits), atol=0, rtol=0
    )


def test_another_base_is_refused(folder: Path, digits: Any, tmp_path: Path) -> None:
    backbone = load(folder)
    lp.bridge_train(
        backbone,
        digits,
        plan=block_plan(backbone, [2]),
        config=BRIDGE.replace(save="trained"),
        output=tmp_path / "run",
    )
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(BrokenFileError, match="only the model it was trained on goes with what it keeps"):
        load(tmp_path / "run")
    folder.rename(tmp_path / "moved")
    with pytest.raises(NotAvailableError, match=r"keeps only what was trained of .*: there is no folder"):
        load(tmp_path / "run")


def test_a_base_that_cannot_be_found_again_is_refused_before_training(
    folder: Path, digits: Any, tmp_path: Path
) -> None:
    own = lp.load_backbone(load(folder).model, patch_size=4)
    with pytest.raises(
        UsageError, match=r"a base model that is found by name, but this one was handed over in memory"
    ):
        lp.bridge_train(own, digits, config=BRIDGE.replace(save="trained"), output=tmp_path / "a")
    control = lp.load_backbone(str(folder), device="cpu", patch_size=4, init="random")
    with pytest.raises(UsageError, match=r"this one is a control \(init 'random'\)"):
        lp.bridge_train(control, digits, config=BRIDGE.replace(save="trained"), output=tmp_path / "b")
    with pytest.raises(UsageError, match="save is one of full, trained, not 'some'"):
        BRIDGE.replace(save="some")
    adapted = peft.get_peft_model(load(folder).model, peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(UsageError, match="holds plain models, and this one carries adapters already"):
        lp.bridge_train(lp.load_backbone(adapted, patch_size=4), digits, config=BRIDGE, output=tmp_path / "c")
    assert not list(tmp_path.glob("[abc]/*"))

"""`freeze_search` end to end on a tiny random transformer and a tiny task, really trained."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import LlamaConfig, LlamaModel

import layerprobe as lp
from layerprobe.errors import PlanError, UnknownNameError, UsageError
from layerprobe.search import evaluator as evaluator_module
from layerprobe.search import run as run_module
from layerprobe.search.join import join_search
from layerprobe.search.settings import PRESETS, how_to_load, make_settings
from layerprobe.search.space import Trial
from layerprobe.search.trials import FINISHED, LOADING
from layerprobe.search.workers import gpu_of
from layerprobe.training import Outcome

FAST = {
    "budget": 8.0,
    "bridge_steps": 1,
    "finetune_steps": 2,
    "batch_size": 8,
    "lrs": (1e-3, 3e-3),
    "seeds": 2,
    "max_seeds": 2,
    "quiet": True,
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A two-block Llama of width 16, made from a configuration."""
    from transformers import LlamaConfig, LlamaModel

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def made_up(monkeypatch):
    """Replaces training by a formula, one second a full training, and leaves transfer scores out."""

    def train_and_score(backbone, tensors, plan, *, bridge, finetune, test, **_):
        lr, seed = finetune.lr, finetune.seed
        gain = 0.1 * plan.blocks[1] + 0.01 * sum(plan.blocks) - (0.2 if lr > 2e-3 else 0.0)
        accuracy = 0.5 + gain + 1e-3 * np.random.default_rng([seed, *map(int, plan.blocks)]).standard_normal()
        steps = bridge.steps + finetune.steps
        return Outcome(
            validation_accuracy=accuracy, test_accuracy=accuracy if test else None, bridge_accuracy=0.2,
            train_seconds=steps / 12, train_flops=1e9 * steps, steps=steps,
            trainable_parameters=plan.counts["trainable_parameters"], n_validation=20, n_test=10**6, lr=lr, seed=seed,
        )  # fmt: skip

    monkeypatch.setattr("layerprobe.search.evaluator.train_and_score", train_and_score)
    return {**FAST, "use_scores": False, "bridge_steps": 4, "finetune_steps": 8}


def parts(tiny_model: Path):
    task = lp.load_task("digits", limit=60)
    return lp.load_backbone(str(tiny_model), patch_size=4), task


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory):
    """A search that was really trained; the backbone comes back as it was."""
    folder = tmp_path_factory.mktemp("run")
    backbone, task = parts(tiny_model)
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    result = lp.freeze_search(backbone, task, output=folder, **FAST)
    assert all((p == before[name]).all() for name, p in backbone.model.named_parameters())
    return result, folder


def test_the_run_folder_holds_what_a_report_needs(finished) -> None:
    result, folder = finished
    search = json.loads((folder / "search.json").read_text())
    assert search["schema"] == "layerprobe.search/v1" and search["answer"] == result.answer
    assert search["provenance"]["arguments"]["budget"] == 8.0
    layers = pd.read_csv(folder / "layers.csv")
    assert list(layers["block"]) == [0, 1, 2]
    assert {"in_plan", "train_gain", "transfer_rgn", "transfer_logme"} <= set(layers.columns)
    assert list(layers["in_plan"].astype(bool)) == list(result.plan.blocks)
    for name in ("trials", "baselines", "plans"):
        assert len(pd.read_csv(folder / f"{name}.csv"))
    assert (folder / "study.db").exists()


def test_the_plan_file_carries_its_evidence_and_fits_the_model(finished, tiny_model: Path) -> None:
    result, folder = finished
    plan = lp.FreezePlan.load(folder / "plan.json")
    assert plan == result.plan
    assert plan.found["spent"] <= 8.0 and plan.found["split_hash"] == result.facts["split_hash"]
    assert plan.found["test_accuracy"]["n_seeds"] == 2
    backbone, _ = parts(tiny_model)
    plan.apply(backbone.model)


def test_selection_never_saw_the_test_split_and_the_report_uses_other_seeds(finished) -> None:
    trials = finished[0].trials
    selecting = trials[trials["repeat"] < 1000]
    reporting = trials[trials["repeat"] >= 1000]
    assert selecting["test_accuracy"].isna().all() and len(selecting)
    assert reporting["test_accuracy"].notna().all() and len(reporting)


def test_baselines_stand_at_equal_length_with_paired_differences(finished) -> None:
    baselines = finished[0].baselines.set_index("arm")
    assert {"plan", "all", "none", "norms", "first-half", "last-half", "probe", "pixels"} == set(
        baselines.index
    )
    per_seed = {
        arm: [float(v) for v in baselines.loc[arm, "test_per_seed"].split()] for arm in baselines.index
    }
    difference = sum(a - b for a, b in zip(per_seed["none"], per_seed["all"], strict=True)) / 2
    assert baselines.loc["none", "minus_all"] == pytest.approx(difference, abs=1e-6)
    assert baselines.loc["all", "trainable_parameters"] > baselines.loc["norms", "trainable_parameters"] > 0


def test_baselines_on_request_stand_beside_the_plan(tiny_model: Path, made_up, tmp_path: Path) -> None:
    asked = []
    train_and_score = evaluator_module.train_and_score

    def watched(*args, auto_rgn, **settings):
        asked.append(auto_rgn)
        return train_and_score(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator_module, "train_and_score", watched)
        backbone, task = parts(tiny_model)
        names = ("all", "auto-rgn", "greedy")
        found = lp.freeze_search(
            backbone, task, output=tmp_path, **{**made_up, "budget": 16.0, "baselines": names}
        )
    baselines = found.baselines.set_index("arm")
    assert set(baselines.index) == {"plan", "none", *names, "probe", "pixels"}
    assert baselines.loc["auto-rgn", "plan"] == "###+auto-rgn"
    # Two learning rates and two seeds of the report.
    assert sum(asked) == 4 and set(found.trials["plan"][found.trials["plan"].str.contains("rgn")]) == {
        "###+auto-rgn"
    }
    # The landscape gains most by block 1, which greedy selection cannot miss.
    assert baselines.loc["greedy", "plan"][1] == "#" and baselines.loc["greedy", "n_seeds"] == 2
    assert found.facts["spent"] <= 16.0


def test_a_log_says_how_long_it_takes_and_how_far_it_is(
    tiny_model: Path, made_up, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("layerprobe.progress.LINE_SECONDS", 0.0)
    backbone, task = parts(tiny_model)
    found = lp.freeze_search(backbone, task, **{**made_up, "quiet": False})
    said = capsys.readouterr().err
    assert re.search(
        r"^\w+ over 3 blocks: \S+ full trainings and a report of \S+, about \S+ (s|min)$", said, re.M
    )
    done, total = map(
        int, re.findall(r"^report: (\d+) of (\d+) trainings, about \d+ s left$", said, re.M)[-1]
    )
    assert 0 < done <= total <= len(found.trials)


def test_an_unknown_baseline_is_named_before_any_work(tiny_model: Path, made_up, monkeypatch) -> None:
    backbone, task = parts(tiny_model)
    monkeypatch.setattr("layerprobe.search.run.layer_scores", lambda *_a, **_k: pytest.fail("work began"))
    with pytest.raises(UnknownNameError, match=r"unknown baseline 'gredy'\. Did you mean 'greedy'"):
        lp.freeze_search(backbone, task, **{**made_up, "use_scores": True, "baselines": ("all", "gredy")})


def test_the_frame_is_tidy_and_the_summary_says_the_plan(finished) -> None:
    result, _ = finished
    frame = result.to_frame()
    assert {"test_accuracy", "train_gain", "in_plan"} <= set(frame["metric"])
    assert frame.loc[frame["value"].isna(), "reason"].notna().all()
    assert "Plan: " in result.summary() and result.answer in result.summary()


def test_a_second_call_trains_nothing_and_says_the_same(finished, tiny_model: Path, monkeypatch) -> None:
    result, folder = finished

    def forbidden(*_args, **_kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("layerprobe.search.evaluator.train_and_score", forbidden)
    monkeypatch.setattr(run_module, "layer_scores", forbidden)
    backbone, task = parts(tiny_model)
    again = lp.freeze_search(backbone, task, output=folder, **FAST)
    assert again.answer == result.answer and again.plan.blocks == result.plan.blocks
    pd.testing.assert_frame_equal(again.trials, result.trials)


def test_two_processes_find_the_same_plan_from_the_same_trials(
    finished, tiny_model: Path, tmp_path: Path
) -> None:
    result, _ = finished
    backbone, task = parts(tiny_model)
    both = lp.freeze_search(backbone, task, output=tmp_path, workers=2, **FAST)
    key = ["plan", "lr", "repeat", "fidelity"]
    one, two = (
        f.trials.sort_values(key, ignore_index=True)[[*key, "validation_accuracy"]] for f in (result, both)
    )
    pd.testing.assert_frame_equal(one[key], two[key])
    assert both.plan.blocks == result.plan.blocks


def test_other_arguments_in_the_same_folder_are_refused(finished, tiny_model: Path) -> None:
    backbone, task = parts(tiny_model)
    with pytest.raises(UsageError, match=r"holds another search \(budget 8.0 there, 9.0 here\)"):
        lp.freeze_search(backbone, task, output=finished[1], **{**FAST, "budget": 9.0})


def test_time_is_turned_into_a_budget_by_the_first_training(
    tiny_model: Path, made_up, tmp_path: Path
) -> None:
    backbone, task = parts(tiny_model)
    fast = {key: value for key, value in made_up.items() if key != "budget"}
    with pytest.raises(
        UsageError, match=r"time 5 s is too small for a search .* one training takes 1 s here"
    ):
        lp.freeze_search(backbone, task, time=5, **fast)
    found = lp.freeze_search(backbone, task, time=60, output=tmp_path, **fast)
    total = found.facts["spent"] + found.facts["report_cost"]
    assert 0 < total < 60, "search and report together stay within the time"
    with pytest.raises(UsageError, match=r"time 60.* there, 61.* here"):
        lp.freeze_search(backbone, task, time=61, output=tmp_path, **fast)


def test_the_block_that_helps_is_found_and_the_sentence_says_so(
    tiny_model: Path, made_up, tmp_path: Path
) -> None:
    backbone, task = parts(tiny_model)
    found = lp.freeze_search(
        backbone, task, output=tmp_path, **{**made_up, "budget": 16.0, "must_freeze": (0,)}
    )
    assert found.plan.blocks[1] and not found.plan.blocks[0]
    assert found.facts["plan"]["lr"] == 1e-3
    assert found.answer.startswith("Train block") and found.kind == "train these"
    nothing = lp.freeze_search(backbone, task, **{**made_up, "budget": 16.0, "must_freeze": (0, 1, 2)})
    assert nothing.answer.startswith("Train stem and head alone and freeze all blocks.")
    assert nothing.kind == "train none" and re.search(r"-1\d\.\d points against all", nothing.answer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 1.0}, "budget 1 is too small: training all blocks"),
        ({"budget": 9.0, "must_train": (7,)}, "block 7 does not exist: the backbone has 3 blocks"),
        ({"must_train": (0,), "must_freeze": (0,)}, "both must-freeze and must-train"),
        ({"strategy": "baye"}, "Did you mean 'bayes'"),
        ({"time": 5.0}, "not both"),
        ({"seeds": 1}, "at least 2 unseen seeds"),
        ({"keep_bridge": True}, "needs an output folder"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(
    tiny_model: Path, settings: dict, message: str
) -> None:
    backbone, task = parts(tiny_model)
    with pytest.raises((UsageError, PlanError), match=message):
        lp.freeze_search(backbone, task, **{**FAST, **settings})


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 1.0},
        {"baselines": ("all", "nosuch")},
        {"seeds": 1},
        {"lrs": (0.0,)},
        {"precision": "float7"},
        {"strategy": "exhaustive"},
    ],
)
def test_a_refused_search_leaves_the_folder_to_the_next(
    tiny_model: Path, made_up, tmp_path: Path, wrong
) -> None:
    backbone, task = parts(tiny_model)
    with pytest.raises((UsageError, UnknownNameError)):
        lp.freeze_search(backbone, task, output=tmp_path / "run", **{**made_up, **wrong})
    assert lp.freeze_search(backbone, task, output=tmp_path / "run", **made_up).plan


def test_presets_give_way_to_what_is_asked_for() -> None:
    assert make_settings("quickstart").budget == PRESETS["quickstart"]["budget"]
    assert make_settings("quickstart", budget=50.0).budget == 50.0
    assert make_settings("quickstart", time=60.0).budget is None
    with pytest.raises(UnknownNameError, match="Did you mean 'quickstart'"):
        make_settings("quickstat")


def test_the_chosen_plan_is_bridge_trained_on_request(tiny_model: Path, made_up, tmp_path: Path) -> None:
    backbone, task = parts(tiny_model)
    result = lp.freeze_search(backbone, task, output=tmp_path, keep_bridge=True, **made_up)
    trained = lp.load_backbone(str(tmp_path / "bridge"))
    before = dict(lp.load_backbone(str(tiny_model)).model.named_parameters())
    for name, parameter in trained.model.named_parameters():
        if name in result.plan.frozen:
            assert (parameter == before[name]).all()
    again, _ = parts(tiny_model)
    lp.freeze_search(again, task, output=tmp_path, keep_bridge=True, **made_up)
    # Another search in the same folder, its own database gone: the bridge there is of another plan or rate.
    (tmp_path / "study.db").unlink()
    with pytest.raises(UsageError, match="holds the bridge of another plan or learning rate"):
        lp.freeze_search(
            again,
            task,
            output=tmp_path,
            keep_bridge=True,
            **{**made_up, "lrs": (3e-4,), "must_train": (0, 1, 2)},
        )


def test_a_worker_takes_model_task_and_settings_from_the_database(
    tiny_model: Path, tmp_path: Path, made_up
) -> None:
    """It trains what waits until the search has its answer; in-memory models are refused, other data as well."""
    backbone, task = parts(tiny_model)
    database = tmp_path / "trials.db"
    given = {**made_up, "max_seeds": 3}
    del given["quiet"]
    runner = run_module.prepare(backbone, task, make_settings(None, **given), database)
    store = runner.store
    store.put(LOADING, how_to_load(backbone, task, None, given))
    waiting = [Trial(mask=(True, False, False), lr=lr, repeat=0) for lr in (1e-3, 3e-3)]
    for trial in waiting:
        store._enqueue(trial)
    other = LlamaModel(LlamaConfig.from_pretrained(tiny_model))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="holds another search"):
        join_search(database, model=str(tmp_path / "other"), workers=1, quiet=True)
    threading.Timer(3.0, store.put, (FINISHED, True)).start()
    assert join_search(database, workers=1, quiet=True) == 2
    assert {record.trial for record in store.records()} == set(waiting)
    store.close()
    lp.freeze_search(
        lp.load_backbone(LlamaModel.from_pretrained(tiny_model), patch_size=4), task,
        storage=tmp_path / "memory.db", **made_up,
    )  # fmt: skip
    with pytest.raises(UsageError, match="made in memory"):
        join_search(tmp_path / "memory.db", workers=1)


def test_each_process_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_of(1, 1) == {} and gpu_of(5, 4) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert [gpu_of(number, 2)["CUDA_VISIBLE_DEVICES"] for number in (0, 1, 2)] == ["3", "7", "3"]
